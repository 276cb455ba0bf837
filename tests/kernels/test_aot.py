"""Ahead-of-time compilation of the shipped kernels, without a GPU: no spills, tensor cores, wide accesses.

Runs in its own process because the interpreter, which the other kernel tests need, cannot be compiled.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from turboserve.errors import ConfigError
from turboserve.kernels import aot, extents_cupy

SCRIPT = """
import json, sys
from turboserve.kernels import aot

rows, problems = [], []
for case in aot.cases(int(sys.argv[1])):
    if not case.kernel.startswith(sys.argv[2]):
        continue
    rows.append(aot.compile_row(case, int(sys.argv[1])))
    problems += aot.problems(rows[-1], case)
print(json.dumps({"rows": rows, "problems": problems}))
"""


def compiled(arch: int, prefix: str = "") -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    argv = [sys.executable, "-c", SCRIPT, str(arch), prefix]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_shipped_kernel_compiles_within_our_rules(arch):
    found = compiled(arch)
    assert found["problems"] == []
    kernels = {row["kernel"] for row in found["rows"]}
    assert kernels - {"attn_varlen_hopper"} == {
        "attn_varlen_slot", "layer_norm_modulate", "gated_residual", "gated_residual_norm", "residual_norm",
        "gated_residual_affine", "rms_norm", "qk_norm_rope_append", "gather_keys", "gather_extents", "scatter_extents",
        "block_checksum",
    }  # fmt: skip
    attention = [row for row in found["rows"] if row["kernel"] == "attn_varlen_slot"]
    assert len(attention) == 3 and all(row["instructions"]["tensor_core"] for row in attention)
    hopper = [row for row in found["rows"] if row["kernel"] == "attn_varlen_hopper"]
    assert [row["instructions"]["register_realloc"] > 0 for row in hopper] == ([True, True] if arch == 90 else [])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("arch", [103, 120])
def test_attention_compiles_for_the_newer_arches(arch):
    """Row-wise kernels come out as for sm_100; `turboserve bench kernels --compile-only` looks at all of them."""
    found = compiled(arch, "attn")
    assert found["problems"] == [] and len(found["rows"]) == 3


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_cuda_c_twins_compile(arch):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the PATH: the CUDA C source cannot be compiled here")
    for kernel in extents_cupy.KERNELS:
        case, row = aot.cuda_source_row(kernel, arch)
        assert aot.problems(row, case) == []
        assert row["instructions"]["load_128"] == row["instructions"]["store_128"] == extents_cupy.UNITS_A_THREAD


def test_without_nvcc_the_row_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="nvcc"):
        aot.cuda_source_row("gather_extents", 90)


def test_the_rules_find_what_they_look_for():
    """A row made bad in each way is named; else the check above could not fail."""
    case = aot.AotCase("k", "c", None, {}, {}, 4)
    good = {
        "kernel": "k", "config": "c", "arch": 90, "registers": 30, "spill_bytes": 0, "shared_bytes": 0,
        "instructions": {"tensor_core": 1, "load_128": 1, "store_128": 1, "store_16": 0},
    }  # fmt: skip
    assert aot.problems(good, case) == []
    for change, word in (
        ({"spill_bytes": 8}, "spills"),
        ({"shared_bytes": 300_000}, "shared"),
        ({"instructions": good["instructions"] | {"store_16": 2}}, "2 bytes"),
        ({"instructions": good["instructions"] | {"load_128": 0}}, "128 bits"),
    ):
        assert any(word in line for line in aot.problems(good | change, case))
    traded = aot.AotCase("k", "c", None, {}, {}, 4, memory_bound=False, warp_specialised=True)
    plain = good | {"instructions": good["instructions"] | {"register_realloc": 0, "tma_load": 3}}
    assert any("warp groups" in line for line in aot.problems(plain, traded))
    compute = aot.AotCase("k", "c", None, {}, {}, 4, memory_bound=False)
    bad = good | {"instructions": good["instructions"] | {"tensor_core": 0}}
    assert any("tensor-core" in line for line in aot.problems(bad, compute))
