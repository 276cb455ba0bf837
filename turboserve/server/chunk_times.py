"""Where the time of each chunk went, kept for `explain`: a bounded record per session, no clock of its own.

A chunk's life in stages, in order; what did not happen takes 0 ms:

    queue      it could have begun (its time had come, the chunk before was there) but had no owner, or no room for it
    input_log  bound inputs on their way to the disk
    moved      its first credit went to a worker that lost the session; until it was asked for again
    batch_wait credit at the worker, first pass not begun
    denoise    first pass to last denoise step, waits between passes included
    decode     latents to frames
    transport  the rest of the way to and from the worker: sockets, frame ring, digest check
    hand_over  the chunk is here, encoder busy with other chunks or the viewer not attached
    encode     frames to the viewer's format: here, or before transport on a worker that joined from another machine
    send       into the viewer's socket

The context pass of a chunk comes after its frames are out; its time stands beside the stages, not among them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from turboserve.runtime import messages

CHUNKS_KEPT = 128
DECISIONS_KEPT = 16
STAGES = (
    "queue",
    "input_log",
    "moved",
    "batch_wait",
    "denoise",
    "decode",
    "transport",
    "hand_over",
    "encode",
    "send",
)


@dataclass(slots=True)
class ChunkTime:
    """One chunk. `_s` are times of the gateway's clock, `_ms` durations that the worker measured."""

    index: int
    ready_s: float
    """From when on nothing but a free owner was missing."""
    released_s: float
    due_s: float
    live: bool
    first_credit_s: float = 0.0
    credit_s: float = 0.0
    credits: int = 0
    epoch: int = 0
    worker_id: str = ""
    accepted_s: float = 0.0
    wait_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    encode_ms: float = 0.0
    batch_size: float = 0.0
    context_ms: float | None = None
    steps: int = 0
    prompt_version: int = 0
    encode_s: float = 0.0
    encoded_s: float = 0.0
    sent_s: float = 0.0

    def stages_ms(self) -> dict[str, float]:
        """Milliseconds by stage; a chunk that is still under way has only the stages that are over."""
        found: dict[str, float] = {"queue": self.released_s - self.ready_s}
        if self.credits:
            found["input_log"] = self.first_credit_s - self.released_s
            found["moved"] = self.credit_s - self.first_credit_s
        found = {name: 1e3 * max(0.0, value) for name, value in found.items()}
        if self.accepted_s:
            way_ms = 1e3 * (self.accepted_s - self.credit_s)
            found["batch_wait"], found["denoise"], found["decode"] = self.wait_ms, self.denoise_ms, self.decode_ms
            found["transport"] = max(0.0, way_ms - self.wait_ms - self.denoise_ms - self.decode_ms - self.encode_ms)
        if self.sent_s:
            found["hand_over"] = 1e3 * max(0.0, self.encode_s - self.accepted_s)
            found["encode"] = self.encode_ms + 1e3 * (self.encoded_s - self.encode_s)
            found["send"] = 1e3 * (self.sent_s - self.encoded_s)
        return {name: round(value, 3) for name, value in found.items()}


@dataclass(slots=True)
class ChunkTimes:
    """The newest CHUNKS_KEPT chunks of one session, and the decisions about it."""

    _chunks: OrderedDict[int, ChunkTime] = field(default_factory=OrderedDict)
    _decisions: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=DECISIONS_KEPT))

    def begun(self, index: int, nominal_s: float, now_s: float, due_s: float, live: bool) -> None:
        """Chunk `index` was bound; by the clock alone it might have been at `nominal_s`."""
        before = self._chunks.get(index - 1)
        ready_s = max(nominal_s, before.accepted_s if before is not None else 0.0)
        self._chunks[index] = ChunkTime(index, min(ready_s, now_s), now_s, due_s, live)
        while len(self._chunks) > CHUNKS_KEPT:
            self._chunks.popitem(last=False)

    def credited(self, index: int, epoch: int, worker_id: str, now_s: float) -> None:
        chunk = self._chunks.get(index)
        if chunk is None or chunk.accepted_s:  # made a second time after a loss: what it took first is what counted
            return
        chunk.first_credit_s = chunk.first_credit_s or now_s
        chunk.credit_s = now_s
        chunk.credits += 1
        chunk.epoch, chunk.worker_id = epoch, worker_id

    def accepted(self, message: messages.ChunkReady, now_s: float) -> None:
        before = self._chunks.get(message.chunk_index - 1)
        if before is not None and message.context_before_ms > 0:
            before.context_ms = message.context_before_ms
        chunk = self._chunks.get(message.chunk_index)
        if chunk is None:
            return
        chunk.accepted_s = now_s
        chunk.wait_ms, chunk.denoise_ms, chunk.decode_ms = message.wait_ms, message.denoise_ms, message.decode_ms
        chunk.encode_ms = message.encode_ms
        chunk.batch_size, chunk.steps, chunk.prompt_version = message.batch_size, message.steps, message.prompt_version

    def sent(self, index: int, encode_s: float, encoded_s: float, sent_s: float) -> None:
        """To the first viewer that took it; a replay to a later one changes nothing."""
        chunk = self._chunks.get(index)
        if chunk is not None and not chunk.sent_s:
            chunk.encode_s, chunk.encoded_s, chunk.sent_s = encode_s, encoded_s, sent_s

    def decided(self, decision: dict[str, Any]) -> None:
        """The controller decided something about the session."""
        self._decisions.append(decision)

    def newest(self) -> int | None:
        """Index of the newest chunk whose frames are here."""
        return next((index for index in reversed(self._chunks) if self._chunks[index].accepted_s), None)

    def timings(self, index: int) -> dict[str, Any] | None:
        """What `explain` shows of one chunk; None when it is not kept (any more)."""
        chunk = self._chunks.get(index)
        if chunk is None:
            return None
        stages = chunk.stages_ms()
        until_s = chunk.credit_s or chunk.released_s
        behind = [one for one in self._decisions if float(one.get("time_s", 0.0)) <= until_s]
        answer: dict[str, Any] = {
            "index": index,
            "worker": chunk.worker_id or None,
            "epoch": chunk.epoch,
            "steps": chunk.steps,
            "prompt_version": chunk.prompt_version,
            "credits": chunk.credits,
            "batch_size": round(chunk.batch_size, 2),
            "stages_ms": stages,
            "total_ms": round(sum(stages.values()), 3),
            "context_ms": None if chunk.context_ms is None else round(chunk.context_ms, 3),
            "decisions": behind[-3:],
        }
        if chunk.accepted_s and chunk.live:
            answer["on_time"] = chunk.accepted_s <= chunk.due_s
            answer["slack_ms"] = round(1e3 * (chunk.due_s - chunk.accepted_s), 3)
        return answer

    def kept(self) -> tuple[int, int] | None:
        """First and last index that `timings` knows."""
        return (next(iter(self._chunks)), next(reversed(self._chunks))) if self._chunks else None
