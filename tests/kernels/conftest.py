"""Kernel tests run the Triton interpreter on the CPU: the variable must be set before triton is imported."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _interpreter():
    import triton

    assert triton.knobs.runtime.interpret, "these tests need TRITON_INTERPRET=1 before triton is imported"
