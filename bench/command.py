"""A benchmark as a command: the options that all of them share, and what is done with their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from typing import Any

import click

from turboserve.bench.report import Row, report, table, write_report
from turboserve.cli.options import console, json_option, print_json
from turboserve.errors import ConfigError


def bench_command(measure: Callable[..., Iterator[Row]]) -> click.Command:
    """Makes a command of a generator of rows.

    `measure` gets `wanted`, which says whether a case's name fits --case (to be asked before it is measured), and
    whatever options it declares itself with click's decorators. Its docstring is the help.
    """

    @click.command(help=measure.__doc__)
    @click.option("--case", default="*", metavar="GLOB", help="Only the cases whose name fits.")
    @click.option(
        "--out",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="F.json",
        help="Save the rows.",
    )
    @json_option
    @wraps(measure)
    def command(case: str, out: Path | None, as_json: bool, **options: Any) -> None:
        rows = []
        terminal = console()
        with terminal.status("measuring") as status:
            for row in measure(wanted=lambda name: fnmatchcase(name, case), **options):
                rows.append(row)
                status.update(f"measured {row.case} {row.shape}")
        if not rows:
            raise ConfigError(f"no case fits {case!r}", hint="leave --case out to see them all")
        terminal.print(rows[0].device, f"commit {rows[0].commit}", sep=", ")
        terminal.print(table(rows), soft_wrap=True)
        if out is not None:
            write_report(rows, out)
        if as_json:
            print_json(report(rows))

    return command
