"""The embedded model on the GPU through the Triton kernels: close to the CPU, and each session's bits its own."""

from __future__ import annotations

import pytest
import torch

from turboserve.kernels.packed_torch import TorchKernels
from turboserve.model.shapes.model import ShapesModel
from turboserve.model.shapes.self_test import allocate, packed_equals_alone, run_chunks
from turboserve.runtime.numerics import set_up_determinism

pytestmark = pytest.mark.gpu
PROMPT = "two small red circles drifting left"


@pytest.fixture(scope="module")
def model(device) -> ShapesModel:
    set_up_determinism(device)
    return ShapesModel.load(device)


def rows_of(model: ShapesModel) -> list[torch.Tensor]:
    (rows,) = run_chunks(model, [allocate(model, "s", 3)], [PROMPT], 3)
    return [one.cpu() for one in rows]


def test_the_model_chose_triton(model):
    assert model.self_test()["kernels"] == "triton"


def test_triton_and_torch_make_the_same_video_on_the_gpu_and_the_cpu_agrees(model):
    ours = rows_of(model)
    transformer = model._transformer
    chosen, transformer.kernels = transformer.kernels, TorchKernels()
    try:
        plain = rows_of(model)
    finally:
        transformer.kernels = chosen
    for got, want, cpu in zip(ours, plain, rows_of(ShapesModel.load("cpu")), strict=True):
        scale = cpu.abs().max()
        assert (got - want).abs().max() < 2e-3 * scale
        assert (got - cpu).abs().max() < 5e-3 * scale


@pytest.mark.parametrize("sessions", [2, 8])
def test_bits_alone_and_packed(model, sessions):
    """Linear layers are the library's here: where this fails, docs/kernels.md says what is to be done about it."""
    found = packed_equals_alone(model, sessions=sessions, chunks=3)
    assert found["packed_equals_alone"], found
