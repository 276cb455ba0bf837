"""A session's ring of unacked chunks: what is in it, who gets it, how long it took.

A chunk lies there as raw frames where its worker shares memory with the gateway, and encoded where it does not, in the
format that was asked for then. When a viewer attaches with another format, what it needs and finds misfitting is asked
for again, chunk by chunk, by credits that were given before: the owner keeps the last chunks, as it does for a gateway
that was restarted, and sends them in the new format (`SessionCredits._next_credit`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from turboserve.errors import CorruptState, WorkerError
from turboserve.runtime import messages
from turboserve.server.effects import Deliver, Measure, ToWorker
from turboserve.server.session_facts import SessionFacts
from turboserve.server.stream_shape import Begun, Pause, StoredChunk

MISFITS_MAX = 8
"""Chunks in a wrong format, one after the other, after which a worker is not asked again."""
PAUSES = {"recovering": "recovery", "queued": "recovery", "suspended": "resume"}
"""What a pause is called by the session's state when it begins."""


@dataclass(slots=True, kw_only=True)
class SessionRing(SessionFacts):
    """See the module's docstring. Effects go to `outbox`."""

    def _refit(self, message: messages.ChunkReady, data: Any, now_s: float) -> None:
        """A chunk of the ring came again: it takes the place of one that does not fit the viewer."""
        at = next((at for at, one in enumerate(self.ring) if one.index == message.chunk_index), None)
        if at is None or self.viewer is None or self.ring[at].fits(self.viewer.format):
            return
        kept = self.ring[at]
        if message.digest != kept.digest:
            raise CorruptState(f"chunk {kept.index} was made again and is another one")
        again = replace(kept, data=data, format=message.format, init=message.init, encode_ms=message.encode_ms)
        self.ring[at] = again
        if again.fits(self.viewer.format):
            self.misfits = 0
            if self._stands_full():
                self.full_s = now_s
            self._deliver_ready()
            return
        self.misfits += 1
        if self.misfits > MISFITS_MAX:
            raise WorkerError(f"the worker sends chunk {kept.index} as {again.format}", expected=self.viewer.format)

    def _deliver_ready(self) -> None:
        """Give the viewer what comes next and is here in its format."""
        viewer = self.viewer
        if viewer is None or not viewer.ready:
            return
        for chunk in self.ring:
            if chunk.index == viewer.next_index and chunk.fits(viewer.format):
                viewer.next_index += 1
                self.outbox.put(Deliver(viewer.connection, chunk))

    def _tell_accepted(self, index: int) -> None:
        accepted = messages.ChunkAccepted(session_id=self.sid, epoch=self.epoch, chunk_index=index)
        self.outbox.put(ToWorker(self.worker_id, accepted))

    def _measure(self, begun: Begun, chunk: StoredChunk, now_s: float) -> None:
        out = self.outbox
        out.put(Measure("chunk_latency", now_s - begun.released_s))
        out.put(Measure("batch_size", chunk.batch_size))
        if begun.live:
            on_time = now_s <= begun.due_s
            out.delivered.count(reduced=chunk.steps < self._steps_full(), late=not on_time)
            self.counts.on_time += on_time
            self.counts.late += not on_time
            out.put(Measure("chunk_on_time" if on_time else "chunk_late"))
        if self.asked and (asked_s := self.asked.get(chunk.prompt_version)) is not None:
            self.asked = {version: at_s for version, at_s in self.asked.items() if version > chunk.prompt_version}
            out.put(Measure("input_to_frame", now_s - asked_s))
        if chunk.index == 0 and self.first_attach_s is not None:
            out.put(Measure("first_chunk_latency", now_s - self.first_attach_s))

    def _steps_full(self) -> int:
        """Denoise steps that it was opened with; under overload the controller sets fewer."""
        return self.steps if self.wish is None else int(self.wish.steps)

    def _watch_pause(self, now_s: float) -> None:
        """A stream pauses when its viewer waits for a chunk and nobody owns the session."""
        if not self._wants() or self._full():
            self.pause_of_stream = None
        elif not self.owned and self.epoch > 0 and self.pause_of_stream is None:
            self.pause_of_stream = Pause(now_s, PAUSES.get(self.state, "migration"))

    def _end_pause(self, index: int, now_s: float) -> None:
        """How long the viewer had nothing to come: from when its chunks stopped, or the next was due to begin."""
        pause, self.pause_of_stream = self.pause_of_stream, None
        if pause is None or self.period is None:
            return
        since_s = max(pause.since_s, self.period.release_s(index, self.clock))
        self.outbox.put(Measure(f"pause_{pause.kind}", max(0.0, now_s - since_s)))
