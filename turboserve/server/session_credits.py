"""A session's side towards controller and worker: inputs bound, credits sent, chunks accepted.

    input -> bound to chunk i in the log -> durable -> credit(i) to the owner -> chunk i accepted -> viewer -> ack

Four counters say where a stream stands, and never cross:

    delivered <= next_index <= sent <= durable <= bound <= delivered + 4

`delivered` counts acked chunks, `next_index` accepted ones, `sent` credits given, `durable` and `bound` chunks whose
inputs are on disk and in the log. At most one chunk is bound ahead of `next_index`, so an input always reaches the
first chunk that has not begun. After a worker was lost, `sent` falls back and the same inputs are sent again; chunks
that were accepted before are made again and dropped.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from turboserve.errors import CorruptState
from turboserve.runtime import messages
from turboserve.server.attach_tokens import AttachTokens
from turboserve.server.chunk_times import ChunkTimes
from turboserve.server.effects import Deliver, Measure, ToController, ToViewer, ToWorker
from turboserve.server.log_records import Bound
from turboserve.server.outbox import Outbox
from turboserve.server.pacing import Pace, Period, StreamClock
from turboserve.server.prompt_line import PromptLine
from turboserve.server.stream_shape import Begun, Counts, StoredChunk, StreamShape, Viewer
from turboserve.session import PublicState

RING_CHUNKS = 4
"""Chunks that may stand unacked; generation waits for an ack when all of them do."""
IDLE_REPORT_S = 1.0
"""A viewer that lags shorter than this is still active to the controller."""
REFUSALS_MAX = 8


@dataclass(slots=True, kw_only=True)
class SessionCredits:
    """All that is known of one session, and its worker's side. Every method takes the time; effects go to `outbox`."""

    sid: str
    tenant: str
    shape: StreamShape
    clock: StreamClock
    seed: int
    format: str
    prompt_switch: str
    max_chunks: int | None
    tokens: AttachTokens
    prompts: PromptLine
    outbox: Outbox
    created_s: float
    steps: int
    grace_s: float
    slow_close_s: float
    session_s: float

    bound: int = 0
    durable: int = 0
    sent: int = 0
    next_index: int = 0
    delivered: int = 0
    restored: int = 0
    """After a gateway restart: chunks up to here were begun before it and may be in the viewer's hands."""
    digest: str = ""
    ring: deque[StoredChunk] = field(default_factory=deque)
    begun: Begun | None = None
    in_flight: bool = False

    state: str = PublicState.QUEUED.value
    owned: bool = False
    epoch: int = 0
    worker_id: str = ""
    numerics_id: str = ""
    queue_position: int = -1
    resident_bytes: int = 0

    viewer: Viewer | None = None
    detached_s: float = 0.0
    period: Period | None = None
    pace: Pace = Pace.LIVE
    paused: bool = False
    full_s: float | None = None
    """Since when the viewer has as many unacked chunks as it may."""
    refusals: int = 0
    reported: tuple[bool, bool] | None = None
    shown: tuple[Any, ...] | None = None
    scheduled_s: float | None = None
    adrift: bool = False
    """Of an earlier gateway: until the controller has taken it in anew, what it says of the session is stale."""
    called_back: bool = False
    wish: Any = None
    first_attach_s: float | None = None
    ended_s: float | None = None
    end_code: int = 1000
    end_reason: str = ""
    counts: Counts = field(default_factory=Counts)
    times: ChunkTimes = field(default_factory=ChunkTimes)
    asked: dict[int, float] = field(default_factory=dict)
    """When prompts came that no chunk shows yet, by version."""

    # ------------------------------------------------------------------ controller and worker

    def placed(self, message: messages.SessionPlaced, now_s: float) -> None:
        """A worker owns the session under a new epoch and takes credits from `next_index` on."""
        if message.epoch <= self.epoch or self.ended_s is not None or self.adrift:
            return
        waited = not self.owned and self.bound == self.next_index
        self.epoch, self.worker_id, self.numerics_id = message.epoch, message.worker_id, message.numerics_id
        self.owned, self.in_flight = True, False
        self.queue_position = -1
        self.refusals = 0
        self.sent = min(message.next_index, self.next_index)
        if self.state in (PublicState.QUEUED, PublicState.RECOVERING, PublicState.SUSPENDED, PublicState.MIGRATING):
            self.state = PublicState.ACTIVE.value
        if waited and self.bound == 0 and self.period is not None:
            self.period = Period(now_s, self.period.first_index, self.period.pace)
        self.pump(now_s)

    def changed(self, message: messages.SessionState, now_s: float) -> None:
        """The controller's word on the session's state; an older epoch's word is stale."""
        if self.ended_s is not None or self.adrift or message.epoch < self.epoch:
            return
        self.state, self.queue_position = message.state, message.queue_position
        if message.state == PublicState.FAILED:
            self.fail(message.code or "session_failed", message.reason or "the session failed", now_s)
            return
        if message.state == PublicState.CLOSED:
            if not self._complete():
                self.end(message.reason or "closed", 1000, now_s)
            return
        if not message.owned:
            self.lose()
        self.pump(now_s)

    def lose(self) -> None:
        """Nobody owns the session: no credit until it is placed again."""
        self.owned, self.in_flight = False, False

    def refused(self, message: messages.ChunkRefused, now_s: float) -> None:
        """The worker cannot take the credit; it says which chunk it would take."""
        if not self.owned or message.epoch != self.epoch or message.chunk_index != self.sent - 1:
            return
        self.in_flight = False
        self.refusals += 1
        if self.refusals > REFUSALS_MAX or message.next_index > self.next_index:
            self.fail("session_failed", f"the worker refused chunk {message.chunk_index} ({message.code})", now_s)
            return
        self.sent = message.next_index
        self.pump(now_s)

    def chunk(self, message: messages.ChunkReady, pixels: Any, now_s: float) -> bool:
        """A chunk from a worker. Only the next one of the newest epoch counts; True when it was accepted."""
        if self.ended_s is not None or message.epoch < self.epoch or not self.owned:
            self.counts.fenced += 1
            self.outbox.put(Measure("chunk_fenced"))
            return False
        index = message.chunk_index
        if not self.in_flight or index != self.sent - 1:
            self.counts.fenced += 1
            self.outbox.put(Measure("chunk_fenced"))
            return False
        self.in_flight = False
        self.epoch = message.epoch
        self.refusals = 0
        if index < self.next_index:  # made again after a worker was lost; the viewer has it or the ring does
            self.counts.replayed += 1
            self._tell_accepted(index)
            self.pump(now_s)
            return False
        if message.digest_prev != self.digest and message.continuity != "approximate":
            raise CorruptState(f"chunk {index} does not continue the stream it belongs to")
        self._accept(message, pixels, now_s)
        self.pump(now_s)
        return True

    def _accept(self, message: messages.ChunkReady, pixels: Any, now_s: float) -> None:
        begun = self.begun or Begun(message.chunk_index, now_s, now_s, False)
        chunk = StoredChunk(
            index=message.chunk_index,
            epoch=message.epoch,
            pixels=pixels,
            frames=message.frames,
            prompt_version=message.prompt_version,
            steps=message.steps,
            digest=message.digest,
            digest_prev=message.digest_prev,
            released_s=begun.released_s,
            accepted_s=now_s,
            batch_size=message.batch_size,
            continuity=message.continuity,
        )
        self.next_index += 1
        self.digest = message.digest
        self.ring.append(chunk)
        while (
            len(self.ring) > RING_CHUNKS
        ):  # cannot happen while credits are counted right; memory must not depend on it
            self.ring.popleft()
        if self._full() and self.viewer is not None:
            self.full_s = now_s
        self.times.accepted(message, now_s)
        self._measure(begun, chunk, now_s)
        self._tell_accepted(chunk.index)
        self._deliver(chunk)
        self._release_behind(now_s)

    def _measure(self, begun: Begun, chunk: StoredChunk, now_s: float) -> None:
        out = self.outbox
        out.put(Measure("chunk_latency", now_s - begun.released_s))
        out.put(Measure("batch_size", chunk.batch_size))
        if begun.live:
            on_time = now_s <= begun.due_s
            self.counts.on_time += on_time
            self.counts.late += not on_time
            out.put(Measure("chunk_on_time" if on_time else "chunk_late"))
        if self.asked and (asked_s := self.asked.get(chunk.prompt_version)) is not None:
            self.asked = {version: at_s for version, at_s in self.asked.items() if version > chunk.prompt_version}
            out.put(Measure("input_to_frame", now_s - asked_s))
        if chunk.index == 0 and self.first_attach_s is not None:
            out.put(Measure("first_chunk_latency", now_s - self.first_attach_s))

    def _tell_accepted(self, index: int) -> None:
        accepted = messages.ChunkAccepted(session_id=self.sid, epoch=self.epoch, chunk_index=index)
        self.outbox.put(ToWorker(self.worker_id, accepted))

    def _deliver(self, chunk: StoredChunk) -> None:
        viewer = self.viewer
        if viewer is not None and viewer.ready and chunk.index == viewer.next_index:
            viewer.next_index += 1
            self.outbox.put(Deliver(viewer.connection, chunk))

    # ------------------------------------------------------------------ credits

    def pump(self, now_s: float) -> None:
        """Bind and send whatever may go now, and tell controller and viewer what changed."""
        if self.ended_s is not None:
            return
        if self._may_bind() and self._release_s() <= now_s:
            self._bind(now_s)
        self._send(now_s)
        self._report(now_s)
        self._show()

    def _full(self) -> bool:
        return self.next_index - self.delivered >= RING_CHUNKS

    def _complete(self) -> bool:
        return self.max_chunks is not None and self.next_index >= self.max_chunks

    def _may_bind(self) -> bool:
        """Whether nothing but time stands between the session and its next credit."""
        return (
            self.period is not None
            and not self.paused
            and self.owned
            and self.bound == self.next_index
            and self.bound - self.delivered < RING_CHUNKS
            and (self.max_chunks is None or self.bound < self.max_chunks)
        )

    def _release_s(self) -> float:
        assert self.period is not None
        return self.period.release_s(self.bound, self.clock)

    def _bind(self, now_s: float) -> None:
        assert self.period is not None
        index = self.bound
        due_s = self.period.due_s(index, self.clock, now_s)
        self.begun = Begun(index, now_s, due_s, self.period.pace is Pace.LIVE)
        self.times.begun(index, self._release_s(), now_s, due_s, self.begun.live)
        version, text, is_new = self.prompts.bind(index, self.steps)
        self.bound += 1
        prompt = text if is_new or index == 0 else None
        record = Bound(sid=self.sid, index=index, steps=self.steps, version=version, prompt=prompt)
        self.outbox.append(record, lambda later_s: self._durable(index, later_s))

    def _durable(self, index: int, now_s: float) -> None:
        self.durable = max(self.durable, index + 1)
        self.pump(now_s)

    def _send(self, now_s: float) -> None:
        """At most one credit is out; after a loss the durable ones are sent again, one after the other."""
        if not self.owned or self.in_flight or self.sent >= self.durable:
            return
        index = self.sent
        version, text = self.prompts.at(index)
        due_s = self.begun.due_s if self.begun is not None else now_s
        credit = messages.Credit(
            session_id=self.sid,
            epoch=self.epoch,
            chunk_index=index,
            steps=self.prompts.steps_at(index),
            prompt=text,
            prompt_version=version,
            prompt_switch=self.prompt_switch,
            deadline_s=max(0.0, due_s - now_s),
        )
        self.sent += 1
        self.in_flight = True
        self.times.credited(index, self.epoch, self.worker_id, now_s)
        self.outbox.put(ToWorker(self.worker_id, credit))

    def send_again(self, now_s: float) -> None:
        """The credit that is out may have been lost with its channel; the worker takes a repeated one once."""
        if self.in_flight:
            self.in_flight = False
            self.sent -= 1
        self.pump(now_s)

    # ------------------------------------------------------------------ what others are told

    def public(self) -> str:
        """One of the eight public states."""
        if self.state == PublicState.ACTIVE and not self._wants():
            return PublicState.IDLE.value
        return self.state

    def _wants(self) -> bool:
        """Whether chunks are asked for: attached or still within its credits, not paused, not done."""
        if self.period is None or self.paused or self._complete():
            return False
        return self.viewer is not None or self.bound - self.delivered < RING_CHUNKS

    def _report(self, now_s: float) -> None:
        lagging = self.full_s is not None and now_s - self.full_s >= IDLE_REPORT_S
        report = (self._wants() and not lagging, self.viewer is not None)
        if report != self.reported:
            self.reported = report
            self.outbox.put(
                ToController(messages.SessionActivity(session_id=self.sid, active=report[0], attached=report[1]))
            )

    def _show(self) -> None:
        """Tell the viewer the state when it is another than it was told last."""
        if self.viewer is None or not self.viewer.ready:
            return
        shown = (self.public(), self.paused, self.queue_position)
        if shown == self.shown:
            return
        self.shown = shown
        message: dict[str, Any] = {"type": "state", "state": shown[0]}
        if self.paused:
            message["reason"] = "paused"
        if self.queue_position >= 0:
            message["queue_position"] = self.queue_position
        self.outbox.put(ToViewer(self.viewer.connection, message))

    # ------------------------------------------------------------------ the viewer's side, in session_stream.py

    def fail(self, code: str, message: str, now_s: float) -> None:
        raise NotImplementedError

    def end(self, reason: str, code: int, now_s: float) -> None:
        raise NotImplementedError

    def _release_behind(self, now_s: float) -> None:
        raise NotImplementedError
