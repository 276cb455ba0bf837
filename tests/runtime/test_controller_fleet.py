"""Workers drained, stopped and asked for; controllers and gateways that start anew."""

from __future__ import annotations

import msgspec
import pytest
from controller_harness import Cluster, _ops, heard, running
from test_controller_logic import GATEWAY, create, hello, sent, sid

from turboserve.orchestrator import plan as plans
from turboserve.orchestrator import view as views
from turboserve.orchestrator.scheduler import Memory, TickConfig, tick
from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import LAUNCHER
from turboserve.session import SessionState


def migrate_off_draining(view: views.ClusterView, memory: object, now_s: float):
    """Moves one session off each draining worker to the first ready one."""
    actions: list[plans.Action] = []
    ready = [row for row in range(view.workers.count) if view.workers.state[row] == views.READY]
    for session in view.open_sessions():
        if session.state == "held" and view.workers.state[session.worker] == views.DRAINING and ready:
            if view.workers.outbound[session.worker] or actions:
                continue
            source, target = view.workers.ids[session.worker], view.workers.ids[ready[0]]
            actions.append(plans.Migrate(session.id, source, target, "drains"))
        elif session.state == "new" and session.active and ready:
            actions.append(plans.Place(session.id, view.workers.ids[ready[0]], "first"))
    return plans.Plan(tuple(actions)), memory


def test_a_drained_worker_is_emptied_by_migration_and_then_stopped():
    cluster = running("w0", sessions=2)
    cluster.start("w1")
    cluster.settle()
    cluster.logic._decide = migrate_off_draining
    assert cluster.admin("drain", worker_id="w0").message == "2 sessions left"
    worker = cluster.workers["w0"]
    cluster.settle()
    assert worker.stopped and not worker.held
    assert [cluster.owner(number) for number in (1, 2)] == ["w1", "w1"]
    assert not [one for one in heard(cluster, m.SessionState) if one.state == "failed"]
    cluster.check()


def test_a_worker_that_ends_without_room_elsewhere_leaves_its_sessions_in_host_memory():
    cluster = running("w0", sessions=2)
    worker = cluster.workers["w0"]
    cluster.tell("w0", m.WorkerLeaving(worker_id="w0", worker_epoch=1))
    cluster.wait(6.0)
    assert worker.stopped and not worker.held
    assert [cluster.state(number) for number in (1, 2)] == [SessionState.HOST] * 2
    cluster.start("w1")
    cluster.settle()
    assert [cluster.state(number) for number in (1, 2)] == [SessionState.RUNNING] * 2


def test_a_worker_told_twice_to_end_leaves_its_sessions_on_disk():
    cluster = running("w0", sessions=2)
    worker = cluster.workers["w0"]
    cluster.tell("w0", m.WorkerLeaving(worker_id="w0", worker_epoch=1))
    cluster.tell("w0", m.WorkerLeaving(worker_id="w0", worker_epoch=1, at_once=True))
    cluster.settle()
    assert worker.stopped and not worker.held, "no time has passed"
    assert [cluster.state(number) for number in (1, 2)] == [SessionState.SPILLING] * 2
    for number in (1, 2):
        cluster.carry_out(cluster.logic.spilled(sid(number), 4096, cluster.now_s))
    assert [cluster.state(number) for number in (1, 2)] == [SessionState.DISK] * 2
    assert not any(live.record.strikes for live in cluster.logic.sessions.values())
    cluster.start("w1")
    cluster.settle()
    assert [cluster.state(number) for number in (1, 2)] == [SessionState.RUNNING] * 2


