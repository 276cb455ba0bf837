"""A fast 64-bit checksum against torn, stale and flipped bytes; not against an attacker.

The bytes are read as little-endian 64-bit words, zero-padded at the end. Blocks of 1024 words each give

    sum over j of (w_j ^ w_j >> 32) * key_j  mod 2**64

with odd keys, so that a change of any one word always shows. The blocks' sums, then the length, go through a
multiply-and-fold chain, which makes their order count. csrc/checksum.cpp computes the same at memory speed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from turboserve.runtime import native

_MASK = (1 << 64) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15
BLOCK_WORDS = 1024
BLOCK_BYTES = 8 * BLOCK_WORDS
_STRIPE_BLOCKS = 32  # 256 KiB at a time: the temporaries stay in the cache


def _make_keys() -> np.ndarray:
    """Splitmix64's first numbers, made odd."""
    keys = []
    state = 0
    for _ in range(BLOCK_WORDS):
        state = (state + _MULTIPLIER) & _MASK
        mixed = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK
        keys.append((mixed ^ mixed >> 31) | 1)
    return np.array(keys, np.uint64)


_KEYS = _make_keys()


def _fold(state: int, value: int) -> int:
    state = ((state ^ value) * _MULTIPLIER) & _MASK
    return state ^ state >> 29


class Checksum64:
    """The checksum of bytes that come in pieces; `update` as often as needed, then `value`."""

    def __init__(self) -> None:
        self._state = _MULTIPLIER
        self._bytes = 0
        self._left = b""  # less than a block

    def update(self, data: Any) -> None:
        """Takes any C-contiguous buffer."""
        view = memoryview(data).cast("B")
        self._bytes += len(view)
        if self._left:
            taken = min(BLOCK_BYTES - len(self._left), len(view))
            self._left += bytes(view[:taken])
            view = view[taken:]
            if len(self._left) < BLOCK_BYTES:
                return
            self._blocks(np.frombuffer(self._left, "<u8"))
            self._left = b""
        whole = len(view) // BLOCK_BYTES * BLOCK_BYTES
        stripe = _STRIPE_BLOCKS * BLOCK_BYTES
        for at in range(0, whole, stripe):
            self._blocks(np.frombuffer(view[at : min(at + stripe, whole)], "<u8"))
        self._left = bytes(view[whole:])

    def _blocks(self, words: np.ndarray) -> None:
        folded = words >> np.uint64(32)
        folded ^= words
        folded = folded.reshape(-1, BLOCK_WORDS)
        folded *= _KEYS
        for block_sum in folded.sum(axis=1, dtype=np.uint64).tolist():
            self._state = _fold(self._state, block_sum)

    @property
    def value(self) -> int:
        """The checksum of all bytes so far; may be read at any time."""
        state = self._state
        if self._left:
            words = np.frombuffer(self._left + bytes(-len(self._left) % 8), "<u8")
            block_sum = int(((words ^ words >> np.uint64(32)) * _KEYS[: len(words)]).sum(dtype=np.uint64))
            state = _fold(state, block_sum)
        return _fold(state, self._bytes)


def checksum64(parts: Iterable[Any], *, implementation: str | None = None) -> int:
    """Checksum of C-contiguous buffers laid end to end."""
    compiled = native.choose(implementation)
    if compiled is not None:
        return int(compiled.checksum64(parts))
    running = Checksum64()
    for part in parts:
        running.update(part)
    return running.value
