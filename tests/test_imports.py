"""What may be imported where: the core on a bare GPU machine, nothing heavy in the gateway or the command line."""

from __future__ import annotations

import subprocess
import sys

CORE = [
    "turboserve.errors", "turboserve.geometry", "turboserve.session",
    "turboserve.kernels.reference", "turboserve.orchestrator.batching",
    "turboserve.model.interface", "turboserve.model.registry", "turboserve.model.dit", "turboserve.model.noise",
    "turboserve.model.noise_schedule", "turboserve.model.shapes.model", "turboserve.model.shapes.spec",
    "turboserve.model.shapes.text", "turboserve.model.presets", "turboserve.model.vae", "turboserve.model.weights",
    "turboserve.model.wan.model", "turboserve.model.wan.layout",
    "turboserve.runtime.kv_pool", "turboserve.runtime.session_tensors", "turboserve.runtime.batch",
    "turboserve.runtime.engine", "turboserve.runtime.cost_model", "turboserve.runtime.numerics",
]  # fmt: skip

# What the GPU test machine lacks, or has in another version than ours.
ABSENT = [
    "fastapi", "starlette", "pydantic", "uvicorn", "av", "diffusers", "transformers", "msgspec", "structlog",
    "websockets", "httpx", "prometheus_client", "uvloop", "nvtx", "numba", "click", "rich", "triton",
]  # fmt: skip

SCRIPT = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"{{name}} is not on this machine", name=name)

sys.meta_path.insert(0, Absent())
for name in {names!r}:
    importlib.import_module(name)
heavy = sorted(one for one in {watched!r} if one in sys.modules)
print(",".join(heavy))
"""


def imported(names: list[str], absent: list[str], watched: list[str]) -> set[str]:
    """Import `names` in a fresh process where `absent` cannot be found; which of `watched` came along."""
    script = SCRIPT.format(names=names, absent=set(absent), watched=watched)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]
    return set(filter(None, done.stdout.strip().split(",")))


def test_core_imports_with_torch_numpy_and_safetensors_alone():
    assert "torch" in imported(CORE, ABSENT, ["torch"])


def test_the_gateway_needs_no_torch():
    names = [
        "turboserve.server.process",
        "turboserve.server.app",
        "turboserve.server.fleet",
        "turboserve.runtime.launcher",
    ]
    assert imported(names, ["torch", "triton", "diffusers", "transformers"], ["torch"]) == set()


def test_decisions_need_no_torch():
    assert imported(["turboserve.orchestrator.scheduler", "turboserve.sim.replay"], ["torch"], ["torch"]) == set()


def test_help_is_light():
    heavy = ["torch", "numpy", "fastapi", "pydantic", "msgspec", "rich", "av", "numba"]
    assert imported(["turboserve.cli.main", "turboserve"], [], heavy) == set()
