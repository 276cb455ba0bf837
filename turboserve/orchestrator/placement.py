"""Sessions onto workers: least worst-case latency, the cost of moving counted.

The bottleneck of a placement is the chunk latency of its fullest worker. For equal sessions the best placement is
found exactly: to get every worker down to at most `cap` sessions takes sum(max(0, n_j - cap)) moves and no fewer, so
trying every cap and weighing latency gained over the horizon against the moves' time finds the optimum. (The
published rule tries one move at a time; loads 4,4,1,1 stall it, because no single move lowers the bottleneck.)
Unequal sessions go to `unequal.py`.

The functions marked njit are the O(sessions) and O(workers) loops; their `.py_func` is the plain twin that tests hold
equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from turboserve.orchestrator.latency import LatencyProfile
from turboserve.orchestrator.view import (
    DRAINING,
    GONE,
    HELD,
    HOST,
    NEW,
    READY,
    STARTING,
    Bytes,
    ClusterView,
    Flags,
    Floats,
    Ints,
)


@dataclass(slots=True)
class Survey:
    """The view summed up per worker row, and what this tick has promised on top; only a tick writes it."""

    active_on: Ints  # active sessions on the worker or on their way to it
    load_on: Floats  # their load
    held: Ints  # sessions it holds, both ends of a transfer counted
    slack_s: Floats  # least time that one of its active sessions has before a chunk must start to be on time
    inbound: Flags
    outbound: Flags
    ready: Ints  # rows of the workers that take sessions
    draining: Ints
    starting: Ints
    active: int  # all active sessions
    waiting: int  # of these on no worker
    now_s: float
    equal: bool  # all active sessions cost the same


@njit(cache=True)
def _survey(
    state: Bytes,
    active: Flags,
    in_chunk: Flags,
    worker: Ints,
    target: Ints,
    load: Floats,
    deadline_s: Floats,
    chunk_s: float,
    now_s: float,
    workers: int,
) -> tuple[Ints, Floats, Ints, Floats, int, int, bool]:
    active_on = np.zeros(workers, np.int64)
    load_on = np.zeros(workers, np.float64)
    held = np.zeros(workers, np.int64)
    slack_s = np.full(workers, np.inf)
    n_active = 0
    waiting = 0
    equal = True
    first_load = -1.0
    for r in range(len(state)):
        if state[r] == GONE:
            continue
        w = worker[r]
        if w >= 0:
            held[w] += 1
        t = target[r]
        if t >= 0:
            held[t] += 1
            w = t
        if not active[r]:
            continue
        n_active += 1
        if first_load < 0.0:
            first_load = load[r]
        elif load[r] != first_load:
            equal = False
        if state[r] == NEW or state[r] == HOST or w < 0:
            waiting += 1
            continue
        active_on[w] += 1
        load_on[w] += load[r]
        # A chunk in work is as good as done: what counts is when the next one must begin.
        left = deadline_s[r] - now_s + (chunk_s if in_chunk[r] else 0.0)
        if left < slack_s[w]:
            slack_s[w] = left
    return active_on, load_on, held, slack_s, n_active, waiting, equal


def survey(view: ClusterView, now_s: float) -> Survey:
    """Sum the columns up."""
    s, w = view.sessions, view.workers
    n, m = s.count, w.count
    active_on, load_on, held, slack_s, n_active, waiting, equal = _survey(
        s.state[:n],
        s.active[:n],
        s.in_chunk[:n],
        s.worker[:n],
        s.target[:n],
        s.load[:n],
        s.next_deadline_s[:n],
        view.profile.chunk_s,
        now_s,
        m,
    )
    state = w.state[:m]
    return Survey(
        active_on=active_on,
        load_on=load_on,
        held=held,
        slack_s=slack_s,
        inbound=w.inbound[:m].copy(),
        outbound=w.outbound[:m].copy(),
        ready=np.flatnonzero(state == READY),
        draining=np.flatnonzero(state == DRAINING),
        starting=np.flatnonzero(state == STARTING),
        active=n_active,
        waiting=waiting,
        now_s=now_s,
        equal=equal,
    )


@njit(cache=True)
def lightest(
    ready: Ints,
    load_on: Floats,
    active_on: Ints,
    held: Ints,
    inbound: Flags,
    session_load: float,
    active_max: int,
    held_max: int,
    by_transfer: bool,
) -> int:
    """The worker with the least load that has room for one more active session, or -1.

    Ties fall to the one that holds fewer sessions, then to the lower row.
    """
    best = -1
    for w in ready:
        if held[w] >= held_max or active_on[w] >= active_max or (by_transfer and inbound[w]):
            continue
        if best >= 0:
            if load_on[w] > load_on[best]:
                continue
            if load_on[w] == load_on[best] and held[w] >= held[best]:
                continue
        best = w
    return best


@njit(cache=True)
def best_cap(
    active_on: Ints, ready: Ints, table: Floats, horizon_chunks: float, eta_move_s: float, gain_min_s: float
) -> tuple[int, int]:
    """(cap, moves): the bottleneck worth reaching and the moves it takes; the present one and 0 if none is.

    Value of a cap: (latency of the fullest now - latency at the cap) * horizon - eta_move_s * moves.
    """
    total = 0
    most = 0
    for w in ready:
        total += active_on[w]
        most = max(most, active_on[w])
    if most <= 1:
        return most, 0
    over = np.zeros(most + 1, np.int64)  # over[c] = sum of max(0, n_j - c), built from the counts
    for w in ready:
        for c in range(active_on[w]):
            over[c] += active_on[w] - c
    last = len(table) - 1
    latency_now = table[min(most - 1, last)]
    best, best_moves, best_value = most, 0, 0.0
    lowest = -(-total // len(ready))
    for c in range(most - 1, max(lowest, 1) - 1, -1):
        gain = latency_now - table[min(c - 1, last)]
        value = gain * horizon_chunks - eta_move_s * over[c]
        if gain >= gain_min_s and value > best_value:
            best, best_moves, best_value = c, over[c], value
    return best, best_moves


@njit(cache=True)
def movable(
    state: Bytes,
    active: Flags,
    in_chunk: Flags,
    worker: Ints,
    deadline_s: Floats,
    moved_s: Floats,
    wanted: Flags,
    now_s: float,
    cooldown_s: float,
) -> Ints:
    """For each worker row in `wanted` the active session that leaves most easily, else -1.

    First one between two chunks (its move starts at once), then the one with the latest deadline (it can bear the
    pause), then the lower row. Sessions that moved less than `cooldown_s` ago stay.
    """
    chosen = np.full(len(wanted), -1, np.int64)
    for r in range(len(state)):
        w = worker[r]
        if w < 0 or not wanted[w] or state[r] != HELD or not active[r]:
            continue
        if now_s - moved_s[r] < cooldown_s:
            continue
        best = chosen[w]
        if best >= 0:
            if in_chunk[r] and not in_chunk[best]:
                continue
            if in_chunk[r] == in_chunk[best] and deadline_s[r] <= deadline_s[best]:
                continue
        chosen[w] = r
    return chosen


def move_seconds(view: ClusterView, source: int, target: int) -> float:
    """Time of a migration: across nodes where the fleet comes in nodes."""
    profile = view.profile
    if profile.provision_unit_workers > 1 and view.workers.node[source] != view.workers.node[target]:
        return profile.migrate_cross_node_s or profile.migrate_s
    return profile.migrate_s


def balance(
    view: ClusterView,
    sv: Survey,
    now_s: float,
    *,
    horizon_chunks: float,
    eta: float,
    gain_min_s: float,
    cooldown_s: float,
    budget: int,
) -> list[tuple[int, int, str]]:
    """Moves (session row, target row, reason) towards the best cap that can start now: one out and one in a worker.

    What one-at-a-time transfers leave over follows when these have ended; the next tick finds the same cap.
    """
    profile = view.profile
    if sv.ready.size < 2:
        return []
    cap, moves = best_cap(
        sv.active_on, sv.ready, latency_table(profile), horizon_chunks, eta * profile.migrate_s, gain_min_s
    )
    if moves == 0:
        return []
    s = view.sessions
    counts = sv.active_on[sv.ready]
    sources = sv.ready[(counts > cap) & ~sv.outbound[sv.ready]]
    targets = sv.ready[(counts < cap) & ~sv.inbound[sv.ready] & (sv.held[sv.ready] < profile.resident_max)]
    if sources.size == 0 or targets.size == 0:
        return []
    sources = sources[np.lexsort((sources, -sv.active_on[sources]))]
    targets = targets[np.lexsort((targets, sv.active_on[targets]))].tolist()
    wanted = np.zeros(view.workers.count, np.bool_)
    wanted[sources] = True
    n = s.count
    leaving = movable(
        s.state[:n],
        s.active[:n],
        s.in_chunk[:n],
        s.worker[:n],
        s.next_deadline_s[:n],
        s.moved_s[:n],
        wanted,
        now_s,
        cooldown_s,
    )
    found: list[tuple[int, int, str]] = []
    worst = int(sv.active_on[sv.ready].max())
    before_ms = 1000 * profile.load_latency(worst)
    after_ms = 1000 * profile.load_latency(cap)
    for source in sources:
        row = int(leaving[source])
        if row < 0 or not targets or len(found) >= budget:
            continue
        # The same node first, where the fleet comes in nodes; else the least loaded.
        here = next((t for t in targets if view.workers.node[t] == view.workers.node[source]), targets[0])
        target = here if profile.provision_unit_workers > 1 else targets[0]
        targets.remove(target)
        cost_ms = 1000 * move_seconds(view, int(source), target)
        reason = f"balance to {cap}: worst {before_ms:.0f} ms -> {after_ms:.0f} ms, cost {cost_ms:.0f} ms"
        promise(sv, view, row, int(source), target)
        found.append((row, target, reason))
    return found


def promise(sv: Survey, view: ClusterView, row: int, source: int, target: int) -> None:
    """Book a transfer (source or target may be -1) so that the rest of the tick counts with it."""
    load = view.sessions.load[row]
    if source >= 0:
        sv.outbound[source] = True
        if view.sessions.active[row]:
            sv.active_on[source] -= 1
            sv.load_on[source] -= load
    if target >= 0:
        sv.inbound[target] = True
        sv.held[target] += 1
        if view.sessions.active[row]:
            sv.active_on[target] += 1
            sv.load_on[target] += load
            sv.slack_s[target] = min(sv.slack_s[target], view.sessions.next_deadline_s[row] - sv.now_s)


_TABLES: dict[tuple[float, ...], Floats] = {}


def latency_table(profile: LatencyProfile) -> Floats:
    """The profile's table as an array; made once per table (a constant, so the tick stays a function)."""
    table = _TABLES.get(profile.batch_latency_s)
    if table is None:
        table = _TABLES[profile.batch_latency_s] = np.array(profile.batch_latency_s)
    return table
