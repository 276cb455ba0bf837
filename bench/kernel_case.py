"""One kernel at one shape, as the kernel benchmark times it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one shape. `floor` names the limit, `work` counts FLOP for "matmul" and bytes for "copy"; `error`
    runs ours once and returns its largest error against reference.py, relative to the largest magnitude."""

    name: str
    shape: str
    dtype: torch.dtype
    floor: str
    work: float
    ours: Work
    baselines: dict[str, Work]
    error: Callable[[], float]
    skipped: dict[str, str] = field(default_factory=dict)
    """Baselines that this machine cannot run, and why."""


def error_of(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest magnitude of `want`."""
    want = want.double()
    return float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30))
