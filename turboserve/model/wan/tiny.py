"""The `wan-tiny` model: every piece of a Wan model at toy size with seeded random weights.

Its pictures are noise. It lets every path of the real thing run on a laptop and in tests, and it can be written to disk
in each layout that checkpoints come in.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboserve.model.presets import PRESETS

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from turboserve.model.light_decoder import LightDecoder
    from turboserve.model.vae import VaeConfig, WanVaeDecoder
    from turboserve.model.wan.model import WanParts

PRESET = PRESETS["wan-tiny"]
_CHARACTERS = 95
_SEED = 20260101


def tiny_text_config() -> dict[str, Any]:
    """config.json of the tiny text encoder."""
    return {
        "model_type": "umt5",
        "vocab_size": _CHARACTERS + 3,
        "d_model": PRESET.text_dim,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 0,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def tiny_tokenizer() -> Tokenizer:
    """One token per character of printable ASCII, with umT5's end mark."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {chr(32 + at): 3 + at for at in range(_CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def tiny_vae_config() -> VaeConfig:
    from turboserve.model.vae import VaeConfig

    channels = PRESET.latent_channels
    return VaeConfig(
        latent_channels=channels,
        base_channels=4,
        channel_factors=(2, 2, 2, 1),
        res_blocks=1,
        latent_mean=(0.1, -0.2, 0.3, 0.0)[:channels],
        latent_std=(1.5, 0.7, 1.1, 2.0)[:channels],
    )


def tiny_decoder(name: str) -> WanVaeDecoder | LightDecoder:
    """The full or the light decoder, without weights."""
    from turboserve.model.light_decoder import LightDecoder, LightDecoderConfig
    from turboserve.model.vae import WanVaeDecoder

    if name == "full":
        return WanVaeDecoder(tiny_vae_config())
    return LightDecoder(LightDecoderConfig(latent_channels=PRESET.latent_channels, widths=(16, 12, 8, 8)))


def tiny_parts(*decoders: str, device: torch.device | str = "cpu", seed: int = _SEED) -> WanParts:
    """All parts with weights from a seed. `decoders` are full, light or both; none named: both."""
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    from turboserve.model.dit import CausalVideoTransformer
    from turboserve.model.random_weights import fill_random
    from turboserve.model.text import TextEncoder
    from turboserve.model.wan.layout import transformer_config
    from turboserve.model.wan.model import WanParts

    transformer = CausalVideoTransformer(transformer_config(PRESET))
    frames = {name: tiny_decoder(name) for name in decoders or ("full", "light")}
    umt5 = UMT5EncoderModel(UMT5Config(**tiny_text_config()))
    seeded = [(transformer, seed), *((one, seed + 1) for one in frames.values()), (umt5, seed + 2)]
    for module, own_seed in seeded:
        fill_random(module, own_seed)
        module.to(torch.device(device)).eval().requires_grad_(False)  # type: ignore[arg-type]
    return WanParts(transformer, frames, TextEncoder(umt5, tiny_tokenizer(), PRESET.text_tokens))


def write_tiny(folder: Path, layout: str = "diffusers", seed: int = _SEED, light: bool = False) -> Path:
    """Write the tiny model as published checkpoints are laid out; returns the folder.

    `diffusers`: a pipeline's folder. `original`: Wan's own names, with a model.toml beside them. `training`: as
    `original`, but the transformer in a pickled `self_forcing.pt` behind wrapper prefixes, for `models convert`.
    `light` adds a light decoder, so that sessions may choose.
    """
    import torch
    from safetensors.torch import save_file

    from turboserve.model import key_maps
    from turboserve.model.light_decoder import LightDecoder
    from turboserve.model.text import TextEncoder
    from turboserve.model.vae import WanVaeDecoder
    from turboserve.model.weights import diffusers_state, original_state

    parts, config = tiny_parts(seed=seed), tiny_vae_config()
    full, small = parts.decoders["full"], parts.decoders["light"]
    assert isinstance(full, WanVaeDecoder) and isinstance(small, LightDecoder) and isinstance(parts.text, TextEncoder)
    vae = full.state_dict()
    text = {key: one for key, one in parts.text.state_dict().items() if key != "encoder.embed_tokens.weight"}

    def write(name: str, state: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: one.contiguous() for key, one in state.items()}, path)
        if config is not None:
            (path.parent / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    diffusers = layout == "diffusers"
    if diffusers:
        rename = key_maps.vae_to_diffusers(config.res_blocks)
        write(
            "transformer/diffusion_pytorch_model.safetensors", diffusers_state(parts.transformer), _diffusers_config()
        )
        write(
            "vae/diffusion_pytorch_model.safetensors",
            {rename(key): one for key, one in vae.items()},
            _diffusers_vae_config(config),
        )
        write("text_encoder/model.safetensors", text, tiny_text_config())
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}) + "\n")
    else:
        renamed = {key_maps.t5_from_transformers(key): one for key, one in text.items()}
        write("text_encoder/model.safetensors", renamed, tiny_text_config())
        write("vae/Wan2.1_VAE.safetensors", vae, _diffusers_vae_config(config))
        transformer = original_state(parts.transformer)
        if layout == "original":
            write("transformer/diffusion_pytorch_model.safetensors", transformer)
        else:
            wrapped = {f"model._fsdp_wrapped_module.{key}": one for key, one in transformer.items()}
            torch.save({"generator_ema": wrapped, "generator": {}}, folder / "self_forcing.pt")
    if light:
        write("taew2_1.safetensors", small.state_dict())
    (folder / "tokenizer").mkdir(exist_ok=True)
    tiny_tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


def _diffusers_config() -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": PRESET.heads,
        "attention_head_dim": PRESET.dim // PRESET.heads,
        "in_channels": PRESET.latent_channels,
        "out_channels": PRESET.latent_channels,
        "text_dim": PRESET.text_dim,
        "freq_dim": PRESET.freq_dim,
        "ffn_dim": PRESET.ffn_dim,
        "num_layers": PRESET.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
    }


def _diffusers_vae_config(config: VaeConfig) -> dict[str, Any]:
    facts = asdict(config)
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": facts["base_channels"],
        "z_dim": facts["latent_channels"],
        "dim_mult": list(facts["channel_factors"][::-1]),
        "num_res_blocks": facts["res_blocks"],
        "temperal_downsample": list(facts["time_doubling"][::-1]),
        "latents_mean": list(facts["latent_mean"]),
        "latents_std": list(facts["latent_std"]),
    }
