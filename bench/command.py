"""A benchmark as a command: the options that all of them share, and what is done with their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from typing import Any

import click

from turboserve.bench.report import Row, machine_slug, report, table, write_report
from turboserve.cli.options import console, json_option, print_json
from turboserve.errors import ConfigError


def bench_command(measure: Callable[..., Iterator[Row]]) -> click.Command:
    """Makes a command of a generator of rows.

    `measure` gets `wanted`, which says whether a case's name fits --case, so that it can leave out what nobody asked
    for (what it yields all the same is dropped), and whatever options it declares with click's decorators. Its
    docstring is the help.
    """

    @click.command(help=measure.__doc__)
    @click.option("--case", default="*", metavar="GLOB", help="Only the cases whose name fits.")
    @click.option(
        "--out",
        type=click.Path(path_type=Path),
        metavar="F.json|DIR",
        help="Save the rows; in a folder under the benchmark's and the machine's name.",
    )
    @json_option
    @wraps(measure)
    def command(case: str, out: Path | None, as_json: bool, **options: Any) -> None:
        def wanted(name: str) -> bool:
            return fnmatchcase(name, case)

        rows = []
        terminal = console()
        with terminal.status("measuring") as status:
            for row in measure(wanted=wanted, **options):
                if wanted(row.case):
                    rows.append(row)
                    status.update(f"measured {row.case} {row.shape}")
        deliver(rows, case, out, as_json, machine_slug())

    return command


def deliver(rows: list[Row], pattern: str, out: Path | None, as_json: bool, machine: str) -> None:
    """Rows to the terminal, to the file asked for (in a folder: under the benchmark's and the machine's name), and as
    JSON. ConfigError when no case fitted `pattern`."""
    if not rows:
        raise ConfigError(f"no case fits {pattern!r}", hint="leave --case out to see them all")
    terminal = console()
    terminal.print(rows[0].device, f"commit {rows[0].commit}", sep=", ")
    terminal.print(table(rows), soft_wrap=True)
    if out is not None:
        name = f"{click.get_current_context().info_name}.{machine}.json"
        path = out / name if out.is_dir() else out
        write_report(rows, path)
        terminal.print(f"saved {path}", soft_wrap=True)
    if as_json:
        print_json(report(rows))
