"""Latents to frames, one latent frame at a time: the decoder of the Wan 2.1 VAE with its memory outside.

Every causal 3-D convolution looks two input frames back. Those frames are the decoder's only state: 32 tensors per
session (1.889 GB at 480x832 in bfloat16), which the caller owns and which are rewritten with every latent frame. A
fresh state is all zeros, because the convolutions pad with zeros in front of a clip.

The first latent frame of a stream is special: it is not doubled in time and leaves no trace in the memory of the
doubling convolutions (reference implementations keep a marker there). It becomes one pixel frame, every later one
four. What is first follows from the chunk's index, so nothing but tensors has to be saved.

Module names are those of original Wan checkpoints (`decoder.*`, `conv2`). Letters: C channels, T frames, h x w.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turboserve.model.interface import Field, Rebuild, Tier, Update

PAST_FRAMES = 2

# Per-channel statistics of Wan 2.1 latents: the transformer works on (latent - mean) / std.
WAN21_LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                     0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
WAN21_LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


@dataclass(frozen=True)
class VaeConfig:
    """Shape of a Wan 2.1 VAE. `channel_factors` and `time_doubling` are listed from the latents to the pixels."""

    latent_channels: int = 16
    base_channels: int = 96
    channel_factors: tuple[int, ...] = (4, 4, 2, 1)
    res_blocks: int = 2  # each stage has one more
    time_doubling: tuple[bool, ...] = (True, True, False)
    latent_mean: tuple[float, ...] = WAN21_LATENT_MEAN
    latent_std: tuple[float, ...] = WAN21_LATENT_STD

    @property
    def space_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** len(self.time_doubling)

    @property
    def time_factor(self) -> int:
        """Pixel frames per latent frame after the first."""
        return 2 ** sum(self.time_doubling)


class CausalConv3d(nn.Conv3d):
    """Convolution over (past, present) frames; `past` [1, C, 2, h, w] is read and then moved on in place."""

    def __init__(self, channels_in: int, channels_out: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(channels_in, channels_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        if past is None:
            return super().forward(x)
        x = torch.cat([past, x], 2)
        past.copy_(x[:, :, -PAST_FRAMES:])
        return super().forward(x)


class ChannelNorm(nn.Module):
    """Root-mean-square norm over channels, computed in float32."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))
        self.scale = channels**0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=1).to(x.dtype) * self.scale * self.gamma


class ResBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        cube = (3, 3, 3)
        # Places 2 and 6 are the convolutions, as in original checkpoints; 5 is their dropout, which does nothing here.
        self.residual = nn.Sequential(
            ChannelNorm(channels_in, 3),
            nn.SiLU(),
            CausalConv3d(channels_in, channels_out, cube),
            ChannelNorm(channels_out, 3),
            nn.SiLU(),
            nn.Identity(),
            CausalConv3d(channels_out, channels_out, cube),
        )
        self.shortcut = (
            nn.Identity() if channels_in == channels_out else CausalConv3d(channels_in, channels_out, (1, 1, 1))
        )

    def forward(self, x: Tensor, pasts: Iterator[Tensor], first: bool) -> Tensor:
        y = x
        for layer in self.residual:
            y = layer(y, next(pasts)) if isinstance(layer, CausalConv3d) else layer(y)
        return y + self.shortcut(x)


class FrameAttention(nn.Module):
    """One head over the places of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, pasts: Iterator[Tensor], first: bool) -> Tensor:
        frames = x[0].transpose(0, 1)
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(frames.shape)
        return x + self.proj(y).transpose(0, 1)[None]


class Upsample(nn.Module):
    """Twice the side, half the channels; with `time_doubling` also two frames from each, but for a stream's first."""

    def __init__(self, channels: int, time_doubling: bool) -> None:
        super().__init__()
        # Place 1, as in original checkpoints; place 0 is their nearest-neighbour enlargement.
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if time_doubling else None

    def forward(self, x: Tensor, pasts: Iterator[Tensor], first: bool) -> Tensor:
        if self.time_conv is not None:
            past = next(pasts)
            if not first:
                doubled = self.time_conv(x, past).unflatten(1, (2, -1))  # [1, 2, C, T, h, w]
                x = doubled.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return self.resample(x[0].transpose(0, 1)).transpose(0, 1)[None]


