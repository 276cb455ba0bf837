"""`turboserve bench`: one subcommand a benchmark, each imported when it is asked for.

To add one: write bench/<name with _>.py with a click command called `command` (bench/command.py makes one from a
generator of rows) and put its name and one line of help into BENCHES.
"""

from __future__ import annotations

import importlib

import click

BENCHES: dict[str, str] = {
    "autoscale": "A live fleet follows a trace, beside the simulator's prediction.",
    "coalescing": "Many sessions in shared passes, against one at a time.",
    "frame-parts": "Chunks from a worker of another machine: encoded there, against raw frames.",
    "frame-ring": "Chunks from worker to gateway: shared memory against pickles.",
    "kernels": "The kernels: how fast on this device; what they compile to, without one.",
    "migrate": "Session state between two processes: arena and socket, against gloo.",
    "offload": "Session state into host memory and back, against plain copies.",
    "report": "Tables and plots of the rows in a results folder.",
    "scheduler-loops": "The scheduler's numba loops, against plain Python.",
    "page": "What a viewer of the page gets, in Chromium.",
    "wan": "The causal Wan transformer: passes and chunks of many sessions.",
    "serve": "A server under the load of a trace, as its viewers see it.",
}


class BenchGroup(click.Group):
    """Knows the benchmarks by name and imports one when it runs."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(BENCHES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in BENCHES:
            return None
        # Imported here, because the root imports this module while it is itself being imported by nobody else.
        from turboserve.cli.main import with_shared_options

        file = "results_report" if name == "report" else name.replace("-", "_")
        module = importlib.import_module(f"turboserve.bench.{file}")
        return with_shared_options(module.command, ("bench", name))

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own asks every command for its help, which would import them all.
        with formatter.section("Benchmarks"):
            formatter.write_dl(list(BENCHES.items()))


@click.command(cls=BenchGroup)
def command() -> None:
    """Measure parts of the system, each against its floor and a baseline.

    Rows worth keeping are committed under bench/results/.
    """
