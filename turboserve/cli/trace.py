"""`turboserve trace`: traces in and out, and a run's files held against the rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from turboserve.cli.options import console, json_option, print_json

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUT_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group()
def command() -> None:
    """Make, read, convert, plot and audit traces."""


@command.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--trace", "trace_path", type=FILE, required=True, help="The trace the run was made from.")
@click.option("--profile", required=True, help="Latency profile: a JSON file or a shipped name.")
@click.option("--policy", help="Accepted so that the flags of `simulate` can be given unchanged.")
@click.option("--workers", type=click.IntRange(min=1), help="Fixed fleet of the run.")
@click.option("--max-workers", type=click.IntRange(min=1), help="Bound on the fleet.")
@click.option("--provision-s", type=click.FloatRange(min=0), help="Provisioning delay.")
@click.option("--pace", type=click.Choice(["realtime", "closed"]))
@click.option("--initial-workers", type=click.IntRange(min=0), help="Workers there from time 0.")
@click.option("--warmup-s", type=click.FloatRange(min=0), help="Figures begin here.")
@click.option("--batching", type=click.Choice(["chunk", "pass"]), help="Only chunk can be audited.")
@click.option("--steps-floor", type=click.IntRange(min=1), help="Fewest denoise steps allowed.")
@click.option("--seed", type=int, help="Accepted so that the flags of `simulate` can be given unchanged.")
@json_option
def audit(
    directory: Path, trace_path: Path, profile: str, policy: str | None, seed: int | None, as_json: bool, **flags: Any
) -> int:
    """Hold the files of the run in DIRECTORY against every rule; exit 1 on any violation.

    Uses no code of the simulator. A flag left out is taken from the settings in report.json, and the answer's
    `settings` says what was used.
    """
    from turboserve.audit.audit import audit_run

    answer = audit_run(directory, trace_path, profile, flags)
    print_json(answer)
    say = console()
    counts = answer["violation_counts"]
    if counts:
        say.print("[red]violations[/red]: " + ", ".join(f"{rule} {n}" for rule, n in sorted(counts.items())))
    else:
        figures = answer["recomputed"]
        say.print(
            f"no violations in {figures['delivered']} delivered chunks, {figures['worker_hours']:.3f} worker-hours"
        )
    return 1 if counts else 0
