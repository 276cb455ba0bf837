"""`turboserve bench autoscale`: the live fleet follows a trace, next to the simulator's prediction and to fixed fleets.

Every run starts a server of its own whose workers are padded to a latency profile (`--paced-profile`), so that two
cores carry several workers, and whose streams play so slowly that a chunk lasts as long as the profile's. The simulator
gets the same scaled trace, the same profile, and the start-up time that the live workers took.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import resource
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from turboserve.bench.chromium import serving
from turboserve.bench.report import commit, cpu_name, machine_slug
from turboserve.bench.serve import live_clock, run_load
from turboserve.bench.serve_figures import figures, predicted
from turboserve.bench.serve_trace import plans, scaled
from turboserve.cli.options import console, json_option, print_json
from turboserve.orchestrator.latency import LatencyProfile
from turboserve.sim.profile_files import load_profile
from turboserve.sim.trace import Trace, demand, read_trace

GRACE_S = 15.0
COMPARED = ("on_time_share", "worker_seconds")


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def stretched(profile: LatencyProfile, factor: float) -> LatencyProfile:
    """The same worker, all of whose times are `factor` times as long."""
    return replace(
        profile,
        name=profile.name if factor == 1 else f"{profile.name}-x{factor:g}",
        chunk_s=factor * profile.chunk_s,
        chunk_target_s=factor * profile.chunk_target_s,
        batch_latency_s=tuple(factor * one for one in profile.batch_latency_s),
    )


def one_run(trace: Trace, flags: list[str], seed: int, say: Any) -> dict[str, Any]:
    """A fresh server under the whole trace; its figures."""
    before_s = cpu_seconds()
    with serving(*flags) as url:
        clock = asyncio.run(live_clock(url, None))
        load = plans(trace, clock.chunk_s)
        seen, meter, wall_s = asyncio.run(
            run_load(url, None, load, steer_share=0.0, seed=seed, grace_s=GRACE_S, say=say)
        )
    found = figures(seen, clock, meter.worker_seconds, wall_s, meter.decided)
    starts = sorted(meter.starts_s.values())
    return {
        **found,
        "workers_mean": round(meter.worker_seconds / wall_s, 3),
        "start_s": round(statistics.median(starts), 2) if starts else None,
        "cpu_cores": round((cpu_seconds() - before_s) / wall_s, 3),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def compare(runs: list[dict[str, Any]], simulated: dict[str, Any]) -> dict[str, Any]:
    """Medians of the runs beside the simulator, and how far apart they are."""
    beside: dict[str, Any] = {}
    for name in COMPARED:
        live = statistics.median(one[name] for one in runs)
        beside[name] = {
            "live_median": live,
            "live_all": [one[name] for one in runs],
            "simulated": simulated[name],
            "difference": round(live / simulated[name] - 1, 4),
        }
    return beside


@click.command("autoscale")
@click.option("--trace", "trace_file", required=True, metavar="FILE", help="Session trace (traces/README.md).")
@click.option("--profile", default="k4", show_default=True, metavar="FILE|NAME", help="Workers are padded to it.")
@click.option(
    "--stretch",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0.1),
    help="The profile's times by this: slower play needs less CPU.",
)
@click.option("--speed", default=8.0, show_default=True, type=click.FloatRange(0.01), help="Trace time runs so fast.")
@click.option("--from-s", default=600.0, show_default=True, type=click.FloatRange(0))
@click.option("--length-s", default=1500.0, show_default=True, type=click.FloatRange(1))
@click.option(
    "--keep", default=0.12, show_default=True, type=click.FloatRange(0, 1, min_open=True), help="Of sessions."
)
@click.option("--active-max", default=11, show_default=True, type=click.IntRange(1), help="Nominal peak of the window.")
@click.option("--max-workers", default=3, show_default=True, type=click.IntRange(1))
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1), help="Runs of each fleet.")
@click.option("--fixed-repeats", type=click.IntRange(1), help="Of the fixed fleet.  [default: as many]")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), metavar="F.json|DIR")
@json_option
def command(
    trace_file: str,
    profile: str,
    stretch: float,
    speed: float,
    from_s: float,
    length_s: float,
    keep: float,
    active_max: int,
    max_workers: int,
    repeats: int,
    fixed_repeats: int | None,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Scale a live fleet by a trace, and lay the simulator's prediction and a fixed fleet beside it."""
    paced = stretched(load_profile(profile), stretch)
    trace = scaled(
        read_trace(trace_file),
        speed=speed,
        from_s=from_s,
        length_s=length_s,
        keep=keep,
        active_max=active_max,
        seed=seed,
    )
    terminal = console()
    peak = demand(trace).peak
    terminal.print(f"{trace.name}: {len(trace.session_ids)} sessions, {trace.horizon_us / 1e6:.0f} s, peak {peak}")
    fleets = {
        "autoscaled": ["--min-workers", "1", "--max-workers", str(max_workers)],
        "fixed": ["--workers", str(max_workers)],
    }
    found: dict[str, Any] = {}
    scratch = tempfile.TemporaryDirectory()
    pace = _pace(paced, Path(scratch.name))
    for name, flags in fleets.items():
        runs = []
        for number in range(repeats if name == "autoscaled" else fixed_repeats or repeats):
            with terminal.status(f"{name}, run {number + 1}") as status:

                def say(at_s: float, end_s: float, delivered: int, workers: int, name: str = name) -> None:
                    status.update(f"{name}: {at_s:.0f} of {end_s:.0f} s, {delivered} chunks, {workers} workers")

                runs.append(one_run(trace, [*pace, *flags], seed, say))
            one = runs[-1]
            terminal.print(
                f"{name} {number + 1}: on time {one['on_time_share']}, {one['worker_seconds']} worker-seconds, "
                f"{one['cpu_cores']} cores of CPU, starts in {one['start_s']} s",
                markup=False,
            )
        scaling = name == "autoscaled"
        starts = [one["start_s"] for one in runs if one["start_s"] is not None]
        simulated = predicted(
            trace,
            paced,
            workers=None if scaling else max_workers,
            workers_max=max_workers,
            initial=1,
            batching="pass",
            provision_s=statistics.median(starts) if starts else None,
        )
        found[name] = {"compared": compare(runs, simulated), "runs": runs, "simulated": simulated}
        for figure, row in found[name]["compared"].items():
            terminal.print(
                f"  {figure:<16} live {row['live_median']}, simulated {row['simulated']}, {row['difference']:+.1%}"
            )
    scratch.cleanup()
    result = {
        "bench": "autoscale",
        "commit": commit(),
        "machine": {"device": cpu_name(), "python": platform.python_version(), "niceness": os.nice(0)},
        "setting": {
            "trace": trace.name,
            "from_s": from_s,
            "keep": keep,
            "length_s": length_s,
            "active_max": active_max,
            "peak_active": peak,
            "sessions": len(trace.session_ids),
            "profile": paced.name,
            "max_workers": max_workers,
        },
        "fleets": found,
    }
    if out is not None:
        path = out / f"autoscale.{machine_slug()}.json" if out.is_dir() else out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        terminal.print(f"saved {path}", soft_wrap=True)
    if as_json:
        print_json(result)


def _pace(paced: LatencyProfile, folder: Path) -> list[str]:
    """Flags of a server whose chunks last as long as the profile's, by the wall clock."""
    from turboserve.model import registry

    path = folder / "profile.json"
    path.write_text(json.dumps(asdict(paced)))
    rate = registry.load_spec("shapes").chunk_s / paced.chunk_s
    return [
        *("--paced-profile", str(path), "--playback-rate", repr(rate)),
        *("--capacity", str(paced.capacity), "--slots", str(paced.resident_max), "--log-level", "warning"),
    ]
