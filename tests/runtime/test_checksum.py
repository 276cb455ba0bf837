"""The 64-bit checksum."""

from __future__ import annotations

import random

import numpy as np

from turboserve.runtime import native
from turboserve.runtime.checksum import BLOCK_BYTES, Checksum64, checksum64

TWINS = ["python", *(["native"] if native.IMPLEMENTATION == "native" else [])]


def test_pieces_do_not_matter_and_order_does():
    data = np.random.default_rng(1).bytes(3 * BLOCK_BYTES + 777)
    whole = checksum64([data])
    rng = random.Random(2)
    for _ in range(20):
        cuts = sorted(rng.randrange(len(data)) for _ in range(6))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert checksum64(pieces) == whole
    assert checksum64([data[BLOCK_BYTES:], data[:BLOCK_BYTES]]) != whole
    assert checksum64([data + b"\0"]) != whole != checksum64([data[:-1]])


def test_any_flipped_bit_shows():
    data = bytearray(np.random.default_rng(3).bytes(BLOCK_BYTES + 100))
    whole = checksum64([data])
    rng = random.Random(4)
    for _ in range(300):
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[at] ^= bit
        assert checksum64([data]) != whole
        data[at] ^= bit
    # Two top bits: the sums of a plain multiply would cancel.
    data[7] ^= 0x80
    data[15] ^= 0x80
    assert checksum64([data]) != whole


def test_the_value_may_be_read_on_the_way():
    running = Checksum64()
    assert running.value == checksum64([])
    running.update(b"abc")
    assert running.value == checksum64([b"abc"]) == checksum64([b"", b"ab", b"c"])


def test_the_twins_agree():
    rng = random.Random(5)
    noise = np.random.default_rng(5).bytes(4 * BLOCK_BYTES)
    for size in [
        *range(20),
        BLOCK_BYTES - 1,
        BLOCK_BYTES,
        BLOCK_BYTES + 1,
        *(rng.randrange(len(noise)) for _ in range(40)),
    ]:
        cut = rng.randrange(size + 1)
        parts = [noise[:cut], memoryview(noise)[cut:size]]
        assert len({checksum64(parts, implementation=twin) for twin in TWINS}) == 1
