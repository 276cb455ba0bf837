"""Fixtures for tests that need the whole server; Triton's interpreter for all tests but those on a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings
from real_server import RunningServer, start_server

# The same examples each time, so that a red run is about the change; other ones: HYPOTHESIS_PROFILE=random.
settings.register_profile("same", derandomize=True)
settings.register_profile("random")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# Before the first test of any folder imports Triton: what was imported without it stays compiled for the whole run.
# scripts/gpu.sh says otherwise.
if "TURBOSERVE_ON_GPU" not in os.environ:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for the whole run: embedded model, the default fleet of two, no keys. Leave it as you found it."""
    with start_server(tmp_path_factory.mktemp("real-server")) as server:
        yield server


@pytest.fixture(scope="session")
def server_url(real_server: RunningServer) -> str:
    """Base URL of `real_server`."""
    return real_server.url


@pytest.fixture(scope="module", autouse=True)
def _denormals_as_python_has_them() -> Iterator[None]:
    """The engine flushes denormals in its thread; a module that ran it here must not leave that to the next one."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
