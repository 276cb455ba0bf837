"""`turboserve compare`: a grid of policies and traces in parallel, its averages, and a page that shows them."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from turboserve.cli.options import console, json_option, make_folder, print_json


@click.command("compare")
@click.option("--trace", "traces", multiple=True, required=True, metavar="FILE", help="Trace (repeatable).")
@click.option("--profile", "profiles", multiple=True, default=("k4",), metavar="FILE|NAME", help="Repeatable.")
@click.option("--policy", "policies", multiple=True, metavar="NAME[:KNOB=V,...]", help="Repeatable; default: all.")
@click.option(
    "--study",
    type=click.Choice(["service", "latency", "tune", "ablation"]),
    default="service",
    help="service: cost at equal service. latency: at equal fleets. tune: the baselines' knobs. ablation: our parts.",
)
@click.option(
    "--provision-s", "delays_s", multiple=True, type=click.FloatRange(min=0), default=(30.0,), help="Repeatable."
)
@click.option("--warmup-s", type=click.FloatRange(min=0), default=600.0, help="Figures cover the time after this.")
@click.option("--seeds", type=click.IntRange(min=0), default=0, help="Runs with random phases; 0: one run as it is.")
@click.option("--steps-floor", type=click.IntRange(min=1), help="Let turboserve go down to so many denoise steps.")
@click.option(
    "--factor", "factors", multiple=True, help="latency: fleets of ceil(peak / capacity) times this (repeatable)."
)
@click.option("--unit-workers", type=click.IntRange(min=1), default=1, help="Workers come in nodes of this many.")
@click.option(
    "--tuned", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="tuned.json of --study tune."
)
@click.option("--audit/--no-audit", default=False, help="Hold every run against the rules as well.")
@click.option("--jobs", type=click.IntRange(min=1), help="Simulations at once; default: one a core.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Rows, summary, page.")
@json_option
def command(
    traces: tuple[str, ...],
    profiles: tuple[str, ...],
    policies: tuple[str, ...],
    study: str,
    delays_s: tuple[float, ...],
    warmup_s: float,
    seeds: int,
    steps_floor: int | None,
    factors: tuple[str, ...],
    unit_workers: int,
    tuned: Path | None,
    audit: bool,
    jobs: int | None,
    out: Path,
    as_json: bool,
) -> int:
    """Run several policies over several traces and lay them side by side.

    Everything is simulated. Rows are kept in OUT/rows.jsonl as they come: started again with the same OUT, a grid goes
    on where it stopped, and studies with the same OUT stand on one page. Where a trace or profile has changed
    since, its runs are made again.
    """
    from turboserve.errors import ConfigError
    from turboserve.sim import studies
    from turboserve.sim.cases import parse_policy
    from turboserve.sim.compare_page import write_page
    from turboserve.sim.grid import check_grid, run_grid
    from turboserve.sim.grid_rows import read_rows
    from turboserve.sim.policies import POLICIES, policy_class

    for path in traces:
        if not Path(path).is_file():
            raise ConfigError(f"no trace {path}", expected="a file", hint="traces/ has small synthetic windows")
    chosen = list(policies) or studies.default_policies(study)
    for spec in chosen:
        name = parse_policy(spec)[0]
        if name == "clairvoyant":
            raise ConfigError(
                "the clairvoyant is no policy to compare: every row is measured against it",
                expected=", ".join(POLICIES),
                hint="`turboserve simulate --policy clairvoyant` writes its bill alone",
            )
        policy_class(name)
    cases = studies.cases_of(
        study,
        list(traces),
        list(profiles),
        chosen,
        list(delays_s),
        list(range(1, seeds + 1)) or [0],
        tuned=_read_tuned(tuned) if tuned else None,
        steps_floor=steps_floor,
        unit_workers=unit_workers,
        audit=audit,
        factors=list(factors) or list(studies.FLEET_FACTORS),
        warmup_s=warmup_s,
    )
    make_folder("--out", out)
    rows_path = out / "rows.jsonl"
    contents = check_grid(cases, rows_path)
    with _Bar(len(cases)) as bar:
        rows = run_grid(cases, rows_path, contents, jobs=jobs or os.cpu_count() or 1, tell=bar.tell)
    (out / "commands.txt").open("a").write(shlex.join(["turboserve", *sys.argv[1:]]) + "\n")
    kept = studies.told_apart(read_rows(rows_path, contents))
    everything = studies.at_every_delay(kept)
    summary: dict[str, Any] = {
        "simulated": True,
        "studies": studies.conclude(everything),
        "by_trace": studies.by_trace(everything),
        "cheaper_baselines": studies.cheaper_baselines(everything),
        "violations": sum(sum(row.get("violations", {}).values()) for row in kept),
        "audited_runs": sum("violations" in row for row in kept),
        "runs": len(kept),
    }
    if study == "tune":
        summary["tuned"] = studies.choose_knobs(rows)
        (out / "tuned.json").write_text(json.dumps(summary["tuned"], indent=1) + "\n")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_page(everything, summary, out / "report.html")
    if as_json:
        print_json(summary)
    else:
        asked = {row["key"] for row in rows}
        _say([row for row in kept if row["key"] in asked], out)
    return 1 if summary["violations"] else 0


def _read_tuned(path: Path) -> dict[str, Any]:
    """tuned.json: profile -> delay -> policy -> knobs."""
    from turboserve.errors import ConfigError

    expected = "the tuned.json that `compare --study tune` writes"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tuned {path} cannot be read: {error}", expected=expected) from None
    level = [found]
    for _ in range(4):
        if not all(isinstance(one, dict) for one in level):
            raise ConfigError(
                f"--tuned {path} holds something else", expected=f"{expected}: profile, delay, policy, knobs"
            )
        level = [value for one in level for value in one.values()]
    if not all(isinstance(one, (int, float)) for one in level):
        raise ConfigError(f"--tuned {path} holds knobs that are no numbers", expected=expected)
    return dict(found)


class _Bar:
    """A progress bar on stderr; where stderr is no terminal, a line now and then."""

    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console()
        self._total = total
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("simulating", total=total)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, done: int, total: int, row: dict[str, Any] | None) -> None:
        what = f"{row['policy']} on {row['trace']}" if row else "simulating"
        self._progress.update(self._task, completed=done, total=total, description=what)
        if not self._console.is_terminal and (row is None or done == total or done % 10 == 0):
            self._console.print(f"{done}/{total} {what}")


def _say(rows: list[dict[str, Any]], out: Path) -> None:
    from rich.table import Table

    from turboserve.sim.studies import label

    table = Table(
        *("trace", "profile", "D s", "policy", "fleet", "on time %", "reduced %", "worker-hours"),
        *("/ clairvoyant", "service p99 / worst s", "moves / session-hour"),
    )
    for row in sorted(rows, key=lambda r: (r["profile"], r["provision_s"], r["trace"], r["worker_hours"])):
        if row["seed"] > 1:
            continue
        reference = row["reference_worker_hours"]
        table.add_row(
            row["trace"],
            row["profile"],
            f"{row['provision_s']:g}",
            label(row),
            str(row["fixed_workers"] or "scales"),
            f"{100 * row['on_time_share']:.3f}",
            f"{100 * row['reduced_step_share']:.2f}",
            f"{row['worker_hours']:.2f}",
            f"{row['worker_hours'] / reference:.2f}" if reference else "-",
            f"{row['service_s']['p99'] or 0:.2f} / {row['service_s']['max'] or 0:.2f}",
            f"{row['moves_per_session_hour']:.2f}",
        )
    say = console()
    say.width = max(say.width, 160)
    say.print(table)
    say.print(f"{out}/report.html shows it; summary.json has the averages with their intervals")
