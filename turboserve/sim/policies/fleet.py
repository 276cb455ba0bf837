"""What the scaling baselines share: placement on the lightest worker, offload when idle, growing and
shrinking a fleet.

They all get the serving base that the paper gives its own baselines: idle sessions go to host memory at
once and come back wherever there is most room (a resume is a free re-placement), drained workers hand their
sessions over instead of waiting for them to end, and a drain is taken back before a new worker is asked
for. So they differ in the rule that this project wants to compare: when to scale, and whether to move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from turboserve.orchestrator.plan import (
    Action,
    AddWorker,
    DrainWorker,
    Migrate,
    Place,
    Plan,
    ReleaseWorker,
    Resume,
    Suspend,
    UndrainWorker,
)
from turboserve.orchestrator.view import (
    DRAINING,
    HELD,
    HOST,
    MIGRATING,
    NEW,
    READY,
    RESUMING,
    STARTING,
    ClusterView,
    Ints,
)


class Book:
    """A plan being written: actions so far, and the counts as they will be once these are carried out."""

    def __init__(self, view: ClusterView) -> None:
        s, w = view.sessions, view.workers
        n, m = s.count, w.count
        self.view = view
        self.actions: list[Action] = []
        self.state = s.state[:n]
        self.active = s.active[:n]
        self.worker = s.worker[:n]
        self.fleet_state = w.state[:m].copy()
        target = s.target[:n]
        held = self.worker[self.worker >= 0]
        coming = target[(self.state == MIGRATING) | (self.state == RESUMING)]
        where = np.where(target >= 0, target, self.worker)
        self.held = np.bincount(held, minlength=m) + np.bincount(coming, minlength=m)
        self.load = np.bincount(where[(where >= 0) & self.active], minlength=m)
        self.inbound = w.inbound[:m].copy()
        self.outbound = w.outbound[:m].copy()
        self.moved: set[int] = set()

    @property
    def active_sessions(self) -> int:
        """Sessions inside an active period, those that wait for a place among them."""
        return int(np.count_nonzero(self.active))

    @property
    def size(self) -> int:
        """Workers that take sessions or soon will: ready and starting ones."""
        return int(np.count_nonzero((self.fleet_state == READY) | (self.fleet_state == STARTING)))

    def ready(self) -> Ints:
        return np.flatnonzero(self.fleet_state == READY)

    def lightest(self, rows: Ints) -> int:
        """The row with the fewest active sessions; then fewest held, then the lowest row."""
        return int(rows[np.lexsort((rows, self.held[rows], self.load[rows]))[0]])

    # Sessions.

    def place_waiting(self) -> None:
        """Every active session that is on no worker to the lightest one with room, longest waiting first."""
        rows = np.flatnonzero(self.active & ((self.state == NEW) | (self.state == HOST)))
        if rows.size == 0:
            return
        since = self.view.sessions.active_since_s[rows]
        for row in rows[np.lexsort((rows, since))].tolist():
            ready = self.ready()
            room = ready[self.held[ready] < self.view.profile.resident_max]
            fresh = self.state[row] == NEW
            # A resume needs the worker's one inbound lane; waiting for it (0.1 s) beats an overfull worker.
            lanes = room if fresh else room[~self.inbound[room]]
            if lanes.size == 0:
                continue
            chosen = self.lightest(lanes)
            full = self.view.profile.capacity
            if self.load[chosen] >= full and self.load[room].min() < full:
                continue
            self.put(row, chosen, fresh=fresh)

    def put(self, row: int, worker: int, *, fresh: bool) -> None:
        session, name = self.view.sessions.ids[row], self.view.workers.ids[worker]
        reason = f"lightest: {int(self.load[worker])} active"
        self.actions.append(Place(session, name, reason) if fresh else Resume(session, name, reason))
        if not fresh:
            self.inbound[worker] = True
        self.held[worker] += 1
        self.load[worker] += 1
        self.moved.add(row)

    def can_move(self, source: int, target: int) -> bool:
        return bool(
            source != target
            and not self.outbound[source]
            and not self.inbound[target]
            and self.held[target] < self.view.profile.resident_max
        )

    def migrate(self, row: int, target: int, reason: str) -> None:
        source = int(self.worker[row])
        ids = self.view.workers.ids
        self.actions.append(Migrate(self.view.sessions.ids[row], ids[source], ids[target], reason))
        self.outbound[source] = self.inbound[target] = True
        self.held[target] += 1
        self.load[source] -= 1
        self.load[target] += 1
        self.moved.add(row)

    def movable(self, worker: int) -> Ints:
        """Active sessions on a worker that are in no transfer, those that moved longest ago first."""
        rows = np.flatnonzero((self.worker == worker) & (self.state == HELD) & self.active)
        rows = np.array([r for r in rows.tolist() if r not in self.moved], np.int64)
        return rows[np.lexsort((rows, self.view.sessions.moved_s[rows]))] if rows.size else rows

    def offload_idle(self) -> None:
        """Idle sessions to host memory, one at a time from each worker."""
        for row in np.flatnonzero(~self.active & (self.state == HELD)).tolist():
            worker = int(self.worker[row])
            if not self.outbound[worker] and row not in self.moved:
                self.outbound[worker] = True
                self.actions.append(Suspend(self.view.sessions.ids[row], self.view.workers.ids[worker], "idle"))

    def level(self, *, most_moves: int, gap: int = 2) -> None:
        """Move sessions from the fullest to the emptiest worker while their loads differ by `gap` or more.

        For equal sessions this reaches the least possible maximum with the fewest moves.
        """
        for _ in range(most_moves):
            ready = self.ready()
            load = self.load[ready]
            if ready.size < 2 or load.max() - load.min() < gap:
                return
            senders = ready[~self.outbound[ready]]
            takers = ready[~self.inbound[ready] & (self.held[ready] < self.view.profile.resident_max)]
            if senders.size == 0 or takers.size == 0:
                return
            source = int(senders[np.lexsort((senders, -self.load[senders]))[0]])
            target = self.lightest(takers)
            if self.load[source] - self.load[target] < gap or not self.can_move(source, target):
                return
            rows = self.movable(source)
            if rows.size == 0:
                return
            self.migrate(int(rows[0]), target, f"levels {int(self.load[source])} and {int(self.load[target])}")

    # Workers, in whole provisioning units.

    def resize(self, wanted: int, reason: str) -> None:
        """Bring the number of ready and starting workers to `wanted` (rounded up to units), as far as may
        be."""
        unit = self.view.profile.provision_unit_workers
        wanted = max(unit, math.ceil(wanted / unit) * unit)
        for mates in self._units(DRAINING, fullest_first=True):
            if self.size + len(mates) > wanted:
                break
            for row in mates:
                self.fleet_state[row] = READY
                self.actions.append(UndrainWorker(self.view.workers.ids[row], reason))
        if wanted > self.size:
            missing = min(wanted - self.size, self.view.workers_max - self._present())
            if missing >= unit:
                self.actions.append(AddWorker(missing // unit * unit, reason))
            return
        for mates in self._units(STARTING, fullest_first=False):
            if self.size - len(mates) < wanted:
                return
            for row in mates:
                self.fleet_state[row] = 0
                self.actions.append(ReleaseWorker(self.view.workers.ids[row], reason))
        for mates in self._units(READY, fullest_first=False):
            if self.size - len(mates) < wanted:
                return
            for row in mates:
                self.fleet_state[row] = DRAINING
                self.actions.append(DrainWorker(self.view.workers.ids[row], reason))

    def _present(self) -> int:
        return int(np.count_nonzero(self.fleet_state))

    def _units(self, state: int, *, fullest_first: bool) -> Iterable[list[int]]:
        """Provisioning units that are wholly in `state`, by active sessions, then youngest first."""
        w = self.view.workers
        units: dict[int, list[int]] = {}
        for row in np.flatnonzero(self.fleet_state).tolist():
            units.setdefault(int(w.unit[row]), []).append(row)
        whole = [rows for rows in units.values() if all(self.fleet_state[row] == state for row in rows)]
        sign = -1 if fullest_first else 1
        return sorted(whole, key=lambda rows: (sign * int(self.load[rows].sum()), -w.request_s[rows[0]], -rows[0]))

    def evacuate(self) -> None:
        """Drained workers hand over what they hold: active sessions move, idle ones go to host memory."""
        for source in np.flatnonzero(self.fleet_state == DRAINING).tolist():
            if self.outbound[source]:
                continue
            rows = self.movable(source)
            ready = self.ready()
            takers = ready[~self.inbound[ready] & (self.held[ready] < self.view.profile.resident_max)]
            if rows.size and takers.size:
                self.migrate(int(rows[0]), self.lightest(takers), "its worker drains")

    def release_empty(self) -> None:
        """Units that are drained and empty go back."""
        if not np.any(self.fleet_state == DRAINING):
            return
        for mates in self._units(DRAINING, fullest_first=False):
            if not any(self.held[row] or self.inbound[row] or self.outbound[row] for row in mates):
                self.actions += [ReleaseWorker(self.view.workers.ids[row], "drained") for row in mates]


class FleetPolicy:
    """The frame of a scaling baseline: `wanted` says how many workers, `rebalance` which sessions move."""

    name = "fleet"
    scales = True
    tuning: tuple[dict[str, float], ...] = ()
    """Knob settings that the tuning command tries."""

    def __init__(self, *, scaling: bool = True) -> None:
        self.scaling = scaling
        """False: the fleet is fixed (`--workers N`); placement and moves go on."""

    def wanted(self, book: Book, now_s: float) -> tuple[int, str] | None:
        """(workers, reason) where the rule has something to say at this moment, else None."""
        return None

    def rebalance(self, book: Book, now_s: float) -> None:
        """Moves between workers; most baselines make none."""

    def wake_at_s(self, now_s: float) -> float | None:
        """When the rule wants to be asked next even if nothing happens."""
        return None

    def decide(self, view: ClusterView, now_s: float) -> Plan:
        book = Book(view)
        if self.scaling:
            answer = self.wanted(book, now_s)
            if answer is not None:
                book.resize(*answer)
        book.place_waiting()
        self.rebalance(book, now_s)
        book.evacuate()
        book.offload_idle()
        book.release_empty()
        return Plan(tuple(book.actions), self.wake_at_s(now_s) if self.scaling else None)
