"""A Wan model by name or path: its spec without torch, and the model itself on a device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from turboserve.errors import CheckpointError
from turboserve.model.interface import Field, ModelSpec
from turboserve.model.presets import PRESETS
from turboserve.model.wan.manifest import DECODERS, ModelManifest, open_manifest
from turboserve.model.wan.spec import wan_spec

if TYPE_CHECKING:
    import torch

    from turboserve.model.light_decoder import LightDecoderConfig
    from turboserve.model.tensor_files import TensorFiles
    from turboserve.model.vae import VaeConfig
    from turboserve.model.wan.layout import FrameDecoder
    from turboserve.model.wan.model import WanModel

TINY = "wan-tiny"
# What the tiny model's weights are made from; another number when that changes.
_TINY_HASH = "tiny-1"


def tiny_spec() -> ModelSpec:
    preset = PRESETS[TINY]
    return wan_spec(preset, preset.size, TINY, _TINY_HASH, tuple(DECODERS))


def tiny_layout() -> tuple[Field, ...]:
    """What a session of the tiny model keeps, without making its weights."""
    import torch

    from turboserve.model.wan.layout import state_layout
    from turboserve.model.wan.tiny import tiny_decoder

    preset = PRESETS[TINY]
    with torch.device("meta"):
        decoders = {name: tiny_decoder(name) for name in DECODERS}
    return state_layout(preset, preset.size, decoders, "float32")


def load_tiny(device: str, size: str | None = None) -> WanModel:
    """The tiny model with random weights, the same on every machine."""
    from turboserve.model.wan.model import WanModel
    from turboserve.model.wan.tiny import tiny_parts

    preset = PRESETS[TINY]
    return WanModel(tiny_parts(device=device), preset, size=size or preset.size, name=TINY, model_hash=_TINY_HASH)


def load_path(path: Path, device: str, size: str | None = None) -> WanModel:
    """The model at a path, as `open_manifest` finds it: 16-bit on CUDA, float32 on a CPU. `size` wins over its own."""
    import torch

    from turboserve.model.tensor_files import TensorFiles
    from turboserve.model.text import TextEncoder
    from turboserve.model.wan.layout import transformer_config
    from turboserve.model.wan.model import WanModel, WanParts
    from turboserve.model.weights import infer_config, load_transformer

    manifest = open_manifest(path)
    if size is not None:
        manifest = replace(manifest, size=size)
    spec = manifest.spec()
    where = torch.device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    with TensorFiles.open(manifest.part("transformer")) as files:
        config = transformer_config(manifest.preset)
        found = infer_config(files, config)
        if found != config:
            wrong = [
                f"{name} {getattr(found, name)}, not {getattr(config, name)}"
                for name in ("layers", "dim", "ffn_dim", "patch_dim", "text_dim", "freq_dim")
                if getattr(found, name) != getattr(config, name)
            ]
            raise CheckpointError(
                f"{files.source} is not what preset {manifest.preset.name} describes: {'; '.join(wrong)}",
                hint="name another preset in model.toml",
            )
        transformer = load_transformer(files, config, where, dtype)
    text = TextEncoder.load(
        manifest.part("text_encoder"),
        manifest.part("tokenizer"),
        manifest.preset.text_tokens,
        torch.device("cpu") if manifest.text_device == "cpu" else where,
        dtype,
    )
    decoders = {name: _load_decoder(manifest, name, where, dtype) for name in manifest.decoders}
    parts = WanParts(transformer, decoders, text)
    return WanModel(parts, manifest.preset, size=manifest.size, name=manifest.name, model_hash=spec.model_hash)


def decoder_config(manifest: ModelManifest, name: str, files: TensorFiles) -> VaeConfig | LightDecoderConfig:
    """The config of one of a model's decoders from its file, held against its preset; CheckpointError."""
    from turboserve.model.weights import light_config, vae_config

    config: VaeConfig | LightDecoderConfig
    if name == "light":
        config = light_config(files)
    else:
        folder = files.source if files.source.is_dir() else files.source.parent
        beside = folder / "config.json"
        config = vae_config(files, json.loads(beside.read_text()) if beside.is_file() else {})
    preset = manifest.preset
    found = (config.latent_channels, config.space_factor, config.time_factor)
    wanted = (preset.latent_channels, preset.space_factor, preset.time_factor)
    if found != wanted:
        raise CheckpointError(
            f"{files.source} has latent channels, space and time factor {found}",
            expected=f"{wanted}, as preset {preset.name}",
        )
    return config


def _load_decoder(manifest: ModelManifest, name: str, device: torch.device, dtype: torch.dtype) -> FrameDecoder:
    from turboserve.model.light_decoder import LightDecoderConfig
    from turboserve.model.tensor_files import TensorFiles
    from turboserve.model.weights import load_light_decoder, load_vae

    with TensorFiles.open(manifest.part(DECODERS[name])) as files:
        config = decoder_config(manifest, name, files)
        if isinstance(config, LightDecoderConfig):
            return load_light_decoder(files, config, device, dtype)
        return load_vae(files, config, device, dtype)


def path_spec(path: Path) -> ModelSpec:
    """The spec of the model at a path; its parts must be there, but are not opened but for their digest."""
    return open_manifest(path).spec()
