"""Placement of unequal sessions: lexicographic min-max local search with moves and swaps.

Sessions of different sizes (or step counts) load a worker differently. Starting from what is, the fullest worker gives
a session away or exchanges one for a smaller one, whichever leaves the lower of the two workers' higher load; a step is
taken when it improves the descending vector of loads, even if another worker ties for the bottleneck, and in the end
only the steps up to the best value of (latency of the fullest * horizon + eta * move seconds) are kept.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from turboserve.orchestrator.view import Bytes, Flags, Floats, Ints


@njit(cache=True)
def load_latency(table: Floats, load: float) -> float:
    """`LatencyProfile.load_latency`, compiled."""
    if load <= 0.0:
        return 0.0
    if load <= 1.0:
        return float(table[0] * load)
    below = int(load)
    last = len(table)
    if below >= last:
        slope = table[last - 1] - table[last - 2] if last > 1 else table[0]
        return float(table[last - 1] + (load - last) * max(slope, 1e-9))
    return float(table[below - 1] + (load - below) * (table[below] - table[below - 1]))


@njit(cache=True)
def search(
    home: Ints,
    load: Floats,
    fixed: Bytes,
    load_on: Floats,
    may_send: Flags,
    may_take: Flags,
    move_s: Floats,
    table: Floats,
    horizon_chunks: float,
    eta: float,
    budget: int,
) -> Ints:
    """New worker of each session (its own where it stays). Rows of `home` index workers; `fixed` sessions stay.

    Each worker sends and takes at most one session; a swap is both for both. `move_s` is per session.
    """
    sessions = len(home)
    workers = len(load_on)
    now = home.copy()
    load_on = load_on.copy()
    may_send = may_send.copy()
    may_take = may_take.copy()
    best = home.copy()
    worst = 0.0
    for w in range(workers):
        worst = max(worst, load_on[w])
    best_value = load_latency(table, worst) * horizon_chunks
    spent_s = 0.0
    moves = 0
    stuck = np.zeros(workers, np.bool_)
    while moves < budget:
        full = -1
        for w in range(workers):
            if not stuck[w] and may_send[w] and (full < 0 or load_on[w] > load_on[full]):
                full = w
        if full < 0:
            break
        step_i, step_k, step_w = -1, -1, -1
        step_high, step_cost = load_on[full] - 1e-9, np.inf
        for i in range(sessions):
            if now[i] != full or fixed[i]:
                continue
            for w in range(workers):
                if w == full or not may_take[w]:
                    continue
                high = max(load_on[full] - load[i], load_on[w] + load[i])
                if high < step_high - 1e-9 or (high < step_high + 1e-9 and move_s[i] < step_cost):
                    step_i, step_k, step_w, step_high, step_cost = i, -1, w, high, move_s[i]
            if not may_take[full] or moves + 2 > budget:
                continue
            for k in range(sessions):
                w = now[k]
                if w == full or w < 0 or fixed[k] or load[k] >= load[i] or not may_send[w] or not may_take[w]:
                    continue
                change = load[i] - load[k]
                high = max(load_on[full] - change, load_on[w] + change)
                cost = move_s[i] + move_s[k]
                if high < step_high - 1e-9 or (high < step_high + 1e-9 and cost < step_cost):
                    step_i, step_k, step_w, step_high, step_cost = i, k, w, high, cost
        if step_i < 0 or step_high >= load_on[full] - 1e-9:
            # The bottleneck itself cannot be lowered: what lies below it does not count.
            highest = 0.0
            for w in range(workers):
                highest = max(highest, load_on[w])
            if load_on[full] >= highest - 1e-9:
                break
            stuck[full] = True
            continue
        change = load[step_i] - (load[step_k] if step_k >= 0 else 0.0)
        load_on[full] -= change
        load_on[step_w] += change
        now[step_i] = step_w
        may_send[full] = False
        may_take[step_w] = False
        moves += 1
        spent_s += move_s[step_i]
        if step_k >= 0:
            now[step_k] = full
            may_send[step_w] = False
            may_take[full] = False
            moves += 1
            spent_s += move_s[step_k]
        worst = 0.0
        for w in range(workers):
            worst = max(worst, load_on[w])
        value = load_latency(table, worst) * horizon_chunks + eta * spent_s
        if value < best_value - 1e-12:
            best_value = value
            best[:] = now
    return best
