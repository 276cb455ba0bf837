"""The worker's protocol without I/O: chunks, credits, leases, leaving."""

from __future__ import annotations

import pytest
from worker_logic_harness import (
    HELLO,
    LEASE_S,
    SID,
    SPEC,
    connected,
    credit,
    hand_over,
    kinds,
    lease,
    made,
    open_session,
    opened,
)

from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_books import (
    CONTROLLER,
    GATEWAY,
    KEPT_CHUNKS,
    Beat,
    Drop,
    Emit,
    Stop,
)
from turboserve.runtime.worker_logic import WorkerLogic


def test_a_chunk_from_credit_to_acceptance():
    logic = opened()
    [begin] = logic.on_message(GATEWAY, credit(0), 1.0)
    assert begin.deadline_s == 1.5 and begin.request.chunk_index == 0
    [emit] = logic.on_engine(made(0), 1, 1.1)
    assert emit == Emit(SID, 1, 0) and logic.may_emit(emit, 1.1) is not None
    assert logic.on_message(GATEWAY, m.ChunkAccepted(session_id=SID, epoch=1, chunk_index=0), 1.2) == []


def test_the_lease_counts_from_when_the_heartbeat_was_sent():
    logic = opened()
    assert logic.on_timer(0.5) == [Beat()]
    logic.on_message(CONTROLLER, lease(), 1.9)  # the answer took 1.4 s
    assert logic.lease_left_s(1.9) == pytest.approx(0.6)
    assert e.Hold(True) in logic.on_timer(2.5)


def test_nothing_is_emitted_without_a_lease_and_all_of_it_when_it_is_back():
    logic = opened()
    logic.on_message(GATEWAY, credit(0), 0.2)
    assert e.Hold(True) in logic.on_timer(3.0)
    assert logic.on_engine(made(0), 1, 3.0) == []
    assert logic.may_emit(Emit(SID, 1, 0), 3.0) is None
    actions = logic.on_message(CONTROLLER, lease(), 3.1)  # answers the beat of 3.0
    assert actions == [e.Hold(False), Emit(SID, 1, 0)]


def test_an_emit_that_waited_past_the_lease_is_withheld():
    logic = opened()
    logic.on_message(GATEWAY, credit(0), 0.2)
    [emit] = logic.on_engine(made(0), 1, 0.3)
    assert logic.may_emit(emit, 2.1) is not None  # renewed by the credit at 0.2
    assert logic.may_emit(emit, 2.3) is None


def test_what_stands_behind_a_withheld_emit_does_not_overtake_it():
    logic = opened()
    emits = []
    for index in range(2):
        logic.on_message(GATEWAY, credit(index), 0.2)
        emits += logic.on_engine(made(index), 1, 0.3)
    assert logic.may_emit(emits[0], 2.5) is None  # the lease ran out while the ring was full
    logic.on_timer(2.5)
    again = logic.on_message(CONTROLLER, lease(), 2.6)
    assert logic.may_emit(emits[1], 2.6) is None
    assert again == [e.Hold(False), *emits]


def test_the_gateways_word_renews_the_lease_of_a_worker_that_once_had_one():
    logic = opened()
    logic.on_disconnect(CONTROLLER, 1.0)
    logic.on_message(GATEWAY, credit(0), 1.9)
    assert logic.lease_left_s(1.9) == LEASE_S
    never = WorkerLogic(HELLO, SPEC)
    never.on_connect(GATEWAY, 0.0)
    never.on_message(GATEWAY, credit(0), 0.1)
    assert never.lease_left_s(0.1) == 0.0


def test_a_lease_for_another_worker_epoch_is_nothing():
    logic = WorkerLogic(HELLO, SPEC)
    logic.on_connect(CONTROLLER, 0.0)
    assert logic.on_message(CONTROLLER, lease(epoch=6), 0.1) == []
    assert logic.lease_left_s(0.1) == 0.0


@pytest.mark.parametrize(
    ("wrong", "code", "next_index"),
    [
        (credit(0, sid="c" * 26), "not_found", 0),
        (credit(0, epoch=2), "stale_epoch", 1),
        (credit(0, epoch=0), "stale_epoch", 1),
        (credit(2), "index_out_of_range", 1),
        (credit(0, prompt="another"), "conflict", 1),
    ],
)
def test_a_wrong_credit_is_told_what_would_be_right(wrong, code, next_index):
    logic = opened()
    logic.on_message(GATEWAY, credit(0), 0.2)
    [refusal] = logic.on_message(GATEWAY, wrong, 0.2)
    assert (refusal.message.code, refusal.message.next_index) == (code, next_index)


def test_a_credit_given_again_gets_the_same_frames_while_they_are_kept():
    logic = opened()
    for index in range(KEPT_CHUNKS + 1):
        assert kinds(logic.on_message(GATEWAY, credit(index), 0.2)) == ["Begin"]
        assert logic.on_message(GATEWAY, credit(index), 0.2) == []  # in work: nothing to say yet
        [emit] = logic.on_engine(made(index), 1, 0.2)
        logic.did_emit(emit)
        logic.on_message(GATEWAY, m.ChunkAccepted(session_id=SID, epoch=1, chunk_index=index), 0.2)
    assert logic.on_message(GATEWAY, credit(1), 0.2) == [Emit(SID, 1, 1)]
    [refusal] = logic.on_message(GATEWAY, credit(0), 0.2)
    assert refusal.message.code == "index_passed"


def test_chunks_in_flight_are_bounded():
    logic = opened()
    for index in range(KEPT_CHUNKS):
        assert kinds(logic.on_message(GATEWAY, credit(index), 0.2)) == ["Begin"]
    # An acceptance of what was never made does not lift the bound.
    logic.on_message(GATEWAY, m.ChunkAccepted(session_id=SID, epoch=1, chunk_index=99), 0.2)
    [refusal] = logic.on_message(GATEWAY, credit(KEPT_CHUNKS), 0.2)
    assert refusal.message.code == "overloaded"


