"""The worker's protocol without I/O: single cases, then random schedules with lost, doubled and late messages."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from turboserve.geometry import SlotGeometry
from turboserve.model.interface import ModelSpec
from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_books import (
    CONTROLLER,
    GATEWAY,
    KEPT_CHUNKS,
    Beat,
    Drop,
    Emit,
    Phase,
    Send,
    Stop,
)
from turboserve.runtime.worker_logic import WorkerLogic

LEASE_S = 2.0
SPEC = ModelSpec(
    name="tiny",
    model_hash="0" * 16,
    width=8,
    height=8,
    fps=12.0,
    chunk_frames_first=4,
    chunk_frames_rest=4,
    slot=SlotGeometry(1, 16, 1, 3),
    denoise_steps=4,
    denoise_steps_floor=1,
)
HELLO = m.WorkerHello(
    worker_id="w0",
    worker_epoch=7,
    pid=1,
    node="local",
    model="tiny",
    model_hash="0" * 16,
    numerics_id="n",
    device="cpu",
    device_class="cpu",
    slot_count=3,
    capacity=3,
)
SID = "b" * 26


def lease(epoch: int = 7) -> m.Lease:
    return m.Lease(lease_s=LEASE_S, worker_epoch=epoch)


def open_session(sid: str = SID, epoch: int = 1, **changes) -> m.OpenSession:
    values = {"seed": 1, "width": 8, "height": 8, "prompt": "p"} | changes
    return m.OpenSession(session_id=sid, epoch=epoch, **values)


def credit(index: int, sid: str = SID, epoch: int = 1, prompt: str = "p") -> m.Credit:
    return m.Credit(
        session_id=sid,
        epoch=epoch,
        chunk_index=index,
        steps=4,
        prompt=prompt,
        prompt_version=1,
        deadline_s=0.5,
    )


def made(index: int, sid: str = SID) -> e.FinishedChunk:
    digest = hashlib.sha256(f"{sid} {index}".encode()).hexdigest()
    return e.FinishedChunk(
        session_id=sid,
        chunk_index=index,
        frames=np.zeros((4, 8, 8, 3), np.uint8),
        digest=digest,
        digest_prev="" if index == 0 else hashlib.sha256(f"{sid} {index - 1}".encode()).hexdigest(),
        steps=4,
        prompt_version=1,
        wait_s=0.0,
        denoise_s=0.0,
        decode_s=0.0,
        batch_size=1.0,
    )


def kinds(actions) -> list[str]:
    return [type(one.message if isinstance(one, Send) else one).__name__ for one in actions]


def connected() -> WorkerLogic:
    """A worker with both channels and a lease until 2.0, at time 0."""
    logic = WorkerLogic(HELLO, SPEC)
    assert kinds(logic.on_connect(CONTROLLER, 0.0)) == ["Hold", "WorkerHello"]
    assert kinds(logic.on_connect(GATEWAY, 0.0)) == ["WorkerHello"]
    assert logic.on_message(CONTROLLER, lease(), 0.1) == [e.Hold(False)]
    return logic


def opened() -> WorkerLogic:
    logic = connected()
    assert kinds(logic.on_message(CONTROLLER, open_session(), 0.1)) == ["Open"]
    assert kinds(logic.on_engine(e.Opened(SID), 1, 0.1)) == ["SessionOpened"]
    return logic


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


def prepare(sid: str = SID, move_id: int = 1) -> m.PrepareSession:
    return m.PrepareSession(session_id=sid, move_id=move_id, seed=1, width=8, height=8, prompt="p")


def hand_over(epoch: int = 1, move_id: int = 1) -> m.HandOver:
    return m.HandOver(session_id=SID, epoch=epoch, move_id=move_id, target="w1")


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


NAMES = "bcde"


class WorkerMachine(RuleBasedStateMachine):
    """The logic between a controller, a gateway and an engine that are honest, and wires that are not."""

    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed):
        self.rng = random.Random(seed)
        self.logic = WorkerLogic(HELLO, SPEC)
        self.now_s = 0.0
        self.epochs: dict[str, int] = {}
        self.engine: dict[str, tuple[int, int]] = {}  # session -> (epoch, chunks made)
        self.work: list[tuple[str, int, int]] = []  # (session, epoch, chunk) that the engine was told to make
        self.wire: list[tuple[str, m.Message]] = []
        self.connected: set[str] = set()
        self.emitted: dict[str, int] = {}  # session -> highest index that left, here or before it came here
        self.closed: set[tuple[str, int]] = set()
        self.held = False
        self.last_heard_s = float("-inf")
        self.outbox: list[Emit] = []
        self.points: dict[str, int] = {}  # what lies in the arena: session -> chunk that comes next
        self.prepared: set[str] = set()
        self.stops: dict[str, e.Stop] = {}
        self.handed_over: set[str] = set()
        self.move_id = 0
        for source in (CONTROLLER, GATEWAY):
            self.connect(source)
        self.deliver(CONTROLLER, lease())
        for name in NAMES[:2]:
            self.send_open(name, True)

    def obey(self, actions):
        for action in actions:
            if isinstance(action, e.Open):
                event = self.open_in_engine(action)
                self.obey(self.logic.on_engine(event, action.epoch, self.now_s))
            elif isinstance(action, e.Stop):
                assert self.engine[action.session_id][0] == action.epoch and action.session_id not in self.stops
                self.stops[action.session_id] = action
                queued = [one for one in self.work if one[0] == action.session_id]
                begun = queued[: self.rng.randrange(2)]  # perhaps one is in work
                self.work = [one for one in self.work if one[0] != action.session_id or one in begun]
            elif isinstance(action, e.Prepare):
                assert action.session_id not in self.engine and action.session_id not in self.prepared
                if len(self.engine) + len(self.prepared) < 3:
                    self.prepared.add(action.session_id)
                    event = e.Prepared(action.session_id, action.move_id)
                else:
                    event = e.PrepareFailed(action.session_id, action.move_id, "pool_exhausted", "full")
                self.obey(self.logic.on_engine(event, -1, self.now_s))
            elif isinstance(action, e.DropPrepared):
                self.prepared.discard(action.session_id)
            elif isinstance(action, e.Close):
                self.last_pass_ends(action.session_id, action.epoch)
                if self.engine.get(action.session_id, (None,))[0] == action.epoch:
                    self.leave_engine(action.session_id)
                self.closed.add((action.session_id, action.epoch))
                self.obey(self.logic.on_engine(e.Closed(action.session_id), action.epoch, self.now_s))
            elif isinstance(action, e.Begin):
                assert self.engine[action.session_id][0] == action.epoch
                assert action.session_id not in self.handed_over  # it stands still until it is told
                self.work.append((action.session_id, action.epoch, action.request.chunk_index))
            elif isinstance(action, e.Hold):
                self.held = action.hold
            elif isinstance(action, Emit):
                self.outbox.append(action)
            else:
                assert isinstance(action, Send | Beat), action

    def open_in_engine(self, action):
        sid = action.session_id
        assert (sid, action.epoch) not in self.closed  # a closed epoch stays closed
        if action.adopt_epoch is not None and self.engine.get(sid, (None,))[0] == action.adopt_epoch:
            self.stops.pop(sid, None)
            self.handed_over.discard(sid)
            self.work = [one for one in self.work if one[0] != sid]
            count = self.engine[sid][1]
            self.engine[sid] = (action.epoch, count)
            return e.Opened(sid, count, adopted=True)
        assert sid not in self.engine  # one owner at a time, whatever the epoch
        if action.adopt_epoch is not None and not action.restore:
            return e.OpenFailed(sid, "not_found", "not here")
        if sid not in self.prepared and len(self.engine) + len(self.prepared) >= 3:
            return e.OpenFailed(sid, "pool_exhausted", "full")
        self.prepared.discard(sid)
        count = self.points.get(sid, 0) if action.restore else 0
        self.engine[sid] = (action.epoch, count)
        if not action.restore or sid not in self.points:
            return e.Opened(sid)
        self.emitted[sid] = max(self.emitted.get(sid, -1), count - 1)
        kept = tuple(made(index, sid) for index in range(max(0, count - KEPT_CHUNKS), count))
        return e.Opened(sid, count, restored=True, made=kept)

    def leave_engine(self, sid):
        del self.engine[sid]
        self.stops.pop(sid, None)
        self.handed_over.discard(sid)
        self.work = [one for one in self.work if one[0] != sid]

    @rule(fails=st.sampled_from([False, False, False, True]))
    def boundaries_are_reached(self, fails):
        for sid, stop in list(self.stops.items()):
            while any(one[0] == sid for one in self.work) and sid in self.stops:
                self.work.sort(key=lambda one: one[0] != sid)
                self.make_one(False)
            if sid not in self.stops:
                continue
            del self.stops[sid]
            count = self.engine[sid][1]
            if fails:
                event = e.StopFailed(sid, count, "arena_full", "no room")
            else:
                self.points[sid] = count
                event = e.Stopped(sid, count, 1)
                if stop.release:
                    self.leave_engine(sid)
                    self.closed.add((sid, stop.epoch))
                else:
                    self.handed_over.add(sid)
            self.obey(self.logic.on_engine(event, stop.epoch, self.now_s))

    def last_pass_ends(self, sid, epoch):
        """What the engine made just before it heard of the close; the logic must not take it for another epoch's."""
        epoch_held, count = self.engine.get(sid, (None, 0))
        if epoch_held == epoch and (sid, epoch, count) in self.work:
            before = {sid: len(one.made) for sid, one in self.logic.sessions.items()}
            assert self.logic.on_engine(made(count, sid), epoch, self.now_s) == []
            assert before == {sid: len(one.made) for sid, one in self.logic.sessions.items()}

    @rule(count=st.integers(1, 8))
    def frames_leave(self, count):
        self.ring_has_room(count)

    def ring_has_room(self, count):
        """Emits leave when the ring has room, which may be long after they were decided."""
        for _ in range(min(count, len(self.outbox))):
            action = self.outbox.pop(0)
            chunk = self.logic.may_emit(action, self.now_s)
            if chunk is None:
                continue
            key = (action.session_id, action.epoch)
            assert key not in self.closed  # nothing is emitted after close
            assert self.now_s < self.last_heard_s + LEASE_S  # nor without a lease
            assert chunk.chunk_index == action.chunk_index
            assert self.logic.sessions[action.session_id].epoch == action.epoch
            last = self.emitted.get(action.session_id, -1)
            assert action.chunk_index <= last + 1  # contiguous; again is allowed, a gap is not
            self.emitted[action.session_id] = max(last, action.chunk_index)
            self.logic.did_emit(action)

    def deliver(self, source, message):
        if source not in self.connected:
            return
        if source == GATEWAY or isinstance(message, m.Lease):
            self.last_heard_s = max(self.last_heard_s, self.now_s)
        self.obey(self.logic.on_message(source, message, self.now_s))

    @rule(source=st.sampled_from([CONTROLLER, GATEWAY]))
    def connect(self, source):
        if source not in self.connected:
            self.connected.add(source)
            self.obey(self.logic.on_connect(source, self.now_s))

    @rule(source=st.sampled_from([CONTROLLER, GATEWAY]))
    def disconnect(self, source):
        if source in self.connected and self.rng.random() < 0.5:
            self.connected.discard(source)
            self.obey(self.logic.on_disconnect(source, self.now_s))

    @rule(name=st.sampled_from(NAMES), newer=st.booleans(), restore=st.booleans(), adopt=st.booleans())
    def send_open(self, name, newer, restore=False, adopt=False):
        sid = name * 26
        self.epochs[sid] = self.epochs.get(sid, 0) + newer if sid in self.epochs else 1
        self.send(CONTROLLER, open_session(sid=sid, epoch=self.epochs[sid], restore=restore, adopt=adopt))

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 1), move=st.booleans())
    def send_stop(self, name, back, move):
        sid = name * 26
        epoch = max(0, self.epochs.get(sid, 0) - back)
        if move:
            self.move_id += self.rng.randrange(2)
            message = m.HandOver(session_id=sid, epoch=epoch, move_id=max(1, self.move_id), target="w1")
        else:
            message = m.SuspendSession(session_id=sid, epoch=epoch)
        self.send(CONTROLLER, message)

    @rule(name=st.sampled_from(NAMES), newer=st.booleans(), drop=st.booleans())
    def send_prepare(self, name, newer, drop):
        self.move_id += newer
        if drop:
            self.send(CONTROLLER, m.DropPrepared(session_id=name * 26, move_id=self.move_id))
        else:
            self.send(CONTROLLER, prepare(sid=name * 26, move_id=self.move_id))

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 1))
    def send_close(self, name, back):
        sid = name * 26
        epoch = max(0, self.epochs.get(sid, 0) - back)
        if back or self.rng.random() < 0.3:  # else few sessions would live long enough
            self.send(CONTROLLER, m.CloseSession(session_id=sid, epoch=epoch))

    @rule(name=st.sampled_from(NAMES), index=st.integers(0, 6), old=st.booleans())
    def send_credit(self, name, index, old):
        sid = name * 26
        epoch = max(0, self.epochs.get(sid, 0) - old)
        self.send(GATEWAY, credit(index, sid=sid, epoch=epoch))

    @rule(at=st.integers(0, 2), count=st.integers(1, 6))
    def stream(self, at, count):
        """A gateway at work: accept what came, give the next credits."""
        if not self.logic.sessions:
            return
        sid = sorted(self.logic.sessions)[at % len(self.logic.sessions)]
        session = self.logic.sessions[sid]
        for _ in range(count):
            sent = self.emitted.get(sid, -1)
            if sent >= 0:
                accepted = m.ChunkAccepted(session_id=sid, epoch=session.epoch, chunk_index=sent)
                self.send(GATEWAY, accepted)
            self.send(GATEWAY, credit(session.next_index, sid=sid, epoch=session.epoch))
            if self.rng.random() < 0.8:
                self.engine_works(1, False)
            if self.rng.random() < 0.3:
                self.ring_has_room(4)

    @rule(name=st.sampled_from(NAMES), index=st.integers(0, 6))
    def send_accepted(self, name, index):
        sid = name * 26
        message = m.ChunkAccepted(session_id=sid, epoch=self.epochs.get(sid, 0), chunk_index=index)
        self.send(GATEWAY, message)

    @rule()
    def send_lease(self):
        self.send(CONTROLLER, lease())

    def send(self, source, message):
        """Wires lose, double and delay messages, and keep copies that come much later."""
        fate = self.rng.choice(["once", "once", "once", "once", "twice", "later", "lost"])
        for _ in range({"once": 1, "twice": 2}.get(fate, 0)):
            self.deliver(source, message)
        if fate == "later" or self.rng.random() < 0.2:
            self.wire.append((source, message))

    @rule(count=st.integers(1, 6))
    def late_messages_arrive(self, count):
        for _ in range(min(count, len(self.wire))):
            self.deliver(*self.wire.pop(self.rng.randrange(len(self.wire))))

    @rule(count=st.integers(1, 4))
    def passes_run(self, count):
        self.engine_works(count, True)

    def engine_works(self, count, breaks):
        for _ in range(count):
            if self.work and not self.held:
                self.make_one(breaks)

    def make_one(self, breaks):
        sid, epoch, index = self.work.pop(0)
        held_epoch, count = self.engine.get(sid, (None, 0))
        if held_epoch != epoch:
            return
        assert index == count  # the engine is asked for chunks in order, each once
        if breaks and self.rng.random() < 0.2:
            event = e.BrokenSession(session_id=sid, chunk_index=index, code="session_poisoned", message="nan")
            self.work = [one for one in self.work if one[0] != sid]
        else:
            self.engine[sid] = (epoch, count + 1)
            if self.rng.random() < 0.7:
                self.points[sid] = count + 1  # write-through
            event = made(index, sid)
        self.obey(self.logic.on_engine(event, epoch, self.now_s))

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0]), answered=st.booleans())
    def time_passes(self, seconds, answered):
        self.now_s += seconds
        self.obey(self.logic.on_timer(self.now_s))
        if self.rng.random() < 0.5:
            self.ring_has_room(8)
        if answered:
            self.deliver(CONTROLLER, lease())

    @invariant()
    def books_agree(self):
        if not hasattr(self, "logic"):
            return
        assert {sid: one.epoch for sid, one in self.logic.sessions.items()} == {
            sid: epoch for sid, (epoch, _) in self.engine.items()
        }
        assert not self.logic.closing
        assert set(self.logic.prepared) == self.prepared and not self.prepared & set(self.engine)
        assert len(self.engine) + len(self.prepared) <= 3
        for sid, session in self.logic.sessions.items():
            assert (session.phase is Phase.HANDED_OVER) == (sid in self.handed_over)
            assert session.phase is not Phase.STOPPING or sid in self.stops
            assert not session.early or session.phase is Phase.STOPPING
        for session in self.logic.sessions.values():
            assert len(session.made) <= KEPT_CHUNKS
            assert session.next_index - session.accepted <= KEPT_CHUNKS
            assert session.phase is not Phase.OPENING
        if self.now_s >= self.last_heard_s + LEASE_S:
            assert self.logic.lease_left_s(self.now_s) == 0.0

    def teardown(self):
        """Everything closes at the newest epoch: nothing is left."""
        if not hasattr(self, "logic"):
            return
        self.connected.add(CONTROLLER)
        self.obey(self.logic.on_connect(CONTROLLER, self.now_s))
        for sid, session in list(self.logic.sessions.items()):
            self.deliver(CONTROLLER, m.CloseSession(session_id=sid, epoch=session.epoch))
        for sid in list(self.logic.prepared):
            self.deliver(CONTROLLER, m.DropPrepared(session_id=sid, move_id=self.move_id))
        assert not self.engine and not self.logic.sessions and not self.logic.closing and not self.prepared


TestWorkerMachine = WorkerMachine.TestCase
TestWorkerMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
