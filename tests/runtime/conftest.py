"""Fixtures of the worker's tests."""

import pytest
import torch

from turboserve.runtime.numerics import set_up_determinism


@pytest.fixture(scope="module")
def deterministic():
    """As in a worker, where bits are compared; undone, because hypothesis draws denormal floats elsewhere."""
    threads = torch.get_num_threads()
    set_up_determinism(torch.device("cpu"))
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)
