"""The controller's part in a full arena and a full disk: what is moved, dropped and kept, and what is said of it."""

from __future__ import annotations

import pytest
from controller_harness import LAUNCHER, running
from test_controller_logic import sid

from turboserve.errors import ArenaFull
from turboserve.orchestrator.eviction import Partition
from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import DropFile, DropHost, Load, Spill
from turboserve.runtime.controller_storage import LOAD_TRIES_MAX, SPILL_RETRY_S, SPILLS_AT_ONCE, StoredBytes
from turboserve.session import SessionState

BYTES = 100


def suspended(count: int):
    """Sessions 1 to `count` in host memory, the first one idle for longest."""
    cluster = running("w0", "w1", "w2", "w3", sessions=count)
    for number in range(1, count + 1):
        cluster.active(number, False)
        assert cluster.admin("suspend", session_id=sid(number)).state == "suspended"
        cluster.settle()
        cluster.wait(1.0)
        assert cluster.state(number) is SessionState.HOST
    return cluster


def counted(cluster, total: int, disk_total: int = 10_000, hosts=None, files=None, newer=()) -> StoredBytes:
    """What the points' thread would count: BYTES for each session in host memory, in partition 1."""
    live = cluster.logic.sessions.values()
    hosts = [one.record.session_id for one in live if one.record.state is SessionState.HOST] if hosts is None else hosts
    files = {one.record.session_id: one.disk_bytes for one in live if one.disk_bytes} if files is None else files
    return StoredBytes(
        (Partition(total, 0), Partition(total, BYTES * len(hosts))),
        {one: {1: BYTES} for one in hosts},
        files,
        {"disk_total_bytes": disk_total, "disk_used_bytes": sum(files.values())},
        frozenset(newer),
    )


def count(cluster, total: int, **more):
    """Tell it; what it wants done."""
    effects = cluster.logic.stored_bytes(counted(cluster, total, **more), cluster.now_s)
    cluster.carry_out(effects)
    return effects


def told(cluster, event: str) -> list[dict]:
    return [one for one in cluster.logic.decisions if one["event"] == event]


def spills(effects) -> list[str]:
    return [one.session_id for one in effects if isinstance(one, Spill)]


def test_below_the_mark_nothing_moves():
    cluster = suspended(4)
    assert count(cluster, 1000) == [] and not told(cluster, "spill")


def test_above_the_mark_the_longest_idle_go_to_disk_and_leave_the_arena_only_then():
    cluster = suspended(6)
    effects = count(cluster, 620)
    assert spills(effects) == [sid(1), sid(2)]
    assert [one["session"] for one in told(cluster, "spill")] == [sid(1), sid(2)]
    assert "partition 1 of the arena is 97% full" in told(cluster, "spill")[0]["reason"]
    assert not any(isinstance(one, DropHost) for one in effects)
    assert count(cluster, 620, hosts=[sid(n) for n in range(1, 7)]) == [], "two are on their way already"
    for number in (1, 2):
        after = cluster.logic.spilled(sid(number), 90, cluster.now_s)
        assert cluster.store.rows[sid(number)][2] is SessionState.DISK
        assert [one.session_id for one in after if isinstance(one, DropHost)] == [sid(number)]
        live = cluster.logic.sessions[sid(number)]
        assert (live.point_bytes, live.disk_bytes) == (0, 90)
    assert spills(count(cluster, 620)) == []
    assert cluster.logic.snapshot()["points"]["spilled"] == 2


def test_no_more_at_once_than_the_bound():
    cluster = suspended(7)
    assert len(spills(count(cluster, 100))) == SPILLS_AT_ONCE


def test_one_whose_viewer_came_meanwhile_is_opened_from_the_arena():
    cluster = suspended(2)
    assert spills(count(cluster, 100)) == [sid(1), sid(2)]
    cluster.active(1, True)
    effects = cluster.logic.spilled(sid(1), 90, cluster.now_s)
    assert not any(isinstance(one, DropHost | Load) for one in effects)
    cluster.carry_out(effects)
    cluster.settle()
    assert cluster.state(1) is SessionState.RUNNING
    assert cluster.logic.sessions[sid(1)].disk_bytes == 0


