"""A worker's half of a move to another node, without I/O: what stands still when, and what goes on when it fails."""

from __future__ import annotations

import msgspec
import pytest
from worker_logic_harness import HELLO, SID, SPEC, credit, hand_over, kinds, lease, made, open_session, prepare

from turboserve.runtime import messages as m
from turboserve.runtime import worker_books as b
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_books import CONTROLLER, GATEWAY, Emit, Phase, Send
from turboserve.runtime.worker_far import POINTS_TOLD_S
from turboserve.runtime.worker_logic import WorkerLogic

THERE, ELSEWHERE = "10.0.0.2:4000", "10.0.0.3:4000"


def joined(**changes) -> WorkerLogic:
    """A worker with an arena of its own, both channels and a lease."""
    hello = msgspec.structs.replace(HELLO, arena_bytes=1 << 20, own_arena=True, **changes)
    logic = WorkerLogic(hello, SPEC)
    logic.on_connect(CONTROLLER, 0.0)
    logic.on_connect(GATEWAY, 0.0)
    logic.on_message(CONTROLLER, lease(), 0.1)
    return logic


def running(chunks: int = 1) -> WorkerLogic:
    logic = joined()
    logic.on_message(CONTROLLER, open_session(), 0.1)
    logic.on_engine(e.Opened(SID), 1, 0.1)
    for index in range(chunks):
        logic.on_message(GATEWAY, credit(index), 0.2)
        logic.on_engine(made(index), 1, 0.3)
        logic.did_emit(Emit(SID, 1, index))
        logic.on_message(GATEWAY, m.ChunkAccepted(session_id=SID, epoch=1, chunk_index=index), 0.3)
    return logic


def far(move_id: int = 1, address: str = THERE, epoch: int = 1) -> m.HandOver:
    return msgspec.structs.replace(hand_over(epoch, move_id), target_address=address)


def ask(move_id: int = 1, **changes) -> m.PrepareSession:
    return msgspec.structs.replace(prepare(move_id=move_id), awaits=True, **changes)


def send_point(epoch: int = 1, move_id: int = 1) -> m.SendPoint:
    return m.SendPoint(session_id=SID, epoch=epoch, move_id=move_id, target="w1", target_address=THERE)


def test_a_point_is_sent_ahead_while_the_session_goes_on():
    logic = running()
    assert logic.on_message(CONTROLLER, send_point(), 0.4) == [b.SendPoint(SID, 1, THERE, ahead=True)]
    assert kinds(logic.on_message(GATEWAY, credit(1), 0.5)) == ["Begin"]
    [sent] = logic.on_point(b.PointSent(SID, 1, True, 500), 0.6)
    assert sent == Send(CONTROLLER, m.PointSent(session_id=SID, move_id=1, sent_bytes=500))
    [kept] = logic.on_point(b.PointNotSent(SID, 1, True, "refused", "full"), 0.6)
    assert (kept.message.code, kept.message.message) == ("refused", "full")
    [nothing] = logic.on_point(b.PointNotSent(SID, 1, True, "not_found", "none yet"), 0.6)
    assert nothing.message == m.PointSent(session_id=SID, move_id=1), "before its first point the stop carries it all"
    [kept] = logic.on_point(b.PointNotSent("c" * 26, 1, True, "not_found", "none"), 0.6)
    assert kept.message.code == "not_found", "of a session that nobody has it is an answer"
    assert logic.on_message(CONTROLLER, send_point(epoch=0), 0.7) == [], "of an owner that was replaced"
    assert logic.sessions[SID].phase is Phase.OPEN


