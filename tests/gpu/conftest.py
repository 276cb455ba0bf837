"""GPU tests run compiled kernels: in a process of their own, apart from those that need Triton's interpreter."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    import triton

    assert torch.cuda.is_available(), "gpu tests need a CUDA device; without one leave out -m gpu"
    assert not triton.knobs.runtime.interpret, "unset TRITON_INTERPRET, or run tests/gpu by themselves"
    return torch.device("cuda", torch.cuda.current_device())
