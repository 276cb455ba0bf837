"""Seeded weights for tests, trials and benches that need a model's shape but not its skill."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def fill_random(module: nn.Module, seed: int) -> None:
    """Variance kept from layer to layer, norms and biases off their defaults, so that every weight matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, one in module.named_parameters():
        noise = torch.randn(one.shape, generator=generator, dtype=torch.float32)
        last = name.rsplit(".", 1)[-1]
        if last == "gamma" or (last == "weight" and one.ndim == 1):
            value = 1 + 0.1 * noise
        elif last == "modulation":
            value = noise * one.shape[-1] ** -0.5
        elif one.ndim > 1:
            value = noise * one[0].numel() ** -0.5
        else:
            value = 0.1 * noise
        one.copy_(value.to(one.dtype))
