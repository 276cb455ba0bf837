"""Rotary embedding over time and the two axes of a latent frame: which angle a token has.

How pairs are turned by an angle is `kernels.packed_torch.rotate`; what the kernels are told is a `Rotation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor

from turboserve.kernels.packed import Rotation


class RopeMode(StrEnum):
    """What the time axis of the rotary embedding counts, which decides whether keys are cached rotated."""

    RELATIVE = "relative"  # position in the window; keys are cached un-rotated; a stream may last for ever
    ABSOLUTE = "absolute"  # latent frame of the stream; keys are cached rotated


class RotaryTable:
    """Rotary angles of latent frames on a height x width token grid.

    The head's pairs are shared out as in Wan: D - 4 * (D // 6) numbers for time, 2 * (D // 6) for each of
    height and width. Angles are computed in float64.
    """

    def __init__(self, head_dim: int, theta: float, height: int, width: int) -> None:
        spatial = 2 * (head_dim // 6)
        self._time = self._frequencies(head_dim - 2 * spatial, theta)
        axis = self._frequencies(spatial, theta)
        rows, columns = torch.arange(height).double(), torch.arange(width).double()
        vertical = torch.outer(rows, axis)[:, None].expand(height, width, -1)
        horizontal = torch.outer(columns, axis)[None].expand(height, width, -1)
        self._place = torch.cat([vertical, horizontal], -1).reshape(height * width, -1)

    @staticmethod
    def _frequencies(dims: int, theta: float) -> Tensor:
        return theta ** (-torch.arange(0, dims, 2).double() / dims)

    def at(self, frames: Sequence[int], device: torch.device | str = "cpu") -> Rotation:
        """Rotation of all tokens of the given latent frame positions, in that order."""
        time = torch.outer(torch.tensor(frames).double(), self._time)
        time = time[:, None].expand(-1, len(self._place), -1)
        angle = torch.cat([time, self._place.expand(len(frames), -1, -1)], -1).flatten(0, 1)[:, None]
        return Rotation(angle.cos().float().to(device), angle.sin().float().to(device))


def halves_order(heads: int, head_dim: int) -> Tensor:
    """Row order that turns q/k weights made for interleaved pairs (original Wan) into ours: new[i] =
    old[order[i]].
    """
    within = torch.arange(head_dim).view(-1, 2).T.reshape(-1)
    return (torch.arange(heads)[:, None] * head_dim + within).reshape(-1)
