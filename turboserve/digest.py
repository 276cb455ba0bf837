"""The digest chain: the identity of a stream.

digest(i) = SHA-256 of digest(i - 1) as bytes (nothing for chunk 0), then the chunk's RGB24 frames, row-major, before
any encoding. Same model, seed, prompts and steps per index give the same chain within a `numerics_id`, whatever
happened in between.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]  # in typing from Python 3.12 on

DIGEST_PATTERN = "^[0-9a-f]{64}$"


def next_digest(previous: str, frames: Buffer) -> str:
    """The digest of the chunk that follows one with digest `previous` ("" for the first).

    `frames` is anything with a C-contiguous buffer: bytes, or a uint8 array [n, height, width, 3].
    """
    chain = hashlib.sha256(bytes.fromhex(previous))
    chain.update(frames)
    return chain.hexdigest()
