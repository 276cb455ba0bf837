"""A light decoder of the TAEHV kind: latents to frames at a twenty-fifth of the Wan VAE's work and with 67 MB of
memory a session at 480x832, at the price of finer detail.

Nine blocks each see the frame before beside the frame at hand; the frames before are the decoder's only state, and a
fresh state is zeros. Frames double in time twice, so a latent frame becomes four; of a stream's first latent frame only
the last of its four is shown, which makes the frame counts those of the Wan VAE.

It takes latents as the transformer makes them (normalised). Module places are those of the published `taew2_1`
checkpoint (`decoder.N.*`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turboserve.model.interface import Field, Rebuild, Tier, Update


@dataclass(frozen=True)
class LightDecoderConfig:
    latent_channels: int = 16
    widths: tuple[int, ...] = (256, 128, 64, 64)
    time_doubling: tuple[bool, ...] = (False, True, True)
    blocks: int = 3  # blocks with memory per stage
    patch: int = 1  # pixels per side that the last layer lays out of channels

    @property
    def space_factor(self) -> int:
        return 2 ** len(self.time_doubling) * self.patch

    @property
    def time_factor(self) -> int:
        return 2 ** sum(self.time_doubling)


class SoftClamp(nn.Module):
    """Keeps latents within +-3 without a corner."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """A residual block over [this frame, the one before]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.width = width

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x [T, C, h, w]; `before` [C, h, w] is the frame ahead of the first, and becomes the last in place."""
        past = torch.cat([before[None], x[:-1]])
        before.copy_(x[-1])
        return F.relu(self.conv(torch.cat([x, past], 1)) + x)


class TimeGrow(nn.Module):
    """`factor` frames out of each, by a 1x1 convolution."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * factor, 1, bias=False)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, self.width, *x.shape[2:])


class LightDecoder(nn.Module):
    def __init__(self, config: LightDecoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LightDecoderConfig()
        widths = config.widths
        layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(config.latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for stage, doubles in enumerate(config.time_doubling):
            layers += [MemoryBlock(widths[stage]) for _ in range(config.blocks)]
            layers += [
                nn.Upsample(scale_factor=2),
                TimeGrow(widths[stage], 2 if doubles else 1),
                nn.Conv2d(widths[stage], widths[stage + 1], 3, padding=1, bias=False),
            ]
        layers += [nn.ReLU(), nn.Conv2d(widths[-1], 3 * config.patch**2, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)

    def cache_fields(self, height: int, width: int, dtype: str) -> tuple[Field, ...]:
        """The memory for latents of height x width: the last input of each block."""
        fields: list[Field] = []
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                shape = (layer.width, height, width)
                name = f"light_{len(fields):02d}"
                # Three latent frames of overlap rebuild it nearly: it reaches back that far and no farther.
                fields.append(Field(name, shape, dtype, Tier.DEVICE, Update.OVERWRITE, Rebuild.APPROXIMATE))
            elif isinstance(layer, nn.Upsample):
                height, width = 2 * height, 2 * width
        return tuple(fields)

    @torch.no_grad()
    def decode(self, latents: Tensor, cache: Mapping[str, Tensor], first: bool) -> Tensor:
        """Normalised latents [T, C, h, w] to pixels [frames, 3, H, W] in 0..1; `cache` moves on by T latent frames."""
        weight = next(self.decoder.parameters())
        ordered = [cache[name] for name in sorted(cache)]
        frames = []
        for latent in latents.to(device=weight.device, dtype=weight.dtype).split(1):
            pasts = iter(ordered)
            x = latent
            for layer in self.decoder:
                x = layer(x, next(pasts)) if isinstance(layer, MemoryBlock) else layer(x)
            frames.append(x)
        if first:
            frames[0] = frames[0][-1:]
        pixels = torch.cat(frames).float()
        if self.config.patch > 1:
            pixels = F.pixel_shuffle(pixels, self.config.patch)
        return pixels.clamp(0, 1)
