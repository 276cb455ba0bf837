"""Suspend, resume, migrate, recover: the controller's steps, and answers that are late or missing."""

from __future__ import annotations

import pytest
from controller_harness import Cluster, heard, running
from test_controller_logic import GATEWAY, end, sid

from turboserve.runtime import messages as m
from turboserve.session import SessionState

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


@pytest.mark.parametrize("watched", [False, True])
def test_what_a_worker_has_is_not_resumed_and_its_viewers_wish_stands(watched):
    """Else the scheduler would count a viewer that is not there: the gateway says only what changes."""
    cluster = running("w0")
    cluster.active(1, watched)
    done = cluster.admin("resume", session_id=sid(1))
    assert (done.code, done.state, done.message) == ("", "active" if watched else "idle", "w0 has it already")
    cluster.wait(3.0)
    assert cluster.state(1) is (SessionState.RUNNING if watched else SessionState.STALLED)
    live = cluster.logic.sessions[sid(1)]
    assert live.wanted == bool(cluster.logic.view.sessions.active[live.row]) == watched
    cluster.check()


def test_an_operator_resumes_what_nobody_watches():
    cluster = running("w0")
    cluster.active(1, False)
    cluster.admin("suspend", session_id=sid(1))
    cluster.settle()
    assert cluster.admin("resume", session_id=sid(1)).code == ""
    cluster.settle()
    assert (cluster.state(1), cluster.owner(1)) == (SessionState.RUNNING, "w0")
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
    cluster.wait(2.0)
    said = [one["reason"] for one in cluster.logic.decisions if one["event"] == "wait"]
    assert len(said) == 1 and "numerics_id num" in said[0] and "allow_approximate" in said[0]
    assert heard(cluster, m.SessionState)[-1].reason == said[0], "its viewer hears it too"
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
