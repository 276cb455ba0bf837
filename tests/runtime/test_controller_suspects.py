"""Sessions that may have killed their worker: strikes, a worker of their own, quarantine; and kills that are nobody's
fault."""

from __future__ import annotations

import signal

import pytest
from controller_harness import Cluster, beat, heard, running
from test_controller_logic import GATEWAY, create, end, sid

from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import LAUNCHER
from turboserve.runtime.controller_suspects import (
    STRIKE_CHUNKS,
    STRIKES_GRAVE,
    STRIKES_IN_COMPANY,
    STRIKES_MAX,
    VERDICT_S,
)
from turboserve.session import SessionState


def test_a_session_that_kills_three_workers_is_quarantined_and_its_neighbours_are_not():
    cluster = running("w0", sessions=2)
    cluster.active(2, False)  # only session 1 is at work
    for name in ("w1", "w2", "w3"):
        cluster.start(name)
    cluster.settle()
    cluster.kill("w0")
    cluster.settle()
    cluster.active(2, True)
    cluster.settle()
    for strikes in (1, 2):
        assert cluster.logic.sessions[sid(1)].record.strikes == strikes
        assert strikes == 1 or cluster.owner(1) != cluster.owner(2), "the third try is on a worker of its own"
        cluster.kill(cluster.owner(1))
        cluster.settle()
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


def test_good_chunks_clear_it_also_under_a_controller_that_was_not_there():
    cluster = running("w0")
    cluster.start("w1")
    cluster.settle()
    cluster.kill("w0")
    cluster.settle()
    cluster.restart_controller()
    cluster.settle()
    assert cluster.logic.sessions[sid(1)].record.strikes == 1
    cluster.wait(0.25 * (STRIKE_CHUNKS - 1))
    beat(cluster, cluster.owner(1))
    assert cluster.logic.sessions[sid(1)].record.strikes == 1, "it has not made enough since that one knows it"
    cluster.wait(0.25)
    beat(cluster, cluster.owner(1))
    assert cluster.logic.sessions[sid(1)].record.strikes == 0


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


# ---------------------------------------------------------------- workers that the launcher has started


def local(sessions: int = 1) -> Cluster:
    """Four workers of this machine: how they end is the launcher's to say."""
    cluster = Cluster(local=True)
    for name in ("w0", "w1", "w2", "w3"):
        cluster.start(name)
    cluster.settle()
    for number in range(1, sessions + 1):
        cluster.tell(GATEWAY, create(number))
    cluster.settle()
    cluster.wait(1.0)
    return cluster


def strikes(cluster: Cluster, number: int) -> int:
    return cluster.logic.sessions[sid(number)].record.strikes


@pytest.mark.parametrize("times", [2, 5])
def test_kills_from_outside_between_two_chunks_make_no_suspects(times: int):
    cluster = local()
    for _ in range(times):
        owner = cluster.owner(1)
        cluster.die(owner, -signal.SIGKILL)
        cluster.settle()
        assert (cluster.state(1), strikes(cluster, 1)) == (SessionState.RUNNING, 0)
        cluster.start(owner)
        cluster.settle()


@pytest.mark.parametrize(
    ("code", "in_work"),
    [(-signal.SIGSEGV, False), (-signal.SIGABRT, True), (1, True), (70, False), (-signal.SIGKILL, True)],
)
def test_a_session_that_really_kills_its_workers_costs_three(code: int, in_work: bool):
    cluster = local(sessions=2)
    for deaths in range(1, 4):
        owner = cluster.owner(1)
        assert owner is not None
        if deaths == 3:
            assert owner != cluster.owner(2), "the third try is on a worker of its own"
        cluster.die(owner, code, (sid(1),) if in_work else ())
        cluster.settle()
        if deaths < 3:
            assert (cluster.state(1), strikes(cluster, 1)) == (SessionState.RUNNING, deaths)
            cluster.start(owner)
            cluster.settle()
    failed = [one for one in heard(cluster, m.SessionState) if one.state == "failed"]
    assert [(one.session_id, one.code) for one in failed] == [(sid(1), "session_poisoned")]
    assert cluster.state(2) is SessionState.RUNNING and strikes(cluster, 2) < STRIKES_MAX


