"""The arena's table in C++: a million random operations against a model, and its owner killed at every instruction."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")


def run(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    sources = [CSRC / f"{name}.cpp" for name in (program, "pinned_arena", "frame_ring")]
    subprocess.run([COMPILER, "-std=c++17", "-O2", *sources, "-pthread", "-o", folder / program], check=True)
    return subprocess.run([folder / program, *arguments], capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("operations", [100_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
def test_random_operations_keep_the_ledger_exact(tmp_path, operations):
    result = run(tmp_path, "stress_arena", str(operations))
    assert result.returncode == 0 and f"{operations} operations: fine" in result.stdout, result.stderr


def test_an_owner_killed_at_every_instruction_leaves_the_state_before_or_after_the_step(tmp_path):
    result = run(tmp_path, "kill_arena")
    if result.returncode == 77:
        pytest.skip(result.stdout)
    assert result.returncode == 0 and ": fine" in result.stdout, result.stderr
