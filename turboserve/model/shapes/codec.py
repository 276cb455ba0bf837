"""Frames <-> latents: principal components of 16 x 16 patches, in closed form.

One token is a 16 x 16 place over the 4 frames of a chunk: COMPONENTS numbers per frame. The basis is
orthonormal and one scale serves all components, so that an error in latents is the same error in pixels and
noise falls evenly on what matters and what does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from turboserve.model.shapes import vocabulary as v
from turboserve.model.shapes.spec import TOKENS

COMPONENTS = 64
TOKEN_DIM = v.CHUNK_FRAMES * COMPONENTS
PATCH_DIM = 3 * v.TOKEN_PX * v.TOKEN_PX


def to_patches(frames: Tensor) -> Tensor:
    """[..., 3, 96, 96] -> [..., 36, 768]."""
    n, p = v.TOKENS_PER_SIDE, v.TOKEN_PX
    lead = frames.shape[:-3]
    x = frames.reshape(-1, 3, n, p, n, p).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(*lead, TOKENS, PATCH_DIM)


def from_patches(patches: Tensor) -> Tensor:
    """[..., 36, 768] -> [..., 3, 96, 96]."""
    n, p = v.TOKENS_PER_SIDE, v.TOKEN_PX
    lead = patches.shape[:-2]
    x = patches.reshape(-1, n, n, 3, p, p).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(*lead, 3, v.SIZE_PX, v.SIZE_PX)


@dataclass(frozen=True)
class PatchCodec:
    mean: Tensor  # [768]
    basis: Tensor  # [768, COMPONENTS]
    scale: Tensor  # []

    @classmethod
    def fit(cls, frames: Tensor) -> PatchCodec:
        """Principal components of the patches of frames [..., 3, 96, 96] in [-1, 1]; empty patches count
        little.
        """
        patches = to_patches(frames).reshape(-1, PATCH_DIM)
        # The same for every position: a background's brightness is content too, but there is much more of it.
        busy = patches.var(-1) > 0.005
        idle = torch.nonzero(~busy)[::8, 0]
        chosen = torch.cat([patches[busy], patches[idle]]).double()
        mean = chosen.mean(0)
        centred = chosen - mean
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        basis = vectors[:, -COMPONENTS:].flip(1)
        scale = (centred @ basis).pow(2).mean().sqrt()
        return cls(mean.float(), basis.float(), scale.float())

    def project(self, patches: Tensor) -> Tensor:
        """Patches [..., 768] -> latents [..., COMPONENTS]."""
        return (patches - self.mean) @ self.basis / self.scale

    def expand(self, latents: Tensor) -> Tensor:
        """Latents [..., COMPONENTS] -> patches [..., 768]; the inverse of `project` as far as there is one."""
        return latents * self.scale @ self.basis.T + self.mean

    def encode(self, frames: Tensor) -> Tensor:
        """[B, F, 3, 96, 96] in [-1, 1] -> tokens [B, F / 4, 36, TOKEN_DIM]."""
        latents = self.project(to_patches(frames))
        return latents.unflatten(1, (-1, v.CHUNK_FRAMES)).transpose(2, 3).flatten(-2)

    def decode(self, tokens: Tensor, sharpen: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Tokens [..., 36, TOKEN_DIM] -> frames [..., 4, 3, 96, 96], not clamped. `sharpen` gives latents of frames
        [N, 36, COMPONENTS] a residual [N, 36, 768] to add (`sharpen.py`)."""
        latents = tokens.unflatten(-1, (v.CHUNK_FRAMES, COMPONENTS)).transpose(-3, -2)
        patches = self.expand(latents)
        if sharpen is not None:
            patches = patches + sharpen(latents.flatten(0, -3)).view_as(patches)
        return from_patches(patches)

    def decode_uint8(self, tokens: Tensor, sharpen: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """One chunk's tokens [36, TOKEN_DIM] -> frames uint8 [4, 96, 96, 3]."""
        frames = self.decode(tokens, sharpen).movedim(-3, -1)
        return ((frames + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)

    def to(self, device: torch.device) -> PatchCodec:
        return PatchCodec(**{name: one.to(device) for name, one in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> PatchCodec:
        return cls(**tensors)


def random_codec(seed: int) -> PatchCodec:
    """An orthonormal basis of no meaning, for tests."""
    generator = torch.Generator().manual_seed(seed + 3)
    basis, _ = torch.linalg.qr(torch.randn(PATCH_DIM, COMPONENTS, generator=generator))
    return PatchCodec(torch.zeros(PATCH_DIM), basis, torch.ones(()))
