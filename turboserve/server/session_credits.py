"""A session's side towards controller and worker: inputs bound, credits sent, chunks accepted.

    input -> bound to chunk i in the log -> durable -> credit(i) to the owner -> chunk i accepted -> viewer -> ack

Four counters say where a stream stands, and never cross:

    delivered <= next_index <= sent <= durable <= bound <= delivered + 4

`delivered` counts acked chunks, `next_index` accepted ones, `sent` credits given, `durable` and `bound` chunks whose
inputs are on disk and in the log. At most one chunk is bound ahead of `next_index`, so an input always reaches the
first chunk that has not begun. After a worker was lost, `sent` falls back and the same inputs are sent again; chunks
that were accepted before are made again and dropped, but for those that the viewer needs in another format
(`session_ring.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from turboserve.errors import CorruptState
from turboserve.runtime import messages
from turboserve.server.effects import Measure, ToController, ToWorker
from turboserve.server.log_records import Bound
from turboserve.server.pacing import Pace, Period
from turboserve.server.session_facts import IDLE_REPORT_S, RING_CHUNKS
from turboserve.server.session_ring import SessionRing
from turboserve.server.stream_shape import Begun, StoredChunk
from turboserve.session import PublicState
from turboserve.video.encoded import Format

__all__ = ["IDLE_REPORT_S", "RING_CHUNKS", "SessionCredits"]

REFUSALS_MAX = 8
RESENDS_MAX = 12
"""A credit is sent again this often, two chunk times apart, before the controller is told that its owner is silent."""
RESEND_MIN_S = 1.0
OWNER_STOPPED = frozenset({"moving", "not_found", "stale_epoch", "session_poisoned"})
"""Refusals of an owner that makes no chunk under this epoch any more; the controller says who does."""


@dataclass(slots=True, kw_only=True)
class SessionCredits(SessionRing):
    """A session's side towards controller and worker. Every method takes the time; effects go to `outbox`."""

    # ------------------------------------------------------------------ controller and worker

    def placed(self, message: messages.SessionPlaced, now_s: float) -> None:
        """A worker owns the session under a new epoch and takes credits from `next_index` on."""
        if message.epoch <= self.epoch or self.ended_s is not None:
            return
        waited = not self.owned and self.bound == self.next_index
        self.epoch, self.worker_id, self.numerics_id = message.epoch, message.worker_id, message.numerics_id
        if message.continuity:
            self.continuity, self.continuity_from = message.continuity, message.next_index
        self.owned, self.in_flight = True, False
        self.queue_position = -1
        self.refusals = self.resends = self.refused_epoch = 0
        self.sent = min(message.next_index, self.next_index)
        if self.state in (PublicState.QUEUED, PublicState.RECOVERING, PublicState.SUSPENDED, PublicState.MIGRATING):
            self.state = PublicState.ACTIVE.value
        if waited and self.bound == 0 and self.period is not None:
            self.period = Period(now_s, self.period.first_index, self.period.pace)
        self.pump(now_s)

    def changed(self, message: messages.SessionState, now_s: float) -> None:
        """The controller's word on the session's state; an older epoch's word is stale."""
        if self.ended_s is not None or message.epoch < self.epoch:
            return
        self.state, self.queue_position = message.state, message.queue_position
        self.device_bytes, self.host_bytes = message.device_bytes, message.host_bytes
        self.disk_bytes = message.disk_bytes
        if message.state == PublicState.FAILED:
            self.fail(message.code or "session_failed", message.reason or "the session failed", now_s)
            return
        if message.state == PublicState.CLOSED:
            if not self._complete():
                self.end(message.reason or "closed", 1000, now_s)
            return
        if not message.owned:
            self.owned = False
        elif message.epoch == self.epoch and self.worker_id and not self.owned:
            self.owned = True  # the owner was to stop, and goes on instead
            self.refused_epoch = 0
            self.send_again(now_s)
        self.pump(now_s)

    def lose(self, now_s: float) -> None:
        """The owner is gone, and with it whatever was in flight: no credit until the session is placed again."""
        self.state = PublicState.RECOVERING.value
        self.owned = self.in_flight = False

    def refused(self, message: messages.ChunkRefused, now_s: float) -> None:
        """The worker cannot take the credit; it says which chunk it would take."""
        index = message.chunk_index
        if not self.in_flight or message.epoch != self.epoch or index != self.credited:
            return
        if message.code == "overloaded":
            return  # it is sent again when it is overdue
        self.in_flight = False
        if message.code == messages.NOT_ENCODED:
            self.fail("session_failed", f"worker {self.worker_id} cannot encode chunk {index}; its log says why", now_s)
            return
        if message.code in OWNER_STOPPED:
            self.sent = index
            self._await_epoch(now_s)
            self.pump(now_s)
            return
        if message.next_index > index and index in (self.next_index, self._misfit()):
            self._await_epoch(now_s)
            self._stuck("ahead")
            return
        if message.next_index > index:  # we hold that chunk and were told an old place: go on from there
            self.sent = min(message.next_index, self.next_index)
            self.pump(now_s)
            return
        self.refusals += 1
        if self.refusals > REFUSALS_MAX:
            self.fail("session_failed", f"the worker refused chunk {index} ({message.code})", now_s)
            return
        self.sent = message.next_index
        self.pump(now_s)

    def _await_epoch(self, now_s: float) -> None:
        """The owner takes no credit under this epoch: who goes on with the session has a newer one. Should none come,
        the controller is asked."""
        self.owned = False
        self.refused_epoch = self.epoch
        self.credit_due_s = now_s + RESENDS_MAX * self._resend_s()
        self.outbox.wakes(self)

    def _stuck(self, code: str) -> None:
        self.counts.stuck += 1
        self.outbox.put(Measure("owner_stuck"))
        stuck = messages.SessionStuck(session_id=self.sid, epoch=self.epoch, next_index=self.next_index, code=code)
        self.outbox.put(ToController(stuck))

    def _resend_s(self) -> float:
        return max(RESEND_MIN_S, 2 * self.clock.chunk_s)

    def chunk(self, message: messages.ChunkReady, data: Any, now_s: float) -> bool:
        """A chunk from a worker. Only the next one of the newest epoch counts; True when it was accepted."""
        index = message.chunk_index
        if self.ended_s is not None or message.epoch != self.epoch or not self.in_flight or index != self.credited:
            self.counts.fenced += 1
            self.outbox.put(Measure("chunk_fenced"))
            if self.ended_s is None and message.epoch == self.epoch and index < self.next_index:
                self._tell_accepted(index)  # sent again after a reconnect: that we hold it was lost
            return False
        self.in_flight = False
        self.refusals = self.resends = 0
        if index < self.next_index:  # made again after a worker was lost; the viewer has it or the ring does
            self.counts.replayed += 1
            self._tell_accepted(index)
            self._refit(message, data, now_s)
            self.pump(now_s)
            return False
        continuity = message.continuity or (self.continuity if index >= self.continuity_from else "")
        if message.digest_prev != self.digest and continuity != "approximate":
            raise CorruptState(f"chunk {index} does not continue the stream it belongs to")
        self._accept(message, continuity, data, now_s)
        self.pump(now_s)
        return True

    def _accept(self, message: messages.ChunkReady, continuity: str, data: Any, now_s: float) -> None:
        begun = self.begun or Begun(message.chunk_index, now_s, now_s, False)
        chunk = StoredChunk(
            index=message.chunk_index,
            epoch=message.epoch,
            data=data,
            frames=message.frames,
            prompt_version=message.prompt_version,
            steps=message.steps,
            digest=message.digest,
            digest_prev=message.digest_prev,
            released_s=begun.released_s,
            accepted_s=now_s,
            batch_size=message.batch_size,
            continuity=continuity,
            format=message.format,
            init=message.init,
            encode_ms=message.encode_ms,
        )
        if continuity:
            self.continuity = ""
        self.next_index += 1
        self.digest = message.digest
        self.digests.add(chunk.index, message.digest)
        self.ring.append(chunk)
        self.times.accepted(message, now_s)
        self._end_pause(chunk.index, now_s)
        while (
            len(self.ring) > RING_CHUNKS
        ):  # cannot happen while credits are counted right; memory must not depend on it
            self.ring.popleft()
        if self._stands_full():
            self.full_s = now_s
        self._measure(begun, chunk, now_s)
        self._tell_accepted(chunk.index)
        self._deliver_ready()
        self._release_behind(now_s)

    # ------------------------------------------------------------------ credits

    def pump(self, now_s: float) -> None:
        """Bind and send whatever may go now, and tell controller and viewer what changed."""
        if self.ended_s is not None:
            return
        if self._may_bind() and self._release_s() <= now_s:
            self._bind(now_s)
        self._send(now_s)
        self._watch_pause(now_s)
        self._report(now_s)
        self._show()

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

    def _next_credit(self) -> int | None:
        """The chunk to ask for: one that is here in another format than the viewer's, else the next that is durable."""
        again = self._misfit()
        if again is not None and again < self.sent:
            return again
        return self.sent if self.sent < self.durable else None

    def _send(self, now_s: float) -> None:
        """At most one credit is out; after a loss the durable ones are sent again, one after the other."""
        index = self._next_credit()
        if not self.owned or self.in_flight or index is None:
            return
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
            format=cast(Format, self.viewed_as or self.format),  # checked where it came in
        )
        self.sent = max(self.sent, index + 1)
        self.in_flight, self.credited = True, index
        self.credit_due_s = now_s + self._resend_s()
        self.times.credited(index, self.epoch, self.worker_id, now_s)
        self.outbox.wakes(self)
        self.outbox.put(ToWorker(self.worker_id, credit))

    def send_again(self, now_s: float) -> None:
        """The credit that is out may have been lost with its channel; the worker takes a repeated one once."""
        if self.in_flight:
            self.in_flight = False
            if self.credited == self.sent - 1:
                self.sent -= 1
        self.pump(now_s)

    def _credit_overdue(self, now_s: float) -> None:
        """A credit that is not answered: it or its answer was lost, or its owner stands still."""
        if now_s < self.credit_due_s:
            return
        if self.refused_epoch == self.epoch > 0 and not self.owned:
            self._await_epoch(now_s)
            self._stuck("silent")
        elif self.owned and self.in_flight:
            self.resends += 1
            if self.resends > RESENDS_MAX:
                self.resends = 0
                self._stuck("silent")
            self.send_again(now_s)

    # ------------------------------------------------------------------ the viewer's side, in session_stream.py

    def fail(self, code: str, message: str, now_s: float) -> None:
        raise NotImplementedError

    def end(self, reason: str, code: int, now_s: float) -> None:
        raise NotImplementedError

    def _release_behind(self, now_s: float) -> None:
        raise NotImplementedError
