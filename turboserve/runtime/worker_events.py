"""What passes between a worker's engine and its logic. Light: importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from turboserve.model.interface import ChunkRequest, Control

if TYPE_CHECKING:
    import numpy as np

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
    """The session has its slot."""

    session_id: str


@dataclass(frozen=True, slots=True)
class OpenFailed:
    """The session has no slot and holds nothing."""

    session_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Closed:
    """Nothing of the session is left."""

    session_id: str


PassEvent: TypeAlias = FinishedChunk | BrokenSession
EngineEvent: TypeAlias = PassEvent | Opened | OpenFailed | Closed

# ---------------------------------------------------------------- logic -> engine


@dataclass(frozen=True, slots=True)
class Open:
    session_id: str
    epoch: int
    seed: int
    control: Control


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


EngineCommand: TypeAlias = Open | Begin | Close | Hold
