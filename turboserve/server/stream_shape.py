"""Facts and small records of one stream: its shape, a stored chunk, the viewer that is attached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StreamShape:
    """A model's facts at one size, as far as the gateway needs them."""

    model: str
    model_hash: str
    width: int
    height: int
    fps: float
    chunk_frames_first: int
    chunk_frames_rest: int

    def chunk_frames(self, index: int) -> int:
        return self.chunk_frames_first if index == 0 else self.chunk_frames_rest

    def frames_before(self, index: int) -> int:
        """Frames of all chunks before this one."""
        return 0 if index == 0 else self.chunk_frames_first + (index - 1) * self.chunk_frames_rest

    def chunk_bytes(self, index: int) -> int:
        return self.chunk_frames(index) * self.width * self.height * 3


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """One accepted chunk: its frames or their encoding, and what its header will say."""

    index: int
    epoch: int
    data: Any
    """Array uint8 [frames, height, width, 3]; bytes when `format` is not `raw`. The logic only keeps it."""
    frames: int
    prompt_version: int
    steps: int
    digest: str
    digest_prev: str
    released_s: float
    accepted_s: float
    batch_size: float
    continuity: str
    format: str = "raw"
    """What `data` is. A worker that shares no memory with the gateway encodes its chunks itself."""
    init: bytes = b""
    encode_ms: float = 0.0

    def fits(self, format: str) -> bool:
        """Whether a viewer of that format can be given it; raw frames are encoded for anybody."""
        return self.format in ("raw", format)


@dataclass(slots=True)
class Viewer:
    """The one connection that is attached. `ready` once its token is durable; `next_index` is what it gets next."""

    connection: int
    first_index: int
    next_index: int
    format: str
    ready: bool = False


@dataclass(slots=True)
class Begun:
    """The chunk whose credit is out or about to be: when it was released and when it is late."""

    index: int
    released_s: float
    due_s: float
    live: bool


@dataclass(frozen=True, slots=True)
class Pause:
    """Since when nobody makes chunks of a session that wants them, and why: "migration", "recovery" or "resume"."""

    since_s: float
    kind: str


@dataclass(slots=True)
class Counts:
    """What happened to a session, for GET /v1/sessions/{id} and the summary in the log."""

    fenced: int = 0
    attaches: int = 0
    on_time: int = 0
    late: int = 0
    replayed: int = 0
    stuck: int = 0


DIGESTS_KEPT = 1 << 14
"""Chunks whose digests a session's card lists: half a megabyte, an hour and a half of a stream of `shapes`."""


class DigestChain:
    """The digests of chunks 0 to n - 1, as bytes. Once a chunk is missing, or there are too many, it holds none."""

    def __init__(self) -> None:
        self._digests = bytearray()
        self._whole = True

    def add(self, index: int, digest: str) -> None:
        if index * 32 != len(self._digests) or index >= DIGESTS_KEPT:
            self._whole = False
            self._digests.clear()
        elif self._whole:
            self._digests += bytes.fromhex(digest)

    def all(self, count: int) -> tuple[str, ...] | None:
        """One digest for each of `count` chunks, or None when not all of them are known."""
        if not self._whole or len(self._digests) != 32 * count:
            return None
        return tuple(self._digests[at : at + 32].hex() for at in range(0, 32 * count, 32))
