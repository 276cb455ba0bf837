"""A run's figures: `report.json` of contracts section 4, and the wall-clock times apart in `timing.json`.

Everything covers [warmup_s, end]; the same figures for the time before stand under `warmup`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from turboserve.orchestrator.latency import LatencyProfile
from turboserve.sim.batch_steps import (
    R_DEADLINE,
    R_FINISH,
    R_N,
    R_PERIOD,
    R_READY,
    R_RELEASE,
    R_SESSION,
    R_START,
    R_STEPS,
)
from turboserve.sim.clairvoyant import CheapestFleet, cheapest_fleet
from turboserve.sim.events import US, to_us
from turboserve.sim.replay import Run, Settings
from turboserve.sim.trace import Trace, demand, periods

TOLERANCE_US = 2
_COUNTED = {
    "migrations": "migrate",
    "resumes": "resume",
    "suspends": "suspend",
    "scale_outs": "worker_request",
    "scale_ins": "worker_release",
}


def report(run: Run, reference_worker_hours: float | None = None) -> dict[str, Any]:
    """The figures of a run; `reference_worker_hours` is the clairvoyant's bill (sim/clairvoyant.py)."""
    s, profile = run.settings, run.profile
    warm_us = min(to_us(s.warmup_s), run.end_us)
    peak = demand(run.trace).peak_in(warm_us, run.end_us)
    bound = None
    if s.workers is not None and peak > 0:
        share = math.ceil(peak / s.workers)
        bound = profile.batch_latency(share) if share <= profile.batch_max else None
    return {
        "policy": run.policy,
        "trace": run.trace.name,
        "profile": profile.name,
        "seed": s.seed,
        "settings": _settings(profile, s),
        **figures(run, warm_us, run.end_us),
        "warmup": figures(run, 0, warm_us),
        "reference": {"worker_hours": reference_worker_hours, "service_max_s": bound},
        "end_s": run.end_us / US,
        "peak_active": peak,
        "dropped_actions": {k: v for k, v in sorted(run.log.dropped_actions.items()) if v},
    }


def reference_hours(run: Run) -> float:
    """The clairvoyant's bill for this trace under the run's delay and provisioning unit."""
    return _cheapest(run.trace, run.profile, run.settings, run.end_us).worker_hours


def clairvoyant_report(trace: Trace, profile: LatencyProfile, settings: Settings) -> dict[str, Any]:
    """What `--policy clairvoyant` writes: the bill and the fleet; there is no run behind it."""
    end_us = trace.horizon_us
    fleet = _cheapest(trace, profile, settings, end_us)
    span_h = (end_us / US - settings.warmup_s) / 3600
    hours = fleet.worker_hours
    return {
        "policy": "clairvoyant",
        "trace": trace.name,
        "profile": profile.name,
        "seed": settings.seed,
        "settings": _settings(profile, settings),
        "worker_hours": hours,
        "cost": hours * profile.price_per_worker_hour,
        "workers": {"mean": hours / span_h if span_h > 0 else 0.0, "max": int(fleet.billed_workers.max(initial=0))},
        "scale_outs": fleet.starts,
        "reference": {"worker_hours": hours, "service_max_s": None},
        "end_s": end_us / US,
    }


def _cheapest(trace: Trace, profile: LatencyProfile, s: Settings, end_us: int) -> CheapestFleet:
    starts_s, ends_s = periods(trace)
    return cheapest_fleet(
        starts_s,
        ends_s,
        capacity=profile.capacity,
        provision_s=profile.provision_s if s.provision_s is None else s.provision_s,
        warmup_s=s.warmup_s,
        end_s=end_us / US,
        unit_workers=profile.provision_unit_workers,
    )


def _settings(profile: LatencyProfile, s: Settings) -> dict[str, Any]:
    return {
        "provision_s": profile.provision_s if s.provision_s is None else s.provision_s,
        "pace": s.pace,
        "batching": s.batching,
        "workers": s.workers,
        "workers_max": s.workers_max,
        "initial_workers": s.initial_workers,
        "warmup_s": s.warmup_s,
        "steps_floor": s.steps_floor,
        "losses_s": list(s.losses_s),
    }


