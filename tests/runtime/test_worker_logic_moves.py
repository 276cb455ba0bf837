"""The worker's protocol without I/O: suspends, moves, adoptions."""

from __future__ import annotations

from worker_logic_harness import SID, connected, credit, hand_over, kinds, made, open_session, opened, prepare

from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_books import (
    CONTROLLER,
    GATEWAY,
    KEPT_CHUNKS,
    Beat,
    Emit,
)


def test_a_suspended_session_is_gone_and_says_so_again_when_asked():
    logic = opened()
    logic.on_message(GATEWAY, credit(0), 0.2)
    ask = m.SuspendSession(session_id=SID, epoch=1)
    assert logic.on_message(CONTROLLER, ask, 0.2) == [e.Stop(SID, 1, release=True)]
    assert logic.on_message(CONTROLLER, ask, 0.2) == []
    assert logic.on_message(GATEWAY, credit(1), 0.2) == []  # it waits for what the engine says
    assert kinds(logic.on_engine(made(0), 1, 0.3)) == ["Emit"]  # the chunk in work is finished
    refused, suspended = logic.on_engine(e.Stopped(SID, 1, 77), 1, 0.4)
    assert (refused.message.code, refused.message.chunk_index) == ("moving", 1)
    assert suspended.message == m.SessionSuspended(session_id=SID, epoch=1, next_index=1, point_bytes=77)
    assert logic.on_message(CONTROLLER, ask, 0.5) == [suspended]
    assert suspended in logic.on_connect(CONTROLLER, 0.6)
    [late] = logic.on_message(CONTROLLER, open_session(), 0.7)
    assert late.message.code == "stale_epoch"
    assert kinds(logic.on_message(CONTROLLER, m.CloseSession(session_id=SID, epoch=1), 0.8)) == ["SessionReleased"]
    assert suspended not in logic.on_connect(CONTROLLER, 0.9)


def test_a_suspend_that_cannot_be_done_loses_no_credit():
    logic = opened()
    for index in range(2):
        logic.on_message(GATEWAY, credit(index), 0.2)
    logic.on_message(CONTROLLER, m.SuspendSession(session_id=SID, epoch=1), 0.2)
    logic.on_message(GATEWAY, credit(2), 0.2)
    logic.on_engine(made(0), 1, 0.3)
    kept, *begins = logic.on_engine(e.StopFailed(SID, 1, "arena_full", "no room"), 1, 0.4)
    assert (kept.message.code, kept.message.move_id) == ("arena_full", 0)
    assert [one.request.chunk_index for one in begins] == [1, 2]


def test_a_source_that_handed_over_stands_still_and_repeats_itself_until_told():
    logic = opened()
    assert logic.on_message(CONTROLLER, hand_over(), 0.2) == [e.Stop(SID, 1, release=False)]
    [handed] = logic.on_engine(e.Stopped(SID, 0, 5), 1, 0.3)
    assert handed.message == m.HandedOver(session_id=SID, epoch=1, move_id=1, next_index=0, point_bytes=5)
    assert logic.on_timer(0.5) == [Beat(), handed]
    assert handed in logic.on_connect(CONTROLLER, 0.6)
    [refused] = logic.on_message(GATEWAY, credit(0), 0.6)
    assert refused.message.code == "moving"
    [renamed] = logic.on_message(CONTROLLER, hand_over(move_id=2), 0.6)
    assert renamed.message.move_id == 2
    assert logic.on_message(CONTROLLER, m.CloseSession(session_id=SID, epoch=1), 0.7) == [e.Close(SID, 1)]
    assert kinds(logic.on_engine(e.Closed(SID), 1, 0.7)) == ["SessionReleased"]
    assert logic.on_timer(1.2) == [Beat()]


def test_a_move_given_up_goes_on_at_the_source_under_the_newer_epoch():
    logic = opened()
    logic.on_message(GATEWAY, credit(0), 0.2)
    logic.on_message(CONTROLLER, hand_over(), 0.2)
    adopt = open_session(epoch=2, adopt=True)
    [action] = logic.on_message(CONTROLLER, adopt, 0.3)
    assert (action.epoch, action.adopt_epoch) == (2, 1)
    assert logic.on_message(CONTROLLER, adopt, 0.3) == []
    assert logic.on_engine(made(0), 1, 0.3) == []  # it was out before the engine heard of it: kept for the new epoch
    assert logic.on_engine(e.Stopped(SID, 1), 1, 0.3) == []
    [told] = logic.on_engine(e.Opened(SID, 1, adopted=True), 2, 0.4)
    assert (told.message.epoch, told.message.next_index) == (2, 1)
    assert logic.on_message(GATEWAY, credit(0, epoch=2), 0.5) == [Emit(SID, 2, 0)]
    assert kinds(logic.on_message(GATEWAY, credit(1, epoch=2), 0.5)) == ["Begin"]
    [stale] = logic.on_message(CONTROLLER, open_session(epoch=1), 0.5)
    assert stale.message.code == "stale_epoch"


