"""Checkpoints of the Wan family into our modules, and back.

On disk three forms are known: original Wan names (also behind training wrappers, as Self-Forcing, CausVid and LongLive
save them), diffusers' names, and ours, which are the original ones. In memory two things differ from the original:
queries and keys of self-attention have their channels in halves order (rotary.py), and a token's numbers lie
channel first both going in and coming out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turboserve.errors import CheckpointError
from turboserve.model import key_maps
from turboserve.model.dit import CausalVideoTransformer, TransformerConfig
from turboserve.model.light_decoder import LightDecoder, LightDecoderConfig
from turboserve.model.presets import guess_preset
from turboserve.model.rotary import halves_order
from turboserve.model.tensor_files import TensorFiles, fill
from turboserve.model.vae import VaeConfig, WanVaeDecoder

PATCH = (1, 2, 2)  # latent frames, rows and columns per token, in all of the family


class Layout(StrEnum):
    """Whose names the weights go by."""

    ORIGINAL = "original"
    WRAPPED = "original, behind training wrappers"
    DIFFUSERS = "diffusers"


def transformer_layout(keys: frozenset[str], source: Path) -> Layout:
    """Told by names that only one layout has. CheckpointError when it is no Wan transformer."""
    if any(key.startswith("condition_embedder.") for key in keys):
        return Layout.DIFFUSERS
    if "patch_embedding.weight" in keys and "head.modulation" in keys:
        return Layout.ORIGINAL
    stripped = {key_maps.strip_wrappers(key) for key in keys}
    if "patch_embedding.weight" in stripped and "head.modulation" in stripped:
        return Layout.WRAPPED
    some = ", ".join(sorted(keys)[:4]) or "nothing"
    raise CheckpointError(
        f"{source} holds no Wan transformer (it has {some})",
        expected="patch_embedding, blocks.N..., head: original, wrapped or diffusers names",
    )


def transformer_names(layout: Layout) -> Callable[[str], str]:
    """From a layout's keys to ours."""
    if layout is Layout.DIFFUSERS:
        return key_maps.transformer_from_diffusers
    return key_maps.strip_wrappers if layout is Layout.WRAPPED else lambda key: key


def shape_of_transformer(files: TensorFiles) -> tuple[int, int]:
    """(layers, width) of a transformer in any layout."""
    rename = transformer_names(transformer_layout(files.keys, files.source))
    names = {rename(key): key for key in files.keys}
    layers = {key.split(".")[1] for key in names if key.startswith("blocks.")}
    return len(layers), files.shape(names["patch_embedding.weight"])[0]


def describe_weights(files: TensorFiles) -> dict[str, Any]:
    """{"holds", "layout", "shape"} of a weights file, from its header alone."""
    keys = files.keys
    if is_light_decoder(keys):
        light = light_config(files)
        return {"holds": "light decoder", "shape": {"latent_channels": light.latent_channels, "widths": light.widths}}
    if "conv2.weight" in keys or "post_quant_conv.weight" in keys:
        diffusers = "post_quant_conv.weight" in keys
        layout = Layout.DIFFUSERS if diffusers else Layout.ORIGINAL
        channels = files.shape("post_quant_conv.weight" if diffusers else "conv2.weight")[0]
        return {"holds": "VAE", "layout": layout.value, "shape": {"latent_channels": channels}}
    if "shared.weight" in keys or "token_embedding.weight" in keys:
        original = "token_embedding.weight" in keys
        vocabulary, width = files.shape("token_embedding.weight" if original else "shared.weight")
        layout_name = Layout.ORIGINAL.value if original else "transformers"
        return {"holds": "text encoder", "layout": layout_name, "shape": {"words": vocabulary, "width": width}}
    layout = transformer_layout(keys, files.source)
    layers, dim = shape_of_transformer(files)
    guessed = guess_preset(layers, dim)
    found: dict[str, Any] = {"holds": "transformer", "layout": layout.value, "shape": {"layers": layers, "width": dim}}
    if guessed is not None:
        found["shape_of_preset"] = guessed.name
    return found