def test_it_stands_still_until_the_rest_has_arrived_and_says_for_how_long():
    logic = running()
    assert logic.on_message(CONTROLLER, far(), 0.4) == [e.Stop(SID, 1, release=False)]
    assert logic.on_engine(e.Stopped(SID, 1, 900), 1, 0.5) == [b.SendPoint(SID, 1, THERE, ahead=False)]
    assert logic.on_message(GATEWAY, credit(1), 0.6) == [], "it waits: the point may not arrive"
    assert logic.on_message(CONTROLLER, far(), 0.6) == [], "the same again"
    refused, handed = logic.on_point(b.PointSent(SID, 1, False, 300), 0.75)
    assert (refused.message.code, refused.message.next_index) == ("moving", 1)
    assert handed.message.stopped_ms == pytest.approx(250)
    assert (handed.message.next_index, handed.message.point_bytes, handed.message.sent_bytes) == (1, 900, 300)
    assert logic.on_point(b.PointSent(SID, 1, False, 300), 0.8) == []
    assert kinds(logic.on_timer(1.0)) == ["Beat", "HandedOver"]


def test_a_point_that_does_not_arrive_leaves_the_session_as_it_was():
    logic = running()
    logic.on_message(GATEWAY, credit(1), 0.4)  # given, and not begun by the engine
    logic.on_message(CONTROLLER, far(), 0.4)
    logic.on_engine(e.Stopped(SID, 1, 900), 1, 0.5)
    logic.on_message(GATEWAY, credit(2), 0.6)
    kept, *begun = logic.on_point(b.PointNotSent(SID, 1, False, "worker_failed", "cut off"), 0.7)
    assert (kept.message.code, kept.message.move_id) == ("worker_failed", 1)
    assert [one.request.chunk_index for one in begun] == [1, 2]
    assert logic.sessions[SID].phase is Phase.OPEN and logic.sessions[SID].stopped is None


def test_a_move_given_up_while_the_rest_is_under_way_goes_on_and_hears_nothing_of_it_later():
    logic = running()
    logic.on_message(CONTROLLER, far(), 0.4)
    logic.on_engine(e.Stopped(SID, 1, 900), 1, 0.5)
    assert kinds(logic.on_message(CONTROLLER, open_session(epoch=2, adopt=True), 0.6)) == ["Open"]
    assert logic.on_point(b.PointSent(SID, 1, False, 300), 0.7) == []
    assert kinds(logic.on_engine(e.Opened(SID, 1, adopted=True), 2, 0.8)) == ["SessionOpened"]
    # And a second move of it: the answer to the first is still not taken for this one's.
    logic.on_message(CONTROLLER, far(move_id=2, epoch=2), 0.9)
    logic.on_engine(e.Stopped(SID, 1, 900), 2, 1.0)
    assert logic.on_point(b.PointSent(SID, 1, False, 300), 1.1) == []
    assert "HandedOver" in kinds(logic.on_point(b.PointSent(SID, 2, False, 0), 1.2))


def test_a_newer_move_to_another_place_gets_the_point_there():
    logic = running()
    logic.on_message(CONTROLLER, far(), 0.4)
    logic.on_engine(e.Stopped(SID, 1, 900), 1, 0.5)
    assert logic.on_message(CONTROLLER, far(2, ELSEWHERE), 0.6) == [b.SendPoint(SID, 2, ELSEWHERE, ahead=False)]
    assert logic.on_point(b.PointSent(SID, 1, False, 300), 0.7) == []
    [handed] = logic.on_point(b.PointSent(SID, 2, False, 900), 0.8)
    assert handed.message.move_id == 2
    # Handed over, and moved on under a third name: the point goes there before it says so again.
    assert logic.on_message(CONTROLLER, far(3, THERE), 0.9) == [b.SendPoint(SID, 3, THERE, ahead=False)]
    [handed] = logic.on_point(b.PointSent(SID, 3, False, 0), 1.0)
    assert (handed.message.move_id, handed.message.next_index) == (3, 1)
    logic.on_message(CONTROLLER, m.CloseSession(session_id=SID, epoch=1), 1.1)
    assert logic.on_point(b.PointSent(SID, 3, False, 0), 1.2) == []


