"""Ahead-of-time compilation of the shipped kernels, without a GPU: no spills, tensor cores, wide accesses.

Runs in its own process because the interpreter, which the other kernel tests need, cannot be compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from turboserve.kernels import aot

SCRIPT = """
import json, sys
from turboserve.kernels import aot

rows, problems = [], []
for case in aot.cases(int(sys.argv[1])):
    rows.append(aot.compile_row(case, int(sys.argv[1])))
    problems += aot.problems(rows[-1], case)
print(json.dumps({"rows": rows, "problems": problems}))
"""


def compiled(arch: int) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    argv = [sys.executable, "-c", SCRIPT, str(arch)]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("arch", aot.ARCHES)
def test_every_shipped_kernel_compiles_within_our_rules(arch):
    found = compiled(arch)
    assert found["problems"] == []
    kernels = {row["kernel"] for row in found["rows"]}
    assert kernels == {
        "attn_varlen_slot", "layer_norm_modulate", "gated_residual", "gated_residual_norm", "residual_norm",
        "gated_residual_affine", "rms_norm", "qk_norm_rope_append", "gather_keys", "gather_extents", "scatter_extents",
        "block_checksum",
    }  # fmt: skip
    attention = [row for row in found["rows"] if row["kernel"] == "attn_varlen_slot"]
    assert len(attention) == 3 and all(row["instructions"]["tensor_core"] for row in attention)


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
    compute = aot.AotCase("k", "c", None, {}, {}, 4, memory_bound=False)
    bad = good | {"instructions": good["instructions"] | {"tensor_core": 0}}
    assert any("tensor-core" in line for line in aot.problems(bad, compute))
