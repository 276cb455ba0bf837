"""Checks of what GPUs need: driver, torch, Triton, CuPy, NCCL, peer access. Without a GPU most do not apply."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

from turboserve.doctor.findings import Finding, failed, ok, skipped, warning

TORCH_RANGE = ((2, 11), (2, 14))
TRITON_RANGE = ((3, 6), (3, 8))
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def within(version: str, bounds: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    """Whether a version's first two numbers lie in [low, high)."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    return bounds[0] <= numbers < bounds[1]


def check_torch(version: str | None) -> Finding:
    low, high = (".".join(map(str, one)) for one in TORCH_RANGE)
    expected = f"torch>={low},<{high}"
    if version is None:
        return failed("torch", "not installed", expected, "make setup")
    if not within(version, TORCH_RANGE):
        return failed("torch", version, expected, f"pip install '{expected}'")
    return ok("torch", version)


def check_driver(device: str) -> Finding:
    """The NVIDIA driver, and whether torch gets along with it."""
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return ok("driver", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}; {_driver_version()}")
    if DRIVER_FILE.exists():
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda or '- none: a CPU build'}"
        report = failed if device == "cuda" else warning
        return report(
            "driver",
            f"{_driver_version()}, but torch sees no device; {built}",
            "a torch built for a CUDA version that this driver has",
            "pip install torch --index-url https://download.pytorch.org/whl/cu130, or update the driver",
        )
    if device == "cuda":
        mend = "install the NVIDIA driver and check with nvidia-smi, or choose --device cpu"
        return failed("driver", "no NVIDIA driver is loaded", "a GPU, for --device cuda", mend)
    return skipped("driver", "no NVIDIA driver is loaded; --device cpu is what this machine can do")


def _driver_version() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        argv = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
        if done.returncode == 0 and done.stdout.strip():
            return f"driver {done.stdout.split()[0]}"
    try:
        return DRIVER_FILE.read_text().splitlines()[0].strip()
    except OSError:
        return "driver version unknown"


def check_triton(version: str | None, *, has_gpu: bool) -> Finding:
    low, high = (".".join(map(str, one)) for one in TRITON_RANGE)
    expected = f"triton>={low},<{high}"
    if version is not None and within(version, TRITON_RANGE):
        return ok("triton", version)
    if not has_gpu:
        return skipped("triton", f"{version or 'not installed'}; a CPU runs the PyTorch path")
    return failed("triton", version or "not installed", expected, f"pip install '{expected}'")


def check_cupy(distributions: dict[str, str], cuda: str | None) -> Finding:
    """`distributions`: installed CuPy packages and their versions; at most one may be, and for torch's CUDA."""
    mend = f"pip uninstall -y {' '.join(distributions)}" if distributions else ""
    if len(distributions) > 1:
        both = ", ".join(f"{name} {version}" for name, version in distributions.items())
        return failed("cupy", both, "one of them: they install the same files", f"{mend}, then install one again")
    if cuda is None:
        return skipped("cupy", "it needs a GPU")
    wanted = f"cupy-cuda{cuda.split('.')[0]}x"
    if not distributions:
        return skipped("cupy", f"not installed; optional (pip install {wanted})")
    ((name, version),) = distributions.items()
    if name != wanted:
        return failed("cupy", f"{name} {version}, torch has CUDA {cuda}", wanted, f"{mend} && pip install {wanted}")
    return ok("cupy", f"{name} {version}")


def check_nccl(device_count: int) -> Finding:
    import torch

    if device_count == 0:
        return skipped("nccl", "it needs a GPU")
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return failed("nccl", "this torch is built without NCCL", "NCCL, for moves between GPUs", "pip install torch")
    return ok("nccl", ".".join(map(str, torch.cuda.nccl.version())))


def check_peers(device_count: int) -> Finding:
    """Which GPUs of this machine reach each other's memory."""
    import torch

    if device_count < 2:
        return skipped("peer access", f"{device_count} GPUs here")
    apart = [
        f"{a}->{b}" for a, b in permutations(range(device_count), 2) if not torch.cuda.can_device_access_peer(a, b)
    ]
    if apart:
        mend = "check `nvidia-smi topo -m`; a hypervisor's IOMMU or ACS setting is the usual cause"
        return warning("peer access", f"not between {', '.join(apart)}", "all pairs: else moves go through host", mend)
    return ok("peer access", f"between all {device_count} GPUs")


def checks(device: str) -> Iterator[Finding]:
    """All of the above on this machine. Nothing that needs torch is tried where it is not there."""
    torch_version = version_of("torch")
    yield check_torch(torch_version)
    if torch_version is None:
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield check_driver(device)
    yield check_triton(version_of("triton"), has_gpu=count > 0)
    cupy = {name: version_of(name) for name in ("cupy", "cupy-cuda12x", "cupy-cuda13x")}
    yield check_cupy(
        {name: version for name, version in cupy.items() if version}, torch.version.cuda if count else None
    )
    yield check_nccl(count)
    yield check_peers(count)
