"""The figures of a load: what the viewers saw, as one object and as rows, and what the simulator says of the same."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from turboserve.bench.report import Row, cpu_name, make_row, versions
from turboserve.bench.serve_viewer import LiveClock, ViewerSeen
from turboserve.bench.timing import Timing
from turboserve.orchestrator.latency import LatencyProfile
from turboserve.sim.trace import Trace

STALL_S = 0.01
"""A shorter halt than this is within what a player's clock hides."""


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float | int]:
    """Count, mean and percentiles; only the count when nothing was measured."""
    if not len(values):
        return {"count": 0}
    array = np.asarray(values, np.float64)
    p50, p95, p99 = np.percentile(array, [50, 95, 99])
    named = {"mean": array.mean(), "p50": p50, "p95": p95, "p99": p99, "max": array.max()}
    return {"count": len(values), **{name: round(float(value), digits) for name, value in named.items()}}


def samples(seen: Sequence[ViewerSeen], clock: LiveClock) -> dict[str, list[float]]:
    """Every measurement by kind, in seconds."""
    periods = [period for one in seen for period in one.periods if period.arrivals_s]
    return {
        "time_to_first_chunk": [one.arrivals_s[0] - one.start_s for one in periods if one.first_of_session],
        "chunk_latency": [ms / 1e3 for one in periods for ms in one.latencies_ms],
        "inter_chunk_gap": [b - a for one in periods for a, b in itertools.pairwise(one.arrivals_s)],
        "input_to_visible": [s for one in periods if (s := one.input_to_visible_s(clock)) is not None],
    }


def figures(
    seen: Sequence[ViewerSeen], clock: LiveClock, worker_seconds: float, wall_s: float, decided: Counter[str]
) -> dict[str, Any]:
    """Everything that `bench serve` prints; times in seconds, shares of what was wanted (not only of what came)."""
    wanted, delivered = sum(one.wanted for one in seen), sum(one.delivered for one in seen)
    on_time = sum(period.on_time(clock) for one in seen for period in one.periods)
    stalls: list[float] = []
    smooth = played_s = 0
    watched = [one for one in seen if one.delivered]
    total_stall_s = total_play_s = 0.0
    for one in watched:
        mine = [stall for period in one.periods for stall in period.play(clock)[1] if stall > STALL_S]
        smooth += not mine
        stalls += mine
        played_s += one.delivered
        total_stall_s += sum(mine)
        total_play_s += one.delivered * clock.chunk_s
    return {
        "sessions": len(seen),
        "chunks_wanted": wanted,
        "chunks_delivered": delivered,
        "chunks_extra": sum(one.extra for one in seen),
        "on_time_share": round(on_time / wanted, 5) if wanted else None,
        **{f"{name}_s": spread(values) for name, values in samples(seen, clock).items()},
        "stalls": {
            "count": len(stalls),
            "seconds": round(total_stall_s, 3),
            "longest_s": round(max(stalls, default=0), 3),
        },
        "sessions_without_stall_share": round(smooth / len(watched), 4) if watched else None,
        "continuous_play_ratio": (round(total_play_s / (total_play_s + total_stall_s), 5) if total_play_s else None),
        "worker_seconds": round(worker_seconds, 2),
        "wall_s": round(wall_s, 2),
        "reconnects": sum(one.reconnects for one in seen),
        "worker_changes_seen": sum(one.worker_changes for one in seen),
        "failed_sessions": dict(Counter(one.failure for one in seen if one.failure)),
        "decisions": dict(sorted(decided.items())),
        "chunk_s": clock.chunk_s,
        "chunk_target_s": clock.chunk_target_s,
    }


def rows(seen: Sequence[ViewerSeen], clock: LiveClock, alone: Sequence[ViewerSeen], shape: str) -> list[Row]:
    """Rows of contracts section 5. The floor is the same figure of one session alone, measured just before; the
    baseline of every time is the chunk's own playing time."""
    loaded, free = samples(seen, clock), samples(alone, clock)
    made = []
    for case, values in loaded.items():
        if not values:
            continue
        floor = free.get(case) or []
        floor_s = float(np.median(floor)) if floor else clock.chunk_s if case == "inter_chunk_gap" else 0.0
        made.append(
            make_row(
                case=case,
                shape=shape,
                dtype="rgb24",
                device=cpu_name(),
                versions=versions("torch", "websockets", "uvicorn"),
                timing=Timing(tuple(1e3 * value for value in values)),
                floor="one session alone, same run" if floor else "none",
                floor_ms=1e3 * floor_s,
                baseline="playing time of a chunk",
                baseline_ms=1e3 * clock.chunk_s,
                max_rel_err=0.0,  # raw frames: the SDK held every chunk against its digest chain
            )
        )
    return made


def predicted(
    trace: Trace,
    profile: LatencyProfile,
    *,
    workers: int | None,
    workers_max: int,
    initial: int,
    batching: str,
    provision_s: float | None = None,
) -> dict[str, Any]:
    """The simulator on the same scaled trace: on-time share, worker-seconds, first chunk, latency.

    `provision_s` None: the profile's.
    """
    from turboserve.sim.policies import make_policy
    from turboserve.sim.replay import Settings, simulate
    from turboserve.sim.report import report

    settings = Settings(
        workers=workers,
        workers_max=workers_max,
        initial_workers=initial,
        warmup_s=0.0,
        batching=batching,
        provision_s=provision_s,
    )
    delay_s = profile.provision_s if provision_s is None else provision_s
    policy = make_policy("turboserve", scaling=workers is None, provision_s=delay_s)
    found = report(simulate(trace, profile, policy, settings))
    return {
        "profile": profile.name,
        "on_time_share": found["on_time_share"],
        "worker_seconds": round(3600 * found["worker_hours"], 2),
        "chunks": found["chunks"],
        "shed": found["shed"],
        "latency_s": found["latency_s"],
        "first_chunk_s": found["first_chunk_s"],
        "workers": found["workers"],
        "migrations": found["migrations"],
        "suspends": found["suspends"],
    }