def test_a_chunk_whose_emit_was_of_an_ended_epoch_holds_nothing_back_after_an_adoption():
    """Each chunk is made between the stop and the adoption: its emit is of an epoch that is over when it would leave,
    and a gateway that holds the chunk from a former owner does not ask for it again."""
    logic = opened()
    for index, epoch in enumerate(range(1, KEPT_CHUNKS + 1)):
        assert kinds(logic.on_message(GATEWAY, credit(index, epoch=epoch), 0.2)) == ["Begin"]
        logic.on_message(CONTROLLER, hand_over(epoch=epoch, move_id=epoch), 0.2)
        [emit] = logic.on_engine(made(index), epoch, 0.3)
        logic.on_message(CONTROLLER, open_session(epoch=epoch + 1, adopt=True), 0.3)
        assert logic.may_emit(emit, 0.3) is None
        logic.on_engine(e.Opened(SID, index + 1, adopted=True), epoch + 1, 0.4)
    # It may still ask for the last of them, and it may ask for the next one.
    [again] = logic.on_message(GATEWAY, credit(KEPT_CHUNKS - 1, epoch=KEPT_CHUNKS + 1), 0.5)
    assert isinstance(again, Emit) and logic.may_emit(again, 0.5) is not None
    assert kinds(logic.on_message(GATEWAY, credit(KEPT_CHUNKS, epoch=KEPT_CHUNKS + 1), 0.5)) == ["Begin"]


def test_adopting_what_is_not_held_is_refused_unless_it_may_be_restored():
    logic = connected()
    [refused] = logic.on_message(CONTROLLER, open_session(adopt=True), 0.2)
    assert refused.message.code == "not_found"
    [action] = logic.on_message(CONTROLLER, open_session(adopt=True, restore=True), 0.2)
    assert action.restore and action.adopt_epoch is None


def test_a_restored_session_gives_its_last_chunks_again_when_they_are_asked_for():
    logic = connected()
    logic.on_message(CONTROLLER, open_session(epoch=3, restore=True), 0.2)
    assert logic.on_message(GATEWAY, credit(8, epoch=3), 0.2) == []  # it waits until the point is read
    chunks = tuple(made(index) for index in range(5, 9))
    told, emit = logic.on_engine(e.Opened(SID, 9, restored=True, made=chunks), 3, 0.3)
    assert (told.message.next_index, told.message.restored) == (9, True)
    assert emit == Emit(SID, 3, 8) and logic.may_emit(emit, 0.3) is chunks[3]
    [refused] = logic.on_message(GATEWAY, credit(4, epoch=3), 0.4)
    assert refused.message.code == "index_passed"
    [begin] = logic.on_message(GATEWAY, credit(9, epoch=3), 0.4)
    assert begin.request.chunk_index == 9


def test_a_prepared_slot_is_used_dropped_or_forgotten():
    logic = connected()
    assert logic.on_message(CONTROLLER, prepare(), 0.2) == [e.Prepare(SID, 1)]
    [told] = logic.on_engine(e.Prepared(SID, 1), -1, 0.3)
    assert told.message == m.SessionPrepared(session_id=SID, move_id=1)
    assert logic.on_message(CONTROLLER, prepare(), 0.3) == [told]
    [older] = logic.on_message(CONTROLLER, prepare(move_id=0), 0.3)
    assert older.message.code == "conflict"
    assert logic.on_message(CONTROLLER, m.DropPrepared(session_id=SID, move_id=0), 0.3) == []
    assert logic.on_message(CONTROLLER, m.DropPrepared(session_id=SID, move_id=1), 0.3) == [e.DropPrepared(SID, 1)]
    logic.on_message(CONTROLLER, prepare(move_id=2), 0.4)
    assert logic.on_engine(e.Prepared(SID, 1), -1, 0.4) == []  # about the slot that was dropped
    assert e.DropPrepared(SID, 2) in logic.on_timer(40.0)
    logic.on_message(CONTROLLER, prepare(move_id=3), 40.0)
    opens = logic.on_message(CONTROLLER, open_session(epoch=2, restore=True, move_id=3), 40.0)
    assert kinds(opens) == ["Open"] and not logic.prepared


def test_a_worker_that_drains_prepares_nothing_but_takes_back_what_it_held():
    logic = opened()
    logic.on_message(CONTROLLER, m.DrainWorker(worker_id="w0"), 0.2)
    [refused] = logic.on_message(CONTROLLER, prepare(sid="c" * 26), 0.2)
    assert refused.message.code == "overloaded"
    logic.on_message(CONTROLLER, hand_over(), 0.2)
    logic.on_engine(e.Stopped(SID, 0), 1, 0.2)
    assert kinds(logic.on_message(CONTROLLER, open_session(epoch=2, adopt=True), 0.2)) == ["Open"]


def test_what_the_worker_does_not_hold_it_says_is_free():
    logic = connected()
    for ask in (m.SuspendSession(session_id=SID, epoch=4), hand_over(epoch=4)):
        assert kinds(logic.on_message(CONTROLLER, ask, 0.2)) == ["SessionReleased"]
