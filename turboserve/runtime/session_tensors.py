"""All that one session keeps on a worker: its slot of the pool, its digest chain, and what it is doing."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from turboserve.model.interface import ChunkRequest, Control, Segment, SessionTensors, StreamingModel
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.worker_events import KEPT_CHUNKS, FinishedChunk

if TYPE_CHECKING:
    from turboserve.runtime.background_points import Job


@dataclass(slots=True)
class ChunkWork:
    """A chunk between its first pass and its commit. Times are seconds of the engine's clock.

    `queued_s` is when its credit reached the engine, `started_s` when its first pass began. `batch_sizes` holds the
    number of segments of every pass it took part in.
    """

    request: ChunkRequest
    segments: list[Segment]
    deadline_s: float
    queued_s: float
    started_s: float | None = None
    position: int = 0
    emitted: bool = False
    denoise_s: float = 0.0
    decode_s: float = 0.0
    batch_sizes: list[int] = field(default_factory=list)

    @property
    def segment(self) -> Segment:
        """What runs next."""
        return self.segments[self.position]

    @property
    def remaining(self) -> int:
        """Segments left, the next one included."""
        return len(self.segments) - self.position

    @property
    def remaining_to_frames(self) -> int:
        """Segments left until the frames can be decoded; 0 once they are out."""
        for ahead, segment in enumerate(self.segments[self.position :]):
            if segment.completes_latents:
                return ahead + 1
        return 0


@dataclass(slots=True)
class QueuedChunk:
    """A credit the engine holds but has not begun."""

    request: ChunkRequest
    deadline_s: float
    queued_s: float


@dataclass(slots=True)
class HeldSession:
    """One resident session. `fault` names what broke it; a broken one keeps its slot until it is closed.

    `pages_rewritten` counts recaches: they change pages that were finished, so copies of those are out of date. `kept`
    are the last chunks with their frames; `saved` says that a recovery point has all that the session is now.
    """

    state: SessionTensors
    epoch: int = 0
    digest: str = ""
    kept: deque[FinishedChunk] = field(default_factory=lambda: deque(maxlen=KEPT_CHUNKS))
    saved: bool = False
    point_chunk: int = 0
    """What the last recovery point is of: the session when this chunk is about to begin."""
    point_every: int = 1
    """How many chunks on from there the next one is due."""
    job: Job | None = None
    """The point that is being written in the background."""
    queue: list[QueuedChunk] = field(default_factory=list)
    work: ChunkWork | None = None
    fault: str | None = None
    pages_rewritten: int = 0
    decoded_s: float = 0.0
    context_s: float = 0.0
    """Of the last committed chunk, for `explain`: when its frames were out, how long its context pass took after."""

    @property
    def session_id(self) -> str:
        return self.state.session_id

    @property
    def at_boundary(self) -> bool:
        """Between two chunks: the last one is committed and none has begun."""
        return self.work is None

    @property
    def next_unqueued_index(self) -> int:
        """Index that the next credit must have."""
        if self.queue:
            return self.queue[-1].request.chunk_index + 1
        if self.work is not None:
            return self.work.request.chunk_index + 1
        return self.state.next_chunk_index


def hold_session(
    pool: KvPool,
    model: StreamingModel,
    session_id: str,
    seed: int,
    control: Control,
    epoch: int = 0,
    decoder: str = "",
) -> HeldSession:
    """Take a slot and begin a session in it; on any failure the slot goes back."""
    decoder = model.spec.decoder(decoder)
    slot = pool.acquire(session_id)
    try:
        tensors = pool.tensors(session_id, decoder)
        state = SessionTensors(session_id=session_id, seed=seed, slot=slot, tensors=tensors, decoder=decoder)
        model.begin(state, control)
    except BaseException:
        pool.release(session_id)
        raise
    return HeldSession(state, epoch)
