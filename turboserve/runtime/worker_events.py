"""What passes between a worker's engine and its logic. Light: importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from turboserve.model.interface import ChunkRequest, Control

if TYPE_CHECKING:
    import numpy as np

KEPT_CHUNKS = 4
"""How many of a session's last chunks keep their frames on its worker and in its recovery points."""


@dataclass(frozen=True, slots=True)
class AtWork:
    """What the engine is at, for other threads: replaced whole, never changed. `until_s` is when the pass in work is
    expected to end, by the monotonic clock, 0 between passes; `sessions` are all that it holds: (epoch, the chunk that
    is not committed yet, whether that one's first pass has started)."""

    until_s: float = 0.0
    sessions: dict[str, tuple[int, int, bool]] = field(default_factory=dict)


# ---------------------------------------------------------------- engine -> logic


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedChunk:
    """A chunk's frames, uint8 [n, height, width, 3], and how they came about. Durations are seconds.

    `wait_s` is from the credit to the first pass, `denoise_s` from there to the last denoise step, waits between
    passes included. `context_before_s` is of the chunk before: from its frames to the end of its context pass.
    """

    session_id: str
    chunk_index: int
    frames: np.ndarray
    digest: str
    digest_prev: str
    steps: int
    prompt_version: int
    wait_s: float
    denoise_s: float
    decode_s: float
    batch_size: float
    context_before_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenSession:
    """A session whose pass failed; it does nothing any more until it is closed."""

    session_id: str
    chunk_index: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Opened:
    """The session has its slot and makes chunk `next_index` next.

    `made` are the last chunks before that, oldest first, where it goes on from a recovery point (`restored`); one that
    was adopted kept its chunks, and one that begins has none.
    """

    session_id: str
    next_index: int = 0
    restored: bool = False
    adopted: bool = False
    made: tuple[FinishedChunk, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenFailed:
    """The session has no slot and holds nothing."""

    session_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """The session stands at a chunk boundary and its recovery point is committed; chunks from `next_index` on that it
    was told to begin are forgotten. After Stop(release=True) its slot is free."""

    session_id: str
    next_index: int
    point_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StopFailed:
    """The point could not be written: the session goes on. Chunks from `next_index` on are forgotten all the same."""

    session_id: str
    next_index: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """A slot is held for a session that will come; its epoch is not known yet."""

    session_id: str
    move_id: int


@dataclass(frozen=True, slots=True)
class PrepareFailed:
    session_id: str
    move_id: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Closed:
    """Nothing of the session is left."""

    session_id: str


@dataclass(frozen=True, slots=True)
class Profiling:
    """The answer to Profile: the trace will be at `path`, or `code` and `message` say why not."""

    op_id: int
    path: str = ""
    code: str = ""
    message: str = ""


PassEvent: TypeAlias = FinishedChunk | BrokenSession
EngineEvent: TypeAlias = (
    PassEvent | Opened | OpenFailed | Stopped | StopFailed | Prepared | PrepareFailed | Closed | Profiling
)

# ---------------------------------------------------------------- logic -> engine


@dataclass(frozen=True, slots=True)
class Open:
    """Hold a session under `epoch`: adopt what is held under `adopt_epoch` (if it is), else go on from the newest
    recovery point (with `restore`, if there is one), else begin. An adoption that finds nothing and may not restore
    fails. A slot that was prepared for the session is used."""

    session_id: str
    epoch: int
    seed: int
    control: Control
    restore: bool = False
    adopt_epoch: int | None = None
    decoder: str = ""
    any_numerics: bool = False
    """The point may have been made in other bits; it then has to be there."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish the chunk in work, forget those not begun, commit a recovery point; with `release` free the slot too."""

    session_id: str
    epoch: int
    release: bool


@dataclass(frozen=True, slots=True)
class Prepare:
    """Hold a slot for a session that will be opened here, and read the pages that its newest point has."""

    session_id: str
    move_id: int


@dataclass(frozen=True, slots=True)
class DropPrepared:
    """Free the slot that was prepared for a session. Nothing is answered."""

    session_id: str
    move_id: int


@dataclass(frozen=True, slots=True)
class Begin:
    """Make one chunk. `received_s` and `deadline_s` are times of the worker's monotonic clock."""

    session_id: str
    epoch: int
    request: ChunkRequest
    received_s: float
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Close:
    session_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Run no pass (True) or go on (False); nothing is lost by either."""

    hold: bool


@dataclass(frozen=True, slots=True)
class Profile:
    """Record the next `chunks` chunks; answered by Profiling at once."""

    op_id: int
    chunks: int


EngineCommand: TypeAlias = Open | Begin | Close | Stop | Prepare | DropPrepared | Hold | Profile