def test_a_resume_reads_from_disk_and_waits_for_room_as_long_as_it_may():
    cluster = suspended(2)
    count(cluster, 100)
    for number in (1, 2):
        cluster.carry_out(cluster.logic.spilled(sid(number), 90, cluster.now_s))
    cluster.active(1, True)
    live = cluster.logic.sessions[sid(1)]
    assert live.loading
    effects = cluster.logic.loaded(sid(1), 0, cluster.now_s, "full")
    assert not any(isinstance(one, DropFile) for one in effects) and live.disk_bytes == 90
    assert cluster.logic.count_soon
    cluster.carry_out(cluster.logic.on_timer(cluster.now_s + 1.0))
    assert live.loading, "tried again"
    cluster.carry_out(cluster.logic.loaded(sid(1), BYTES, cluster.now_s))
    cluster.settle()
    assert cluster.state(1) is SessionState.RUNNING and "replay" not in {
        one["event"] for one in cluster.logic.decisions
    }


def test_without_room_for_ever_it_is_made_again_from_the_log():
    cluster = suspended(1)
    count(cluster, 50)
    cluster.carry_out(cluster.logic.spilled(sid(1), 90, cluster.now_s))
    cluster.points.pop(sid(1), None)
    cluster.active(1, True)
    effects = []
    for _ in range(LOAD_TRIES_MAX + 1):
        effects = cluster.logic.loaded(sid(1), 0, cluster.now_s, "full")
        cluster.carry_out(effects)
        cluster.now_s += 0.25
        cluster.carry_out(cluster.logic.on_timer(cluster.now_s))
    assert any(isinstance(one, DropFile) for one in effects)
    cluster.settle()
    assert cluster.state(1) is SessionState.RUNNING
    assert told(cluster, "no_point") and told(cluster, "replay")


def test_a_full_disk_gives_up_what_is_worth_less():
    cluster = suspended(4)
    for number in (1, 2):
        cluster.logic.sessions[sid(number)].next_index = 10  # cheap to make again
    for number in (3, 4):
        cluster.logic.sessions[sid(number)].next_index = 1000
    assert spills(count(cluster, 210, disk_total=200)) == [sid(1), sid(2), sid(3)]
    for number in (1, 2):
        cluster.carry_out(cluster.logic.spilled(sid(number), 90, cluster.now_s))
    effects = cluster.logic.spilled(sid(3), 0, cluster.now_s, "full")
    assert [one.session_id for one in effects if isinstance(one, DropFile)] == [sid(1)]
    assert spills(effects) == [sid(3)], "and it is tried once more"
    (said,) = told(cluster, "evict")
    assert said["session"] == sid(1) and "the disk is full" in said["reason"] and "input log" in said["reason"]
    cluster.carry_out(cluster.logic.spilled(sid(3), 90, cluster.now_s))
    assert cluster.logic.sessions[sid(1)].disk_bytes == 0 and cluster.state(1) is SessionState.DISK
    cluster.points.pop(sid(1), None)
    cluster.active(1, True)
    cluster.settle()
    assert cluster.state(1) is SessionState.RUNNING and told(cluster, "replay")


def test_a_full_disk_refuses_what_is_worth_least_and_is_left_alone_for_a_while():
    cluster = suspended(2)
    cluster.logic.sessions[sid(1)].next_index = 1000
    cluster.logic.sessions[sid(2)].next_index = 0
    count(cluster, 100)
    cluster.carry_out(cluster.logic.spilled(sid(1), 90, cluster.now_s))
    effects = cluster.logic.spilled(sid(2), 0, cluster.now_s, "full")
    assert not any(isinstance(one, DropFile | Spill | DropHost) for one in effects)
    assert (
        cluster.state(2) is SessionState.HOST
        and "nothing there is worth less" in told(cluster, "not_spilled")[0]["reason"]
    )
    assert spills(count(cluster, 100)) == []
    cluster.wait(SPILL_RETRY_S)
    assert spills(count(cluster, 100)) == [sid(2)]


def test_a_broken_disk_drops_nothing():
    cluster = suspended(2)
    count(cluster, 100)
    cluster.carry_out(cluster.logic.spilled(sid(1), 90, cluster.now_s))
    effects = cluster.logic.spilled(sid(2), 0, cluster.now_s, "failed")
    assert not any(isinstance(one, DropFile | Spill | DropHost) for one in effects)
    assert cluster.state(2) is SessionState.HOST


