"""`turboserve trace`: traces in and out, and a run's files held against the rules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from turboserve.cli.options import console, json_option, print_json
from turboserve.errors import ConfigError

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUT_FILE = click.Path(dir_okay=False, path_type=Path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the path that cannot be written."""
    try:
        yield
    except OSError as e:
        raise ConfigError(
            f"cannot write {path}: {e.strerror or e}", expected="a file in a directory that can be written"
        ) from e


@click.group()
def command() -> None:
    """Make, read, convert, plot and audit traces."""


@command.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--trace", "trace_path", type=FILE, required=True, help="The trace the run was made from.")
@click.option("--profile", required=True, help="Latency profile: a JSON file or a shipped name.")
@click.option("--policy", hidden=True)
@click.option("--workers", type=click.IntRange(min=1), help="Fixed fleet of the run.")
@click.option("--max-workers", type=click.IntRange(min=1), help="Bound on the fleet.")
@click.option("--provision-s", type=click.FloatRange(min=0), help="Provisioning delay.")
@click.option("--pace", type=click.Choice(["realtime", "closed"]))
@click.option("--initial-workers", type=click.IntRange(min=0), help="Workers there from time 0.")
@click.option("--warmup-s", type=click.FloatRange(min=0), help="Figures begin here.")
@click.option("--batching", type=click.Choice(["chunk", "pass"]), help="Only chunk can be audited.")
@click.option("--steps-floor", type=click.IntRange(min=1), help="Fewest denoise steps allowed.")
@click.option("--seed", type=int, hidden=True)
@click.option("--lose-at", multiple=True, hidden=True)
@click.option("--knob", multiple=True, hidden=True)
@click.option("--html/--no-html", default=None, hidden=True)
@click.option("--out", hidden=True)
@json_option
def audit(directory: Path, trace_path: Path, profile: str, as_json: bool, **flags: Any) -> int:
    """Hold the files of the run in DIRECTORY against every rule; exit 1 on any violation.

    Takes the flags that the run was started with; those that no rule asks about (--policy, --seed, --knob, --lose-at,
    --html, --no-html, --out) are allowed and ignored. A flag left out is taken from the settings in report.json, and
    the answer's `settings` says what was used. Uses no code of the simulator.
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


@command.command()
@click.argument("files", type=FILE, nargs=-1, required=True)
@json_option
def stats(files: tuple[Path, ...], as_json: bool) -> None:
    """Peaks, spreads and lengths of one or more traces, as a table or as JSON."""
    from rich.table import Table

    from turboserve.sim.trace import read_trace
    from turboserve.sim.trace_stats import stats as stats_of

    found = [stats_of(read_trace(path)) for path in files]
    if as_json:
        print_json({"traces": found})
        return
    table = Table(
        *(
            "trace",
            "min",
            "sessions",
            "periods",
            "active peak / mean",
            "open peak / mean",
            "duration s p50 / p90 / p99",
        ),
        *("peak÷mean", "CV active / sd of 60 s change", "max rise 1 / 10 min", "arrivals peak÷mean 1 / 10 min"),
        *("gap CV", "active share"),
    )
    for one in found:
        length = one["duration_s"]
        table.add_row(
            one["trace"],
            f"{one['horizon_s'] / 60:.0f}",
            str(one["sessions"]),
            str(one["active_periods"]),
            f"{one['peak_active']} / {one['mean_active']:.0f}",
            f"{one['peak_open']} / {one['mean_open']:.0f}",
            f"{length['p50']:.0f} / {length['p90']:.0f} / {length['p99']:.0f}",
            f"{one['peak_over_mean_active']:.2f}",
            f"{one['active_cv_after_ramp']:.2f} / {one['delta60_std_over_mean']:.2f}",
            f"{one['max_rise_1min']:.2f} / {one['max_rise_10min']:.2f}",
            f"{one['arrivals_peak_over_mean_1min']:.2f} / {one['arrivals_peak_over_mean_10min']:.2f}",
            f"{one['arrival_gap_cv']:.2f}",
            f"{one['active_share']:.2f}",
        )
    say = console()
    say.width = max(say.width, 200)
    say.print(table)


@command.command()
@click.argument("out", type=OUT_FILE)
@click.option("--kind", default="steady", help="Arrival curve: steady, modulated, diurnal, flash, or family.")
@click.option("--base", type=FILE, help="With --kind family: scale this trace's own deviation instead of a curve's.")
@click.option("--horizon-s", type=click.FloatRange(min=1), default=3600.0, help="Length of the window.")
@click.option("--mean-active", type=click.FloatRange(min=0.1), default=40.0, help="Sessions active at once.")
@click.option("--active-s", type=click.FloatRange(min=0.1), default=30.0, help="Mean length of an active period.")
@click.option("--idle-s", type=click.FloatRange(min=0.1), default=60.0, help="Mean pause between periods.")
@click.option("--periods", type=click.FloatRange(min=1), default=3.5, help="Mean active periods a session.")
@click.option("--lengths", type=click.Choice(["lognormal", "pareto"]), default="lognormal")
@click.option("--tail", type=click.FloatRange(min=0.1), default=1.0, help="Factor on p99 / p50 of period lengths.")
@click.option(
    "--swing",
    type=click.FloatRange(min=0),
    default=1.0,
    help="Factor on the arrival curve's deviation, before rates are cut at 0.",
)
@click.option("--tenant-loads", default="1", help="Relative load of each tenant: 1,1,10.")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@json_option
def synth(out: Path, kind: str, base: Path | None, tenant_loads: str, as_json: bool, **shape: Any) -> None:
    """Draw a synthetic trace into OUT (NAME.csv.gz), the same one for the same options.

    --kind family writes ten: OUT-02.csv.gz to OUT-20.csv.gz, with 0.2 to 2.0 times the deviation of the diurnal
    curve, or of the trace given by --base. Rates are cut at 0 and the mean is kept, so the last ones deviate by less
    than their names say: the diurnal curve at 2.0 by 1.72 times.
    """
    from turboserve.sim.trace import read_trace, write_trace
    from turboserve.sim.workload import CURVES, FAMILY_FACTORS, Workload, generate, rescaled, volatility_family

    if kind != "family" and kind not in CURVES:
        raise ConfigError(f"no arrival curve {kind!r}", expected=" | ".join((*CURVES, "family")))
    try:
        loads = tuple(float(text) for text in tenant_loads.split(","))
    except ValueError:
        raise ConfigError(f"--tenant-loads {tenant_loads!r}", expected="numbers with commas, as 1,1,10") from None
    workload = Workload(
        kind="diurnal" if kind == "family" else kind,
        horizon_s=shape["horizon_s"],
        mean_active=shape["mean_active"],
        active_s_mean=shape["active_s"],
        idle_s_mean=shape["idle_s"],
        periods_mean=shape["periods"],
        lengths=shape["lengths"],
        tail=shape["tail"],
        swing=shape["swing"],
        tenant_loads=loads,
        seed=shape["seed"],
    )
    if base is not None and kind != "family":
        raise ConfigError("--base without --kind family", expected="--kind family --base TRACE")
    if kind != "family":
        made = {out: generate(workload)}
    else:
        stem = out.name.removesuffix(".gz").removesuffix(".csv")
        paths = [out.with_name(f"{stem}-{round(10 * factor):02d}.csv.gz") for factor in FAMILY_FACTORS]
        if base is None:
            made = dict(zip(paths, volatility_family(workload), strict=True))
        else:
            source = read_trace(base)
            family = [rescaled(source, factor, workload.seed) for factor in FAMILY_FACTORS]
            made = dict(zip(paths, family, strict=True))
    for path, trace in made.items():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_trace(trace, path)
        console().print(f"{path}: {len(trace.session_ids)} sessions, {trace.time_us.size} events (synthetic)")
    if as_json:
        print_json({"written": [str(path) for path in made], "synthetic": True})


@command.command()
@click.argument("source", type=FILE)
@click.argument("target", type=OUT_FILE)
def convert(source: Path, target: Path) -> None:
    """Convert between our CSV and the released TurboServe JSON events; the names' endings say which is which."""
    import json

    from turboserve.sim.trace import read_trace, write_trace
    from turboserve.sim.trace_convert import read_events, to_events

    kinds = tuple("json" if path.suffix == ".json" else "csv" for path in (source, target))
    if kinds == ("csv", "json"):
        text = json.dumps(to_events(read_trace(source)), indent=1) + "\n"
        with writing(target):
            target.write_text(text)
    elif kinds == ("json", "csv"):
        made = read_events(source)
        with writing(target):
            write_trace(made, target)
    else:
        raise ConfigError(
            f"{source.name} to {target.name} is no conversion", expected="one .json and one .csv or .csv.gz"
        )
    console().print(f"{source} -> {target}")


@command.command()
@click.argument("files", type=FILE, nargs=-1, required=True)
@click.option("-o", "--out", type=OUT_FILE, required=True, help="Picture to write: .png, .svg or .pdf.")
def plot(files: tuple[Path, ...], out: Path) -> None:
    """Draw active and open sessions, arrivals and period lengths of one or more traces."""
    from turboserve.sim.trace import read_trace
    from turboserve.sim.trace_plot import plot as draw

    traces = [read_trace(path) for path in files]
    with writing(out):
        draw(traces, out)
    console().print(f"wrote {out}")