def infer_config(files: TensorFiles, base: TransformerConfig) -> TransformerConfig:
    """The config that a file's shapes imply; what they do not tell (heads, rotary mode) is the preset's."""
    layout = transformer_layout(files.keys, files.source)
    names = {transformer_names(layout)(key): key for key in files.keys}

    def shape(key: str) -> tuple[int, ...]:
        if key not in names:
            raise CheckpointError(f"{files.source} lacks {key}", expected="a whole Wan transformer")
        return files.shape(names[key])

    dim = shape("patch_embedding.weight")[0]
    blocks = {key.split(".")[1] for key in names if key.startswith("blocks.")}
    return TransformerConfig(
        layers=len(blocks),
        dim=dim,
        heads=base.heads,
        ffn_dim=shape("blocks.0.ffn.0.weight")[0],
        patch_dim=shape("head.head.weight")[0],
        text_dim=shape("text_embedding.0.weight")[1],
        text_tokens=base.text_tokens,
        freq_dim=shape("time_embedding.0.weight")[1],
        rope_mode=base.rope_mode,
        rope_theta=base.rope_theta,
        eps=base.eps,
    )


def load_transformer(
    files: TensorFiles, config: TransformerConfig, device: torch.device, dtype: torch.dtype
) -> CausalVideoTransformer:
    """The transformer of a checkpoint in any of the known layouts."""
    layout = transformer_layout(files.keys, files.source)
    with torch.device("meta"):
        module = CausalVideoTransformer(config)
    fill(
        module,
        files,
        transformer_names(layout),
        what=f"a Wan transformer of {config.layers} layers, {config.dim} wide",
        dtype=dtype,
        device=device,
        adapt=lambda key, value: _to_ours(key, value, config),
        adapted_shape=_adapted_shape,
    )
    return module


def _order(key: str, config: TransformerConfig) -> Tensor | None:
    """Where our rows of a tensor stand in the original; None where they stand as they are."""
    if key.startswith("blocks.") and ".self_attn." in key:
        part = key.split(".self_attn.")[1]
        if part.startswith(("q.", "k.", "norm_q.", "norm_k.")):
            return halves_order(config.heads, config.head_dim)
    if key.startswith("head.head."):
        # Original: (frame, row, column, channel) of the patch; ours: channel first, as the patch embedding has it.
        channels = config.patch_dim // (PATCH[0] * PATCH[1] * PATCH[2])
        return torch.arange(config.patch_dim).view(-1, channels).T.reshape(-1)
    return None


def _adapted_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if key == "patch_embedding.weight" and len(shape) == 5:
        return (shape[0], shape[1] * shape[2] * shape[3] * shape[4])
    return shape


def _to_ours(key: str, value: Tensor, config: TransformerConfig) -> Tensor:
    if key == "patch_embedding.weight":
        return value.flatten(1)
    order = _order(key, config)
    return value if order is None else value[order]


def original_state(module: CausalVideoTransformer) -> dict[str, Tensor]:
    """A transformer's tensors as an original Wan checkpoint holds them: the inverse of loading."""
    state: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        order = _order(key, module.config)
        if order is not None:
            value = value[torch.argsort(order)]
        if key == "patch_embedding.weight":
            value = value.view(value.shape[0], -1, *PATCH)
        state[key] = value.contiguous()
    return state


def diffusers_state(module: CausalVideoTransformer) -> dict[str, Tensor]:
    """A transformer's tensors as diffusers' WanTransformer3DModel names them."""
    return {key_maps.transformer_to_diffusers(key): one for key, one in original_state(module).items()}


def is_light_decoder(keys: frozenset[str]) -> bool:
    """A TAEHV-class decoder; told by its blocks, which no Wan VAE has."""
    return "decoder.3.conv.0.weight" in keys


