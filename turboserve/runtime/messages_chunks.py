"""Between gateway and workers: credits one way, chunks the other (`messages.py`)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from turboserve.runtime.messages_base import (
    INIT_BYTES_MAX,
    PART_BYTES,
    Count,
    Message,
    Prompt,
    SessionId,
    ShortText,
)
from turboserve.video.encoded import Format

# ---------------------------------------------------------------- gateway -> worker


class Credit(Message, frozen=True, kw_only=True):
    """Leave to generate one chunk, with its inputs bound. Durable in the gateway's log before it is sent. One for a
    chunk that is made already gets it once more, in the format that is asked for now.

    `deadline_s` counts from receipt: the time by which the frames should be out to be on time. `format` is what the
    viewer who is attached receives, or the one before, or else what the session was opened with. A worker that shares
    memory with the gateway has no use for it: its frames are encoded beside the ring.
    """

    session_id: SessionId
    epoch: Count
    chunk_index: Count
    steps: Annotated[int, msgspec.Meta(ge=1, le=64)]
    prompt: Prompt
    prompt_version: Count
    prompt_switch: ShortText = "swap"
    deadline_s: float
    format: Format = "raw"


class ChunkAccepted(Message, frozen=True, kw_only=True):
    """The gateway holds chunk `chunk_index` and everything before it."""

    session_id: SessionId
    epoch: Count
    chunk_index: Count


# ---------------------------------------------------------------- worker -> gateway


class ChunkReady(Message, frozen=True, kw_only=True):
    """A chunk's frames lie in the frame ring (the ring's record repeats session, epoch and index), or its parts have
    come before this.

    Times are the worker's own durations, for `explain` and metrics.
    """

    session_id: SessionId
    epoch: Count
    chunk_index: Count
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    digest_prev: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]
    frames: Count
    steps: Count
    prompt_version: Count
    wait_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    context_before_ms: float = 0.0
    """Of the chunk before this one: from its frames to the end of its context pass. 0 when not known."""
    batch_size: float = 1.0
    """Mean number of segments in the passes this chunk took part in."""
    continuity: ShortText = ""
    format: Format = "raw"
    """What its parts are; `raw` with the frame ring. The digests are over the frames in any case."""
    encode_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    init: Annotated[bytes, msgspec.Meta(max_length=INIT_BYTES_MAX)] = b""
    """The init segment that an mp4 chunk plays behind."""


class FramePart(Message, frozen=True, kw_only=True):
    """Some of a chunk, from a worker that shares no memory with the gateway: `total_bytes` in all, as `format` says.
    Parts come in order, and the chunk's ChunkReady after the last; one with offset 0 begins a chunk and gives up what
    was there of another."""

    session_id: SessionId
    epoch: Count
    chunk_index: Count
    offset: Count
    frames: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    height: Annotated[int, msgspec.Meta(ge=1, le=16384)]
    width: Annotated[int, msgspec.Meta(ge=1, le=16384)]
    format: Format
    total_bytes: Annotated[int, msgspec.Meta(ge=1)]
    data: Annotated[bytes, msgspec.Meta(min_length=1, max_length=PART_BYTES)]


class ChunkRefused(Message, frozen=True, kw_only=True):
    """A credit the worker cannot honour: wrong epoch or index; `next_index` is what it would take. With the code
    NOT_ENCODED the chunk is made and cannot be had in its format."""

    session_id: SessionId
    epoch: Count
    chunk_index: Count
    next_index: Count
    code: ShortText
