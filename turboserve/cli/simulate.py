"""`turboserve simulate`: one policy over one trace on simulated time, its files into a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from turboserve.cli.options import console, json_option, make_folder, print_json


@click.command("simulate")
@click.option("--trace", "trace_file", metavar="FILE", help="Session trace (traces/README.md).")
@click.option(
    "--from-recording",
    "recording",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Instead of a trace: decide again what `serve --record` recorded; exit code 1 when a plan differs.",
)
@click.option("--profile", default="k4", metavar="FILE|NAME", help="Latency profile: a file or a shipped name.")
@click.option("--policy", default="turboserve", metavar="NAME", help="Who decides; an unknown name lists them all.")
@click.option("--workers", type=int, default=None, help="Fix the fleet; it is there from time 0.")
@click.option("--max-workers", type=int, default=None, help="Largest fleet of a scaling policy.")
@click.option("--provision-s", type=float, default=None, help="Seconds until a worker is ready; default: profile's.")
@click.option("--pace", default="realtime", help="realtime or closed.")
@click.option("--initial-workers", type=int, help="Workers of a scaling policy at time 0; 2, or --max-workers if less.")
@click.option("--warmup-s", type=float, default=600.0, help="Figures cover the time after this.")
@click.option("--batching", default="chunk", help="chunk (whole chunks, auditable) or pass (as our engine).")
@click.option("--steps-floor", type=int, default=None, help="Allow brownout down to so many denoise steps.")
@click.option("--seed", type=int, default=0, help="Draws which worker is lost, if any.")
@click.option("--lose-at", multiple=True, type=float, metavar="S", help="Lose a worker at this time (repeatable).")
@click.option("--knob", multiple=True, metavar="NAME=VALUE", help="A knob of the policy (repeatable).")
@click.option("--html/--no-html", default=True, help="Write report.html as well.")
@click.option("--out", "out_dir", metavar="DIR", help="Directory for the files of the run.")
@json_option
def command(
    trace_file: str | None,
    recording: Path | None,
    profile: str,
    policy: str,
    workers: int | None,
    max_workers: int | None,
    provision_s: float | None,
    pace: str,
    initial_workers: int | None,
    warmup_s: float,
    batching: str,
    steps_floor: int | None,
    seed: int,
    lose_at: tuple[float, ...],
    knob: tuple[str, ...],
    html: bool,
    out_dir: str | None,
    as_json: bool,
) -> int:
    """Run a scheduling policy over a trace on simulated time, or the live controller's own decisions again."""
    if recording is not None:
        if trace_file is not None:
            raise click.UsageError("--trace and --from-recording are two different things; give one")
        return _replay(recording, as_json)
    if trace_file is None or out_dir is None:
        raise click.UsageError(f"{'--trace' if trace_file is None else '--out'} is missing (or --from-recording DIR)")
    from turboserve.errors import ConfigError
    from turboserve.sim.events import to_us
    from turboserve.sim.files import write_report, write_run
    from turboserve.sim.policies import POLICIES, check_knobs, make_policy
    from turboserve.sim.profile_files import load_profile
    from turboserve.sim.replay import INITIAL_WORKERS, WORKERS_MAX_DEFAULT, Settings, check, simulate
    from turboserve.sim.report import clairvoyant_report, reference_hours, report
    from turboserve.sim.trace import read_trace

    most = WORKERS_MAX_DEFAULT if max_workers is None else max_workers
    settings = Settings(
        workers=workers,
        workers_max=most,
        initial_workers=min(INITIAL_WORKERS, most) if initial_workers is None else initial_workers,
        provision_s=provision_s,
        pace=pace,
        batching=batching,
        warmup_s=warmup_s,
        steps_floor=steps_floor,
        seed=seed,
        losses_s=lose_at,
    )
    if policy not in (*POLICIES, "clairvoyant"):
        raise ConfigError(f"no policy {policy!r}", expected=", ".join([*POLICIES, "clairvoyant"]))
    model = load_profile(profile)
    knobs = _knobs(knob)
    made = None
    check_knobs(policy, knobs)
    if policy != "clairvoyant":
        delay_s = model.provision_s if provision_s is None else provision_s
        made = make_policy(policy, scaling=workers is None, provision_s=delay_s, **knobs)
    check(settings, model, made)
    trace = read_trace(trace_file)
    if trace.horizon_us <= to_us(warmup_s):
        console().print(
            f"{trace.name} ends at {trace.horizon_us / 1e6:g} s, within the warm-up of {warmup_s:g} s: every figure "
            "stands under `warmup`, none covers the time after it (--warmup-s 0 counts all)",
            style="yellow",
        )
    make_folder("--out", Path(out_dir))
    if made is None:
        found = clairvoyant_report(trace, model, settings)
        write_report(found, out_dir)
    else:
        run = simulate(trace, model, made, settings)
        found = report(run, reference_hours(run))
        write_run(run, found, out_dir)
        if html:
            from turboserve.sim.report_page import write_page

            write_page(run, found, Path(out_dir) / "report.html")
    if as_json:
        print_json(found)
    else:
        _say(found, out_dir)
    return 0


def _replay(recording: Path, as_json: bool) -> int:
    from turboserve.sim.from_recording import replay_recording

    verdict = replay_recording(recording)
    if as_json:
        print_json(verdict.as_json())
    else:
        out = console()
        same = verdict.ticks - verdict.different
        out.print(f"{same} of {verdict.ticks} ticks in {verdict.files} files decided the same", style="bold")
        for kind, count in sorted(verdict.actions.items()):
            out.print(f"  {count} {kind}")
        for one in verdict.differences[:3]:
            out.print(f"{one['file']}, tick {one['tick']} (at {one['now_s']:.3f} s):", style="red")
            out.print(f"  recorded {one['recorded']}", markup=False, soft_wrap=True)
            out.print(f"  now      {one['now']}", markup=False, soft_wrap=True)
        for name in verdict.torn:
            out.print(f"{name} ends in a cut record, as a kill leaves it", style="dim")
    return 1 if verdict.different else 0


def _knobs(pairs: tuple[str, ...]) -> dict[str, float]:
    knobs = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            knobs[name] = float(value)
        except ValueError as e:
            raise click.BadParameter(f"{pair!r}: expected NAME=NUMBER", param_hint="--knob") from e
    return knobs


def _say(found: dict[str, Any], out_dir: str) -> None:
    out = console()
    hours = found["worker_hours"]
    reference = found["reference"]["worker_hours"]
    beside = f", {hours / reference:.2f}x the clairvoyant" if reference else ""
    out.print(f"[bold]{found['policy']}[/bold] on {found['trace']}, profile {found['profile']}")
    out.print(f"  {hours:.2f} worker-hours{beside}")
    if "on_time_share" in found:
        service = found["service_s"]
        out.print(f"  {100 * found['on_time_share']:.3f} % of {found['chunks']} chunks on time, {found['shed']} shed")
        out.print(f"  service p50 {service['p50']} s, p99 {service['p99']} s, worst {service['max']} s")
        out.print(
            f"  {found['migrations']} migrations, {100 * found['reduced_step_share']:.2f} % chunks with fewer steps"
        )
    out.print(f"  files in {out_dir}")
