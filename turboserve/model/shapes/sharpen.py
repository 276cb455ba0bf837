"""What the linear codec cannot say: a small decoder that gives edges back.

A patch of these pictures has few true degrees of freedom (where an edge runs, which two colours meet), but they are
not linear, so principal components blur edges. A 3 x 3 convolution over the grid of a frame's latents and a pointwise
layer predict the residual in pixels. It is trained last, on encoded pictures and on what the transformer makes of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turboserve.model.shapes import vocabulary as v
from turboserve.model.shapes.clips import make_frames
from turboserve.model.shapes.codec import COMPONENTS, PATCH_DIM, PatchCodec, to_patches

_HIDDEN = 256
_CLIP_SEEDS = 5_000_000


class Sharpener(nn.Module):
    """Frame latents [N, 36, COMPONENTS] -> residual patches [N, 36, 768]."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(COMPONENTS, _HIDDEN, 3, padding=1, padding_mode="circular")
        self.out = nn.Linear(_HIDDEN, PATCH_DIM)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, latents: Tensor) -> Tensor:
        n = v.TOKENS_PER_SIDE
        grid = latents.transpose(1, 2).unflatten(2, (n, n))
        hidden = F.gelu(self.near(grid), approximate="tanh").flatten(2).transpose(1, 2)
        return self.out(hidden)


# Latents of single frames [N, 36, COMPONENTS], and the pictures [N, 3, 96, 96] in [-1, 1] that they stand for.
Pairs = Iterator[tuple[Tensor, Tensor]]


def train_sharpener(
    codec: PatchCodec,
    pairs: Pairs,
    seed: int,
    steps: int,
    learning_rate: float = 2e-3,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Sharpener:
    """Fit the residual, a batch of pairs a step; `report` gets (step, loss). A step takes some 40 ms of one core."""
    torch.manual_seed(seed)  # layer initialisation draws from the global generator
    network = Sharpener()
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * max(0.02, 1 - step / steps)
        latents, pictures = next(pairs)
        error = network(latents) + codec.expand(latents) - to_patches(pictures)
        # Edges are few: the mean absolute error cares for them, the squared one for what is far off.
        loss = error.abs().mean() + error.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        report(step + 1, loss.item())
    return network.eval()


def encoded_pairs(codec: PatchCodec, seed: int, batch: int = 24) -> Pairs:
    """Endless pairs straight from the codec, disturbed a little; clips that the transformer was not trained on."""
    generator = torch.Generator().manual_seed(seed + 29)
    for part in itertools.count():
        pictures = make_frames(24, seed + _CLIP_SEEDS + part)[0].flatten(0, 1)
        for some in _mixed(codec.project(to_patches(pictures)), pictures, batch, generator):
            latents, shown = some
            amount = 0.2 * torch.rand(len(latents), 1, 1, generator=generator).square()
            yield latents + amount * torch.randn(latents.shape, generator=generator), shown


def predicted_pairs(
    codec: PatchCodec, predict: Callable[[Tensor, Tensor, Tensor], Tensor], seed: int, batch: int = 24
) -> Pairs:
    """Endless pairs by way of the transformer: `predict(latents, prompts, starts)` gives a clip's latents as the last
    denoise step would leave them (`train.Trainer.predict_last_step`)."""
    generator = torch.Generator().manual_seed(seed + 31)
    for part in itertools.count():
        frames, prompts, starts = make_frames(16, seed + 2 * _CLIP_SEEDS + part)
        guess = predict(codec.encode(frames), prompts, starts)
        latents = guess.unflatten(-1, (v.CHUNK_FRAMES, COMPONENTS)).transpose(2, 3).flatten(0, 2)
        yield from _mixed(latents, frames.flatten(0, 1), batch, generator)


def alternating(first: Pairs, second: Pairs) -> Pairs:
    while True:
        yield next(first)
        yield next(second)


def _mixed(latents: Tensor, pictures: Tensor, batch: int, generator: torch.Generator) -> Pairs:
    order = torch.randperm(len(latents), generator=generator)
    for some in order.split(batch):
        yield latents[some], pictures[some]
