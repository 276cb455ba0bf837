"""Weighted-fair admission among tenants: who may have active sessions placed, and who gives way.

Room is counted in active sessions the fleet carries. Each tenant's share is its max-min fair part by weight: nobody
gets more than it asks for, what it leaves goes to the others. Within its share a tenant's sessions are placed whatever
the others do; beyond it they are placed only while there is room nobody else asks for.
"""

from __future__ import annotations

import numpy as np

from turboserve.orchestrator.placement import Survey, promise
from turboserve.orchestrator.plan import Action, Suspend
from turboserve.orchestrator.view import GONE, HELD, NOWHERE, ClusterView, Floats, Ints

RESERVE_PART = 5  # one in so many places is kept free of tenants over their share: who is within never waits


def reserve(room: int) -> int:
    """Places of `room` kept free of tenants over their share."""
    return max(1, room // RESERVE_PART)


def shares(asked: Floats, weights: Floats, room: float) -> Floats:
    """Max-min fair shares of `room` by weight; the sum is min(room, sum of asked)."""
    given = np.zeros(len(asked))
    open_ = asked > 0
    left = room
    while open_.any() and left > 1e-9:
        each = left / weights[open_].sum()
        done = open_ & (asked - given <= each * weights + 1e-9)
        if not done.any():
            given[open_] += each * weights[open_]
            break
        left -= float((asked[done] - given[done]).sum())
        given[done] = asked[done]
        open_ &= ~done
    return given


def tenant_counts(view: ClusterView) -> tuple[Ints, Ints]:
    """(active, placed and active) sessions of each tenant."""
    s = view.sessions
    n = s.count
    tenants = len(view.tenant_weights)
    active = s.active[:n] & (s.state[:n] != GONE)
    placed = active & ((s.worker[:n] != NOWHERE) | (s.target[:n] != NOWHERE))
    return (
        np.bincount(s.tenant[:n][active], minlength=tenants),
        np.bincount(s.tenant[:n][placed], minlength=tenants),
    )


def order(view: ClusterView, waiting: Ints, room: int) -> tuple[list[int], Floats, Ints]:
    """The waiting sessions in fair order, the tenants' shares, and how many of each are placed.

    The tenant furthest below its share by weight comes first, within a tenant who waits longest.
    """
    s = view.sessions
    active, placed = tenant_counts(view)
    waiting = waiting[np.lexsort((waiting, s.active_since_s[waiting]))]
    share = shares(active.astype(np.float64), np.array(view.tenant_weights), float(room))
    left = {t: waiting[s.tenant[waiting] == t].tolist()[::-1] for t in range(len(share))}
    counted = [float(x) for x in placed]
    wanted = [max(float(x), 1e-9) for x in share]
    ordered: list[int] = []
    while any(left.values()):
        first = min((counted[t] / wanted[t], t) for t in left if left[t])[1]
        ordered.append(left[first].pop())
        counted[first] += 1.0
    return ordered, share, placed


def enforce(view: ClusterView, sv: Survey, room: int) -> list[Action]:
    """While more is placed than `room`, tenants over their share give sessions up, one a worker at a time.

    `room` leaves some places out, so that a tenant within its share never waits for somebody to go first. Of the tenant
    furthest over, the youngest session on the fullest worker goes, one between two chunks before others.
    """
    active, placed = tenant_counts(view)
    total = int(placed.sum())
    if total <= room:
        return []
    share = np.ceil(shares(active.astype(np.float64), np.array(view.tenant_weights), float(room)) - 1e-9)
    s = view.sessions
    n = s.count
    actions: list[Action] = []
    while total > room:
        over = placed - share
        tenant = int(np.argmax(over))
        if over[tenant] <= 0:
            break
        rows = np.flatnonzero((s.state[:n] == HELD) & s.active[:n] & (s.tenant[:n] == tenant))
        rows = rows[~sv.outbound[s.worker[rows]]]
        if rows.size == 0:
            break
        order = np.lexsort((rows, -s.active_since_s[rows], s.in_chunk[rows], -sv.active_on[s.worker[rows]]))
        row = int(rows[order[0]])
        worker = int(s.worker[row])
        actions.append(Suspend(s.ids[row], view.workers.ids[worker], "over its tenant's share"))
        promise(sv, view, row, worker, NOWHERE)
        placed[tenant] -= 1
        total -= 1
    return actions