def test_of_several_on_a_killed_worker_those_with_a_chunk_in_work_are_suspected():
    cluster = Cluster(local=True)
    cluster.start("w0")
    cluster.settle()
    for number in (1, 2):
        cluster.tell(GATEWAY, create(number))
    cluster.settle()
    cluster.die("w0", -signal.SIGKILL, (sid(2),))
    assert (strikes(cluster, 1), strikes(cluster, 2)) == (0, 1)
    cluster.start("w1")
    cluster.settle()
    cluster.die("w1", -signal.SIGSEGV, (sid(2),))
    assert (strikes(cluster, 1), strikes(cluster, 2)) == (1, 2), "a crash may be late: both wanted chunks"


def test_a_suspect_waits_for_the_verdict_and_for_a_worker_of_its_own():
    cluster = local(sessions=4)
    for _ in range(2):
        cluster.die(cluster.owner(1), -signal.SIGKILL, (sid(1),), told=False)
        cluster.settle()
        held = strikes(cluster, 1) > 0
        assert (cluster.owner(1) is None) == held, "only who was suspected before waits"
        cluster.tell_death()
        cluster.settle()
    assert strikes(cluster, 1) == 2 and len(cluster.workers) == 2
    others = {cluster.owner(number) for number in (2, 3, 4)}
    if others == set(cluster.workers):
        assert cluster.owner(1) is None, "every worker has sessions at work"
        cluster.start("w9")
        cluster.wait(0.5)
    assert cluster.owner(1) not in others and cluster.state(1) is SessionState.RUNNING
    alone = cluster.owner(1)
    cluster.active(2, False)
    cluster.admin("suspend", session_id=sid(2))
    cluster.settle()
    cluster.active(2, True)
    cluster.settle()
    assert cluster.owner(2) not in (None, alone), "nobody is put beside it"


def test_a_worker_that_was_cut_off_and_is_not_dead_makes_no_suspects():
    cluster = local()
    for _ in range(4):
        cluster.kill(cluster.owner(1))  # its connection ends; the launcher says nothing
        cluster.wait(VERDICT_S + 0.5)
        assert (cluster.state(1), strikes(cluster, 1)) == (SessionState.RUNNING, 0)
        cluster.start(f"w{4 + _}")
        cluster.settle()


def test_the_launcher_may_be_heard_before_the_connection_ends():
    cluster = local()
    owner = cluster.owner(1)
    pid = cluster.workers[owner].hello.pid
    event = m.FleetEvent(worker_id=owner, kind="backing_off", pid=pid, exit_code=-signal.SIGSEGV, reason="exit -11")
    del cluster.workers[owner]
    cluster.tell(LAUNCHER, event)
    assert owner not in cluster.logic.workers and strikes(cluster, 1) == 1
    cluster.carry_out(cluster.logic.on_disconnect(owner, cluster.now_s))
    cluster.tell(LAUNCHER, event)  # the same word again changes nothing
    cluster.settle()
    assert (cluster.state(1), strikes(cluster, 1)) == (SessionState.RUNNING, 1)


def one_worker(sessions: int) -> Cluster:
    """Local, and with no other worker to go to."""
    cluster = Cluster(local=True)
    cluster.start("w0")
    cluster.settle()
    for number in range(1, sessions + 1):
        cluster.tell(GATEWAY, create(number))
    cluster.settle()
    return cluster


def again(cluster: Cluster, code: int, *in_work: int) -> None:
    """The only worker dies in chunks of these sessions, and is started again."""
    cluster.die("w0", code, tuple(sid(number) for number in in_work))
    cluster.settle()
    cluster.start("w0")
    cluster.settle()
    for _ in range(60):
        if all(one.record.owner for one in cluster.logic.sessions.values()):
            return
        cluster.wait(0.25)
    raise AssertionError("a session gets no worker")


