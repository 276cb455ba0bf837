"""Pictures of traces: what the demand looks like before any policy meets it. Needs matplotlib (extra `plots`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from turboserve.errors import ConfigError
from turboserve.sim.events import US
from turboserve.sim.trace import ACTIVE, ARRIVE, DEPART, Trace, demand
from turboserve.sim.trace_stats import idle_lengths_s

FORMATS = (".png", ".svg", ".pdf")


def pyplot() -> Any:
    """matplotlib without a display."""
    try:
        import matplotlib
    except ImportError as missing:
        raise ConfigError(
            "pictures need matplotlib", expected="the package matplotlib", hint="pip install 'turboserve[plots]'"
        ) from missing
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(traces: list[Trace], out: Path) -> None:
    """One row a trace: sessions over time, arrivals per minute, lengths of periods and pauses."""
    if out.suffix not in FORMATS:
        raise ConfigError(f"cannot draw into {out.name}", expected=f"a name ending in {', '.join(FORMATS)}")
    plt = pyplot()
    figure, rows = plt.subplots(
        len(traces), 3, figsize=(15, 3.4 * len(traces)), squeeze=False, width_ratios=(3, 2, 2), layout="constrained"
    )
    for trace, (over_time, arrivals, lengths) in zip(traces, rows, strict=True):
        _over_time(over_time, trace)
        _arrivals(arrivals, trace)
        _lengths(lengths, trace)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def _over_time(axes: Any, trace: Trace) -> None:
    steps = demand(trace)
    arrive, depart = (np.sort(trace.time_us[trace.event == kind]) for kind in (ARRIVE, DEPART))
    times = np.unique(np.concatenate([arrive, depart]))
    open_count = np.searchsorted(arrive, times, side="right") - np.searchsorted(depart, times, side="right")
    axes.step(times / US / 60, open_count, where="post", color="#9aa5b1", linewidth=1, label="open")
    axes.step(steps.time_us / US / 60, steps.count, where="post", color="#1f6feb", linewidth=1, label="active")
    axes.set(title=trace.name, xlabel="minutes", ylabel="sessions", ylim=(0, None))
    axes.legend(loc="upper left", frameon=False)


def _arrivals(axes: Any, trace: Trace) -> None:
    minutes = max(1, int(trace.horizon_us / US // 60))
    counts, edges = np.histogram(trace.time_us[trace.event == ARRIVE] / US / 60, bins=minutes, range=(0, minutes))
    axes.stairs(counts, edges, fill=True, color="#57ab5a")
    axes.set(title="arrivals per minute", xlabel="minutes", ylim=(0, None))


def _lengths(axes: Any, trace: Trace) -> None:
    shown = {"active periods": trace.chunks[trace.event == ACTIVE].astype(float), "pauses": idle_lengths_s(trace)}
    for (label, values), colour in zip(shown.items(), ("#1f6feb", "#9aa5b1"), strict=True):
        if values.size:
            ranked = np.sort(values)
            axes.step(ranked, 1 - np.arange(ranked.size) / ranked.size, where="post", color=colour, label=label)
    axes.set(title="share longer than", xlabel="seconds", xscale="log", yscale="log")
    axes.legend(loc="lower left", frameon=False)