def figures(run: Run, start_us: int, end_us: int) -> dict[str, Any]:
    """Figures of the chunks released, and the workers billed, in [start_us, end_us)."""
    rows, profile = run.rows, run.profile

    def released_then(some: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        released = some[:, R_RELEASE]
        return some[(released >= start_us) & ((released < max(end_us, start_us + 1)) | (end_us == run.end_us))]

    mine = released_then(rows)
    shed = sum(start_us <= x.release_us and (x.release_us < end_us or end_us == run.end_us) for x in run.log.shed)
    delivered = len(mine)
    if run.settings.pace == "closed":
        on_time = int((mine[:, R_FINISH] - mine[:, R_START] <= to_us(profile.chunk_target_s) + TOLERANCE_US).sum())
    else:
        on_time = int((mine[:, R_FINISH] <= mine[:, R_DEADLINE] + TOLERANCE_US).sum())
    hours = worker_hours(run, start_us, end_us)
    first = released_then(_first_of_period(rows))
    timeline = _timeline(run, start_us, end_us)
    decisions = [d for d in run.log.decisions if start_us <= to_us(d["time_s"]) < max(end_us, start_us + 1)]
    counts = {name: sum(d["event"] == event for d in decisions) for name, event in _COUNTED.items()}
    if end_us == run.end_us and run.settings.workers is None:
        counts["scale_ins"] = sum(
            d["event"] == "worker_release" and to_us(d["time_s"]) >= start_us for d in run.log.decisions
        )
    span_h = (end_us - start_us) / US / 3600
    return {
        "chunks": delivered + shed,
        "delivered": delivered,
        "shed": shed,
        "on_time_share": on_time / (delivered + shed) if delivered + shed else 0.0,
        "service_s": spread(mine[:, R_FINISH] - mine[:, R_START]),
        "latency_s": spread(mine[:, R_FINISH] - mine[:, R_READY]),
        "first_chunk_s": spread(first[:, R_FINISH] - first[:, R_RELEASE]),
        "batch_n_max": int(mine[:, R_N].max(initial=0)),
        "worker_hours": hours,
        "cost": hours * profile.price_per_worker_hour,
        "cost_per_on_time_video_hour": hours * profile.price_per_worker_hour / (on_time * profile.chunk_s / 3600)
        if on_time
        else None,
        "workers": {"mean": hours / span_h if span_h else 0.0, "max": timeline["billed_max"]},
        **counts,
        "reduced_step_share": float((mine[:, R_STEPS] < profile.denoise_steps).mean()) if delivered else 0.0,
        "balance_excess": timeline["balance_excess"],
        "tenants": _by_tenant(run, mine),
    }


def worker_hours(run: Run, start_us: int, end_us: int) -> float:
    """Billed time inside [start_us, end_us], hours. The bill ends with the run, whenever a last release comes."""
    total = sum(
        max(0, min(end_us if b.release_us is None else b.release_us, end_us) - max(b.request_us, start_us))
        for b in run.log.bills
    )
    return total / US / 3600


def spread(values_us: npt.NDArray[np.int64]) -> dict[str, float | None]:
    """Mean, percentiles (nearest rank) and maximum in seconds."""
    if values_us.size == 0:
        return {"mean": None, "p50": None, "p95": None, "p99": None, "max": None}
    ordered = np.sort(values_us)
    at = {q: float(ordered[max(0, math.ceil(q / 100 * ordered.size) - 1)]) / US for q in (50, 95, 99)}
    return {
        "mean": float(ordered.mean()) / US,
        "p50": at[50],
        "p95": at[95],
        "p99": at[99],
        "max": float(ordered[-1]) / US,
    }


def timing(run: Run) -> dict[str, Any]:
    """Wall-clock figures; they differ from run to run and therefore stand in a file of their own."""
    d = np.sort(np.array(run.decision_s)) if run.decision_s else np.zeros(1)
    return {
        "wall_s": run.wall_s,
        "cpu_s": run.cpu_s,
        "decisions": len(run.decision_s),
        "decision_s": {
            "total": float(d.sum()),
            "mean": float(d.mean()),
            "p50": float(np.quantile(d, 0.5)),
            "p99": float(np.quantile(d, 0.99)),
            "max": float(d[-1]),
        },
        "chunks_per_cpu_s": len(run.rows) / run.cpu_s if run.cpu_s else None,
    }


def _first_of_period(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """First delivered chunk of each period (rows come in order of delivery)."""
    if len(rows) == 0:
        return rows
    key = rows[:, R_SESSION] * (rows[:, R_PERIOD].max() + 1) + rows[:, R_PERIOD]
    _, first = np.unique(key, return_index=True)
    return rows[first]


def _timeline(run: Run, start_us: int, end_us: int) -> dict[str, Any]:
    t = np.array(run.timeline.time_us, np.int64)
    until = np.append(t[1:], end_us)
    lasting = np.clip(np.minimum(until, end_us) - np.maximum(t, start_us), 0, None)
    active, ready = np.array(run.timeline.active), np.array(run.timeline.ready)
    fullest, billed = np.array(run.timeline.fullest), np.array(run.timeline.billed)
    total = lasting.sum()
    fair = -(-active // np.maximum(ready, 1))
    excess = np.where(ready > 0, fullest - fair, 0)
    return {
        "balance_excess": float((excess * lasting).sum() / total) if total else 0.0,
        "billed_max": int(billed[lasting > 0].max(initial=0)),
    }


def _by_tenant(run: Run, rows: npt.NDArray[np.int64]) -> dict[str, Any]:
    """On-time share and reduced share of each tenant, where there is more than one."""
    if len(run.trace.tenants) < 2:
        return {}
    out = {}
    tenant = run.trace.tenant[rows[:, R_SESSION]]
    for number, name in enumerate(run.trace.tenants):
        mine = rows[tenant == number]
        if len(mine):
            out[name] = {
                "chunks": len(mine),
                "on_time_share": float((mine[:, R_FINISH] <= mine[:, R_DEADLINE] + TOLERANCE_US).mean()),
                "reduced_step_share": float((mine[:, R_STEPS] < run.profile.denoise_steps).mean()),
            }
    return out
