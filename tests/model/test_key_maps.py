"""Key maps between checkpoint layouts: each is the inverse of the other, and lands on the names others use."""

from __future__ import annotations

import pytest
import torch

from turboserve.model import key_maps as maps


def original_transformer_keys(layers: int) -> set[str]:
    """Names in original Wan checkpoints, as their code registers them."""
    keys = {f"{name}.{p}" for name in ("patch_embedding", "head.head", "time_projection.1") for p in ("weight", "bias")}
    keys |= {f"{name}_embedding.{i}.{p}" for name in ("text", "time") for i in (0, 2) for p in ("weight", "bias")}
    keys.add("head.modulation")
    for i in range(layers):
        keys |= {f"blocks.{i}.modulation", f"blocks.{i}.norm3.weight", f"blocks.{i}.norm3.bias"}
        keys |= {f"blocks.{i}.ffn.{n}.{p}" for n in (0, 2) for p in ("weight", "bias")}
        for a in ("self_attn", "cross_attn"):
            keys |= {f"blocks.{i}.{a}.{n}.{p}" for n in "qkvo" for p in ("weight", "bias")}
            keys |= {f"blocks.{i}.{a}.norm_{n}.weight" for n in "qk"}
    return keys


def test_transformer_names_are_diffusers_names():
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        theirs = WanTransformer3DModel(num_layers=2, num_attention_heads=2, attention_head_dim=24, ffn_dim=8)
    original = original_transformer_keys(2)
    assert {maps.transformer_to_diffusers(key) for key in original} == set(theirs.state_dict())
    assert {maps.transformer_from_diffusers(key) for key in theirs.state_dict()} == original


@pytest.mark.parametrize("res_blocks", [1, 2])
def test_vae_names_go_there_and_back(res_blocks):
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        theirs = AutoencoderKLWan(base_dim=8, num_res_blocks=res_blocks).state_dict()
    there, back = maps.vae_from_diffusers(res_blocks), maps.vae_to_diffusers(res_blocks)
    ours = {there(key) for key in theirs}
    assert len(ours) == len(theirs) and {back(key) for key in ours} == set(theirs)
    assert f"decoder.upsamples.{res_blocks + 1}.time_conv.weight" in ours
    assert "decoder.middle.1.to_qkv.weight" in ours and "decoder.middle.2.residual.6.bias" in ours


def test_published_vae_names():
    """A few names of the published file, written down, with what diffusers calls them."""
    rename = maps.vae_to_diffusers(2)
    for original, theirs in (
        ("decoder.upsamples.4.shortcut.weight", "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"),
        ("decoder.upsamples.7.resample.1.bias", "decoder.up_blocks.1.upsamplers.0.resample.1.bias"),
        ("decoder.upsamples.14.residual.0.gamma", "decoder.up_blocks.3.resnets.2.norm1.gamma"),
        ("decoder.head.0.gamma", "decoder.norm_out.gamma"),
        ("conv2.weight", "post_quant_conv.weight"),
    ):
        assert rename(original) == theirs


def test_text_encoder_names_are_those_of_transformers():
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with torch.device("meta"):
        theirs = set(UMT5EncoderModel(config).state_dict()) - {"encoder.embed_tokens.weight"}
    ours = {maps.t5_from_transformers(key) for key in theirs}
    assert {maps.t5_to_transformers(key) for key in ours} == theirs
    assert {"token_embedding.weight", "norm.weight", "blocks.1.pos_embedding.embedding.weight"} <= ours
    assert {"blocks.0.ffn.gate.0.weight", "blocks.0.attn.q.weight"} <= ours


@pytest.mark.parametrize(
    "wrapped",
    [
        "model.blocks.0.self_attn.q.weight",
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.self_attn.q.weight",
        "module.model._orig_mod.blocks.0._checkpoint_wrapped_module.self_attn.q.weight",
        "diffusion_model.blocks.0.self_attn.q.weight",
        "blocks.0.self_attn.q.weight",
    ],
)
def test_wrappers_are_stripped(wrapped):
    assert maps.strip_wrappers(wrapped) == "blocks.0.self_attn.q.weight"


def test_an_unknown_key_stays_as_it_is():
    for rename in (maps.transformer_from_diffusers, maps.transformer_to_diffusers, maps.t5_to_transformers):
        assert rename("blocks.0.mystery.weight").endswith("mystery.weight")
        assert rename("mystery.weight") == "mystery.weight"
