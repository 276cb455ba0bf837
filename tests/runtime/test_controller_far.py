"""Sessions and their points between nodes, as the controller sees it: w workers share the server's arena, each joined
(j) worker has its own."""

from __future__ import annotations

import pytest
from controller_harness import Cluster, heard, running
from test_controller_logic import GATEWAY, create, end, sid

from turboserve.runtime import messages as m
from turboserve.runtime.controller_far import BRINGS_MAX
from turboserve.session import SessionState


def events(cluster: Cluster, *kinds: str) -> list[str]:
    return [one["event"] for one in cluster.logic.decisions if one["event"] in kinds]


def lies_on(cluster: Cluster, number: int = 1) -> str:
    return cluster.logic.sessions[sid(number)].point_node


def suspended_on_j(*workers: str) -> Cluster:
    """Session 1 suspended in the arena of the joined worker j1."""
    cluster = running("w0", "j1", *workers)
    assert cluster.admin("migrate", session_id=sid(1), worker_id="j1").state == "migrating"
    cluster.settle()
    assert (cluster.owner(1), lies_on(cluster)) == ("j1", "j1")
    cluster.wait(0.5)
    cluster.active(1, False)
    cluster.admin("suspend", session_id=sid(1))
    cluster.settle()
    assert cluster.state(1) is SessionState.HOST
    cluster.logic.decisions.clear()
    return cluster


def test_a_move_to_another_node_carries_the_point_before_and_after_the_stop():
    cluster = running("w0", "j1")
    made = cluster.workers["w0"].held[sid(1)].next_index
    cluster.admin("migrate", session_id=sid(1), worker_id="j1")
    [prepare] = [one for one in cluster.workers["j1"].heard if isinstance(one, m.PrepareSession)]
    assert prepare.awaits and prepare.slot
    cluster.step()  # prepared
    cluster.step()
    assert cluster.state(1) is SessionState.PRECOPY, "it goes on while its point is sent ahead"
    cluster.settle()
    assert (cluster.owner(1), cluster.state(1), lies_on(cluster)) == ("j1", SessionState.RUNNING, "j1")
    assert heard(cluster, m.SessionPlaced)[-1].next_index == made
    assert events(cluster, "carried", "replay") == ["carried"]
    assert cluster.store.points == {sid(1): "j1"}
    # And back; a move within the server's node carries nothing.
    cluster.admin("migrate", session_id=sid(1), worker_id="w0")
    cluster.settle()
    assert (cluster.owner(1), lies_on(cluster), cluster.store.points) == ("w0", "n", {sid(1): "n"})
    cluster.start("w1")
    cluster.settle()
    cluster.admin("migrate", session_id=sid(1), worker_id="w1")
    [prepare] = [one for one in cluster.workers["w1"].heard if isinstance(one, m.PrepareSession)]
    assert not prepare.awaits
    cluster.settle()
    assert cluster.owner(1) == "w1" and events(cluster, "carried", "replay") == ["carried"] * 2
    cluster.check()


def test_a_point_that_cannot_be_sent_leaves_the_session_at_its_source():
    cluster = running("w0", "j1")
    cluster.workers["w0"].arrive = 0
    cluster.admin("migrate", session_id=sid(1), worker_id="j1")
    cluster.settle()
    assert (cluster.owner(1), cluster.state(1)) == ("w0", SessionState.RUNNING)
    assert cluster.logic.sessions[sid(1)].record.epoch == 1, "nobody had stopped for it"
    assert not cluster.workers["j1"].prepared
    # Cut only once it has stopped: the source takes it back under a new epoch.
    cluster.workers["w0"].arrive = 1
    cluster.admin("migrate", session_id=sid(1), worker_id="j1")
    cluster.settle()
    assert (cluster.owner(1), cluster.logic.sessions[sid(1)].record.epoch) == ("w0", 2)
    assert not cluster.workers["j1"].prepared
    cluster.check()


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("dies", ["w0", "j1"])
def test_either_end_may_die_at_any_step(dies, steps):
    for there in ("j1", "w0"):
        cluster = running("w0", "w1", "j1")
        cluster.admin("migrate", session_id=sid(1), worker_id="j1")
        if there == "w0":
            cluster.settle()
            cluster.wait(0.5)
            cluster.admin("migrate", session_id=sid(1), worker_id="w0")
        for _ in range(steps):
            cluster.step()
        cluster.kill(dies)
        cluster.settle()
        cluster.wait(2.0)
        assert cluster.state(1) is SessionState.RUNNING and cluster.owner(1) in cluster.workers
        assert not any(one.prepared for one in cluster.workers.values())
        if dies == "w0":
            assert "replay" not in events(cluster, "replay"), "the arena of the server's node outlives its workers"
        cluster.check()


def test_a_suspended_session_resumes_on_the_node_that_has_its_point():
    cluster = suspended_on_j()
    cluster.active(1, True)  # the tick would say w0
    cluster.settle()
    assert cluster.owner(1) == "j1" and events(cluster, "bring", "replay") == []
    cluster.check()


