"""Where the objects of a stream begin, drawn as soft spots on the token grid.

Only the first chunk has no past to go on from. It gets a start map beside its latents, as image-to-video models get
their image: per token and object a 4 x 4 picture of a round spot at the object's first position. Without it the first
chunk has as many right answers as there are places, and comes out as a blend of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from turboserve.model.shapes import vocabulary as v
from turboserve.model.shapes.spec import TOKENS

_FINE = 4  # map points per token side
_SPOT_PX = 6.0
_PER_OBJECT = _FINE * _FINE
START_DIM = v.OBJECTS_MAX * _PER_OBJECT


@cache
def _spots() -> Tensor:
    """One object's map for every start cell, [START_CELLS (x), START_CELLS (y), 36, 16]."""
    centre = (torch.arange(v.START_CELLS) + 0.5) * v.CELL_PX
    step = v.TOKEN_PX / _FINE
    point = (torch.arange(v.TOKENS_PER_SIDE * _FINE) + 0.5) * step
    offset = (point - centre[:, None] + v.SIZE_PX / 2) % v.SIZE_PX - v.SIZE_PX / 2
    bell = torch.exp(-offset.square() / (2 * _SPOT_PX**2)).unflatten(1, (v.TOKENS_PER_SIDE, _FINE))
    grid = torch.einsum("xcf,yrg->xyrcgf", bell, bell)  # rows before columns, tokens before their points
    return grid.reshape(v.START_CELLS, v.START_CELLS, TOKENS, _PER_OBJECT)


def start_maps(start: Tensor, two: Tensor) -> Tensor:
    """Maps [B, 36, START_DIM] from start cells int64 [B, 2 objects, 2 (x, y)] and whether there is a second object."""
    maps = _spots()[start[..., 0], start[..., 1]]  # [B, 2, 36, 16]
    shown = torch.stack([torch.ones_like(two), two], 1)[..., None, None]
    return (maps * shown).transpose(1, 2).flatten(-2)


@cache
def start_map(start: Sequence[Sequence[int]], two: bool) -> Tensor:
    """One scene's map [36, START_DIM]."""
    return start_maps(torch.tensor([start]), torch.tensor([two]))[0]