def test_a_server_told_twice_to_end_takes_away_what_no_worker_answers_for():
    cluster = running("w0", "w1", sessions=2)
    deaf = cluster.workers[cluster.owner(1)]
    cluster.tell(LAUNCHER, m.FleetEvent(worker_id="", kind="stopping"))
    cluster.tell(LAUNCHER, m.FleetEvent(worker_id="", kind="stopping_now"))
    deaf.heard.clear()  # it never hears that it is to suspend
    cluster.settle()
    assert cluster.state(1) is SessionState.OFFLOADING
    cluster.wait(1.0)
    assert cluster.state(1) is SessionState.OFFLOADING
    cluster.wait(1.0)
    assert cluster.state(1) is SessionState.SPILLING and cluster.owner(1) is None
    cluster.carry_out(cluster.logic.spilled(sid(1), 4096, cluster.now_s))
    cluster.carry_out(cluster.logic.spilled(sid(2), 0, cluster.now_s, "full"))
    cluster.settle()
    assert cluster.logic.stopped and cluster.logic.not_on_disk() == [sid(2)]
    assert deaf.stopped


def test_a_server_that_stops_puts_everything_on_disk_and_stops_the_workers():
    cluster = running("w0", "w1", sessions=2)
    workers = list(cluster.workers.values())
    cluster.tell(LAUNCHER, m.FleetEvent(worker_id="", kind="stopping"))
    cluster.settle()
    assert [cluster.state(number) for number in (1, 2)] == [SessionState.SPILLING] * 2 and not cluster.logic.stopped
    for number in (1, 2):
        cluster.carry_out(cluster.logic.spilled(sid(number), 4096, cluster.now_s))
    cluster.settle()
    assert cluster.logic.stopped and all(worker.stopped for worker in workers)
    again = Cluster("w0", store=cluster.store)
    again.points.update(cluster.points)
    again.restart_controller()
    again.settle()
    assert [again.state(number) for number in (1, 2)] == [SessionState.DISK] * 2
    again.tell(GATEWAY, create(1, op_id=next(_ops)))
    again.active(1, True)
    again.settle()
    assert again.state(1) is SessionState.RUNNING


def test_adoption_changes_no_epoch():
    cluster = running("w0", sessions=2, lease_s=2.0)
    cluster.restart_controller()
    cluster.settle()
    for number in (1, 2):
        live = cluster.logic.sessions[sid(number)]
        assert live.record.epoch == 1 and live.adopt_by_s is None
        assert live.record.state is SessionState.STALLED, "nobody has said yet that it is watched"
    cluster.active(1, True)
    assert cluster.state(1) is SessionState.RUNNING
    assert cluster.tell(GATEWAY, create(3)).code == ""
    cluster.check()


def test_an_owner_that_does_not_come_is_given_up_after_the_lease():
    cluster = running("w0", lease_s=2.0)
    cluster.workers.clear()
    cluster.restart_controller()
    cluster.active(1, True)
    cluster.start("w1")
    cluster.settle()
    assert cluster.owner(1) == "w0", "it may still come"
    cluster.now_s += 2.9
    cluster.carry_out(cluster.logic.on_message("w1", cluster.workers["w1"].hello, cluster.now_s))
    assert cluster.owner(1) == "w0"
    cluster.logic.workers["w1"].lease_until_s = cluster.now_s + 1000.0
    cluster.now_s += 0.2
    cluster.carry_out(cluster.logic.on_timer(cluster.now_s))
    cluster.settle()
    assert (cluster.owner(1), cluster.state(1)) == ("w1", SessionState.RUNNING)
    cluster.check()


def test_a_wish_repeated_to_the_next_controller_is_answered_not_refused():
    cluster = Cluster("w0")
    asked = create(1)
    cluster.tell(GATEWAY, asked)
    cluster.restart_controller()
    done = cluster.tell(GATEWAY, asked)
    assert done.code == "" and len(cluster.logic.sessions) == 1


def test_a_gateway_that_was_restarted_keeps_its_sessions():
    cluster = running("w0")
    asked = create(1)
    asked = m.CreateSession(**{name: getattr(asked, name) for name in asked.__struct_fields__} | {"adopt": True})
    assert cluster.tell(GATEWAY, asked).code == ""
    assert (heard(cluster, m.SessionPlaced)[-1].epoch, cluster.state(1)) == (1, SessionState.RUNNING)


