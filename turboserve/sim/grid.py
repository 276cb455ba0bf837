"""Many simulations: traces x profiles x policies x fleets x delays x seeds, in parallel, each row kept as it comes.

A row holds the figures of report.json and what a comparison needs beside them. Rows are appended to a file, and cases
that already have one (`grid_rows`) are not run again, so an interrupted grid goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from turboserve.errors import ConfigError
from turboserve.orchestrator.latency import LatencyProfile
from turboserve.sim.batch_steps import R_FINISH, R_START
from turboserve.sim.cases import Case, group_of, parse_policy, trace_name
from turboserve.sim.clairvoyant import cheapest_fleet
from turboserve.sim.events import US
from turboserve.sim.files import write_run
from turboserve.sim.grid_rows import Contents, contents_of, digests_of, read_rows
from turboserve.sim.policies import check_knobs, make_policy, policy_class
from turboserve.sim.profile_files import load_profile
from turboserve.sim.replay import Run, Settings, check_seconds, check_trace, close_at_end, simulate
from turboserve.sim.report import report
from turboserve.sim.trace import ACTIVE, ARRIVE, DEPART, IDLE, Trace, demand, randomise_phases, read_trace, write_trace

ON_TIME_LEAST = 0.999
REDUCED_MOST = 0.02
CURVE_POINTS = 240
QUANTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 100)
KEPT = (
    *("chunks", "delivered", "shed", "on_time_share", "service_s", "latency_s", "first_chunk_s", "batch_n_max"),
    *("worker_hours", "cost", "cost_per_on_time_video_hour", "workers", "migrations", "resumes", "suspends"),
    *("scale_outs", "scale_ins", "reduced_step_share", "balance_excess", "tenants", "peak_active", "end_s"),
)


def gives_service(row: dict[str, Any]) -> bool:
    """Equal service: >= 99.9% of chunks on time, none shed, <= 2% with reduced steps."""
    return row["on_time_share"] >= ON_TIME_LEAST and row["shed"] == 0 and row["reduced_step_share"] <= REDUCED_MOST


@lru_cache(maxsize=4)
def _trace(path: str, digest: str, seed: int, chunk_s: float) -> Trace:
    """`digest` tells a file that was written again from the one that is remembered."""
    trace = close_at_end(read_trace(path))
    return randomise_phases(trace, seed, chunk_s) if seed else trace


def _profile(case: Case) -> LatencyProfile:
    profile = load_profile(case.profile)
    return dataclasses.replace(profile, provision_s=case.provision_s, provision_unit_workers=case.unit_workers)


def run_case(case: Case) -> dict[str, Any]:
    """Simulate one case (or search its least fleet) and answer its row."""
    digests = digests_of(case)
    profile = _profile(case)
    trace = _trace(case.trace, digests["trace_sha256"], case.seed, profile.chunk_s)
    peak_workers = max(1, math.ceil(demand(trace).peak_in(0, trace.horizon_us) / profile.capacity))
    if case.fleet == "least":
        row = _least_fleet(case, trace, profile, peak_workers, tuple(digests.values()))
    else:
        row = _simulate(case, trace, profile, _fleet_size(case.fleet, peak_workers))
    return {"key": case.key, "peak_workers": peak_workers} | row | digests


def _fleet_size(fleet: str, peak_workers: int) -> int | None:
    if fleet == "scale":
        return None
    try:
        if fleet.startswith("peak"):
            return math.ceil(peak_workers * float(fleet.removeprefix("peak").removeprefix("*") or 1) - 1e-9)
        return int(fleet)
    except ValueError:
        raise ConfigError(f"fleet {fleet!r}", expected="scale, least, a number, or peak*1.3") from None


def _least_fleet(
    case: Case, trace: Trace, profile: LatencyProfile, peak_workers: int, files: tuple[str, ...]
) -> dict[str, Any]:
    """A fixed fleet that gives equal service, one worker less of which does not.

    By bisection upwards from the peak's fleet, or, where another seed of the case was searched before in this process,
    step by step from what that one found. Service need not be monotone in the fleet to the last worker.
    """
    tried: dict[int, dict[str, Any]] = {}

    def serves(workers: int) -> bool:
        if workers not in tried:
            tried[workers] = _simulate(case, trace, profile, workers)
        return gives_service(tried[workers])

    same = dataclasses.replace(case, seed=0, curve=False), files
    limit = 20 * peak_workers + 20
    if same in _FOUND:
        low, high, step = _FOUND[same] - 1, _FOUND[same], 1
        while not serves(high) and high <= limit:
            low, high, step = high, high + step, 2 * step
        while high - low == 1 and low and serves(low):
            low, high = low - 1, low
    else:
        low, high = 0, max(1, peak_workers)
        while not serves(high) and high <= limit:
            low, high = high, math.ceil(high * 1.25) + 1
        if low == 0:
            low = max(0, math.floor(high * 0.5))
            while low and serves(low):
                low, high = math.floor(low * 0.5), low
    if high > limit:
        return tried[max(tried)] | {"least_found": False}
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if serves(middle) else (middle, high)
    _FOUND[same] = high
    return tried[high] | {"least_found": True, "fleets_tried": len(tried)}


_FOUND: dict[tuple[Case, tuple[str, ...]], int] = {}


def _simulate(case: Case, trace: Trace, profile: LatencyProfile, workers: int | None) -> dict[str, Any]:
    name, knobs = parse_policy(case.policy)
    if workers is None and not policy_class(name).scales:
        raise ConfigError(f"{name} does not scale", expected="--fleet with a size for it")
    initial = -(-2 // case.unit_workers) * case.unit_workers
    settings = Settings(
        workers=workers,
        initial_workers=initial,
        provision_s=case.provision_s,
        warmup_s=case.warmup_s,
        steps_floor=case.steps_floor,
        seed=case.seed,
    )
    policy = make_policy(name, scaling=workers is None, provision_s=case.provision_s, **knobs)
    run = simulate(trace, profile, policy, settings)
    figures = report(run)
    row: dict[str, Any] = {
        "trace": trace_name(case.trace),
        "group": group_of(trace_name(case.trace)),
        "profile": profile.name,
        "capacity": profile.capacity,
        "policy": name,
        "knobs": knobs,
        "fleet": case.fleet,
        "fixed_workers": workers,
        "provision_s": case.provision_s,
        "unit_workers": case.unit_workers,
        "seed": case.seed,
        "steps_floor": case.steps_floor,
    } | {k: figures[k] for k in KEPT}
    row["reference_worker_hours"] = reference_hours(trace, case, profile)
    row["session_hours"] = session_hours(trace)
    row["moves_per_session_hour"] = row["migrations"] / max(1e-9, row["session_hours"])
    row["equal_service"] = gives_service(row)
    if case.audit:
        row["violations"] = _audit(run, figures, trace, profile)
    if case.curve:
        row["curve"] = curve(run)
        row["service_quantiles_s"] = _service_quantiles(run, case.warmup_s)
    return row


def active_periods(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Nominal starts and ends of all active periods, in seconds."""
    starts, ends = [], []
    running: dict[int, int] = {}
    for session, event, time_us in zip(
        trace.session.tolist(), trace.event.tolist(), trace.time_us.tolist(), strict=True
    ):
        if event == ACTIVE:
            running[session] = time_us
        elif event in (IDLE, DEPART) and session in running:
            starts.append(running.pop(session) / US)
            ends.append(time_us / US)
    return np.array(starts), np.array(ends)


