"""Frames <-> latents: principal components of 16 x 16 patches, in closed form.

One token is a 16 x 16 place over the 4 frames of a chunk: COMPONENTS numbers per frame. The basis is
orthonormal and one scale serves all components, so that an error in latents is the same error in pixels and
noise falls evenly on what matters and what does not.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from turboserve.model.shapes import vocabulary as v
from turboserve.model.shapes.spec import TOKENS

COMPONENTS = 64
TOKEN_DIM = v.CHUNK_FRAMES * COMPONENTS
_PATCH = 3 * v.TOKEN_PX * v.TOKEN_PX


def to_patches(frames: Tensor) -> Tensor:
    """[..., 3, 96, 96] -> [..., 36, 768]."""
    n, p = v.TOKENS_PER_SIDE, v.TOKEN_PX
    lead = frames.shape[:-3]
    x = frames.reshape(-1, 3, n, p, n, p).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(*lead, TOKENS, _PATCH)


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
        patches = to_patches(frames).reshape(-1, _PATCH)
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

    def encode(self, frames: Tensor) -> Tensor:
        """[B, F, 3, 96, 96] in [-1, 1] -> tokens [B, F / 4, 36, TOKEN_DIM]."""
        latents = (to_patches(frames) - self.mean) @ self.basis / self.scale
        return latents.unflatten(1, (-1, v.CHUNK_FRAMES)).transpose(2, 3).flatten(-2)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [..., 36, TOKEN_DIM] -> frames [..., 4, 3, 96, 96], not clamped."""
        latents = tokens.unflatten(-1, (v.CHUNK_FRAMES, COMPONENTS)).transpose(-3, -2)
        return from_patches(latents * self.scale @ self.basis.T + self.mean)

    def decode_uint8(self, tokens: Tensor) -> Tensor:
        """One chunk's tokens [36, TOKEN_DIM] -> frames uint8 [4, 96, 96, 3]."""
        frames = self.decode(tokens).movedim(-3, -1)
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
    basis, _ = torch.linalg.qr(torch.randn(_PATCH, COMPONENTS, generator=generator))
    return PatchCodec(torch.zeros(_PATCH), basis, torch.ones(()))
