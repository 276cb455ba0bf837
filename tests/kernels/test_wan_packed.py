"""The Wan model through the Triton kernels (interpreted) makes the latents that it makes through PyTorch's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from turboserve.kernels.packed_triton import TritonKernels
from turboserve.model.dit import CausalVideoTransformer
from turboserve.model.interface import ChunkRequest, Control, PromptSwitch, SessionTensors, pack
from turboserve.model.presets import PRESETS
from turboserve.model.random_weights import fill_random
from turboserve.model.wan.layout import transformer_config
from turboserve.model.wan.model import WanModel, WanParts
from turboserve.model.wan.tiny import tiny_parts

# The kernels take heads of 32, 64 or 128 numbers.
PRESET = replace(PRESETS["wan-tiny"], dim=64, heads=2, layers=1)


def latents(model: WanModel) -> list[torch.Tensor]:
    """Two sessions in shared passes: a chunk each, then one of them recaches under a new prompt beside the other."""
    states, made = [], []
    for seed in (1, 2):
        tensors = {one.name: torch.zeros(one.shape) for one in model.state_layout()}
        states.append(SessionTensors(session_id=f"s{seed}", seed=seed, slot=seed, tensors=tensors))
        model.begin(states[-1], Control("a fox"))
    for chunk, prompt in enumerate(("a fox", "a fox", "a bear")):
        waiting = [
            model.next_passes(state, ChunkRequest(chunk, 1, Control(wanted), PromptSwitch.RECACHE))
            for state, wanted in zip(states, (prompt, "a fox"), strict=True)
        ]
        while any(waiting):
            segments = [one.pop(0) for one in waiting if one]
            batch = pack(segments)
            rows = model.forward(batch)
            for index, segment in enumerate(segments):
                model.advance(segment, rows[batch.rows(index)])
                if segment.completes_latents:
                    made.append(segment.state.tensors["work"].clone())
    return made


@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
def test_triton_and_pytorch_make_the_same_latents(rope_mode, monkeypatch):
    preset = replace(PRESET, rope_mode=rope_mode)
    transformer = CausalVideoTransformer(transformer_config(preset)).eval().requires_grad_(False)
    fill_random(transformer, 1)
    tiny = tiny_parts("light")
    parts = WanParts(transformer, tiny.decoders, tiny.text)

    def make() -> WanModel:
        return WanModel(parts, preset, size=preset.size, name="wan", model_hash="wan")

    expected = latents(make())
    triton = TritonKernels(torch.device("cpu"), 90)
    monkeypatch.setattr(CausalVideoTransformer, "choose_kernels", lambda self: setattr(self, "kernels", triton))
    model = make()  # on these kernels padding is written out, not folded
    for ours, theirs in zip(latents(model), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert len(expected) == 6
