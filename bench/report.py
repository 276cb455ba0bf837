"""A benchmark's rows: their fields, the machine they were measured on, a JSON file and a table to read.

No figure stands alone: a row names its floor (the limit measured in the same run), its baseline (what a user would
pick otherwise) and the largest error against a reference.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from turboserve.bench.timing import Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement. Times in milliseconds; `of_floor` = floor / median, so 1.0 stands on the floor;
    `speedup` = baseline / median. `checked` says that the result was compared with a reference in this run,
    `load_1min` how busy the machine was (all its processes, this one among them)."""

    case: str
    shape: str
    dtype: str
    device: str
    versions: dict[str, str]
    commit: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    floor_ms: float
    floor: str
    of_floor: float
    baseline: str
    baseline_ms: float
    speedup: float
    max_rel_err: float
    checked: bool
    load_1min: float


def make_row(
    *,
    case: str,
    shape: str,
    dtype: str,
    device: str,
    versions: dict[str, str],
    timing: Timing,
    floor: str,
    floor_ms: float,
    baseline: str,
    baseline_ms: float,
    max_rel_err: float,
) -> Row:
    """A checked row with its ratios worked out and the commit filled in; six digits are kept."""

    def kept(value: float) -> float:
        return float(f"{value:.6g}")

    return Row(
        case=case,
        shape=shape,
        dtype=dtype,
        device=device,
        versions=versions,
        commit=commit(),
        median_ms=kept(timing.median_ms),
        p20_ms=kept(timing.p20_ms),
        p80_ms=kept(timing.p80_ms),
        floor_ms=kept(floor_ms),
        floor=floor,
        of_floor=kept(floor_ms / timing.median_ms),
        baseline=baseline,
        baseline_ms=kept(baseline_ms),
        speedup=kept(baseline_ms / timing.median_ms),
        max_rel_err=kept(max_rel_err),
        checked=True,
        load_1min=round(os.getloadavg()[0], 2),
    )


@cache
def cpu_name() -> str:
    """Like "2-core AMD EPYC (x86_64), CPU"."""
    model = platform.processor() or "processor"
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # no Linux: the platform's own word must do
    return f"{len(os.sched_getaffinity(0))}-core {model} ({platform.machine()}), CPU"


def machine_slug() -> str:
    """The machine's name for a file: "2-core-amd-epyc"."""
    return re.sub(r"[^a-z0-9]+", "-", cpu_name().partition(" (")[0].lower()).strip("-")


@cache
def commit() -> str:
    """The checkout's commit, with "-dirty" where the measured sources differ from it; "v<version>" when installed."""
    tree = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(tree), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != tree:
            raise FileNotFoundError("another project's checkout stands around this one")
        changed = git("status", "--porcelain", "--", "turboserve", "csrc", "bench", "setup.py", ":!bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"v{metadata.version('turboserve')}"


def versions(*packages: str) -> dict[str, str]:
    """The versions a row depends on: Python, and the packages named."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def report(rows: Iterable[Row]) -> dict[str, Any]:
    """What `--json` prints and `--out` saves."""
    return {"rows": [asdict(row) for row in rows]}


def write_report(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report(rows), indent=1, allow_nan=False) + "\n")


def table(rows: Iterable[Row]) -> str:
    """The rows for people: what was measured, its spread, and what it is held against."""
    lines = [("case", "shape", "median ms", "p20 - p80", "of floor", "speedup", "against")]
    for row in rows:
        lines.append(
            (
                row.case,
                row.shape,
                f"{row.median_ms:.3g}",
                f"{row.p20_ms:.3g} - {row.p80_ms:.3g}",
                f"{row.of_floor:.0%}",
                f"{row.speedup:.2f}x",
                f"{row.baseline} ({row.baseline_ms:.3g} ms)",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
