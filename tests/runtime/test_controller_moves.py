"""Suspend, resume, migrate, recover, drain: the controller's steps, answers that are late or missing, and restarts."""

from __future__ import annotations

import itertools

import pytest
from scripted_worker import ScriptedWorker
from test_controller_logic import CAPACITY, GATEWAY, MemoryStore, create, end, hello, make, sent, sid

from turboserve.orchestrator import plan as plans
from turboserve.orchestrator import view as views
from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import LAUNCHER, Drop, DropPoints, Effect, Send
from turboserve.runtime.controller_recovery import STRIKE_CHUNKS
from turboserve.session import SessionState

_ops = itertools.count(10_000)


class Cluster:
    """One controller, scripted workers on one node, and what the gateway hears. Messages wait until `settle`."""

    def __init__(self, *workers: str, store: MemoryStore | None = None, **options) -> None:
        self.store = store or MemoryStore()
        self.options = {"lease_s": 1000.0, **options}
        self.logic = make(store=self.store, **self.options)
        self.workers: dict[str, ScriptedWorker] = {}
        self.points: dict[str, int] = {}
        self.gateway: list[m.Message] = []
        self.launcher: list[m.FleetWish] = []
        self.dropped: list[str] = []
        self.now_s = 1.0
        self.epochs: dict[str, int] = {}
        for worker_id in workers:
            self.start(worker_id)
        self.settle()

    def start(self, worker_id: str) -> None:
        self.epochs[worker_id] = self.epochs.get(worker_id, 0) + 1
        self.workers[worker_id] = worker = ScriptedWorker(
            hello(worker_id, self.epochs[worker_id]), self.points, slots=CAPACITY
        )
        worker.connect()

    def kill(self, worker_id: str) -> None:
        del self.workers[worker_id]
        self.carry_out(self.logic.on_disconnect(worker_id, self.now_s))

    def restart_controller(self) -> None:
        self.logic = make(store=self.store, **self.options)
        self.logic.take_over(self.store.stored(), self.now_s, self.store.moves(), numerics=self.store.numerics)
        for worker in self.workers.values():
            worker.connect()

    def carry_out(self, effects: list[Effect]) -> None:
        for one in effects:
            if isinstance(one, DropPoints):
                self.dropped.append(one.session_id)
            elif isinstance(one, Send) and one.to == GATEWAY:
                self.gateway.append(one.message)
            elif isinstance(one, Send) and one.to == LAUNCHER:
                self.launcher.append(one.message)
            elif isinstance(one, Send) and one.to in self.workers:
                self.workers[one.to].heard.append(one.message)
            else:
                assert isinstance(one, Send | Drop) or one.session_id

    def tell(self, source: str, message: m.Message) -> m.OpDone | None:
        before = len(self.gateway)
        self.carry_out(self.logic.on_message(source, message, self.now_s))
        done = [one for one in self.gateway[before:] if isinstance(one, m.OpDone)]
        return done[-1] if done else None

    def admin(self, kind: str, **fields) -> m.OpDone:
        done = self.tell(GATEWAY, m.AdminCommand(op_id=next(_ops), kind=kind, **fields))
        assert done is not None
        return done

    def active(self, number: int, wanted: bool) -> None:
        self.tell(GATEWAY, m.SessionActivity(session_id=sid(number), active=wanted, attached=wanted))

    def step(self) -> bool:
        """Deliver one message each way; False when nothing was under way."""
        moved = False
        for worker_id, worker in list(self.workers.items()):
            if worker.said:
                moved = True
                self.carry_out(self.logic.on_message(worker_id, worker.said.pop(0), self.now_s))
            if worker.heard:
                moved = True
                worker.take(worker.heard.pop(0))
            if worker.stopped and not worker.said:
                del self.workers[worker_id]
                self.carry_out(self.logic.on_disconnect(worker_id, self.now_s))
        return moved

    def settle(self) -> None:
        for _ in range(1000):
            if not self.step():
                return
        raise AssertionError("the messages do not end")

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.25)):
            self.now_s += 0.25
            for worker in self.workers.values():
                worker.work()
            self.carry_out(self.logic.on_timer(self.now_s))
            self.settle()

    def state(self, number: int) -> SessionState:
        return self.logic.sessions[sid(number)].record.state

    def owner(self, number: int) -> str | None:
        return self.logic.sessions[sid(number)].record.owner

    def check(self) -> None:
        """Records, directory, view and workers agree."""
        logic = self.logic
        assert set(self.store.rows) == set(logic.sessions) == {one.id for one in logic.view.open_sessions()}
        for key, live in logic.sessions.items():
            epoch, owner, state = self.store.rows[key][:3]
            record = live.record
            assert (epoch, owner) == (record.epoch, record.owner)
            memory_only = {SessionState.RUNNING, SessionState.STALLED}
            assert state is record.state or {state, record.state} <= memory_only, (state, record.state)
            assert (live.move is not None) == (
                record.owner is not None and state not in memory_only | {SessionState.CLOSING}
            ) or live.adopt_by_s is not None, (record, live.move)
            shown = logic.view.session(live.row)
            if record.state in memory_only and live.adopt_by_s is None:
                assert shown.state == "held" and logic.view.workers.ids[shown.worker] == owner
            if owner is None:
                assert shown.worker is None and shown.target is None
            elif live.adopt_by_s is None:
                assert owner in logic.workers
        owners = [
            (key, held.epoch, name)
            for name, worker in self.workers.items()
            for key, held in worker.held.items()
            if not held.stopped_by
        ]
        for key, epoch, name in owners:
            live = logic.sessions.get(key)
            if live is not None and live.record.epoch == epoch:
                assert live.record.owner == name or live.record.owner is None, "two owners of one epoch"


