"""What a trace looks like in numbers: the columns of the table in traces/README.md.

Everything "after the ramp" leaves out the first 10 minutes, in which an empty window fills.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from turboserve.sim.events import US
from turboserve.sim.trace import ACTIVE, ARRIVE, DEPART, IDLE, Trace, demand

RAMP_S = 600.0
SAMPLE_S = 1.0

Ints = npt.NDArray[np.int64]


def stats(trace: Trace) -> dict[str, Any]:
    """Counts, peaks and spreads of one trace; times in seconds."""
    horizon_s = max(1.0, trace.horizon_us / US)
    steps = demand(trace)
    grid_us = (np.arange(0.0, horizon_s, SAMPLE_S) * US).astype(np.int64)
    active = sample(steps.time_us, steps.count, grid_us)
    open_count = _open_count(trace, grid_us)
    arrive_s = trace.time_us[trace.event == ARRIVE] / US
    duration = _durations(trace)
    mean_active = float(active.mean()) if active.size else 0.0
    settled = active[grid_us >= RAMP_S * US] if horizon_s > 2 * RAMP_S else active
    lengths = trace.chunks[trace.event == ACTIVE]
    gaps = np.diff(np.sort(arrive_s))
    open_mean = float(open_count.mean()) if open_count.size else 0.0
    return {
        "trace": trace.name,
        "horizon_s": horizon_s,
        "sessions": len(trace.session_ids),
        "active_periods": int(lengths.size),
        "chunks": int(lengths.sum()),
        "peak_active": steps.peak,
        "mean_active": mean_active,
        "peak_open": int(open_count.max(initial=0)),
        "mean_open": open_mean,
        "duration_s": _quantiles(duration, (50, 90, 99)),
        "chunks_per_period": _quantiles(lengths, (50, 99)),
        "peak_over_mean_active": _ratio(steps.peak, mean_active),
        "active_cv_after_ramp": _ratio(float(settled.std()), float(settled.mean())) if settled.size else 0.0,
        "delta60_std_over_mean": _change(settled, 60, np.std),
        "max_rise_1min": _change(settled, 60, np.max),
        "max_rise_10min": _change(settled, 600, np.max),
        "arrivals_peak_over_mean_1min": _arrival_peak(arrive_s, 60.0, horizon_s),
        "arrivals_peak_over_mean_10min": _arrival_peak(arrive_s, 600.0, horizon_s),
        "arrival_gap_cv": _ratio(float(gaps.std()), float(gaps.mean())) if gaps.size else 0.0,
        "active_share": _ratio(mean_active, open_mean),
        "tenants": len(trace.tenants),
    }


def sample(step_us: Ints, count: Ints, at_us: Ints) -> Ints:
    """Values of a step curve at the given times (0 before its first step)."""
    if step_us.size == 0:
        return np.zeros(at_us.size, np.int64)
    at = np.searchsorted(step_us, at_us, side="right") - 1
    return np.where(at >= 0, count[np.maximum(at, 0)], 0)


def _open_count(trace: Trace, grid_us: Ints) -> Ints:
    arrived = np.searchsorted(trace.time_us[trace.event == ARRIVE], grid_us, side="right")
    departed = np.searchsorted(trace.time_us[trace.event == DEPART], grid_us, side="right")
    return arrived - departed


def _durations(trace: Trace) -> npt.NDArray[np.float64]:
    begin = np.zeros(len(trace.session_ids))
    end = np.full(len(trace.session_ids), trace.horizon_us / US)
    for kind, column in ((ARRIVE, begin), (DEPART, end)):
        rows = trace.event == kind
        column[trace.session[rows]] = trace.time_us[rows] / US
    return end - begin


def _quantiles(values: npt.NDArray[Any], percents: tuple[int, ...]) -> dict[str, float]:
    if not values.size:
        return {f"p{p}": 0.0 for p in percents}
    return {f"p{p}": float(v) for p, v in zip(percents, np.percentile(values, percents), strict=True)}


def _ratio(value: float, by: float) -> float:
    return float(value / by) if by > 0 else 0.0


def _change(active: Ints, seconds: int, reduce: Any) -> float:
    """Spread or largest of A(t) - A(t - seconds), over the mean."""
    lag = round(seconds / SAMPLE_S)
    if active.size <= lag or active.mean() <= 0:
        return 0.0
    return float(reduce(active[lag:] - active[:-lag]) / active.mean())


def _arrival_peak(arrive_s: npt.NDArray[np.float64], bin_s: float, horizon_s: float) -> float:
    bins = int(horizon_s // bin_s)
    if bins < 1 or not arrive_s.size:
        return 0.0
    counts = np.histogram(arrive_s, bins=bins, range=(0, bins * bin_s))[0]
    return _ratio(float(counts.max()), float(counts.mean()))


def idle_lengths_s(trace: Trace) -> npt.NDArray[np.float64]:
    """Lengths of the pauses between active periods."""
    ended: dict[int, int] = {}
    lengths = []
    for session, event, time_us in zip(
        trace.session.tolist(), trace.event.tolist(), trace.time_us.tolist(), strict=True
    ):
        if event == IDLE:
            ended[session] = time_us
        elif event == ACTIVE and session in ended:
            lengths.append((time_us - ended.pop(session)) / US)
    return np.array(lengths)
