"""What a policy is to the simulator, and what most policies share.

A policy is asked once per instant that had an arrival, an activity change, a worker or a transfer event,
and at the time it asked to be woken; never per batch. It reads the view (columns of `orchestrator.view`;
read-only) and answers with a plan in the vocabulary of `orchestrator.plan`. It may keep what it likes on
itself; equal views in equal order must give equal plans (a seeded generator is fine, a clock is not).

What the simulator does for everybody: transfers wait for the chunk in work to end, then take the profile's
time; a session counts as held at both ends meanwhile; a worker has at most one inbound and one outbound
transfer (a plan that breaks this has the action dropped; the policy is asked again when the transfer ends);
a session that has an active period but no worker simply waits (its chunks are released on time and late
when they finish). Batches are formed by `orchestrator.batching` the same way for every policy.

A minimal policy is `StaticLeast` below: at arrival to the worker with the fewest open sessions, for life.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from turboserve.orchestrator.plan import Action, Place, Plan, Queue, Resume, Suspend
from turboserve.orchestrator.view import GONE, HELD, HOST, MIGRATING, NEW, READY, RESUMING, ClusterView, Ints


class Policy(Protocol):
    """Decides; carries nothing out."""

    name: str
    scales: bool  # False: needs a fixed fleet (`--workers N`)

    def decide(self, view: ClusterView, now_s: float) -> Plan: ...


def held_counts(view: ClusterView) -> Ints:
    """Sessions each worker row holds: active, idle, and both ends of a transfer."""
    s = view.sessions
    state = s.state[: s.count]
    held = np.bincount(s.worker[: s.count][s.worker[: s.count] >= 0], minlength=view.workers.count)
    coming = s.target[: s.count][(state == MIGRATING) | (state == RESUMING)]
    return held + np.bincount(coming, minlength=view.workers.count)


def active_counts(view: ClusterView) -> Ints:
    """Active sessions on each worker row, counted where they are or go to."""
    s = view.sessions
    where = np.where(s.target[: s.count] >= 0, s.target[: s.count], s.worker[: s.count])
    return np.bincount(where[(where >= 0) & s.active[: s.count]], minlength=view.workers.count)


def ready_rows(view: ClusterView) -> Ints:
    """Rows of the workers that take sessions, in order."""
    return np.flatnonzero(view.workers.state[: view.workers.count] == READY)


def waiting_rows(view: ClusterView) -> Ints:
    """Rows of the active sessions that are on no worker (new, or in host memory), longest waiting first."""
    s = view.sessions
    state = s.state[: s.count]
    rows = np.flatnonzero(s.active[: s.count] & ((state == NEW) | (state == HOST)))
    return rows[np.lexsort((rows, s.active_since_s[rows]))]


def least_valuable_idle(view: ClusterView, worker: int) -> int | None:
    """The session on `worker` that has been idle longest; None when all it holds are active or in
    transfer."""
    s = view.sessions
    rows = np.flatnonzero((s.worker[: s.count] == worker) & (s.state[: s.count] == HELD) & ~s.active[: s.count])
    if rows.size == 0:
        return None
    return int(rows[np.lexsort((rows, s.idle_since_s[rows]))[0]])


class HomePlacer:
    """Places sessions on a home worker for life; suspends the longest idle one where memory is full.

    Static policies differ only in `home_of`. When its home is lost a session gets a new one.
    """

    def __init__(self) -> None:
        self._home: dict[str, str] = {}
        self._home_row = np.full(1024, -1, np.int64)  # session row -> worker row of its home
        self._queued: set[str] = set()

    def homes_open(self, view: ClusterView) -> Ints:
        """Open sessions that call each worker row their home."""
        s = view.sessions
        rows = self._home_row[: s.count]
        return np.bincount(rows[(rows >= 0) & (s.state[: s.count] != GONE)], minlength=view.workers.count)

    def home_of(self, view: ClusterView, row: int, ready: Ints) -> int:
        """Worker row for a session that has none yet."""
        raise NotImplementedError

    def decide(self, view: ClusterView, now_s: float) -> Plan:
        actions: list[Action] = []
        s, w = view.sessions, view.workers
        waiting = waiting_rows(view)
        if waiting.size == 0:
            return Plan()
        if self._home_row.size < s.capacity:
            self._home_row = np.concatenate([self._home_row, np.full(s.capacity - self._home_row.size, -1, np.int64)])
        for row in waiting:
            if s.state[row] == NEW and s.ids[row] not in self._home:
                self._home_row[row] = -1  # the row's last tenant may have left its home here
        ready = ready_rows(view)
        row_of = {w.ids[int(r)]: int(r) for r in ready}
        held = held_counts(view)
        inbound, outbound = w.inbound.copy(), w.outbound.copy()
        for row in waiting:
            session = s.ids[row]
            home = self._home.get(session)
            if home not in row_of:
                if ready.size == 0:
                    continue
                chosen = self.home_of(view, int(row), ready)
                home = w.ids[chosen]
                self._home[session] = home
                self._home_row[row] = chosen
            worker = row_of[home]
            if held[worker] >= view.profile.resident_max:
                idle = least_valuable_idle(view, worker)
                if idle is not None and not outbound[worker]:
                    outbound[worker] = True
                    actions.append(Suspend(s.ids[idle], home, "memory full; idle longest"))
                if session not in self._queued:
                    self._queued.add(session)
                    actions.append(Queue(session, f"{home} is full"))
                continue
            if s.state[row] == NEW:
                actions.append(Place(session, home, f"home {home}"))
            elif not inbound[worker]:
                inbound[worker] = True
                actions.append(Resume(session, home, f"home {home}"))
            else:
                continue
            held[worker] += 1
            self._queued.discard(session)
        return Plan(tuple(actions))


class StaticLeast(HomePlacer):
    """Fixed fleet; at arrival to the worker with the fewest open sessions, sticky for life."""

    name = "static-least"
    scales = False

    def home_of(self, view: ClusterView, row: int, ready: Ints) -> int:
        homes = self.homes_open(view)
        return int(ready[np.lexsort((ready, homes[ready]))[0]])
