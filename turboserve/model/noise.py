"""Noise as a function of (seed, chunk, step, position), with no generator to save, move or share.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer tensor
operations, so the same counters give the same integers on every device; Box-Muller in float64 turns them into
normals. The numbers of one session never depend on what else runs, and a chunk that is started again draws
the same ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four tensors of 32-bit words (held in int64) from four counter words and a 64-bit key in two words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap at 2**64; masking after the shift makes their bits those of unsigned words.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
        high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def normal(seed: int, chunk_index: int, step: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """`count` standard normals, float32 [count]. Position p comes from counter (p // 4, step, chunk_index,
    0).
    """
    blocks = (count + 3) // 4
    position = torch.arange(blocks, dtype=torch.int64, device=device)
    constant = [torch.full_like(position, one & _MASK) for one in (step, chunk_index, 0)]
    words = philox4x32((position, *constant), (seed & _MASK, (seed >> 32) & _MASK))
    uniform = (torch.stack(words, 1).double() + 0.5) * 2.0**-32  # in (0, 1), [blocks, 4]
    radius = torch.sqrt(-2.0 * torch.log(uniform[:, 0::2]))
    angle = 2.0 * math.pi * uniform[:, 1::2]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)
    return pairs.reshape(-1)[:count].float()
