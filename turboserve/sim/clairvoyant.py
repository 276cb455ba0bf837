"""The clairvoyant reference: the cheapest fleet of somebody who knows the whole trace.

It pays the same bill (a worker costs from its request to its release), waits the same provisioning delay,
moves sessions for free and always has room for every active session at full steps: `ready(t) * capacity >=
active(t)`. No policy that keeps at most `capacity` active sessions a worker and lets nobody wait can be
cheaper.

Why no table over fleet sizes is needed. Let need(t) = ceil(active(t) / capacity). A fleet is a stack of
layers: layer j is billed exactly while at least j workers are. Its bill is the time it is up plus
`provision_s` for every start, both sums over layers, and feasibility (layer j ready whenever need(t) >= j)
is a condition on each layer alone. So the dynamic programme over (time, fleet size) splits into one
two-state programme a layer, whose only choice comes at each gap of the need: stay up (cost: the gap) or go
down and be requested again ahead of time (cost: provision_s). Each gap therefore costs min(gap,
provision_s), exactly. `clairvoyant_milp.py` states the same problem as an integer programme without that
argument; tests hold the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from turboserve.errors import ConfigError

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class CheapestFleet:
    """The reference fleet. Curves are step functions: value[i] holds on [time_s[i], time_s[i + 1])."""

    worker_hours: float
    """Billed in [warmup_s, end_s], in worker-hours."""
    starts: int
    """Workers started within [warmup_s, end_s]."""
    need_time_s: np.ndarray
    need_workers: np.ndarray
    billed_time_s: np.ndarray
    billed_workers: np.ndarray

    def billed_at(self, time_s: np.ndarray) -> np.ndarray:
        """Workers billed at each of the times (0 before the first step)."""
        if self.billed_time_s.size == 0:
            return np.zeros(np.shape(time_s), dtype=np.int64)
        index = np.searchsorted(self.billed_time_s, time_s, side="right") - 1
        return np.where(index >= 0, self.billed_workers[np.maximum(index, 0)], 0)


def active_steps(starts_s: np.ndarray, ends_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sweep active periods to (times, active count from that time on); ends come before starts at equal
    times.

    Only the count after everything at an instant is kept, so one user leaving as another comes is no peak.
    """
    times = np.concatenate([np.asarray(starts_s, float), np.asarray(ends_s, float)])
    change = np.concatenate([np.ones(len(starts_s), np.int64), -np.ones(len(ends_s), np.int64)])
    if times.size == 0:
        return np.zeros(0), np.zeros(0, np.int64)
    order = np.argsort(times, kind="stable")
    times, count = times[order], np.cumsum(change[order])
    last = np.append(times[1:] != times[:-1], True)
    return times[last], count[last]


def peak_active(starts_s: np.ndarray, ends_s: np.ndarray, warmup_s: float = 0.0) -> int:
    """Most sessions active at once at or after warmup_s."""
    times, active = active_steps(starts_s, ends_s)
    if times.size == 0:
        return 0
    until = np.append(times[1:], np.inf)
    return int(active[until > warmup_s].max(initial=0))


def cheapest_fleet(
    starts_s: np.ndarray,
    ends_s: np.ndarray,
    *,
    capacity: int,
    provision_s: float,
    warmup_s: float,
    end_s: float,
    unit_workers: int = 1,
) -> CheapestFleet:
    """Least worker-hours in [warmup_s, end_s] that always has room for the active periods [start, end).

    `unit_workers`: workers come and go in nodes of this many; a layer is then a node.
    The need before warmup_s costs nothing (it is not billed), so the fleet may stand ready there for free.
    """
    if capacity < 1 or unit_workers < 1 or provision_s < 0:
        raise ConfigError(
            f"capacity {capacity}, unit_workers {unit_workers} and provision_s {provision_s} make no fleet",
            expected="capacity >= 1, unit_workers >= 1, provision_s >= 0",
        )
    end_s = max(end_s, warmup_s)  # nothing is billed of a trace that ends within the warm-up
    times, active = active_steps(starts_s, ends_s)
    per_unit = capacity * unit_workers
    need = -(-active // per_unit)
    keep = np.append(True, need[1:] != need[:-1]) if need.size else np.zeros(0, bool)
    times, need = times[keep], need[keep]

    down_since: list[float] = []  # per layer: when its need last ended (the free warm-up counts as need)
    billed_s = 0.0
    starts = 0
    changes: list[tuple[float, int]] = []  # of the billed number of units, within [warmup_s, end_s]
    level = 0
    for time_s, wanted in zip(times.tolist(), need.tolist(), strict=True):
        now_s = min(max(time_s, warmup_s), end_s)
        while level < wanted:
            if level == len(down_since):
                down_since.append(warmup_s)
            gap_s = now_s - max(down_since[level], warmup_s)
            billed_s += min(gap_s, provision_s)
            if gap_s > provision_s:
                starts += 1
                changes += [(max(down_since[level], warmup_s), -1), (now_s - provision_s, 1)]
            level += 1
        while level > wanted:
            level -= 1
            down_since[level] = time_s
    # Layers stay up from their first billed moment; the gaps above are cut out of that.
    for top_s in down_since[level:]:
        changes.append((min(max(top_s, warmup_s), end_s), -1))
    changes += [(warmup_s, 1)] * len(down_since)
    until = np.append(times[1:], end_s) if times.size else np.zeros(0)
    inside = np.clip(until, warmup_s, end_s) - np.clip(times, warmup_s, end_s)
    billed_s += float((need * np.maximum(inside, 0.0)).sum())

    billed_time_s, billed = _running_sum(changes)
    return CheapestFleet(
        worker_hours=billed_s * unit_workers / SECONDS_PER_HOUR,
        starts=starts * unit_workers,
        need_time_s=times,
        need_workers=need * unit_workers,
        billed_time_s=billed_time_s,
        billed_workers=billed * unit_workers,
    )


def static_fleet(starts_s: np.ndarray, ends_s: np.ndarray, *, capacity: int) -> int:
    """ceil(peak active / capacity): the fixed fleet that has room for everybody at every moment."""
    return -(-peak_active(starts_s, ends_s) // capacity)


def _running_sum(changes: list[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Step curve of a list of (time, change)."""
    if not changes:
        return np.zeros(0), np.zeros(0, np.int64)
    changes.sort()
    times = np.array([time_s for time_s, _ in changes])
    total = np.cumsum([change for _, change in changes])
    last = np.append(times[1:] != times[:-1], True)
    return times[last], total[last]