def running(*workers: str, sessions: int = 1, **options) -> Cluster:
    cluster = Cluster(*workers, **options)
    for number in range(1, sessions + 1):
        cluster.tell(GATEWAY, create(number))
    cluster.settle()
    cluster.wait(1.0)
    assert all(cluster.state(number) is SessionState.RUNNING for number in range(1, sessions + 1))
    cluster.gateway.clear()
    return cluster


def heard(cluster: Cluster, kind: type[m.Message]) -> list:
    return [one for one in cluster.gateway if isinstance(one, kind)]


# ---------------------------------------------------------------- suspend and resume


def test_suspended_until_it_is_wanted_and_then_resumed_where_it_was():
    cluster = running("w0")
    cluster.active(1, False)
    assert cluster.admin("suspend", session_id=sid(1)).state == "suspended"
    told = heard(cluster, m.SessionState)[-1]
    assert (told.state, told.owned) == ("suspended", False)
    cluster.settle()
    assert (cluster.state(1), cluster.owner(1)) == (SessionState.HOST, None)
    assert not cluster.workers["w0"].held and cluster.logic.view.session(0).state == "host"
    made = cluster.points[sid(1)]
    cluster.active(1, True)
    assert cluster.state(1) is SessionState.RESUMING
    cluster.settle()
    placed = heard(cluster, m.SessionPlaced)[-1]
    assert (placed.worker_id, placed.next_index, cluster.state(1)) == ("w0", made, SessionState.RUNNING)
    assert cluster.logic.view.profile.offload_s == cluster.logic.view.profile.resume_s == 0.0
    cluster.check()


def test_a_worker_that_keeps_it_goes_on_under_a_new_epoch():
    cluster = running("w0")
    cluster.active(1, False)
    cluster.admin("suspend", session_id=sid(1))
    cluster.workers["w0"].heard.clear()
    kept = m.SessionKept(session_id=sid(1), epoch=1, code="arena_full", message="no room for the copy")
    cluster.tell("w0", kept)
    cluster.settle()
    assert (cluster.state(1), cluster.logic.sessions[sid(1)].record.epoch) == (SessionState.STALLED, 2)
    assert heard(cluster, m.SessionPlaced)[-1].epoch == 2
    cluster.check()


def test_no_answer_to_suspend_ends_in_a_new_epoch_whatever_the_worker_did():
    """The worker suspended and its answer is lost: it opens what it has in the arena."""
    cluster = running("w0", move_deadline_s=2.0)
    cluster.admin("suspend", session_id=sid(1))
    worker = cluster.workers["w0"]
    worker.take(worker.heard.pop(0))
    (lost,) = worker.said
    worker.said.clear()
    cluster.wait(3.0)
    assert cluster.state(1) is SessionState.RUNNING and cluster.logic.sessions[sid(1)].record.epoch == 2
    before = len(cluster.gateway)
    cluster.tell("w0", lost)
    assert cluster.state(1) is SessionState.RUNNING and not heard(cluster, m.SessionPlaced)[before:]
    cluster.check()


# ---------------------------------------------------------------- migrate


