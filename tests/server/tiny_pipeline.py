"""A diffusers WanPipeline at toy size with seeded random weights, as a folder."""

from __future__ import annotations

from pathlib import Path

from turboserve.model.wan.tiny import PRESET, tiny_text_config, tiny_tokenizer, tiny_vae_config


def write_pipeline(folder: Path) -> Path:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    from turboserve.model.random_weights import fill_random

    vae = tiny_vae_config()
    parts = (
        WanTransformer3DModel(
            num_attention_heads=PRESET.heads, attention_head_dim=PRESET.dim // PRESET.heads, in_channels=4,
            out_channels=4, text_dim=PRESET.text_dim, freq_dim=PRESET.freq_dim, ffn_dim=PRESET.ffn_dim, num_layers=1,
        ),
        AutoencoderKLWan(
            base_dim=vae.base_channels, z_dim=vae.latent_channels, dim_mult=list(vae.channel_factors[::-1]),
            num_res_blocks=vae.res_blocks, temperal_downsample=list(vae.time_doubling[::-1]),
            latents_mean=list(vae.latent_mean), latents_std=list(vae.latent_std),
        ),
        UMT5EncoderModel(UMT5Config(**tiny_text_config())),
    )  # fmt: skip
    for seed, module in enumerate(parts):
        fill_random(module, seed)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    transformer, decoder, text = parts
    pipeline = WanPipeline(
        tokenizer=tokenizer, text_encoder=text, vae=decoder, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
