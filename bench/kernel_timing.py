"""Rows of the kernels on a device: ours, its baselines, and the floor measured in the same run."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator

import torch

from turboserve.bench import kernel_cases
from turboserve.bench.device_timing import copy_rate, matmul_rate, measure
from turboserve.bench.report import Row, cpu_name, machine_slug, make_row, versions
from turboserve.errors import ConfigError

# What a kernel's result may differ from the reference by, of its largest magnitude.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.uint8: 0.0}


def device_of(name: str | None) -> torch.device:
    """The device asked for; CUDA where there is one if nobody asked. ConfigError where it is not there."""
    if name != "cpu" and not torch.cuda.is_available():
        raise ConfigError(
            "no CUDA device here",
            expected="a machine with an NVIDIA GPU and its driver",
            hint="--compile-only looks at the kernels' machine code, --device cpu times the PyTorch path",
        )
    return torch.device(name or "cuda")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def file_slug(device: torch.device) -> str:
    """The device's name for a results file: "nvidia-h200", "2-core-amd-epyc"."""
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return machine_slug()


def timed_rows(device: torch.device, pattern: str, rounds: int, skipped: set[str]) -> Iterator[Row]:
    """A row per case and baseline; what could not be run here is added to `skipped` with the reason.

    Raises AssertionError where a kernel's result is wrong: the time of a wrong result means nothing.
    """
    torch.set_num_threads(1)
    rates: dict[tuple[str, torch.dtype], float] = {}
    installed = versions("torch", "triton") if device.type == "cuda" else versions("torch")
    for case in kernel_cases.cases(device):
        if not fnmatch.fnmatch(case.name, pattern):
            continue
        skipped |= {f"{name}: {why}" for name, why in case.skipped.items()}
        key = (case.floor, case.dtype if case.floor == "matmul" else torch.uint8)
        if key not in rates:
            rates[key] = matmul_rate(device, case.dtype) if case.floor == "matmul" else copy_rate(device)
        error = case.error()
        if not error <= TOLERANCE[case.dtype]:
            raise AssertionError(f"{case.name} {case.shape}: {error:.2g} away from the reference, not within tolerance")
        times = measure({"ours": case.ours, **case.baselines}, device=device, rounds=rounds)
        unit = "TFLOP/s" if case.floor == "matmul" else "TB/s"
        for name in case.baselines:
            yield make_row(
                case=case.name,
                shape=case.shape,
                dtype=str(case.dtype).removeprefix("torch."),
                device=device_name(device),
                versions=installed,
                timing=times["ours"],
                floor=f"{case.floor} at {rates[key] / 1e12:.4g} {unit}, measured in this run",
                floor_ms=1e3 * case.work / rates[key],
                baseline=name,
                baseline_ms=times[name].median_ms,
                max_rel_err=error,
            )
