"""The CUDA side of csrc/ against a stand-in runtime of plain memory: order of calls, batches, failures, leaks.

What a real GPU must show is in tests/runtime/test_state_gpu.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from turboserve.runtime import native

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
pytestmark = pytest.mark.skipif(
    COMPILER is None or native.IMPLEMENTATION != "native", reason="needs a C++ compiler and the compiled part"
)

PROGRAM = """
import ctypes, os, sys
import numpy as np
from turboserve import _native
from turboserve.errors import WorkerError
from turboserve.runtime.arena import Arena, create_arena
from turboserve.runtime.copy_engine import CopyEngine
assert _native.load_cuda([sys.argv[1]]) == (sys.argv[1], 1)
fake = ctypes.CDLL(sys.argv[1])
fd = create_arena(1 << 20)
with Arena.map(fd, partition=0, owner_epoch=1) as arena:
    arena.pin()
    assert fake.fake_open_things() == 1
assert fake.fake_open_things() == 0
source = np.random.default_rng(1).integers(0, 256, 50_000, np.uint8)
target = np.zeros_like(source)
rows = [(target[i:].ctypes.data, source[i:].ctypes.data, 1000) for i in range(0, 50_000, 1000)]
stream = 12345  # somebody's stream: an event is recorded on it first
with CopyEngine("cuda:0", implementation="native") as engine:
    assert engine._engine.batched == bool(os.environ.get("FAKE_BATCH"))
    ticket = engine.submit([*rows, (target.ctypes.data, source.ctypes.data, 0)], after_stream=stream)
    ticket.wait(10)
    assert ticket.copied == 51 and (target == source).all()
    bad = engine.submit([(target.ctypes.data, source.ctypes.data, 13)], after_stream=stream)
    for _ in range(2):
        try:
            bad.wait(10)
        except WorkerError as error:
            assert "as asked" in str(error)
        else:
            raise SystemExit("a failed copy was not said")
    target[:] = 0
    engine.submit(rows).wait(10)  # the engine goes on after a failure
    assert (target == source).all()
assert fake.fake_open_things() == 0, "a stream or an event was not given back"
print("fine")
"""


@pytest.mark.parametrize("batched", [False, True])
def test_the_copy_engine_over_a_stand_in_runtime(tmp_path, batched):
    library = tmp_path / "libcudart.so.13"
    source = Path(__file__).with_name("fake_cudart.cpp")
    subprocess.run([COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    environment = {**os.environ, **({"FAKE_BATCH": "1"} if batched else {})}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library)], capture_output=True, text=True, timeout=60, env=environment
    )
    assert result.returncode == 0 and "fine" in result.stdout, result.stderr
