"""Noise: published Philox vectors, independence of draws, moments."""

from __future__ import annotations

import pytest
import torch

from turboserve.model.noise import normal, philox4x32

# Known answers of Random123 (kat_vectors, philox4x32 10 rounds): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_matches_the_published_vectors(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([one]) for one in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_a_draw_depends_on_every_coordinate_and_on_nothing_else():
    base = normal(7, 3, 1, 256)
    assert torch.equal(base, normal(7, 3, 1, 256))
    for other in (
        normal(8, 3, 1, 256),
        normal(7, 4, 1, 256),
        normal(7, 3, 2, 256),
        normal(7 + (1 << 40), 3, 1, 256),
    ):
        assert not torch.equal(base, other)


def test_a_longer_draw_begins_with_the_shorter_one():
    assert torch.equal(normal(1, 0, 0, 9216)[:64], normal(1, 0, 0, 64))


def test_moments_are_those_of_a_normal():
    draw = normal(11, 5, 2, 400_000).double()
    assert abs(draw.mean()) < 0.006
    assert abs(draw.var() - 1) < 0.01
    assert abs((draw**3).mean()) < 0.02
    assert abs((draw**4).mean() - 3) < 0.05