def load_vae(files: TensorFiles, config: VaeConfig, device: torch.device, dtype: torch.dtype) -> WanVaeDecoder:
    """The decoder of a Wan 2.1 VAE, original or diffusers names; the encoder's tensors are passed over."""
    with torch.device("meta"):
        module = WanVaeDecoder(config)
    diffusers = "post_quant_conv.weight" in files.keys
    fill(
        module,
        files,
        key_maps.vae_from_diffusers(config.res_blocks) if diffusers else lambda key: key,
        what="the decoder of a Wan 2.1 VAE",
        dtype=dtype,
        device=device,
        ignored=("encoder.", "conv1."),
    )
    return module


def load_light_decoder(
    files: TensorFiles, config: LightDecoderConfig, device: torch.device, dtype: torch.dtype
) -> LightDecoder:
    """A TAEHV-class decoder under its published names; the encoder's tensors are passed over."""
    with torch.device("meta"):
        module = LightDecoder(config)
    fill(module, files, lambda key: key, what="a light decoder", dtype=dtype, device=device, ignored=("encoder.",))
    return module


def vae_config(files: TensorFiles, extra: Mapping[str, object] | None = None) -> VaeConfig:
    """A VAE's config from its shapes; `extra` is diffusers' config.json, for the latents' statistics."""
    diffusers = "post_quant_conv.weight" in files.keys
    top = "post_quant_conv.weight" if diffusers else "conv2.weight"
    last = "decoder.conv_out.weight" if diffusers else "decoder.head.2.weight"
    if top not in files.keys or last not in files.keys:
        raise CheckpointError(f"{files.source} holds no Wan VAE", expected=f"{top} and {last} among its keys")
    channels, base = files.shape(top)[0], files.shape(last)[1]
    given = dict(extra or {})
    defaults = VaeConfig()
    mean, std = given.get("latents_mean", defaults.latent_mean), given.get("latents_std", defaults.latent_std)
    assert isinstance(mean, list | tuple) and isinstance(std, list | tuple)
    factors, down = given.get("dim_mult"), given.get("temperal_downsample")
    blocks = given.get("num_res_blocks", defaults.res_blocks)
    assert isinstance(blocks, int)
    if given.get("is_residual") or given.get("patch_size"):
        raise CheckpointError(f"{files.source} is a Wan 2.2 VAE", expected="a Wan 2.1 VAE; 2.2 is not supported yet")
    if len(mean) != channels or len(std) != channels:
        raise CheckpointError(
            f"{files.source} has {channels} latent channels, and there is no mean and deviation for them",
            expected="latents_mean and latents_std in the VAE's config.json",
        )
    return VaeConfig(
        latent_channels=channels,
        base_channels=base,
        channel_factors=tuple(factors[::-1]) if isinstance(factors, list) else defaults.channel_factors,
        res_blocks=blocks,
        time_doubling=tuple(down[::-1]) if isinstance(down, list) else defaults.time_doubling,
        latent_mean=tuple(mean),
        latent_std=tuple(std),
    )


def light_config(files: TensorFiles) -> LightDecoderConfig:
    """A light decoder's config from its shapes (three stages of three blocks, as all published ones)."""
    defaults = LightDecoderConfig()
    places = [1, 8, 14, 20]
    widths = tuple(files.shape(f"decoder.{place}.weight")[0] for place in places)
    doubling = tuple(
        files.shape(f"decoder.{place}.conv.weight")[0] == 2 * width
        for place, width in zip((7, 13, 19), widths, strict=False)
    )
    out = files.shape("decoder.22.weight")[0]
    return LightDecoderConfig(
        latent_channels=files.shape("decoder.1.weight")[1],
        widths=widths,
        time_doubling=doubling,
        blocks=defaults.blocks,
        patch=int((out // 3) ** 0.5),
    )