def test_migrate_changes_the_owner_once_and_frees_the_source_last():
    cluster = running("w0", "w1")
    source = cluster.owner(1)
    target = "w1" if source == "w0" else "w0"
    assert cluster.admin("migrate", session_id=sid(1), worker_id=target).state == "migrating"
    shown = cluster.logic.view.session(0)
    assert shown.state == "migrating" and cluster.logic.view.workers.ids[shown.target] == target
    assert heard(cluster, m.SessionState)[-1].owned, "the source goes on while the target prepares"
    cluster.settle()
    assert (cluster.owner(1), cluster.state(1)) == (target, SessionState.RUNNING)
    assert not cluster.workers[source].held and sid(1) in cluster.workers[target].held
    assert not cluster.workers[target].prepared
    placed = heard(cluster, m.SessionPlaced)
    assert [(one.worker_id, one.epoch) for one in placed] == [(target, 2)]
    assert not cluster.logic.view.workers.inbound.any() and not cluster.logic.view.workers.outbound.any()
    cluster.check()


def test_a_full_target_refuses_and_nothing_has_happened():
    cluster = running("w0", "w1")
    target = "w1" if cluster.owner(1) == "w0" else "w0"
    cluster.workers[target].slots = 0
    cluster.admin("migrate", session_id=sid(1), worker_id=target)
    cluster.settle()
    assert cluster.state(1) is SessionState.RUNNING and cluster.logic.sessions[sid(1)].record.epoch == 1
    assert heard(cluster, m.SessionState)[-1].owned and not heard(cluster, m.SessionPlaced)
    cluster.check()


def steps_of_a_migration() -> list[int]:
    cluster = running("w0", "w1")
    target = "w1" if cluster.owner(1) == "w0" else "w0"
    cluster.admin("migrate", session_id=sid(1), worker_id=target)
    count = 0
    while cluster.step():
        count += 1
    return list(range(count + 1))


@pytest.mark.parametrize("victim", ["source", "target", "controller", "silent source", "silent target"])
@pytest.mark.parametrize("at", steps_of_a_migration())
def test_a_migration_that_is_cut_at_any_step_ends_with_one_owner(victim: str, at: int):
    cluster = running("w0", "w1", move_deadline_s=2.0)
    source = cluster.owner(1)
    target = "w1" if source == "w0" else "w0"
    cluster.admin("migrate", session_id=sid(1), worker_id=target)
    for _ in range(at):
        cluster.step()
    made = cluster.points[sid(1)]
    if victim == "controller":
        cluster.restart_controller()
        cluster.logic.lease_s = 1000.0
        cluster.active(1, True)
    elif victim in ("source", "target"):
        cluster.kill(source if victim == "source" else target)
    else:  # one message of it is lost
        worker = cluster.workers[source if victim == "silent source" else target]
        worker.said[:1] = []
    cluster.settle()
    cluster.wait(4.0)
    cluster.now_s += cluster.logic.lease_s + 2.0 if victim == "controller" else 0.0
    for worker in cluster.logic.workers.values():
        worker.lease_until_s = cluster.now_s + 1000.0
    cluster.wait(3.0)
    cluster.check()
    assert cluster.state(1) is SessionState.RUNNING
    owner = cluster.owner(1)
    assert cluster.workers[owner].held[sid(1)].next_index > made, "it goes on from its recovery point"
    others = [worker for name, worker in cluster.workers.items() if name != owner]
    assert all(not worker.held and not worker.prepared for worker in others), "no copy and no slot is left behind"
    assert not cluster.logic.view.workers.inbound.any() and not cluster.logic.view.workers.outbound.any()


def test_a_session_that_ends_in_mid_move_leaves_nothing():
    for at in steps_of_a_migration():
        cluster = running("w0", "w1")
        target = "w1" if cluster.owner(1) == "w0" else "w0"
        cluster.admin("migrate", session_id=sid(1), worker_id=target)
        for _ in range(at):
            cluster.step()
        cluster.tell(GATEWAY, end(1))
        cluster.settle()
        assert not cluster.logic.sessions and cluster.dropped == [sid(1)]
        assert not any(worker.held or worker.prepared for worker in cluster.workers.values())


# ---------------------------------------------------------------- recover


def test_all_sessions_of_a_lost_worker_go_on_elsewhere_in_the_same_event():
    cluster = running("w0", sessions=2)
    cluster.start("w1")
    cluster.settle()
    cluster.kill("w0")
    opened = [one for one in cluster.workers["w1"].heard if isinstance(one, m.OpenSession)]
    assert [one.session_id for one in opened] == [sid(1), sid(2)] and all(one.restore for one in opened)
    cluster.settle()
    assert [cluster.state(number) for number in (1, 2)] == [SessionState.RUNNING] * 2
    cluster.check()


