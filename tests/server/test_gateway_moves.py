"""The gateway while sessions move: owners that stop, are silent, are ahead; restarts; prompts that outlive a kill."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from turboserve.runtime import messages as m
from turboserve.server.delivered import DELIVERED_S
from turboserve.server.effects import Append, Deliver, Effect, Measure, ToController, ToViewer, ToWorker
from turboserve.server.gateway_config import WIDE_QUOTAS, Limits
from turboserve.server.gateway_logic import GatewayLogic, NewSession
from turboserve.server.log_records import Asked, replay
from turboserve.server.pacing import Pace, StreamClock
from turboserve.server.session_credits import RESENDS_MAX
from turboserve.server.session_stream import SessionStream, StreamShape

SID = "a" * 26
SHAPE = StreamShape("shapes", "h", 2, 2, 12.0, 1, 4)
CLOCK = StreamClock(0.25, 0.25)
VIEWER = 1


class Gateway:
    """The logic, a log that commits at once, and what was sent to whom."""

    def __init__(self, disk: list[Any] | None = None) -> None:
        self.now_s = 10.0
        self.disk: list[Any] = disk if disk is not None else []
        self.base = len(self.disk)
        self.to_worker: list[tuple[str, Any]] = []
        self.to_controller: list[Any] = []
        self.to_viewer: list[dict[str, Any]] = []
        self.delivered: list[int] = []
        self.measured: list[tuple[str, float]] = []
        self.logic = GatewayLogic(Limits(), WIDE_QUOTAS, WIDE_QUOTAS, lambda: "fresh")
        if self.disk:
            self.take(self.logic.restore([(replay(self.disk)[SID], SHAPE, CLOCK)], self.now_s, 0.0))
        self.take(self.logic.controller_connected(self.now_s))

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Append():
                    self.disk.append(effect.record)
                case ToWorker():
                    self.to_worker.append((effect.worker_id, effect.message))
                case ToController():
                    self.to_controller.append(effect.message)
                case ToViewer():
                    self.to_viewer.append(effect.message)
                case Deliver():
                    self.delivered.append(effect.chunk.index)
                case Measure():
                    self.measured.append((effect.name, effect.value))

    def commit(self) -> None:
        before = -1
        while before != len(self.disk):
            before = len(self.disk)
            self.take(self.logic.durable(len(self.disk) - self.base, self.now_s))

    def controller(self, message: Any) -> None:
        self.take(self.logic.from_controller(message, self.now_s))
        self.commit()

    def open(self, pace: Pace = Pace.FREE) -> Gateway:
        wish = NewSession(
            sid=SID,
            token="t",
            tenant="t",
            tenant_weight=1.0,
            wide=True,
            shape=SHAPE,
            clock=CLOCK,
            seed=1,
            steps=4,
            format="raw",
            prompt="p",
        )
        op_id, effects = self.logic.create(wish, self.now_s)
        self.take(effects)
        self.commit()
        self.controller(m.OpDone(op_id=op_id, state="active"))
        self.place(1, "w0")
        return self.attach("t", 0, pace)

    def attach(self, token: str, next_index: int, pace: Pace = Pace.FREE) -> Gateway:
        self.take(self.logic.attach(VIEWER, SID, token, next_index, None, pace, self.now_s))
        self.commit()
        return self

    def place(self, epoch: int, worker: str, next_index: int = 0, **more: Any) -> None:
        fields = {"numerics_id": "n", "next_index": next_index, **more}
        self.controller(m.SessionPlaced(session_id=SID, epoch=epoch, worker_id=worker, **fields))

    def state(self, state: str, epoch: int, owned: bool, **more: Any) -> None:
        self.controller(m.SessionState(session_id=SID, state=state, epoch=epoch, owned=owned, **more))

    def credits(self) -> list[tuple[str, int, int]]:
        return [(worker, one.epoch, one.chunk_index) for worker, one in self.to_worker if isinstance(one, m.Credit)]

    def finish(self, index: int, epoch: int) -> None:
        digests = [""]
        for number in range(index + 1):
            digests.append(hashlib.sha256(f"{number}{digests[-1]}".encode()).hexdigest())
        ready = m.ChunkReady(
            session_id=SID,
            epoch=epoch,
            chunk_index=index,
            digest=digests[-1],
            digest_prev=digests[-2],
            frames=4,
            steps=4,
            prompt_version=1,
        )
        self.take(self.logic.chunk(ready, None, self.now_s))
        self.commit()

    def refuse(self, index: int, epoch: int, next_index: int, code: str) -> None:
        refusal = m.ChunkRefused(session_id=SID, epoch=epoch, chunk_index=index, next_index=next_index, code=code)
        self.take(self.logic.refused(refusal, self.now_s))
        self.commit()

    def wait(self, seconds: float) -> None:
        """Time passes as the process lets it: tick at each wake."""
        until_s = self.now_s + seconds
        while (wake_s := self.logic.wake_s()) is not None and wake_s <= until_s:
            self.now_s = max(self.now_s, wake_s)
            self.take(self.logic.tick(self.now_s))
            self.commit()
        self.now_s = until_s

    @property
    def session(self) -> SessionStream:
        return self.logic.sessions[SID]


def test_a_source_that_stopped_keeps_its_credit_for_the_next_owner() -> None:
    gateway = Gateway().open()
    gateway.finish(0, 1)
    for _ in range(20):  # however often: it is no failure
        gateway.refuse(1, 1, 1, "moving")
    assert not gateway.session.owned and gateway.session.ended_s is None
    assert gateway.credits() == [("w0", 1, 0), ("w0", 1, 1)]
    gateway.now_s += 0.5
    gateway.place(2, "w1", next_index=1)
    assert gateway.credits()[-1] == ("w1", 2, 1)
    gateway.finish(1, 2)
    assert gateway.delivered == [0, 1]
    assert [round(value, 3) for name, value in gateway.measured if name == "pause_migration"] == [0.5]


def test_a_move_that_was_given_up_goes_on_at_the_source() -> None:
    gateway = Gateway().open()
    gateway.finish(0, 1)
    gateway.refuse(1, 1, 1, "moving")
    gateway.state("active", 1, owned=True)
    assert gateway.credits()[-1] == ("w0", 1, 1)


def test_the_chunk_in_work_when_a_move_begins_is_taken() -> None:
    gateway = Gateway().open()
    gateway.state("migrating", 1, owned=False)
    gateway.finish(0, 1)
    assert gateway.delivered == [0]
    assert gateway.credits() == [("w0", 1, 0)]  # no further one
    assert [one["state"] for one in gateway.to_viewer if one["type"] == "state"][-1] == "migrating"
    gateway.place(2, "w1", next_index=1)
    gateway.finish(0, 1)  # the zombie's
    assert gateway.delivered == [0] and gateway.credits()[-1] == ("w1", 2, 1)


def test_a_new_owner_starts_where_its_recovery_point_is() -> None:
    gateway = Gateway().open()
    for index in range(3):
        gateway.finish(index, 1)
    gateway.controller(m.WorkerChanged(worker_id="w0", worker_epoch=1, state="ready"))
    gateway.controller(m.WorkerChanged(worker_id="w0", worker_epoch=1, state="lost"))
    gateway.place(2, "w1", next_index=1)
    assert gateway.credits()[-1] == ("w1", 2, 1)
    gateway.finish(1, 2)
    gateway.finish(2, 2)
    assert gateway.credits()[-1] == ("w1", 2, 3) and gateway.delivered == [0, 1, 2]
    assert gateway.session.counts.replayed == 2


def test_a_silent_owner_is_asked_again_then_reported() -> None:
    gateway = Gateway().open()
    gateway.wait(1.1)
    assert gateway.credits() == [("w0", 1, 0)] * 2
    gateway.wait(60.0)
    stuck = [one for one in gateway.to_controller if isinstance(one, m.SessionStuck)]
    assert stuck and (stuck[0].code, stuck[0].next_index, stuck[0].epoch) == ("silent", 0, 1)
    assert len(stuck) <= 60 / RESENDS_MAX
    gateway.place(2, "w1")
    gateway.finish(0, 2)
    assert gateway.delivered == [0]


def test_an_owner_that_stopped_and_nobody_follows_is_reported() -> None:
    gateway = Gateway().open()
    gateway.refuse(0, 1, 0, "not_found")
    gateway.wait(30.0)
    stuck = [one for one in gateway.to_controller if isinstance(one, m.SessionStuck)]
    assert stuck and stuck[0].code == "silent"


def test_an_owner_that_cannot_give_a_chunk_again_is_reported() -> None:
    gateway = Gateway().open()
    gateway.refuse(0, 1, 5, "index_passed")
    stuck = [one for one in gateway.to_controller if isinstance(one, m.SessionStuck)]
    assert [(one.code, one.next_index) for one in stuck] == [("ahead", 0)]
    assert gateway.session.ended_s is None


def test_an_old_word_of_where_the_owner_is_does_no_harm() -> None:
    """A controller that says again what the owner said long ago: the owner itself corrects it."""
    gateway = Gateway().open()
    for index in range(3):
        gateway.finish(index, 1)
    gateway.place(2, "w0", next_index=0)
    gateway.refuse(0, 2, 3, "index_passed")
    assert gateway.credits()[-1] == ("w0", 2, 3)


def test_a_gateway_that_starts_adopts_and_goes_on() -> None:
    first = Gateway().open()
    for index in range(3):
        first.finish(index, 1)
    first.take(first.logic.viewer(VIEWER, SID, lambda one: one.ack(VIEWER, 0, first.now_s), first.now_s)[1])
    first.commit()
    again = Gateway(disk=first.disk)
    asked = [one for one in again.to_controller if isinstance(one, m.CreateSession)]
    assert [(one.adopt, one.next_index) for one in asked] == [(True, 1)]
    assert not any(isinstance(one, m.EndSession) for one in again.to_controller)
    again.controller(m.OpDone(op_id=asked[0].op_id, state="active"))
    again.place(1, "w0", next_index=0)  # the same owner, the same epoch; what it said when it opened
    assert again.credits()[-1] == ("w0", 1, 0)
    again.refuse(0, 1, 4, "index_passed")
    assert again.credits()[-1] == ("w0", 1, 1)
    again.attach("fresh", 1)
    again.finish(1, 1)
    again.finish(2, 1)
    assert again.delivered == [1, 2]


def test_a_controller_without_room_is_asked_again_and_nothing_ends() -> None:
    again = Gateway(disk=Gateway().open().disk)
    asked = next(one for one in again.to_controller if isinstance(one, m.CreateSession))
    again.controller(m.OpDone(op_id=asked.op_id, code="overloaded", message="full"))
    again.wait(1.5)
    assert again.session.ended_s is None
    assert len([one for one in again.to_controller if isinstance(one, m.CreateSession)]) == 2


def test_a_session_that_only_the_controller_knows_is_ended() -> None:
    gateway = Gateway()
    for _ in range(3):
        gateway.state("active", 4, owned=True)
    ends = [one for one in gateway.to_controller if isinstance(one, m.EndSession)]
    assert [one.session_id for one in ends] == [SID]


def test_an_end_is_told_until_it_is_heard() -> None:
    gateway = Gateway().open()
    gateway.take(gateway.logic.end(SID, None, "deleted", gateway.now_s))
    gateway.wait(120.0)
    gateway.take(gateway.logic.controller_connected(gateway.now_s))
    ends = [one for one in gateway.to_controller if isinstance(one, m.EndSession)]
    assert len(ends) == 2 and ends[0].op_id == ends[1].op_id
    gateway.controller(m.OpDone(op_id=ends[0].op_id, state="closed"))
    gateway.take(gateway.logic.controller_connected(gateway.now_s))
    assert len([one for one in gateway.to_controller if isinstance(one, m.EndSession)]) == 2


def prompt(gateway: Gateway, text: str, event_id: str, from_index: int | None = None) -> bool:
    good, effects = gateway.logic.viewer(
        VIEWER,
        SID,
        lambda one: one.prompt(VIEWER, text, event_id, from_index, gateway.now_s),
        gateway.now_s,
        event_id,
    )
    gateway.take(effects)
    return good


def accepted(gateway: Gateway) -> list[tuple[str, int, int]]:
    return [
        (one["event_id"], one["prompt_version"], one["from_index"])
        for one in gateway.to_viewer
        if one["type"] == "prompt_accepted"
    ]


def test_a_prompt_is_durable_before_it_is_answered_and_outlives_the_gateway() -> None:
    gateway = Gateway().open()
    assert prompt(gateway, "q", "e1", from_index=3)
    assert accepted(gateway) == []
    assert isinstance(gateway.disk[-1], Asked)
    gateway.commit()
    assert accepted(gateway) == [("e1", 2, 3)]
    prompt(gateway, "r", "e2", from_index=6)
    gateway.commit()

    again = Gateway(disk=gateway.disk)
    again.place(5, "w0")
    again.attach("fresh", 0)
    assert prompt(again, "q", "e1", from_index=3)  # the same message again: the same answer, nothing new
    again.commit()
    assert accepted(again) == [("e1", 2, 3)]
    assert not prompt(again, "other words", "e1", from_index=3)
    assert [one["event_id"] for one in again.to_viewer if one["type"] == "error"] == ["e1"]
    for index in range(5):
        again.finish(index, 5)
        again.take(again.logic.viewer(VIEWER, SID, lambda one, i=index: one.ack(VIEWER, i, 0.0), again.now_s)[1])
        again.commit()
    inputs = {one.chunk_index: one.prompt for _, one in again.to_worker if isinstance(one, m.Credit)}
    assert [inputs[index] for index in range(6)] == ["p", "p", "p", "q", "q", "q"]
    assert [one.text for one in again.session.prompts.waiting] == ["r"]


@pytest.mark.parametrize("count", [3, 400])
def test_the_log_tells_what_waits_also_after_it_was_compacted(count: int) -> None:
    gateway = Gateway().open()
    for number in range(count):
        assert prompt(gateway, f"p{number}", f"e{number}", from_index=2 + number % 5)
        gateway.commit()
    logged = replay(gateway.disk)[SID]
    assert replay(logged.as_records())[SID] == logged
    assert len(logged.asked) <= 129
    again = Gateway(disk=list(logged.as_records()))
    assert again.session.prompts.waiting == gateway.session.prompts.waiting
    assert again.session.prompts.newest_version == gateway.session.prompts.newest_version


def told(gateway: Gateway, kind: type) -> list[Any]:
    return [one for one in gateway.to_controller if isinstance(one, kind)]


def test_the_controller_hears_when_the_next_chunk_is_due_and_again_when_that_changed() -> None:
    gateway = Gateway().open()
    active = told(gateway, m.SessionActivity)[-1]
    assert (active.active, active.due_index, active.due_s, active.every_s) == (True, 0, pytest.approx(0.625), 0.0)
    gateway.finish(0, 1)
    before = len(told(gateway, m.SessionActivity))
    gateway.take(gateway.logic.attach(VIEWER + 1, SID, "fresh", 0, None, Pace.LIVE, gateway.now_s))
    (again,) = told(gateway, m.SessionActivity)[before:]
    # Its period begins with chunk 0, which is there: chunk 1 is due one chunk time after the player's start.
    assert (again.active, again.due_index, again.due_s, again.every_s) == (True, 1, pytest.approx(0.875), 0.25)
    gateway.take(gateway.logic.pause(SID, "t", gateway.now_s))
    paused = told(gateway, m.SessionActivity)[-1]
    assert (paused.active, paused.due_s) == (False, None)


def test_a_controller_that_starts_hears_which_steps_a_session_runs_on() -> None:
    gateway = Gateway().open()
    gateway.controller(m.SetSteps(session_id=SID, steps=2))
    gateway.take(gateway.logic.controller_connected(gateway.now_s))
    said = told(gateway, m.CreateSession)[-1]
    assert (said.adopt, said.steps_now) == (True, 2)
    assert said.steps == told(gateway, m.CreateSession)[0].steps != 2, "what it is restored to"


def test_the_controller_hears_what_viewers_got_at_most_so_often() -> None:
    gateway = Gateway().open(Pace.LIVE)
    assert told(gateway, m.ChunksDelivered) == [m.ChunksDelivered(chunks=0, reduced=0, late=0)]
    gateway.wait(0.5)
    gateway.finish(0, 1)
    gateway.controller(m.SetSteps(session_id=SID, steps=4))
    gateway.finish(1, 1)
    gateway.finish(2, 1)
    assert [one.chunks for one in told(gateway, m.ChunksDelivered)] == [0, 1], "the rest waits its turn"
    gateway.wait(DELIVERED_S)
    assert told(gateway, m.ChunksDelivered)[-1] == m.ChunksDelivered(chunks=3, reduced=0, late=0)
    count = len(told(gateway, m.ChunksDelivered))
    gateway.wait(5.0)
    assert len(told(gateway, m.ChunksDelivered)) == count, "nothing is said again without news"
    gateway.take(gateway.logic.controller_connected(gateway.now_s))
    assert told(gateway, m.ChunksDelivered)[-1].chunks == 3
    free = Gateway().open()
    free.wait(1.0)
    free.finish(0, 1)
    assert told(free, m.ChunksDelivered)[-1].chunks == 0, "as fast as there is room: no load that must be met"


def marks(gateway: Gateway) -> list[str]:
    return [chunk.continuity for chunk in gateway.logic.sessions[SID].ring]


def test_the_first_chunk_in_other_bits_says_so_and_only_that_one():
    gateway = Gateway().open()
    gateway.finish(0, 1)
    gateway.place(2, "w1", 1, numerics_id="other", continuity="approximate")
    gateway.place(2, "w1", 1, numerics_id="other")  # said again by a controller that was restarted
    gateway.finish(1, 2)
    gateway.finish(2, 2)
    assert marks(gateway) == ["", "approximate", ""]
    assert gateway.logic.sessions[SID].numerics_id == "other"


def test_the_mark_waits_for_its_chunk_through_a_worker_that_is_lost():
    gateway = Gateway().open()
    gateway.finish(0, 1)
    gateway.place(2, "w1", 2, numerics_id="other", continuity="approximate")
    gateway.finish(1, 2)  # of the point: made as before
    gateway.place(3, "w2", 2, numerics_id="other")
    gateway.finish(2, 3)
    assert marks(gateway) == ["", "", "approximate"]


def test_a_chain_goes_on_over_frames_in_other_bits_but_never_silently():
    for continuity in ("approximate", ""):
        gateway = Gateway().open()
        gateway.finish(0, 1)
        gateway.place(2, "w1", 0, numerics_id="other", continuity=continuity)
        for index in (0, 1):
            credit = [one for one in gateway.credits() if one[1] == 2][-1]
            assert credit == ("w1", 2, index)
            ready = m.ChunkReady(
                session_id=SID,
                epoch=2,
                chunk_index=index,
                digest=f"{index + 7:064x}",
                digest_prev=f"{index + 6:064x}" if index else "",
                frames=4,
                steps=4,
                prompt_version=1,
            )
            gateway.take(gateway.logic.chunk(ready, None, gateway.now_s))
            gateway.commit()
        session = gateway.logic.sessions[SID]
        assert (session.next_index == 2 and marks(gateway) == ["", "approximate"]) is bool(continuity)
        assert (session.state == "failed") is not bool(continuity)