def test_a_suspended_session_is_brought_to_a_worker_of_another_node():
    cluster = suspended_on_j()
    made = cluster.nodes["j1"][sid(1)]
    cluster.active(1, False)
    assert cluster.admin("migrate", session_id=sid(1), worker_id="w0").state == "suspended"
    cluster.check()
    cluster.settle()
    assert (cluster.owner(1), lies_on(cluster)) == ("w0", "n")
    assert heard(cluster, m.SessionPlaced)[-1].next_index == made
    assert events(cluster, "bring", "brought", "replay") == ["bring", "brought"]
    cluster.check()


def test_what_cannot_be_brought_is_made_again_after_a_few_tries_and_the_reason_says_so():
    cluster = suspended_on_j()
    cluster.workers["j1"].arrive = 0
    cluster.points.clear()
    for _ in range(BRINGS_MAX + 1):
        assert cluster.admin("migrate", session_id=sid(1), worker_id="w0").state == "suspended"
        cluster.settle()
        cluster.check()
        cluster.wait(2.0)
    assert events(cluster, "move_given_up") == ["move_given_up"] * BRINGS_MAX
    assert (cluster.owner(1), cluster.state(1)) == ("w0", SessionState.STALLED)
    [replay] = [one["reason"] for one in cluster.logic.decisions if one["event"] == "replay"]
    assert "lies on j1, which did not send it" in replay and "input log" in replay
    cluster.check()


def test_a_node_that_is_gone_means_an_older_point_or_the_log_and_the_reason_says_which():
    for older in (0, 3):
        cluster = suspended_on_j()
        cluster.points.clear()
        if older:
            cluster.points[sid(1)] = older
        cluster.kill("j1")
        cluster.active(1, True)
        cluster.settle()
        assert (cluster.owner(1), lies_on(cluster)) == ("w0", "n")
        assert heard(cluster, m.SessionPlaced)[-1].next_index == older
        [replay] = [one["reason"] for one in cluster.logic.decisions if one["event"] == "replay"]
        assert "lies on j1, which is gone" in replay
        assert ("at chunk 3" if older else "input log") in replay
        cluster.check()


def test_a_joined_worker_that_drains_ends_once_its_points_are_home():
    cluster = suspended_on_j()
    cluster.tell(GATEWAY, create(2))
    cluster.settle()
    if cluster.owner(2) != "j1":
        cluster.admin("migrate", session_id=sid(2), worker_id="j1")
        cluster.settle()
    made = cluster.nodes["j1"][sid(1)]
    cluster.admin("drain", worker_id="j1")
    cluster.admin("migrate", session_id=sid(2), worker_id="w0")
    cluster.wait(2.0)
    assert "j1" not in cluster.workers
    assert (cluster.owner(1), cluster.state(1), lies_on(cluster)) == (None, SessionState.HOST, "n")
    assert (cluster.owner(2), lies_on(cluster, 2)) == ("w0", "n")
    assert cluster.points[sid(1)] == made
    assert events(cluster, "brought", "replay") == ["brought"]
    assert "worker_left" in events(cluster, "worker_left", "worker_lost")
    cluster.check()


def test_a_session_that_ends_while_its_point_is_brought_leaves_nothing():
    cluster = suspended_on_j()
    cluster.admin("migrate", session_id=sid(1), worker_id="w0")
    cluster.step()
    cluster.tell(GATEWAY, end(1))
    cluster.settle()
    assert not cluster.logic.sessions and not cluster.workers["w0"].prepared
    cluster.workers["j1"].tell_points()
    cluster.settle()
    assert cluster.nodes["j1"] == {}
    cluster.check()


def test_a_joined_worker_drops_what_lives_elsewhere_and_keeps_what_is_its_own():
    cluster = suspended_on_j()
    cluster.tell(GATEWAY, create(2))
    cluster.settle()
    cluster.nodes["j1"] |= {sid(2): 1, sid(9): 1}
    if cluster.owner(2) == "j1":
        cluster.admin("migrate", session_id=sid(2), worker_id="w0")
        cluster.settle()
    cluster.workers["j1"].tell_points()
    cluster.settle()
    assert list(cluster.nodes["j1"]) == [sid(1)]


def test_the_next_controller_knows_where_points_lie():
    cluster = suspended_on_j()
    cluster.admin("migrate", session_id=sid(1), worker_id="w0")
    cluster.step()  # a bring is under way when it ends
    cluster.restart_controller()
    cluster.settle()
    assert lies_on(cluster) == "j1" and not cluster.workers["w0"].prepared
    assert cluster.store.moves() == {}
    cluster.active(1, True)
    cluster.settle()
    assert cluster.owner(1) == "j1" and events(cluster, "replay") == []
    cluster.check()


def test_a_worker_without_an_arena_is_moved_to_as_before_by_the_log():
    cluster = running("w0", "j1")
    cluster.logic.workers["j1"].hello = m.WorkerHello(
        **{
            name: getattr(cluster.logic.workers["j1"].hello, name)
            for name in m.WorkerHello.__struct_fields__
            if name not in ("arena_bytes", "own_arena")
        }
    )
    cluster.admin("migrate", session_id=sid(1), worker_id="j1")
    [prepare] = [one for one in cluster.workers["j1"].heard if isinstance(one, m.PrepareSession)]
    assert not prepare.awaits
    cluster.settle()
    assert cluster.owner(1) == "j1" and events(cluster, "replay", "carried") == ["replay"]