def reference_hours(trace: Trace, case: Case, profile: LatencyProfile) -> float:
    """The clairvoyant's bill for the case's trace, delay, warm-up and unit."""
    starts, ends = active_periods(trace)
    return cheapest_fleet(
        starts,
        ends,
        capacity=profile.capacity,
        provision_s=case.provision_s,
        warmup_s=case.warmup_s,
        end_s=trace.horizon_us / US,
        unit_workers=case.unit_workers,
    ).worker_hours


def session_hours(trace: Trace) -> float:
    """Summed open time of all sessions."""
    arrived = trace.time_us[trace.event == ARRIVE].sum()
    return float(trace.time_us[trace.event == DEPART].sum() - arrived) / US / 3600


def curve(run: Run) -> dict[str, list[float]]:
    """Demand and fleet over time, as means over equal spans (so that short peaks do not vanish between samples)."""
    times = np.array(run.timeline.time_us, np.int64)
    edges = np.linspace(0, run.end_us, CURVE_POINTS + 1)
    until = np.append(times[1:], run.end_us)
    out: dict[str, list[float]] = {"time_s": np.round(edges[:-1] / US, 1).tolist()}
    for name in ("active", "ready", "billed", "fullest"):
        values = np.array(getattr(run.timeline, name), float)
        area = np.concatenate([[0.0], np.cumsum(values * (until - times))])
        at = np.interp(edges, np.append(times, run.end_us), area)
        out[name] = np.round(np.diff(at) / np.diff(edges), 2).tolist()
    return out


