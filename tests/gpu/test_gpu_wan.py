"""The causal Wan model on the GPU: float32 through Triton close to the CPU; 16 bits close to float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from turboserve.model.dit import CausalVideoTransformer
from turboserve.model.interface import ChunkRequest, Control, SessionTensors, pack
from turboserve.model.light_decoder import LightDecoder, LightDecoderConfig
from turboserve.model.presets import PRESETS
from turboserve.model.random_weights import fill_random
from turboserve.model.wan.layout import transformer_config
from turboserve.model.wan.model import WanModel, WanParts
from turboserve.runtime.numerics import set_up_determinism

pytestmark = pytest.mark.gpu
PRESET = replace(PRESETS["wan-tiny"], dim=256, heads=2, layers=2, size="64x64")


class Text:
    """Stands for a text encoder, which needs packages that a GPU machine may lack."""

    def encode(self, prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(prompt))
        return torch.randn(9, PRESET.text_dim, generator=generator)


def latents(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    transformer = CausalVideoTransformer(transformer_config(PRESET)).eval().requires_grad_(False)
    decoder = LightDecoder(LightDecoderConfig(latent_channels=4, widths=(16, 12, 8, 8))).eval().requires_grad_(False)
    fill_random(transformer, 1)
    fill_random(decoder, 2)
    parts = WanParts(transformer.to(device, dtype), {"light": decoder.to(device, dtype)}, Text())
    model = WanModel(parts, PRESET, size=PRESET.size, name="wan", model_hash="wan")
    tensors = {
        one.name: torch.zeros(one.shape, dtype=getattr(torch, one.dtype), device=device) for one in model.state_layout()
    }
    state, made = SessionTensors(session_id="s", seed=1, slot=0, tensors=tensors), []
    model.begin(state, Control("a fox"))
    for chunk in range(5):  # past a full window
        for segment in model.next_passes(state, ChunkRequest(chunk, 4, Control("a fox"))):
            model.advance(segment, model.forward(pack([segment])))
            if segment.completes_latents:
                made.append(state.tensors["work"].cpu().clone())
                assert model.decode(state, chunk).std() > 1
    return made


def test_the_gpu_agrees_with_the_cpu(device):
    set_up_determinism(device)
    expected = latents(torch.device("cpu"), torch.float32)
    for got, want in zip(latents(device, torch.float32), expected, strict=True):
        assert (got - want).abs().max() < 5e-3 * want.abs().max()


def test_16_bits_stay_near_float32(device):
    set_up_determinism(device)
    expected = latents(torch.device("cpu"), torch.float32)
    got = latents(device, torch.bfloat16)
    # Chunks feed on each other; the first shows what 16 bits cost without that.
    assert (got[0] - expected[0]).norm() < 0.15 * expected[0].norm()
    assert all(torch.isfinite(one).all() for one in got)
