"""What one session of a causal Wan model keeps, to the byte; known without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from turboserve.model.dit import TransformerConfig
from turboserve.model.interface import Field, PromptSwitch, Rebuild, Tier, Update
from turboserve.model.presets import WanPreset
from turboserve.model.rotary import RopeMode

KV_CACHE, TEXT_KV, LATENTS, WORK = "kv_cache", "text_kv", "latents", "work"


class FrameDecoder(Protocol):
    """Latents to pixels: the Wan VAE's decoder or a light one."""

    def cache_fields(self, height: int, width: int, dtype: str) -> tuple[Field, ...]: ...

    def decode(self, latents: Tensor, cache: dict[str, Tensor], first: bool) -> Tensor: ...


def transformer_config(preset: WanPreset) -> TransformerConfig:
    """The shape of a preset's transformer."""
    return TransformerConfig(
        layers=preset.layers,
        dim=preset.dim,
        heads=preset.heads,
        ffn_dim=preset.ffn_dim,
        patch_dim=4 * preset.latent_channels,
        text_dim=preset.text_dim,
        text_tokens=preset.text_tokens,
        freq_dim=preset.freq_dim,
        rope_mode=RopeMode(preset.rope_mode),
    )


def state_layout(
    preset: WanPreset,
    size: str,
    decoders: Mapping[str, FrameDecoder],
    dtype: str,
    config: TransformerConfig | None = None,
) -> tuple[Field, ...]:
    """Every tensor of a session, with the memory of each decoder that it may choose. Keys and decoders' memory are in
    `dtype`; latents are float32 always."""
    config = config or transformer_config(preset)
    slot, (rows, columns) = preset.slot(size), preset.latent_size(size)
    latents = (preset.chunk_latent_frames, preset.latent_channels, rows, columns)
    heads, width, layers = config.heads, config.head_dim, config.layers
    fields = [
        Field(
            KV_CACHE,
            (layers, 2, slot.page_count, slot.page_tokens, heads, width),
            dtype,
            Tier.DEVICE,
            Update.APPEND_CHUNK,
            Rebuild.APPROXIMATE,
            page_axis=2,
        )
    ]
    if PromptSwitch.RECACHE in preset.prompt_switch:
        fields.append(
            Field(LATENTS, (slot.page_count, *latents), "float32", Tier.DEVICE, Update.APPEND_CHUNK, page_axis=0)
        )
    fields.append(
        Field(
            TEXT_KV,
            (layers, 2, config.text_tokens, heads, width),
            dtype,
            Tier.DEVICE,
            Update.PER_PROMPT,
            Rebuild.EXACT,
        )
    )
    for name, decoder in decoders.items():
        fields += [replace(one, decoder=name) for one in decoder.cache_fields(rows, columns, dtype)]
    fields.append(Field(WORK, latents, "float32", Tier.DEVICE, Update.SCRATCH))
    return tuple(fields)


def to_tokens(latents: Tensor) -> Tensor:
    """Latents [F, C, h, w] to tokens [F * h/2 * w/2, C * 4], channel first within a token."""
    frames, channels, rows, columns = latents.shape
    x = latents.reshape(frames, channels, rows // 2, 2, columns // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * 4)


def from_tokens(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_tokens`, for latents of the shape of `like`."""
    frames, channels, rows, columns = like.shape
    x = tokens.reshape(frames, rows // 2, columns // 2, channels, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(like.shape)


def linear_shapes(module: nn.Module) -> list[nn.Linear]:
    """One linear layer of each (in, out) shape in a module, in the order met."""
    seen: dict[tuple[int, int], nn.Linear] = {}
    for one in module.modules():
        if isinstance(one, nn.Linear):
            seen.setdefault((one.in_features, one.out_features), one)
    return list(seen.values())


@torch.no_grad()
def packed_linears_equal(layers: list[nn.Linear], rows: int, sessions: int = 3) -> list[str]:
    """Shapes whose packed rows differ from the same rows alone, on this machine: [] is what one hopes for."""
    differing = []
    for layer in layers:
        noise = np.random.default_rng(0).standard_normal((sessions * rows, layer.in_features), dtype=np.float32)
        x = torch.from_numpy(noise).to(layer.weight)
        together = layer(x)
        alone = torch.cat([layer(x[at * rows : (at + 1) * rows]) for at in range(sessions)])
        if not torch.equal(together, alone):
            differing.append(f"{layer.in_features}x{layer.out_features}")
    return differing