def test_a_wish_for_workers_that_the_next_controller_hears_again_is_the_same_requests():
    cluster = running("w0")
    op_id = next(_ops)
    asked = m.AdminCommand(op_id=op_id, kind="add_workers", count=2)
    first = cluster.tell(GATEWAY, asked)
    requests = [(one.request_id, one.worker_id) for one in cluster.launcher]
    cluster.restart_controller()
    cluster.logic.generation += 1
    cluster.settle()
    again = cluster.tell(GATEWAY, asked)
    assert (again.state, again.message) == (first.state, first.message)
    assert [(one.request_id, one.worker_id) for one in cluster.launcher] == 2 * requests
    assert set(cluster.logic.expected) == {"w1", "w2"}
    # One of them has come and gone meanwhile; the launcher says so.
    cluster.tell(LAUNCHER, m.FleetEvent(worker_id="w1", kind="exited", request_id=requests[0][0]))
    assert set(cluster.logic.expected) == {"w2"}
    cluster.admin("add_workers", count=1)
    assert cluster.launcher[-1].request_id not in dict(requests), "another wish is another request"


def test_workers_are_asked_for_counted_and_released():
    cluster = running("w0")
    done = cluster.admin("add_workers", count=2)
    assert (done.state, done.message) == ("starting", "w1, w2")
    assert [(one.kind, one.worker_id) for one in cluster.launcher] == [("add", "w1"), ("add", "w2")]
    assert len({one.request_id for one in cluster.launcher}) == 2
    states = [one.state for one in cluster.logic.view.present_workers()]
    assert states == ["ready", "starting", "starting"]
    cluster.now_s += 4.0
    cluster.start("w1")
    cluster.settle()
    cluster.logic._release(plans.ReleaseWorker("w2", "not needed"), cluster.now_s)
    cluster.carry_out(cluster.logic._flush())
    assert cluster.launcher[-1].kind == "remove" and "w2" not in cluster.logic.expected
    cluster.tell(LAUNCHER, m.FleetEvent(worker_id="w1", kind="backing_off", reason="exit 9"))
    assert len(list(cluster.logic.view.present_workers())) == 2, "a worker that is here is not counted twice"
    assert sent(cluster.logic.on_message("w0", m.FleetEvent(worker_id="w0", kind="exited"), 9.0), m.Message) == []


def test_a_worker_that_is_asked_for_gets_no_id_of_one_that_was_cut_off_and_lives():
    cluster = running("w0", "w1", local=True)
    for worker_id in ("w0", "w1"):
        cluster.tell(LAUNCHER, m.FleetEvent(worker_id=worker_id, kind="started"))
    cluster.kill("w1")  # its connection is gone; the launcher says nothing, because its process lives
    assert "w1" not in cluster.logic.workers
    assert cluster.admin("add_workers", count=1).message == "w2", "the launcher would find w1 there, and start none"
    assert cluster.logic.view.workers_max == 3, "the one that was cut off is of the fleet"
    cluster.start("w1")
    cluster.start("w2")
    cluster.settle()
    assert set(cluster.logic.workers) == {"w0", "w1", "w2"} and not cluster.logic.expected


def test_an_id_is_free_again_once_its_process_has_ended():
    cluster = running("w0", "w1", local=True)
    for worker_id in ("w0", "w1"):
        cluster.tell(LAUNCHER, m.FleetEvent(worker_id=worker_id, kind="started"))
    cluster.kill("w1")
    cluster.tell(LAUNCHER, m.FleetEvent(worker_id="w1", kind="exited"))
    assert cluster.admin("add_workers", count=1).message == "w1"


