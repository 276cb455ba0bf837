"""The simulated fleet: workers are asked for, become ready, drain and go; who pays from when to when.

Mechanism only, like `cluster`, which carries out what concerns sessions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from turboserve.orchestrator.latency import LatencyProfile
from turboserve.orchestrator.plan import AddWorker, DrainWorker, ReleaseWorker, UndrainWorker
from turboserve.orchestrator.view import ABSENT, DRAINING, READY, STARTING, ClusterView, add_worker
from turboserve.sim.batches import Batches
from turboserve.sim.events import US, WORKER_READY, Timers, up_us
from turboserve.sim.run_log import Bill, Log


class SimFleet:
    """Workers of one run: rows of the view's worker columns, with what each holds."""

    def __init__(
        self,
        view: ClusterView,
        batches: Batches,
        profile: LatencyProfile,
        provision_us: int,
        timers: Timers,
        log: Log,
    ) -> None:
        self.view, self.batches, self.profile, self.timers, self.log = view, batches, profile, timers, log
        self.provision_us = provision_us
        self.row_of: dict[str, int] = {}  # present workers
        self.number_of: dict[int, int] = {}  # row -> number in log.worker_names, for the chunk rows
        self.held = np.zeros(view.workers.capacity, np.int64)
        self.active_on = np.zeros(view.workers.capacity, np.int64)  # active sessions that a worker runs
        self.billed = 0
        self.ready = 0
        self.changed = False  # something a policy should see at this same instant
        self._free_rows: list[int] = []
        self._bill_of: dict[str, Bill] = {}

    def takes(self, row: int) -> bool:
        """Whether the worker can hold one more session."""
        return bool(self.view.workers.state[row] == READY and self.held[row] < self.profile.resident_max)

    def start_worker(self, now_us: int, *, unit: int | None, node: int, reason: str, ready: bool = False) -> int:
        """Ask for one worker; `ready` ones are there at once (a fixed fleet, the initial workers)."""
        name = f"w{len(self.log.worker_names):05d}"
        self.log.worker_names.append(name)
        row = self._free_rows.pop() if self._free_rows else None
        ready_us = now_us if ready else now_us + self.provision_us
        row = add_worker(
            self.view,
            name,
            state=STARTING,
            request_s=now_us / US,
            ready_at_s=ready_us / US,
            node=node,
            unit=unit,
            row=row,
        )
        self.batches.grow()
        self.held = _fit(self.held, self.view.workers.capacity)
        self.active_on = _fit(self.active_on, self.view.workers.capacity)
        self.held[row] = self.active_on[row] = 0
        self.row_of[name] = row
        self.number_of[row] = len(self.log.worker_names) - 1
        bill = Bill(name, now_us)
        self.log.bills.append(bill)
        self._bill_of[name] = bill
        self.billed += 1
        self.log.decide(now_us, "worker_request", reason, worker=name)
        if ready:
            self.worker_ready(row, name, now_us)
        else:
            self.timers.add(ready_us, WORKER_READY, (row, name))
        return row

    def worker_ready(self, row: int, name: str, now_us: int) -> bool:
        if self.row_of.get(name) != row or self.view.workers.state[row] != STARTING:
            return False
        self.view.workers.state[row] = READY
        self.batches.add_worker(row, self.number_of[row])
        self.ready += 1
        self.log.decide(now_us, "worker_ready", "provisioned", worker=name)
        return True

    def add(self, a: AddWorker, now_us: int) -> bool:
        size = self.profile.provision_unit_workers
        units = -(-a.count // size)
        units = min(units, (self.view.workers_max - self.billed) // size)
        for _ in range(units):
            unit = node = len(self.log.worker_names)
            for _ in range(size):
                self.start_worker(now_us, unit=unit, node=node, reason=a.reason)
            self.changed |= self.provision_us == 0
        return units > 0

    def drain(self, a: DrainWorker, now_us: int) -> bool:
        row = self.row_of.get(a.worker)
        if row is None or self.view.workers.state[row] != READY:
            return False
        self.view.workers.state[row] = DRAINING
        self.ready -= 1
        self.log.decide(now_us, "drain", a.reason, worker=a.worker)
        return True

    def undrain(self, a: UndrainWorker, now_us: int) -> bool:
        row = self.row_of.get(a.worker)
        if row is None or self.view.workers.state[row] != DRAINING:
            return False
        self.view.workers.state[row] = READY
        self.ready += 1
        self.log.decide(now_us, "drain", a.reason, worker=a.worker, undo=True)
        return True

    def release(self, actions: list[ReleaseWorker], now_us: int) -> None:
        """Empty workers go; of a provisioning unit all that are left or none."""
        w = self.view.workers
        going = {self.row_of[a.worker]: a for a in actions if a.worker in self.row_of}
        blocked = {r for r in going if self.held[r] or w.inbound[r] or w.outbound[r]}
        end_us = now_us + up_us(self.profile.release_s)
        present = w.state[: w.count] != ABSENT
        mates_of = {row: np.flatnonzero((w.unit[: w.count] == w.unit[row]) & present).tolist() for row in going}
        for row, action in going.items():
            if any(m not in going or m in blocked for m in mates_of[row]):
                self.log.drop(action)
                continue
            self.end_worker(row, end_us)
            self.log.decide(end_us, "worker_release", action.reason, worker=action.worker)

    def end_worker(self, row: int, end_us: int) -> None:
        w = self.view.workers
        name = w.ids[row]
        if w.state[row] != STARTING:
            self.batches.remove_worker(row)
        if w.state[row] == READY:
            self.ready -= 1
        w.state[row] = ABSENT
        w.inbound[row] = w.outbound[row] = False
        del self.row_of[name]
        self._bill_of.pop(name).release_us = end_us
        self.billed -= 1
        self._free_rows.append(row)


def _fit(array: Any, n: int) -> Any:
    return array if array.size >= n else np.concatenate([array, np.zeros(n - array.size, array.dtype)])