def test_without_room_the_watched_wait_and_the_others_lie_in_host_memory():
    cluster = running("w0", sessions=2)
    cluster.active(2, False)
    cluster.kill("w0")
    assert (cluster.state(1), cluster.state(2)) == (SessionState.RECOVERING, SessionState.HOST)
    cluster.wait(300.0)
    assert cluster.state(1) is SessionState.RECOVERING, "lack of room fails nobody"
    cluster.start("w0")
    cluster.settle()
    assert (cluster.state(1), cluster.state(2)) == (SessionState.RUNNING, SessionState.HOST)
    cluster.active(2, True)
    cluster.settle()
    assert cluster.state(2) is SessionState.RUNNING
    cluster.check()


def test_a_broken_session_is_tried_once_more_elsewhere_then_it_fails():
    cluster = running("w0", "w1")
    first = cluster.owner(1)
    at = cluster.logic.sessions[sid(1)].next_index
    broken = {"session_id": sid(1), "chunk_index": at, "code": "session_poisoned", "message": "not finite"}
    cluster.tell(first, m.SessionBroken(epoch=1, **broken))
    cluster.settle()
    assert cluster.state(1) is SessionState.RUNNING and cluster.owner(1) != first
    epoch = cluster.logic.sessions[sid(1)].record.epoch
    cluster.tell(cluster.owner(1), m.SessionBroken(epoch=epoch, **broken))
    told = heard(cluster, m.SessionState)[-1]
    assert (told.state, told.code) == ("failed", "session_poisoned")
    cluster.settle()
    assert not any(worker.held for worker in cluster.workers.values())


def beat(cluster: Cluster, worker_id: str) -> None:
    worker = cluster.workers[worker_id]
    figures = dict.fromkeys(
        ("active", "resident", "slots_free", "busy_share", "chunk_latency_ms", "batch_size_mean", "chunks", "passes"), 0
    )
    progress = {key: held.next_index for key, held in worker.held.items()}
    epoch = worker.hello.worker_epoch
    cluster.tell(
        worker_id,
        m.Heartbeat(worker_id=worker_id, worker_epoch=epoch, device_bytes=0, progress=progress, **figures),
    )


def test_a_session_that_kills_two_workers_is_quarantined_and_its_neighbours_are_not():
    cluster = running("w0", sessions=2)
    cluster.active(2, False)  # only session 1 is at work
    for name in ("w1", "w2"):
        cluster.start(name)
    cluster.settle()
    cluster.kill("w0")
    cluster.settle()
    cluster.active(2, True)
    cluster.settle()
    assert cluster.logic.sessions[sid(1)].record.strikes == 1
    cluster.kill(cluster.owner(1))
    failed = [one for one in heard(cluster, m.SessionState) if one.state == "failed"]
    assert [(one.session_id, one.code) for one in failed] == [(sid(1), "session_poisoned")]
    cluster.settle()
    assert cluster.state(2) is SessionState.RUNNING


def test_good_chunks_clear_a_session_of_suspicion():
    cluster = running("w0")
    for name in ("w1", "w2"):
        cluster.start(name)
    cluster.settle()
    cluster.kill("w0")
    cluster.settle()
    cluster.wait(0.25 * (STRIKE_CHUNKS + 1))
    beat(cluster, cluster.owner(1))
    assert cluster.logic.sessions[sid(1)].record.strikes == 0
    cluster.kill(cluster.owner(1))
    cluster.settle()
    assert cluster.state(1) is SessionState.RUNNING


def test_two_that_died_together_twice_are_kept_apart_until_one_is_found_out():
    cluster = running("w0", sessions=2)
    cluster.start("w1")
    cluster.settle()
    cluster.kill("w0")
    cluster.settle()
    assert cluster.owner(1) == cluster.owner(2) == "w1", "with one worker left they stay together at first"
    cluster.kill("w1")
    assert len(cluster.logic.sessions) == 2, "nobody knows which it was"
    cluster.start("w2")
    cluster.settle()
    held = [cluster.owner(1), cluster.owner(2)]
    assert sorted(held, key=str) == [None, "w2"], "never together again"
    cluster.kill("w2")
    assert len(cluster.logic.sessions) == 1
    for name in ("w3", "w4"):
        cluster.start(name)
    cluster.settle()
    (left,) = cluster.logic.sessions.values()
    assert left.record.state is SessionState.RUNNING


def test_an_operator_who_kills_a_worker_makes_no_suspects():
    cluster = running("w0")
    cluster.admin("kill_worker", worker_id="w0")
    (wish,) = cluster.launcher
    assert (wish.kind, wish.worker_id) == ("kill", "w0")
    cluster.kill("w0")
    assert cluster.logic.sessions[sid(1)].record.strikes == 0