class Decoder3d(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_channels * one for one in config.channel_factors]
        cube = (3, 3, 3)
        self.conv1 = CausalConv3d(config.latent_channels, widths[0], cube)
        self.middle = nn.Sequential(
            ResBlock(widths[0], widths[0]), FrameAttention(widths[0]), ResBlock(widths[0], widths[0])
        )
        layers: list[nn.Module] = []
        incoming = widths[0]
        for stage, width in enumerate(widths):
            for _ in range(config.res_blocks + 1):
                layers.append(ResBlock(incoming, width))
                incoming = width
            if stage < len(config.time_doubling):
                layers.append(Upsample(width, config.time_doubling[stage]))
                incoming = width // 2
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(ChannelNorm(incoming, 3), nn.SiLU(), CausalConv3d(incoming, 3, cube))

    def forward(self, x: Tensor, pasts: Iterator[Tensor], first: bool) -> Tensor:
        x = self.conv1(x, next(pasts))
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, pasts, first)
        norm, activation, last = self.head
        return last(activation(norm(x)), next(pasts))


class WanVaeDecoder(nn.Module):
    """The streaming decoder. One instance serves all sessions: everything that differs between them is passed in."""

    def __init__(self, config: VaeConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VaeConfig()
        self.conv2 = CausalConv3d(config.latent_channels, config.latent_channels, (1, 1, 1))
        self.decoder = Decoder3d(config)
        # Made on the CPU in float32 even where the module is made without memory: they are facts, not weights.
        self._mean = torch.tensor(config.latent_mean, device="cpu").view(1, -1, 1, 1, 1)
        self._std = torch.tensor(config.latent_std, device="cpu").view(1, -1, 1, 1, 1)

    @property
    def _weight(self) -> Tensor:
        return self.conv2.weight

    def cache_fields(self, height: int, width: int, dtype: str) -> tuple[Field, ...]:
        """The decoder's memory for latents of height x width, in the order in which the convolutions run."""
        shapes = _cache_shapes(self.decoder, height, width)
        return tuple(
            Field(f"vae_{index:02d}", shape, dtype, Tier.DEVICE, Update.OVERWRITE, Rebuild.NONE)
            for index, shape in enumerate(shapes)
        )

    @torch.no_grad()
    def decode(self, latents: Tensor, cache: Mapping[str, Tensor], first: bool) -> Tensor:
        """Normalised latents [T, C, h, w] to pixels [frames, 3, H, W] in 0..1; `cache` moves on by T latent frames.

        `first` says that the first of them is the first of the stream. One latent frame at a time: its activations at
        full size are hundreds of megabytes.
        """
        device, dtype = self._weight.device, self._weight.dtype
        x = latents.to(device=device).transpose(0, 1)[None].float()
        x = (x * self._std.to(device) + self._mean.to(device)).to(dtype)
        x = self.conv2(x)
        ordered = [cache[name][None] for name in sorted(cache)]
        frames = []
        for index in range(x.shape[2]):
            pasts = iter(ordered)
            out = self.decoder(x[:, :, index : index + 1], pasts, first and index == 0)
            assert next(pasts, None) is None, "more cache fields than causal convolutions"
            frames.append(out[0].transpose(0, 1))
        return torch.cat(frames).float().clamp(-1, 1) * 0.5 + 0.5


def _cache_shapes(decoder: Decoder3d, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """(C, 2, h, w) of what each causal convolution remembers."""
    shapes: list[tuple[int, int, int, int]] = []

    def remember(module: nn.Module) -> None:
        for one in module.modules():
            if isinstance(one, CausalConv3d) and one.kernel_size[0] > 1:
                shapes.append((one.in_channels, PAST_FRAMES, height, width))

    remember(decoder.conv1)
    for layer in (*decoder.middle, *decoder.upsamples):
        remember(layer)
        if isinstance(layer, Upsample):
            height, width = 2 * height, 2 * width
    remember(decoder.head)
    return shapes


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels [n, 3, H, W] in 0..1 to frames uint8 [n, H, W, 3], rounded to the nearest."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
