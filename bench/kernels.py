"""`turboserve bench kernels`: what the kernels compile to, and how fast they are.

`--compile-only` needs no GPU: every kernel and shipped configuration is compiled ahead of time for the asked
architectures, and a row each says registers, spills, shared memory and what instructions came out. Otherwise they are
timed: on a GPU the kernels, on a CPU (`--device cpu`) the PyTorch path (see kernel_cases.py).
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from turboserve.cli.options import console, json_option, print_json
from turboserve.errors import ConfigError

ARCHES = ("80", "90", "100", "103", "120")


def compile_rows(arches: Iterable[int], pattern: str) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """(rows, what is wrong with them, what could not be compiled here and why)."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ConfigError(
            "TRITON_INTERPRET is set; interpreted kernels cannot be compiled", hint="unset TRITON_INTERPRET"
        )
    from turboserve.kernels import aot, extents_cupy

    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    skipped: list[str] = []
    chosen = [(arch, case) for arch in arches for case in aot.cases(arch) if fnmatch.fnmatch(case.kernel, pattern)]
    twins = [(arch, name) for arch in arches for name in extents_cupy.KERNELS]
    twins = [(arch, name) for arch, name in twins if fnmatch.fnmatch(f"{name}_cupy", pattern)]
    if not chosen and not twins:
        raise ConfigError(f"no kernel matches {pattern!r}", expected="a name or pattern like 'attn*'")
    for arch, case in _progress(chosen):
        try:
            row = aot.compile_row(case, arch)
        except ConfigError as error:
            skipped.append(f"{case.kernel} {case.config} sm_{arch}: {error}")
            continue
        rows.append(row)
        wrong += aot.problems(row, case)
    for arch, name in twins:
        try:
            case, row = aot.cuda_source_row(name, arch)
        except ConfigError as error:
            skipped.append(f"{name}_cupy sm_{arch}: {error}")
            continue
        rows.append(row)
        wrong += aot.problems(row, case)
    return rows, wrong, skipped


def _progress(chosen: list[Any]) -> Iterable[Any]:
    if not sys.stderr.isatty():
        return chosen
    from rich.progress import track

    return track(chosen, description="compiling", console=console())


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("kernel", "config", "sm", "registers", "spill B", "shared B", "tensor core", "128-bit ld/st"):
        table.add_column(heading, justify="left" if heading in ("kernel", "config") else "right")
    for row in rows:
        ops = row["instructions"]
        table.add_row(
            row["kernel"], row["config"], str(row["arch"]), str(row["registers"]), str(row["spill_bytes"]),
            str(row["shared_bytes"]), str(ops["tensor_core"]), f"{ops['load_128']}/{ops['store_128']}",
        )  # fmt: skip
    console().print(table)


def _time(pattern: str, device_name: str | None, rounds: int, out: Path | None, as_json: bool) -> int:
    from turboserve.bench import kernel_timing
    from turboserve.bench.command import deliver

    device = kernel_timing.device_of(device_name)
    skipped: set[str] = set()
    rows = list(kernel_timing.timed_rows(device, pattern, rounds, skipped))
    deliver(rows, pattern, out, as_json, kernel_timing.file_slug(device))
    for line in sorted(skipped):
        click.echo(f"not run: {line}", err=True)
    return 0


@click.command()
@click.option("--compile-only", is_flag=True, help="Compile ahead of time; no GPU needed.")
@click.option("--arch", "arches", multiple=True, type=click.Choice(ARCHES), help="Default: all of them.")
@click.option("--case", "pattern", default="*", metavar="GLOB", help="Only kernels (or cases) whose name matches.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="What to time on; default: the GPU.")
@click.option("--rounds", default=30, type=click.IntRange(3), help="Timed runs of each contender.")
@click.option("--out", type=click.Path(path_type=Path), metavar="F.json|DIR", help="Save the rows.")
@json_option
def command(
    compile_only: bool,
    arches: tuple[str, ...],
    pattern: str,
    device: str | None,
    rounds: int,
    out: Path | None,
    as_json: bool,
) -> int:
    """How fast the kernels are, or (--compile-only) what they compile to: registers, spills, instructions."""
    from turboserve.bench.report import versions

    if not compile_only:
        return _time(pattern, device, rounds, out, as_json)
    rows, wrong, skipped = compile_rows([int(one) for one in arches or ARCHES], pattern)
    found = {"versions": versions("torch", "triton"), "rows": rows, "problems": wrong, "skipped": skipped}
    if out is not None:
        path = out / "kernels-compiled.json" if out.is_dir() else out
        path.write_text(json.dumps(found, indent=1) + "\n")
    if as_json:
        print_json(found)
    else:
        _print_table(rows)
    for line in [*wrong, *skipped]:
        click.echo(line, err=True)
    return 1 if wrong else 0
