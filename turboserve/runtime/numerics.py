"""Bits: how this process is set up so that they repeat, a name for the bits it makes, and the check at load.

Promise P1: a session's frames are the same alone, coalesced, suspended or moved, within a device class. On a CPU that
holds with one torch thread, denormals flushed, and layers that treat a packed row as they treat it alone (the model's
`self_test` probes each layer shape in use and falls back to one segment at a time where they do not).

`numerics_id` names all that is known to change bits: model, kernels, library versions, and the processor's kind. Two
workers with equal ids make equal bits; a session goes to a worker with another id only when told to.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from turboserve.errors import ConfigError
from turboserve.model.interface import ChunkRequest, Control, StreamingModel, pack
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.session_tensors import hold_session


@dataclass(frozen=True, slots=True)
class NumericsReport:
    """What the load-time check found; it goes to the log and to `doctor`."""

    numerics_id: str
    device_class: str
    packed_equals_alone: bool
    model_report: dict[str, Any] = field(default_factory=dict)


def set_up_determinism(device: torch.device) -> None:
    """Make this thread's results repeatable. Call it first in the thread that runs the engine.

    One thread: how torch splits a sum over threads changes its order. Denormals: the flag is per thread, and a worker
    that differs from another in it makes other bits.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("highest")
    if device.type == "cuda":
        # cuBLAS picks a workspace, and with it a summation order, per call unless this is fixed.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        # Not on a CPU: nothing we use there needs it, and asking costs a second and a half of imports.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@cache
def _cpu_model() -> str:
    """Vendor, family and model of the processor: math libraries choose their code by these."""
    wanted = {"vendor_id", "cpu family", "model"}
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in wanted:
                found.setdefault(key.strip(), value.strip())
            elif found and not line:
                break
    except OSError:
        pass
    return "/".join(found.get(key, "?") for key in sorted(wanted))


def device_class(device: torch.device) -> str:
    """The kind of device, such as `cpu-avx512` or `cuda-sm90-nvidia-h200`."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device).lower().replace(" ", "-")
        return f"cuda-sm{major}{minor}-{name}"
    if device.type == "cpu":
        return f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}"
    raise ConfigError(f"device {device}", expected="cpu or cuda")


def compute_numerics_id(model_hash: str, device: torch.device, kernels: Mapping[str, Any]) -> str:
    """16 hex digits over everything known to change bits; `kernels` is what the model's self-test chose."""
    facts = {
        "model": model_hash,
        "kernels": kernels,
        "torch": torch.__version__,
        "numpy": np.__version__.split(".")[0],
        "device_class": device_class(device),
        "machine": platform.machine(),
        "cpu": _cpu_model() if device.type == "cpu" else "",
        "cuda": torch.version.cuda or "",
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
    }
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def packed_equals_alone(model: StreamingModel, pool: KvPool, segment_count: int = 4) -> bool:
    """Whether a packed pass of several sessions gives each the very rows it gets alone; slots are given back."""
    count = min(segment_count, pool.free_count)
    held = []
    try:
        for index in range(count):
            name = f"selftest{index:02d}".ljust(26, "a")
            held.append(hold_session(pool, model, name, seed=index, control=Control(prompt="")))
        request = ChunkRequest(0, model.spec.denoise_steps, Control(prompt=""))
        with torch.inference_mode():
            segments = [model.next_passes(one.state, request)[0] for one in held]
            batch = pack(segments)
            # Cloned: a model may hand out the same buffer from every pass.
            together = model.forward(batch).clone()
            for index, segment in enumerate(segments):
                if not torch.equal(model.forward(pack([segment])), together[batch.rows(index)]):
                    return False
    finally:
        for one in held:
            pool.release(one.session_id)
    return True


def check_numerics(model: StreamingModel, pool: KvPool) -> NumericsReport:
    """The model's own probe, then a packed pass against lone ones; called once at load."""
    found = model.self_test()
    kernels = {key: value for key, value in found.items() if key != "timings"}
    return NumericsReport(
        numerics_id=compute_numerics_id(model.spec.model_hash, model.device, kernels),
        device_class=device_class(model.device),
        packed_equals_alone=packed_equals_alone(model, pool),
        model_report=found,
    )