def test_one_that_was_not_in_work_is_not_given_up_for_what_another_one_did():
    cluster = one_worker(sessions=2)
    for _ in range(STRIKES_GRAVE):
        again(cluster, -signal.SIGKILL, 1)
    assert (strikes(cluster, 1), strikes(cluster, 2)) == (STRIKES_GRAVE, 0)
    assert cluster.owner(1) == cluster.owner(2) == "w0", "there is no other one"
    again(cluster, -signal.SIGSEGV, 2)
    assert (strikes(cluster, 1), strikes(cluster, 2)) == (STRIKES_GRAVE, 1), "a crash may be late, and may be not"
    cluster.active(2, False)
    cluster.die("w0", -signal.SIGSEGV)
    assert sid(1) not in cluster.logic.sessions, "nobody was in work, and it alone wanted chunks"


def test_in_company_it_is_given_up_only_at_the_fifth_death():
    cluster = one_worker(sessions=1)
    for deaths in range(1, STRIKES_IN_COMPANY + 1):
        number = deaths + 1
        cluster.tell(GATEWAY, create(number))
        for _ in range(60):
            if cluster.owner(1) == cluster.owner(number) == "w0":
                break
            cluster.wait(0.25)
        cluster.die("w0", -signal.SIGKILL, (sid(1), sid(number)))
        assert (sid(1) in cluster.logic.sessions) == (deaths < STRIKES_IN_COMPANY)
        cluster.tell(GATEWAY, end(number))
        cluster.start("w0")
        cluster.settle()


def test_whoever_shared_the_deaths_of_one_that_is_given_up_is_cleared_of_them():
    cluster = one_worker(sessions=2)
    again(cluster, -signal.SIGSEGV, 1, 2)
    again(cluster, -signal.SIGKILL, 2)
    assert (strikes(cluster, 1), strikes(cluster, 2)) == (1, 2)
    again(cluster, -signal.SIGSEGV, 2)
    assert sid(2) not in cluster.logic.sessions
    assert strikes(cluster, 1) == cluster.store.rows[sid(1)][3] == 0
    assert cluster.state(1) is SessionState.RUNNING


def test_a_chunk_that_nobody_wants_any_more_may_still_be_the_one():
    cluster = one_worker(sessions=1)
    for code in (-signal.SIGKILL, -signal.SIGSEGV):
        cluster.active(1, False)
        cluster.die("w0", code, (sid(1),))
        cluster.start("w0")
        cluster.active(1, True)
        cluster.settle()
    assert strikes(cluster, 1) == 2
    cluster.active(1, False)
    cluster.die("w0", -signal.SIGSEGV)
    assert strikes(cluster, 1) == 2, "it was not in work, and no viewer wanted chunks"


@pytest.mark.parametrize("opened", [False, True])
def test_one_on_its_way_to_the_worker_is_suspected_only_while_it_is_opened(opened: bool):
    cluster = one_worker(sessions=1)
    cluster.tell(GATEWAY, create(2))  # its OpenSession has not arrived
    assert cluster.state(2) is SessionState.LOADING
    cluster.die("w0", -signal.SIGSEGV, (sid(1), sid(2)) if opened else (sid(1),))
    assert (strikes(cluster, 1), strikes(cluster, 2)) == (1, int(opened))


def test_nobody_is_put_beside_a_grave_suspect_while_a_restart_may_help():
    cluster = one_worker(sessions=2)
    for _ in range(STRIKES_GRAVE):
        again(cluster, -signal.SIGKILL, 1)
    cluster.start("w1")
    cluster.settle()
    cluster.active(2, False)
    cluster.die("w0", -signal.SIGKILL)
    cluster.settle()
    cluster.active(2, True)
    cluster.settle()
    assert (cluster.owner(1), cluster.owner(2)) == ("w1", None), "the other one waits for a worker"
    cluster.start("w0")
    cluster.wait(0.5)
    assert (cluster.owner(1), cluster.owner(2)) == ("w1", "w0")