def test_a_destination_says_prepared_once_it_has_the_slot_and_an_address():
    for first, second in ((0, 1), (1, 0)):
        logic = joined()
        assert logic.on_message(CONTROLLER, ask(), 0.2) == [e.Prepare(SID, 1), b.AwaitPoint(SID, 1)]
        steps = [
            lambda one=logic: one.on_engine(e.Prepared(SID, 1), -1, 0.3),
            lambda one=logic: one.on_point(b.PointAwaited(SID, 1, THERE), 0.3),
        ]
        assert steps[first]() == []
        [said] = steps[second]()
        assert said.message == m.SessionPrepared(session_id=SID, move_id=1, address=THERE)
        assert logic.on_message(CONTROLLER, ask(), 0.4) == [said], "asked twice"
        opened = open_session(epoch=2, restore=True, move_id=1)
        assert kinds(logic.on_message(CONTROLLER, opened, 0.5)) == ["RefusePoint", "Open"]


def test_a_newer_name_of_a_move_is_awaited_under_that_name():
    logic = joined()
    logic.on_message(CONTROLLER, ask(), 0.2)
    logic.on_engine(e.Prepared(SID, 1), -1, 0.3)
    logic.on_point(b.PointAwaited(SID, 1, THERE), 0.3)
    assert logic.on_message(CONTROLLER, ask(2), 0.4) == [b.AwaitPoint(SID, 2)]
    assert logic.on_point(b.PointAwaited(SID, 1, THERE), 0.5) == []
    assert kinds(logic.on_point(b.PointAwaited(SID, 2, THERE), 0.5)) == ["SessionPrepared"]


def test_a_point_alone_takes_no_slot():
    logic = joined()
    assert logic.on_message(CONTROLLER, ask(slot=False), 0.2) == [b.AwaitPoint(SID, 1)]
    assert kinds(logic.on_point(b.PointAwaited(SID, 1, THERE), 0.3)) == ["SessionPrepared"]
    assert logic.on_message(CONTROLLER, m.DropPrepared(session_id=SID, move_id=1), 0.4) == [b.RefusePoint(SID)]
    logic.on_message(CONTROLLER, ask(2, slot=False), 0.5)
    assert kinds(logic.on_message(CONTROLLER, ask(3), 0.6)) == ["RefusePoint", "Prepare", "AwaitPoint"]
    assert {"DropPrepared", "RefusePoint"} <= set(kinds(logic.on_timer(40.0))), "nobody asked for it"


def test_where_nothing_can_be_awaited_or_sent_it_says_so():
    logic = joined()
    logic.on_message(CONTROLLER, ask(), 0.2)
    drop, refuse, said = logic.on_point(b.PointNotAwaited(SID, 1, "worker_failed", "cannot listen"), 0.3)
    assert isinstance(drop, e.DropPrepared) and isinstance(refuse, b.RefusePoint)
    assert said.message.message == "cannot listen" and not logic.prepared
    bare = WorkerLogic(HELLO, SPEC)
    bare.on_connect(CONTROLLER, 0.0)
    [refused] = bare.on_message(CONTROLLER, ask(), 0.2)
    assert refused.message.code == "not_offered"
    [kept] = bare.on_message(CONTROLLER, send_point(), 0.2)
    assert (kept.message.code, type(kept.message)) == ("not_offered", m.PointKept)


def test_what_lies_in_its_own_arena_is_said_now_and_then_and_dropped_when_told():
    logic = running()
    assert not any(isinstance(one, b.TellPoints) for one in logic.on_timer(POINTS_TOLD_S - 1))
    assert any(isinstance(one, b.TellPoints) for one in logic.on_timer(POINTS_TOLD_S + 1))
    forget = m.ForgetPoint(session_id=SID)
    assert logic.on_message(CONTROLLER, forget, 12.0) == [], "it is here"
    logic.on_message(CONTROLLER, m.SuspendSession(session_id=SID, epoch=1), 12.0)
    logic.on_engine(e.Stopped(SID, 1, 5), 1, 12.1)
    assert logic.on_message(CONTROLLER, forget, 12.2) == [b.ForgetPoint(SID)]
    shared = WorkerLogic(msgspec.structs.replace(HELLO, arena_bytes=1), SPEC)
    shared.on_connect(CONTROLLER, 0.0)
    assert not any(isinstance(one, b.TellPoints) for one in shared.on_timer(POINTS_TOLD_S + 1))
