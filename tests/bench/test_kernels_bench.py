"""`turboserve bench kernels`: rows of the contract's form on the CPU, and what is said where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from turboserve.bench import device_timing, kernel_cases, kernel_timing
from turboserve.cli.main import main


def test_every_case_runs_on_the_cpu(tmp_path):
    out = tmp_path / "rows.json"
    result = CliRunner().invoke(
        main, ["bench", "kernels", "--device", "cpu", "--rounds", "3", "--out", str(out), "--json"]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert json.loads(result.stdout)["rows"] == rows
    assert {one["case"] for one in rows} == {
        "attention/equal/torch", "attention/ragged/torch", "rows/layer_norm_modulate", "rows/gated_residual_norm",
        "rows/qk_norm_rope_append", "extents/gather/torch", "extents/scatter/torch", "extents/checksum/torch",
    }  # fmt: skip
    assert "not run: cupy twin: no CUDA device" in result.stderr
    for row in rows:
        assert row["checked"] and row["max_rel_err"] <= 1e-4 and row["floor_ms"] > 0 and row["median_ms"] > 0
        assert "measured in this run" in row["floor"]


def test_a_wrong_kernel_gets_no_row(monkeypatch):
    cpu = torch.device("cpu")
    right = next(case for case in kernel_cases.cases(cpu) if case.name == "extents/gather/torch")
    wrong = replace(right, error=lambda: 0.5)
    monkeypatch.setattr(kernel_cases, "cases", lambda device: [wrong])
    with pytest.raises(AssertionError, match="away from the reference"):
        list(kernel_timing.timed_rows(cpu, "*", 3, set()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_can_be_done():
    result = CliRunner().invoke(main, ["bench", "kernels"])
    assert result.exit_code == 2
    assert "no CUDA device" in result.stderr and "--compile-only" in result.stderr


def test_compile_only_prints_the_rows_of_the_issue():
    # A process of its own: other tests here may have set Triton to interpret.
    chosen = ["--compile-only", "--arch", "90", "--case", "rms_norm", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    argv = [sys.executable, "-m", "turboserve", "bench", "kernels", *chosen]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)["rows"]
    fields = {"kernel", "config", "arch", "registers", "spill_bytes", "shared_bytes", "instructions"}
    assert rows and all(set(one) == fields and one["arch"] == 90 for one in rows)


def test_rates_are_of_this_machine():
    cpu = torch.device("cpu")
    assert 1e8 < device_timing.matmul_rate(cpu, torch.float32, rounds=3) < 1e14
    assert 1e8 < device_timing.copy_rate(cpu, rounds=3) < 1e13
