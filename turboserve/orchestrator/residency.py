"""Device memory as a cache of idle sessions, and emptying workers that are to go.

An idle session stays on its worker while there is room: holding it costs nothing, and a session that comes back where
it is needs no transfer. Room is made ahead of need, by suspending who has been idle longest: the chance of coming back
falls with the time idle (heavy-tailed gaps), so that one is worth least. Where a worker drains, an idle session moves
to another worker if it is likely to come back before the price of two transfers (suspend, resume) is spent waiting,
which is the ski-rental rule with the hold as rent; otherwise it goes to host memory.
"""

from __future__ import annotations

import numpy as np

from turboserve.orchestrator.placement import Survey, lightest, promise
from turboserve.orchestrator.plan import Action, Migrate, ReleaseWorker, Suspend
from turboserve.orchestrator.view import HELD, NOWHERE, ClusterView

ROOM_KEPT = 2  # places kept free on each worker for who arrives or comes back
IDLE_MIN_S = 0.2  # a gap this short may be no gap
IDLE_HOLD_S = 120.0  # idle for longer: not worth another worker's memory


def make_room(view: ClusterView, sv: Survey) -> list[Action]:
    """Suspend the longest idle session of every worker that has fewer than ROOM_KEPT places left."""
    limit = view.profile.resident_max - ROOM_KEPT
    full = sv.ready[(sv.held[sv.ready] > limit) & ~sv.outbound[sv.ready]]
    if full.size == 0:
        return []
    actions: list[Action] = []
    s = view.sessions
    n = s.count
    for w in full:
        idle = np.flatnonzero((s.worker[:n] == w) & (s.state[:n] == HELD) & ~s.active[:n])
        if idle.size == 0:
            continue
        row = int(idle[np.lexsort((idle, s.idle_since_s[idle]))[0]])
        reason = f"{int(sv.held[w])} of {view.profile.resident_max} places taken, idle longest"
        actions.append(Suspend(s.ids[row], view.workers.ids[int(w)], reason))
        promise(sv, view, row, int(w), NOWHERE)
    return actions


def make_way(view: ClusterView, sv: Survey, now_s: float) -> list[Action]:
    """Where nothing else can carry an overfull batch (no brownout): idle sessions leave workers that are nearly full.

    Such a session will have to move when it comes back, and several that come back together can leave only one by one;
    from host memory each goes straight to a worker with room. The longest idle goes first.
    """
    if view.steps_floor is not None:
        return []
    tight = sv.ready[
        (sv.active_on[sv.ready] >= view.profile.capacity - 1)
        & (sv.held[sv.ready] > sv.active_on[sv.ready])
        & ~sv.outbound[sv.ready]
    ]
    if tight.size == 0:
        return []
    s = view.sessions
    n = s.count
    on_tight = np.zeros(view.workers.count, np.bool_)
    on_tight[tight] = True
    idle = np.flatnonzero((s.state[:n] == HELD) & ~s.active[:n] & (now_s - s.idle_since_s[:n] >= IDLE_MIN_S))
    idle = idle[on_tight[s.worker[idle]]]
    actions: list[Action] = []
    for r in idle[np.lexsort((idle, s.idle_since_s[idle]))].tolist():
        worker = int(s.worker[r])
        if sv.outbound[worker]:
            continue
        reason = f"{int(sv.active_on[worker])} active here: it would have to move when it comes back"
        actions.append(Suspend(s.ids[r], view.workers.ids[worker], reason))
        promise(sv, view, r, worker, NOWHERE)
    return actions


def empty_draining(view: ClusterView, sv: Survey, now_s: float, active_max: int) -> list[Action]:
    """One session off each draining worker: active ones to a worker with room at full steps, idle ones as above.

    An active session for which there is no room stays where it is and goes on.
    """
    actions: list[Action] = []
    s, w = view.sessions, view.workers
    n = s.count
    held_max = view.profile.resident_max
    for source in sv.draining:
        if sv.outbound[source]:
            continue
        rows = np.flatnonzero((s.worker[:n] == source) & (s.state[:n] == HELD))
        if rows.size == 0:
            continue
        rows = rows[np.lexsort((rows, s.in_chunk[rows], ~s.active[rows]))]
        for r in rows.tolist():
            active = bool(s.active[r])
            lasting = now_s - s.idle_since_s[r] < IDLE_HOLD_S
            room = held_max if active else held_max - ROOM_KEPT
            bound = active_max if active else view.profile.batch_max + held_max
            target = NOWHERE
            if active or lasting:
                target = lightest(
                    sv.ready, sv.load_on, sv.active_on, sv.held, sv.inbound, float(s.load[r]), bound, room, True
                )
            source_id = w.ids[int(source)]
            if target >= 0:
                actions.append(Migrate(s.ids[r], source_id, w.ids[target], f"{source_id} drains"))
                promise(sv, view, r, int(source), target)
                break
            if not active:
                actions.append(Suspend(s.ids[r], source_id, f"{source_id} drains"))
                promise(sv, view, r, int(source), NOWHERE)
                break
    return actions


def release_empty(view: ClusterView, sv: Survey) -> list[Action]:
    """Draining workers that hold nothing, in whole provisioning units."""
    if sv.draining.size == 0:
        return []
    w = view.workers
    empty = sv.draining[(sv.held[sv.draining] == 0) & ~sv.inbound[sv.draining] & ~sv.outbound[sv.draining]]
    if empty.size == 0:
        return []
    blocked = set(w.unit[np.setdiff1d(np.concatenate([sv.ready, sv.draining, sv.starting]), empty)].tolist())
    return [ReleaseWorker(w.ids[int(r)], "drained") for r in empty if int(w.unit[r]) not in blocked]