def test_without_a_disk_nothing_is_tried():
    cluster = suspended(2)
    assert spills(count(cluster, 100, disk_total=0)) == []


def test_a_copy_that_nobody_waits_for_goes_without_being_written():
    cluster = suspended(1)
    count(cluster, 50)
    cluster.carry_out(cluster.logic.spilled(sid(1), 90, cluster.now_s))
    cluster.active(1, True)
    cluster.active(1, False)
    cluster.carry_out(cluster.logic.loaded(sid(1), BYTES, cluster.now_s))
    assert cluster.state(1) is SessionState.DISK
    effects = count(cluster, 50, hosts=[sid(1)])
    assert [one.session_id for one in effects if isinstance(one, DropHost)] == [sid(1)] and not spills(effects)
    cluster.active(1, True)
    assert cluster.logic.sessions[sid(1)].loading, "read back again"


def test_a_newer_point_that_a_worker_wrote_late_is_kept_and_goes_to_disk_in_its_turn():
    """Its worker was cut off: it went on for a while after the session had been taken from it and its point spilled."""
    cluster = suspended(1)
    count(cluster, 50)
    cluster.carry_out(cluster.logic.spilled(sid(1), 90, cluster.now_s))
    effects = count(cluster, 50, hosts=[sid(1)], newer=[sid(1)])
    assert not any(isinstance(one, DropHost) for one in effects)
    live = cluster.logic.sessions[sid(1)]
    assert (cluster.state(1), live.point_bytes) == (SessionState.HOST, BYTES)
    assert spills(effects) == [] and spills(count(cluster, 50)) == [sid(1)]
    after = cluster.logic.spilled(sid(1), 95, cluster.now_s)
    assert [one.session_id for one in after if isinstance(one, DropHost)] == [sid(1)] and live.disk_bytes == 95


def test_a_point_that_comes_late_of_a_session_that_has_none_is_kept():
    """The one on disk was given up for another's, and its chunks were to be made again from the input log."""
    cluster = suspended(1)
    count(cluster, 50)
    cluster.carry_out(cluster.logic.spilled(sid(1), 90, cluster.now_s))
    cluster.logic.sessions[sid(1)].disk_bytes = 0
    effects = count(cluster, 1000, hosts=[sid(1)], files={})
    assert not any(isinstance(one, DropHost) for one in effects) and cluster.state(1) is SessionState.HOST


def test_a_session_whose_worker_has_no_room_for_its_point_is_not_asked_again_at_once():
    cluster = running("w0", "w1", sessions=1)
    owner = cluster.owner(1)
    cluster.active(1, False)
    assert cluster.admin("suspend", session_id=sid(1)).state == "suspended"
    epoch = cluster.logic.sessions[sid(1)].record.epoch
    cluster.workers[owner].heard.clear()
    kept = m.SessionKept(session_id=sid(1), epoch=epoch, move_id=0, code=ArenaFull.code, message="no room")
    cluster.tell(owner, kept)
    cluster.settle()
    assert cluster.logic.count_soon
    assert cluster.admin("suspend", session_id=sid(1)).code == "conflict"
    cluster.wait(2.5)
    assert cluster.admin("suspend", session_id=sid(1)).state == "suspended"


@pytest.mark.parametrize("worth_more", [True, False])
def test_a_server_that_stops_on_a_small_disk_keeps_what_is_worth_most(worth_more):
    cluster = suspended(2)
    cluster.logic.sessions[sid(1)].next_index = 5 if worth_more else 50_000
    cluster.logic.sessions[sid(2)].next_index = 5000
    count(cluster, 1000, disk_total=100)
    cluster.tell(LAUNCHER, m.FleetEvent(worker_id="", kind="stopping"))
    cluster.carry_out(cluster.logic.spilled(sid(1), 90, cluster.now_s))
    cluster.carry_out(cluster.logic.spilled(sid(2), 0, cluster.now_s, "full"))
    assert cluster.state(2) is (SessionState.SPILLING if worth_more else SessionState.HOST)
    assert bool(told(cluster, "evict")) is worth_more
    cluster.carry_out(cluster.logic.spilled(sid(2), 90 if worth_more else 0, cluster.now_s, "full"))
    cluster.settle()
    assert cluster.logic.stopped
