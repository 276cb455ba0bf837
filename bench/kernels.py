"""`turboserve bench kernels`: what the kernels compile to, on any machine.

`--compile-only` needs no GPU: every kernel and shipped configuration is compiled ahead of time for the asked
architectures, and a row each says registers, spills, shared memory and what instructions came out. Timing on a device
is not here yet, and asking for it says so.
"""

from __future__ import annotations

import fnmatch
import os
import sys
from pathlib import Path

import click

from turboserve.cli.options import console, json_option, print_json
from turboserve.errors import ConfigError


@click.command()
@click.option("--compile-only", is_flag=True, help="Compile ahead of time; no GPU needed.")
@click.option(
    "--arch",
    "arches",
    multiple=True,
    type=click.Choice(["80", "90", "100", "103", "120"]),
    help="Default: 80, 90 and 100.",
)
@click.option("--case", "pattern", default="*", metavar="GLOB", help="Only kernels whose name matches.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows to this JSON file.")
@json_option
def command(compile_only: bool, arches: tuple[str, ...], pattern: str, out: Path | None, as_json: bool) -> int:
    """What the kernels compile to: registers, spills, shared memory, instructions."""
    if not compile_only:
        raise ConfigError("kernel timing on a device does not exist yet", expected="--compile-only")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ConfigError(
            "TRITON_INTERPRET is set; interpreted kernels cannot be compiled", hint="unset TRITON_INTERPRET"
        )
    from turboserve.kernels import aot

    rows, wrong = [], []
    chosen = [(int(arch), case) for arch in arches or ("80", "90", "100") for case in aot.cases(int(arch))]
    chosen = [(arch, case) for arch, case in chosen if fnmatch.fnmatch(case.kernel, pattern)]
    if not chosen:
        raise ConfigError(f"no kernel matches {pattern!r}", expected="a name or pattern like 'attn*'")
    for arch, case in _progress(chosen):
        row = aot.compile_row(case, arch)
        rows.append(row)
        wrong += aot.problems(row, case)
    if out is not None:
        import json

        out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if as_json:
        print_json({"rows": rows, "problems": wrong})
    else:
        _print_table(rows)
    for line in wrong:
        click.echo(line, err=True)
    return 1 if wrong else 0


def _progress(chosen: list) -> object:
    if not sys.stderr.isatty():
        return chosen
    from rich.progress import track

    return track(chosen, description="compiling", console=console())


def _print_table(rows: list[dict]) -> None:
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