def test_close_is_idempotent_and_final():
    logic = opened()
    close = m.CloseSession(session_id=SID, epoch=1)
    assert logic.on_message(CONTROLLER, close, 0.2) == [e.Close(SID, 1)]
    assert logic.on_message(CONTROLLER, close, 0.2) == []  # in work: SessionReleased will come
    assert logic.on_engine(made(0), 1, 0.2) == []
    assert kinds(logic.on_engine(e.Closed(SID), 1, 0.2)) == ["SessionReleased"]
    assert kinds(logic.on_message(CONTROLLER, close, 0.2)) == ["SessionReleased"]
    [refused] = logic.on_message(CONTROLLER, open_session(), 0.2)  # a late copy of the first message
    assert refused.message.code == "stale_epoch"
    assert kinds(logic.on_message(CONTROLLER, open_session(epoch=2), 0.2)) == ["Open"]


def test_a_newer_epoch_replaces_what_is_held():
    logic = opened()
    logic.on_message(GATEWAY, credit(0), 0.2)
    assert logic.on_message(CONTROLLER, open_session(epoch=2), 0.2)[0] == e.Close(SID, 1)
    assert logic.on_engine(made(0), 1, 0.2) == []  # the earlier owner's work
    assert kinds(logic.on_message(CONTROLLER, open_session(epoch=1), 0.2)) == ["SessionRefused"]
    assert kinds(logic.on_engine(e.Closed(SID), 1, 0.2)) == ["SessionReleased"]
    assert kinds(logic.on_engine(e.Opened(SID), 2, 0.2)) == ["SessionOpened"]


def test_a_controller_that_comes_back_hears_what_is_held_and_what_broke():
    logic = opened()
    logic.on_message(CONTROLLER, open_session(sid="c" * 26), 0.2)
    logic.on_engine(e.Opened("c" * 26), 1, 0.2)
    broken = e.BrokenSession(session_id="c" * 26, chunk_index=3, code="session_poisoned", message="nan")
    assert kinds(logic.on_engine(broken, 1, 0.2)) == ["SessionBroken"]
    logic.on_disconnect(CONTROLLER, 0.3)
    assert kinds(logic.on_connect(CONTROLLER, 0.4)) == ["WorkerHello", "SessionOpened", "SessionBroken"]
    [refusal] = logic.on_message(GATEWAY, credit(0, sid="c" * 26), 0.4)
    assert refusal.message.code == "session_poisoned"


def test_leaving_ends_when_nothing_is_left_or_the_time_is_over():
    logic = opened()
    assert kinds(logic.on_terminate(1.0)) == ["WorkerLeaving"]
    [refused] = logic.on_message(CONTROLLER, open_session(sid="c" * 26), 1.0)
    assert refused.message.code == "overloaded"
    assert not any(isinstance(one, Stop) for one in logic.on_timer(8.9))
    assert any(isinstance(one, Stop) for one in logic.on_timer(9.0))
    alone = WorkerLogic(HELLO, SPEC)
    assert kinds(alone.on_terminate(0.0)) == ["Hold", "Stop"]  # nobody to ask, nothing held


def test_told_twice_it_suspends_what_it_has_and_ends_soon():
    logic = opened()
    logic.on_terminate(1.0)
    leaving, stop = logic.on_terminate(2.0)
    assert leaving.message.at_once and stop == e.Stop(SID, 1, release=True)
    assert logic.on_message(CONTROLLER, m.SuspendSession(session_id=SID, epoch=1), 2.0) == []  # it is at it already
    assert kinds(logic.on_engine(e.Stopped(SID, 0, 77), 1, 2.1)) == ["SessionSuspended"]
    assert not any(isinstance(one, Stop) for one in logic.on_timer(4.9)), "StopWorker is the controller's to say"
    logic.on_disconnect(CONTROLLER, 4.9)
    slow = opened()
    slow.on_terminate(1.0)
    slow.on_terminate(2.0)
    [ends] = [one for one in slow.on_timer(5.0) if isinstance(one, Stop)]
    assert ends.code == 0 and SID in ends.reason and "input log" in ends.reason
    third = opened()
    for _ in range(2):
        third.on_terminate(1.0)
    assert kinds(third.on_terminate(1.1)) == ["Stop"]


def test_told_twice_it_suspends_also_what_a_move_gives_back():
    logic = opened()
    logic.on_message(CONTROLLER, hand_over(), 0.2)
    for _ in range(2):
        assert e.Stop(SID, 1, release=True) not in logic.on_terminate(1.0)
    logic.on_engine(e.Stopped(SID, 0, 77), 1, 1.1)
    logic.on_message(CONTROLLER, open_session(epoch=2, adopt=True), 1.2)
    assert e.Stop(SID, 2, release=True) in logic.on_engine(e.Opened(SID, 0, adopted=True), 2, 1.3)


def test_a_peer_that_sends_what_is_not_its_to_send_is_dropped():
    logic = opened()
    assert isinstance(logic.on_message(GATEWAY, open_session(), 0.2)[0], Drop)
    assert isinstance(logic.on_message(CONTROLLER, credit(0), 0.2)[0], Drop)
    assert isinstance(logic.on_message(GATEWAY, lease(), 0.2)[0], Drop)


def test_sizes_prompt_switches_and_decoders_the_model_lacks_are_refused():
    logic = connected()
    for wrong in (open_session(width=9), open_session(prompt_switch="blend"), open_session(decoder="light")):
        [refused] = logic.on_message(CONTROLLER, wrong, 0.2)
        assert refused.message.code == "invalid_request"