def _service_quantiles(run: Run, warmup_s: float) -> list[float]:
    rows = run.rows[run.rows[:, R_START] >= warmup_s * US]
    if not len(rows):
        return []
    return np.round(np.percentile((rows[:, R_FINISH] - rows[:, R_START]) / US, QUANTILES), 4).tolist()


def _audit(run: Run, figures: dict[str, Any], trace: Trace, profile: LatencyProfile) -> dict[str, int]:
    """How often each rule was broken, by the independent auditor."""
    from turboserve.audit.audit import audit_run

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_run(run, figures, place / "run")
        write_trace(trace, place / "trace.csv.gz")
        (place / "profile.json").write_text(json.dumps(dataclasses.asdict(profile)))
        answer = audit_run(place / "run", place / "trace.csv.gz", str(place / "profile.json"), {})
    return dict(answer["violation_counts"])


def check_grid(cases: Sequence[Case], path: Path) -> Contents:
    """Refuse, before the first run, what would end the grid in the middle or mix its figures with others'."""
    wanted = {case.key: case for case in cases}
    for delay_s in {case.provision_s for case in wanted.values()}:
        check_seconds("--provision-s", delay_s)
    for warmup_s in {case.warmup_s for case in wanted.values()}:
        check_seconds("--warmup-s", warmup_s)
    for spec in {case.policy for case in wanted.values()}:
        check_knobs(*parse_policy(spec))
    contents = contents_of(cases)  # of all: two files of one name share their keys
    rows = read_rows(path, contents)
    asked = {case.warmup_s for case in wanted.values()}
    for said in (_warmup_of(row) for row in rows):
        if said is not None and said not in asked:
            raise ConfigError(
                f"{path} holds runs with a warm-up of {said:g} s",
                expected=f"--warmup-s {said:g}",
                hint="runs with different warm-ups cover different times; give these an --out of their own",
            )
    done = {row["key"] for row in rows if row["key"] in wanted and contents.fits(row)}
    todo = {(case.trace, case.warmup_s): key for key, case in wanted.items() if key not in done}
    for (trace, warmup_s), key in todo.items():
        chunk_s = load_profile(wanted[key].profile).chunk_s
        check_trace(_trace(trace, contents.of_case[key]["trace_sha256"], 0, chunk_s), warmup_s)
    return contents


def _warmup_of(row: dict[str, Any]) -> float | None:
    try:
        return float(json.loads(row["key"])["warmup_s"])
    except (ValueError, TypeError, KeyError):
        return None


def run_grid(
    cases: Sequence[Case],
    path: Path,
    contents: Contents,
    *,
    jobs: int,
    tell: Callable[[int, int, dict[str, Any] | None], None],
) -> list[dict[str, Any]]:
    """Run the cases that have no row in `path` yet (or one of other files), append theirs, and answer all rows of the
    cases asked for.

    `contents` is the answer of `check_grid`; `tell(done, total, row)` is called after each case, for a progress bar.
    """
    wanted = {case.key: case for case in cases}
    kept = (row for row in read_rows(path, contents) if row["key"] in wanted)
    rows = {row["key"]: row for row in kept if contents.fits(row)}
    todo = [case for key, case in wanted.items() if key not in rows]
    tell(len(rows), len(wanted), None)
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as out:
        if cut:  # the first new row would stand on the line that an interruption cut, and be lost with it
            out.write("\n")
        for row in _results(todo, jobs):
            rows[row["key"]] = row
            out.write(json.dumps(row) + "\n")
            out.flush()
            tell(len(rows), len(wanted), row)
    return [rows[key] for key in wanted]


def _results(cases: list[Case], jobs: int) -> Iterator[dict[str, Any]]:
    """Rows as they come; in this process where one job is enough."""
    if jobs == 1 or len(cases) < 2:
        yield from map(run_case, cases)
        return
    # Spawned, not forked: numba's threads and locks do not survive a fork.
    pool = ProcessPoolExecutor(min(jobs, len(cases)), mp_context=multiprocessing.get_context("spawn"))
    try:
        for finished in as_completed([pool.submit(run_case, case) for case in cases]):
            yield finished.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