def test_a_session_moves_only_to_a_worker_that_makes_the_same_bits():
    cluster = running("w0")
    cluster.start("w1")
    other = cluster.workers["w1"]
    fields = {name: getattr(other.hello, name) for name in other.hello.__struct_fields__} | {"numerics_id": "other"}
    other.hello = m.WorkerHello(**fields)
    other.connect()
    cluster.settle()
    assert cluster.admin("migrate", session_id=sid(1), worker_id="w1").code == "conflict"
    cluster.kill("w0")
    cluster.settle()
    assert cluster.state(1) is SessionState.RECOVERING and not other.held
    cluster.start("w2")
    cluster.settle()
    assert (cluster.owner(1), cluster.state(1)) == ("w2", SessionState.RUNNING)


def with_another_kind(sessions: int = 1) -> Cluster:
    """Sessions on w0; w1 makes other bits."""
    cluster = running("w0", sessions=sessions)
    start_another_kind(cluster)
    return cluster


def start_another_kind(cluster: Cluster) -> None:
    cluster.start("w1")
    other = cluster.workers["w1"]
    fields = {name: getattr(other.hello, name) for name in other.hello.__struct_fields__} | {"numerics_id": "other"}
    other.hello = m.WorkerHello(**fields)
    other.connect()
    cluster.settle()


def placed_last(cluster: Cluster) -> m.SessionPlaced:
    return heard(cluster, m.SessionPlaced)[-1]


def test_told_so_a_session_goes_on_in_other_bits_and_says_so():
    cluster = with_another_kind()
    refused = cluster.admin("migrate", session_id=sid(1), worker_id="w1")
    assert refused.code == "conflict" and "allow_approximate" in refused.message and "num" in refused.message
    assert cluster.admin("migrate", session_id=sid(1), worker_id="w1", allow_approximate=True).state == "migrating"
    cluster.settle()
    assert (cluster.owner(1), cluster.state(1)) == ("w1", SessionState.RUNNING)
    placed = placed_last(cluster)
    assert (placed.numerics_id, placed.continuity) == ("other", "approximate")
    assert cluster.store.numerics[sid(1)] == ("other", placed.next_index)
    assert "approximate" in {one["event"] for one in cluster.logic.decisions}
    cluster.restart_controller()
    cluster.settle()
    assert cluster.owner(1) == "w1" and placed_last(cluster).continuity == "approximate", "the chunk is not made yet"
    cluster.active(1, True)
    cluster.kill("w1")
    cluster.wait(1.0)
    assert cluster.state(1) is SessionState.RECOVERING, "back in the old bits it would change once more"
    cluster.check()


def test_a_session_without_a_change_of_bits_does_not_say_so():
    cluster = running("w0", "w1")
    assert all(one.continuity == "" for one in heard(cluster, m.SessionPlaced))
    target = "w1" if cluster.owner(1) == "w0" else "w0"
    cluster.admin("migrate", session_id=sid(1), worker_id=target, allow_approximate=True)
    cluster.settle()
    assert placed_last(cluster).continuity == "" and cluster.store.numerics[sid(1)] == ("num", -1)


def test_after_a_loss_in_the_middle_it_is_not_made_in_other_bits():
    cluster = with_another_kind()
    cluster.admin("migrate", session_id=sid(1), worker_id="w1", allow_approximate=True)
    cluster.kill("w0")
    cluster.settle()
    assert cluster.state(1) is SessionState.RECOVERING and cluster.owner(1) is None
    assert not cluster.workers["w1"].held


@pytest.mark.parametrize("suspended", [True, False])
def test_one_that_waits_for_workers_that_are_gone_for_good_may_be_let_go_on(suspended):
    cluster = running("w0")
    if suspended:
        cluster.active(1, False)
        cluster.admin("suspend", session_id=sid(1))
        cluster.settle()
    cluster.kill("w0")
    start_another_kind(cluster)
    cluster.active(1, True)
    cluster.wait(1.0)
    assert cluster.owner(1) is None, "it waits for the same bits"
    done = cluster.admin("migrate", session_id=sid(1), worker_id="w1", allow_approximate=True)
    assert done.code == ""
    cluster.settle()
    assert (cluster.owner(1), cluster.state(1)) == ("w1", SessionState.RUNNING)
    assert placed_last(cluster).continuity == "approximate"


# ---------------------------------------------------------------- drain, stop, fleet


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
