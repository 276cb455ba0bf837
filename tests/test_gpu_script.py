"""`make gpu` on a machine without a GPU: it says so and fails; with one, it runs every step within its time."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "gpu.sh"


def run(python: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON_BIN": python} | variables
    return subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_fails():
    done = run(sys.executable)
    assert done.returncode == 1
    assert "needs an NVIDIA GPU" in done.stderr and "Nothing was tested" in done.stderr
    assert "driver" in done.stderr and "mend:" in done.stderr


@pytest.fixture
def python_with_a_gpu(tmp_path):
    """Says yes to the question for a GPU, notes every step, and fails the one named in FAIL."""
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *device_count*) echo 1; exit 0;; "-c "*) exit 0;; esac\n'
        f'echo "$@" >> {tmp_path}/steps\ncase "$*" in *"$FAIL"*) sleep "${{NAP:-0}}"; exit 3;; esac\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_the_steps_and_their_verdict(python_with_a_gpu, tmp_path):
    """A stand-in for Python: what is looked at here is the shell script alone."""
    done = run(str(python_with_a_gpu), FAIL="nothing fails", OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    steps = (tmp_path / "steps").read_text()
    for wanted in ("tests/gpu", "bench kernels --device cuda", "bench coalescing", "bench offload", "bench migrate"):
        assert wanted in steps
    done = run(str(python_with_a_gpu), FAIL="tests/gpu", OUT=str(tmp_path))
    assert done.returncode == 1 and "failed: kernel and model tests (exit 3)" in done.stderr


def test_a_step_that_takes_too_long_leaves_the_rest_without_time(python_with_a_gpu, tmp_path):
    done = run(str(python_with_a_gpu), FAIL="tests/gpu", NAP="60", LIMIT_S="6", OUT=str(tmp_path))
    assert done.returncode == 1
    assert "kernel and model tests (exit 124)" in done.stderr and "bench kernels (no time left)" in done.stderr
