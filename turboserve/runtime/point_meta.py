"""What a recovery point says besides its bytes: who may read it, the inputs it stands at, its last chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from turboserve.runtime.worker_events import FinishedChunk


@dataclass(frozen=True, slots=True)
class PointIdentity:
    """Points are read only by workers that would have made the same bits."""

    model_hash: str
    layout_hash: str
    numerics_id: str


class KeptChunk(msgspec.Struct, array_like=True, frozen=True):
    """A chunk whose frames lie in a page of the point."""

    chunk_index: int
    shape: tuple[int, int, int, int]
    digest: str
    digest_prev: str
    steps: int
    prompt_version: int


class PointMeta(msgspec.Struct, frozen=True):
    """What a point says besides its bytes. `control` is (prompt, version), `decoder` what its tail is made for."""

    model_hash: str
    layout_hash: str
    numerics_id: str
    seed: int
    control: tuple[str, int] | None
    scalars: dict[str, Any]
    chunks: list[KeptChunk]
    decoder: str = ""


def shape4(frames: np.ndarray) -> tuple[int, int, int, int]:
    """(frames, height, width, channels)."""
    count, height, width, channels = frames.shape
    return count, height, width, channels


def finished_chunk(session_id: str, kept: KeptChunk, data: bytes) -> FinishedChunk:
    """A chunk as its first maker finished it; its durations were reported then."""
    frames = np.frombuffer(data, np.uint8).reshape(kept.shape)
    return FinishedChunk(
        session_id=session_id,
        chunk_index=kept.chunk_index,
        frames=frames,
        digest=kept.digest,
        digest_prev=kept.digest_prev,
        steps=kept.steps,
        prompt_version=kept.prompt_version,
        wait_s=0.0,
        denoise_s=0.0,
        decode_s=0.0,
        batch_size=1.0,
    )