def test_the_id_of_a_joined_worker_is_not_given_to_another_one():
    cluster = running("w0")
    cluster.start("j1")
    joined = cluster.workers["j1"].hello
    cluster.tell("w1", msgspec.structs.replace(joined, worker_id="w1"))
    cluster.carry_out(cluster.logic.on_disconnect("w1", cluster.now_s))
    assert cluster.admin("add_workers", count=1).message == "w2"


def test_an_id_that_a_scale_hook_was_asked_for_is_free_again_once_its_process_has_ended():
    cluster = running("w0")
    assert cluster.admin("add_workers", count=1).message == "w1"
    cluster.tell(LAUNCHER, m.FleetEvent(worker_id="w1", kind="started"))
    cluster.start("j1")
    comes = msgspec.structs.replace(cluster.workers["j1"].hello, worker_id="w1")  # over the network, from elsewhere
    cluster.tell("w1", comes)
    cluster.carry_out(cluster.logic.on_disconnect("w1", cluster.now_s))
    cluster.tell(LAUNCHER, m.FleetEvent(worker_id="w1", kind="exited"))
    assert cluster.admin("add_workers", count=1).message == "w1"


def reduced_by_an_earlier_controller() -> tuple[Cluster, m.CreateSession]:
    """A session on half its steps, its controller killed; and what the gateway says of it to the next one."""
    cluster = running("w0", steps_floor=2)
    cluster.logic._carry_out(plans.SetSteps(sid(1), 2, "overload"), cluster.now_s)
    cluster.carry_out(cluster.logic._flush())
    assert heard(cluster, m.SetSteps) == [m.SetSteps(session_id=sid(1), steps=2)]
    cluster.gateway.clear()
    return cluster, msgspec.structs.replace(create(1), adopt=True, steps_now=2)


def test_a_controller_that_starts_learns_who_runs_on_reduced_steps_and_restores_them():
    cluster, asked = reduced_by_an_earlier_controller()
    cluster.restart_controller()
    cluster.logic._decide = lambda view, memory, now_s: tick(view, memory, now_s, TickConfig(scale=False))
    cluster.logic._memory = Memory()
    cluster.settle()
    cluster.tell(GATEWAY, asked)
    cluster.wait(1.0)
    assert heard(cluster, m.SetSteps) == [m.SetSteps(session_id=sid(1), steps=4)]
    assert cluster.logic.view.session(cluster.logic.sessions[sid(1)].row).steps == 4


def test_a_session_that_is_opened_anew_keeps_its_full_steps():
    cluster, asked = reduced_by_an_earlier_controller()
    cluster.store.rows.clear()
    cluster.store.requests.clear()
    cluster.restart_controller()
    cluster.tell(GATEWAY, asked)
    live = cluster.logic.sessions[sid(1)]
    shown = cluster.logic.view.sessions
    assert (live.record.steps, shown.steps_full[live.row], shown.steps[live.row]) == (4, 4, 2)


def test_a_gateway_that_missed_a_change_of_steps_hears_it_again():
    cluster, asked = reduced_by_an_earlier_controller()
    cluster.tell(GATEWAY, msgspec.structs.replace(asked, steps_now=4))
    assert heard(cluster, m.SetSteps) == [m.SetSteps(session_id=sid(1), steps=2)]
    cluster.gateway.clear()
    cluster.tell(GATEWAY, msgspec.structs.replace(asked, op_id=next(_ops)))
    assert heard(cluster, m.SetSteps) == [], "it has heard it"


@pytest.mark.parametrize(("two_s", "fits"), [(1.0, 2), (1.00002, 2), (1.01, 1)])
def test_as_many_sessions_are_put_on_a_worker_as_it_can_make_in_time(two_s: float, fits: int):
    """Of a chunk target of 1 s; what is above it by rounding alone is not too long."""
    cluster = Cluster()
    said = msgspec.structs.replace(hello("w0"), batch_latency_s=(0.5, two_s))
    cluster.tell("w0", said)
    assert cluster.logic.view.profile.capacity == fits
