"""The simulated cluster: keeps the view that policies read, and carries out their plans.

Mechanism only. Who sits where, what a transfer costs, when a worker is ready and what it is billed for is decided
here from the latency profile; why anything happens is the policy's business and goes to the decision log. An action
that does not fit what is (a full worker, a second inbound transfer, a session that just closed) is dropped and counted,
never bent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from turboserve.orchestrator.latency import LatencyProfile
from turboserve.orchestrator.plan import (
    AddWorker,
    DrainWorker,
    Migrate,
    Place,
    Plan,
    Queue,
    ReleaseWorker,
    Resume,
    SetSteps,
    Shed,
    Suspend,
    UndrainWorker,
)
from turboserve.orchestrator.view import (
    ABSENT,
    DRAINING,
    GONE,
    HELD,
    HOST,
    MIGRATING,
    NEW,
    NOWHERE,
    READY,
    RESUMING,
    STARTING,
    SUSPENDING,
    ClusterView,
    add_session,
    add_worker,
)
from turboserve.sim.batches import DONE, HOLD, INDEX, PASSES, PERIOD, RUNNING, WORKER, Batches
from turboserve.sim.events import TRANSFER_END, US, WORKER_READY, Timers, up_us


@dataclass(slots=True)
class Bill:
    """One worker's time, from its request to its release."""

    worker: str
    request_us: int
    release_us: int | None = None


@dataclass(frozen=True, slots=True)
class ShedChunk:
    """A chunk given up: when it was, and when it was (or would have been) released."""

    session: str
    index: int
    period: int
    time_us: int
    reason: str
    release_us: int


@dataclass(slots=True)
class Log:
    """What happened, for the files of the run."""

    decisions: list[dict[str, Any]] = field(default_factory=list)
    shed: list[ShedChunk] = field(default_factory=list)
    bills: list[Bill] = field(default_factory=list)
    worker_names: list[str] = field(default_factory=list)
    dropped_actions: dict[str, int] = field(default_factory=dict)

    def decide(self, now_us: int, event: str, reason: str, **who: Any) -> None:
        self.decisions.append({"time_s": now_us / US, "event": event, **who, "reason": reason})


class SimCluster:
    """Sessions and workers of one run. `view` is what policies see; `batches` what the compiled part runs on."""

    def __init__(
        self, view: ClusterView, batches: Batches, profile: LatencyProfile, provision_us: int, timers: Timers
    ) -> None:
        self.view, self.batches, self.profile, self.timers = view, batches, profile, timers
        self.provision_us = provision_us
        self.log = Log()
        self.row_of: dict[str, int] = {}  # open sessions
        self.worker_row: dict[str, int] = {}  # present workers
        self.number_of: dict[int, int] = {}  # worker row -> number in log.worker_names, for the chunk rows
        self.held = np.zeros(view.workers.capacity, np.int64)
        self.active_on = np.zeros(view.workers.capacity, np.int64)  # active sessions that a worker runs
        self.active = 0
        self.billed = 0
        self.ready = 0
        self._free_sessions: list[int] = []
        self._free_workers: list[int] = []
        self._bill_of: dict[str, Bill] = {}
        self._leaving: set[int] = set()  # rows whose session departed during a transfer
        self._migrate_us = up_us(profile.migrate_s)
        self._migrate_far_us = up_us(profile.migrate_cross_node_s or profile.migrate_s)
        self._suspend_us, self._resume_us = up_us(profile.offload_s), up_us(profile.resume_s)
        self._reasons: dict[int, str] = {}  # of transfers that wait for a chunk to end
        self.ended_by_shedding: list[int] = []  # periods without a chunk left, for the replay to end
        self._changed = False

    # Sessions come, go, and turn active and idle.

    def open_session(self, session: str, trace_id: int, tenant: int, now_us: int) -> None:
        row = self._free_sessions.pop() if self._free_sessions else None
        row = add_session(self.view, session, now_s=now_us / US, tenant=tenant, row=row)
        self.batches.grow()
        self.batches.add_session(row, trace_id)
        self.row_of[session] = row

    def begin_period(self, row: int, active_us: int, chunks: int, now_us: int) -> None:
        s = self.view.sessions
        s.active[row] = True
        s.active_since_s[row] = active_us / US
        self.active += 1
        if s.worker[row] >= 0:
            self.active_on[s.worker[row]] += 1
        self.view.observed.periods_started += 1
        self.batches.begin_period(row, active_us, chunks, now_us)

    def end_period(self, row: int, now_us: int) -> None:
        s, observed = self.view.sessions, self.view.observed
        s.active[row] = False
        s.idle_since_s[row] = now_us / US
        self.active -= 1
        if s.worker[row] >= 0:
            self.active_on[s.worker[row]] -= 1
        observed.periods_ended += 1
        observed.period_seconds += now_us / US - s.active_since_s[row]

    def close_session(self, row: int) -> None:
        """The session leaves; a transfer in the middle of which it left is finished first."""
        s = self.view.sessions
        if s.state[row] in (MIGRATING, SUSPENDING, RESUMING):
            self._leaving.add(row)
            return
        if s.state[row] == HELD:
            self.batches.detach(row)
            self.held[s.worker[row]] -= 1
        s.state[row] = GONE
        s.worker[row] = s.target[row] = NOWHERE
        del self.row_of[s.ids[row]]
        self._free_sessions.append(row)

    # Plans.

    def apply(self, plan: Plan, now_s: float) -> bool:
        """Carry out `plan`; True when something changed that the policy should see at this same instant."""
        now_us = round(now_s * US)
        self._changed = False
        releases: list[ReleaseWorker] = []
        for action in plan.actions:
            if isinstance(action, ReleaseWorker):
                releases.append(action)
                continue
            if not self._HANDLERS[type(action)](self, action, now_us):
                self._drop(action)
        self._release(releases, now_us)
        return self._changed

    def _place(self, a: Place, now_us: int) -> bool:
        row, worker = self.row_of.get(a.session), self.worker_row.get(a.worker)
        s = self.view.sessions
        if row is None or worker is None or s.state[row] != NEW or not self._takes(worker):
            return False
        s.state[row] = HELD
        self._arrive(row, worker, now_us)
        self.held[worker] += 1
        self.log.decide(now_us, "place", a.reason, worker=a.worker, session=a.session)
        return True

    def _migrate(self, a: Migrate, now_us: int) -> bool:
        row, target = self.row_of.get(a.session), self.worker_row.get(a.worker)
        s, w = self.view.sessions, self.view.workers
        if row is None or target is None or s.state[row] != HELD or row in self._leaving:
            return False
        source = int(s.worker[row])
        if (
            w.ids[source] != a.source
            or source == target
            or w.outbound[source]
            or w.inbound[target]
            or not self._takes(target)
        ):
            return False
        s.state[row] = MIGRATING
        s.target[row] = target
        w.outbound[source] = w.inbound[target] = True
        self.held[target] += 1
        self._begin_transfer(row, a.reason, now_us)
        return True

    def _suspend(self, a: Suspend, now_us: int) -> bool:
        row = self.row_of.get(a.session)
        s, w = self.view.sessions, self.view.workers
        if row is None or s.state[row] != HELD or w.ids[int(s.worker[row])] != a.worker or w.outbound[s.worker[row]]:
            return False
        s.state[row] = SUSPENDING
        w.outbound[s.worker[row]] = True
        self._begin_transfer(row, a.reason, now_us)
        return True

    def _resume(self, a: Resume, now_us: int) -> bool:
        row, target = self.row_of.get(a.session), self.worker_row.get(a.worker)
        s, w = self.view.sessions, self.view.workers
        if row is None or target is None or s.state[row] != HOST or w.inbound[target] or not self._takes(target):
            return False
        s.state[row] = RESUMING
        s.target[row] = target
        w.inbound[target] = True
        self.held[target] += 1
        self._begin_transfer(row, a.reason, now_us)
        return True

    def _takes(self, worker: int) -> bool:
        return bool(self.view.workers.state[worker] == READY and self.held[worker] < self.profile.resident_max)

    def _begin_transfer(self, row: int, reason: str, now_us: int) -> None:
        """At once, or when the chunk in work ends (`chunk_over`)."""
        s = self.view.sessions
        self._reasons[row] = reason
        if s.worker[row] >= 0:
            self.batches.session[row, HOLD] = 1
            if self.batches.session[row, RUNNING] or self.batches.session[row, PASSES]:
                s.transfer_end_s[row] = np.inf
                return
        self._run_transfer(row, now_us)

    def _run_transfer(self, row: int, now_us: int) -> None:
        s, w = self.view.sessions, self.view.workers
        state, source, target = int(s.state[row]), int(s.worker[row]), int(s.target[row])
        reason = self._reasons.pop(row)
        session = s.ids[row]
        if state == MIGRATING:
            end = now_us + (
                self._migrate_us if w.node[source] == w.node[target] or self._one_node() else self._migrate_far_us
            )
            self.log.decide(
                now_us, "migrate", reason, worker=w.ids[target], session=session, source=w.ids[source], end_s=end / US
            )
        elif state == SUSPENDING:
            end = now_us + self._suspend_us
            self.log.decide(now_us, "suspend", reason, worker=w.ids[source], session=session, end_s=end / US)
        else:
            end = now_us + self._resume_us
            self.log.decide(now_us, "resume", reason, worker=w.ids[target], session=session, end_s=end / US)
        if self.batches.session[row, WORKER] >= 0:
            self.batches.detach(row)  # runs nowhere meanwhile; the view still shows where it is held
        s.transfer_end_s[row] = end / US
        self.timers.add(end, TRANSFER_END, (row, session, end))

    def _one_node(self) -> bool:
        """With units of one worker the profile says nothing of nodes; every move takes migrate_s."""
        return self.profile.provision_unit_workers == 1

    def chunk_over(self, row: int, now_us: int) -> None:
        """The chunk that a transfer waited for has ended."""
        s = self.view.sessions
        if s.state[row] in (MIGRATING, SUSPENDING) and s.transfer_end_s[row] == np.inf:
            self._run_transfer(row, now_us)

    def end_transfer(self, row: int, session: str, end_us: int) -> bool:
        """The transfer that was to end now has ended; False if it was cut short by a lost worker."""
        s, w = self.view.sessions, self.view.workers
        if self.row_of.get(session) != row or s.transfer_end_s[row] != end_us / US:
            return False
        state, source, target = int(s.state[row]), int(s.worker[row]), int(s.target[row])
        s.transfer_end_s[row] = 0.0
        s.moved_s[row] = end_us / US
        s.target[row] = NOWHERE
        if state in (MIGRATING, SUSPENDING):
            w.outbound[source] = False
            self.held[source] -= 1
            self.active_on[source] -= int(s.active[row])
            s.worker[row] = NOWHERE
        if state in (MIGRATING, RESUMING):
            w.inbound[target] = False
            s.state[row] = HELD
            self._arrive(row, target, end_us)
        else:
            s.state[row] = HOST
        self.batches.session[row, HOLD] = 0
        if row in self._leaving:
            self._leaving.discard(row)
            self.close_session(row)
        return True

    def _arrive(self, row: int, worker: int, now_us: int) -> None:
        s = self.view.sessions
        s.worker[row] = worker
        if s.active[row]:
            self.active_on[worker] += 1
        self.batches.attach(row, worker, now_us)

    def _set_steps(self, a: SetSteps, now_us: int) -> bool:
        row = self.row_of.get(a.session)
        s = self.view.sessions
        if row is None or self.view.steps_floor is None or not self.view.steps_floor <= a.steps <= s.steps_full[row]:
            return False
        s.steps[row] = a.steps
        self.log.decide(now_us, "set_steps", a.reason, session=a.session, steps=a.steps)
        return True

    def _queue(self, a: Queue, now_us: int) -> bool:
        if a.session not in self.row_of:
            return False
        self.log.decide(now_us, "queue", a.reason, session=a.session)
        return True

    def _shed(self, a: Shed, now_us: int) -> bool:
        row = self.row_of.get(a.session)
        s = self.view.sessions
        if row is None or not s.active[row] or self.batches.session[row, RUNNING]:
            return False
        k = self.batches.session[row]
        first, period = int(k[INDEX]), int(k[PERIOD])
        done = int(k[DONE])
        dropped = self.batches.drop_chunks(row, a.chunks if a.chunks is not None else 1 << 40, now_us)
        for i in range(dropped):
            release_us = self.batches.release_of(row, done + i)
            self.log.shed.append(ShedChunk(a.session, first + i, period, now_us, a.reason, release_us))
        if s.next_deadline_s[row] == np.inf:
            self.ended_by_shedding.append(row)
        return True

    # Workers.

    def start_worker(self, now_us: int, *, unit: int | None, node: int, reason: str, ready: bool = False) -> int:
        """Ask for one worker; `ready` ones are there at once (a fixed fleet, the initial workers)."""
        name = f"w{len(self.log.worker_names):05d}"
        self.log.worker_names.append(name)
        row = self._free_workers.pop() if self._free_workers else None
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
        self.worker_row[name] = row
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
        if self.worker_row.get(name) != row or self.view.workers.state[row] != STARTING:
            return False
        self.view.workers.state[row] = READY
        self.batches.add_worker(row, self.number_of[row])
        self.ready += 1
        self.log.decide(now_us, "worker_ready", "provisioned", worker=name)
        return True

    def _add(self, a: AddWorker, now_us: int) -> bool:
        size = self.profile.provision_unit_workers
        units = -(-a.count // size)
        units = min(units, (self.view.workers_max - self.billed) // size)
        for _ in range(units):
            unit = node = len(self.log.worker_names)
            for _ in range(size):
                self.start_worker(now_us, unit=unit, node=node, reason=a.reason)
            self._changed |= self.provision_us == 0
        return units > 0

    def _drain(self, a: DrainWorker, now_us: int) -> bool:
        row = self.worker_row.get(a.worker)
        if row is None or self.view.workers.state[row] != READY:
            return False
        self.view.workers.state[row] = DRAINING
        self.ready -= 1
        self.log.decide(now_us, "drain", a.reason, worker=a.worker)
        return True

    def _undrain(self, a: UndrainWorker, now_us: int) -> bool:
        row = self.worker_row.get(a.worker)
        if row is None or self.view.workers.state[row] != DRAINING:
            return False
        self.view.workers.state[row] = READY
        self.ready += 1
        self.log.decide(now_us, "drain", a.reason, worker=a.worker, undo=True)
        return True

    def _release(self, actions: list[ReleaseWorker], now_us: int) -> None:
        """Empty workers go; of a provisioning unit all that are left or none."""
        w = self.view.workers
        going = {self.worker_row[a.worker]: a for a in actions if a.worker in self.worker_row}
        blocked = {r for r in going if self.held[r] or w.inbound[r] or w.outbound[r]}
        end_us = now_us + up_us(self.profile.release_s)
        present = w.state[: w.count] != ABSENT
        mates_of = {row: np.flatnonzero((w.unit[: w.count] == w.unit[row]) & present).tolist() for row in going}
        for row, action in going.items():
            if any(m not in going or m in blocked for m in mates_of[row]):
                self._drop(action)
                continue
            self._end_worker(row, end_us)
            self.log.decide(end_us, "worker_release", action.reason, worker=action.worker)

    def _drop(self, action: Any) -> None:
        name = type(action).__name__
        self.log.dropped_actions[name] = self.log.dropped_actions.get(name, 0) + 1

    def _end_worker(self, row: int, end_us: int) -> None:
        w = self.view.workers
        name = w.ids[row]
        if w.state[row] != STARTING:
            self.batches.remove_worker(row)
        if w.state[row] == READY:
            self.ready -= 1
        w.state[row] = ABSENT
        w.inbound[row] = w.outbound[row] = False
        del self.worker_row[name]
        self._bill_of.pop(name).release_us = end_us
        self.billed -= 1
        self._free_workers.append(row)

    def lose_worker(self, row: int, now_us: int) -> None:
        """The worker is gone with the chunks in work; what it held or was to hold goes on from host memory."""
        s, w = self.view.sessions, self.view.workers
        name = w.ids[row]
        self.log.decide(now_us, "worker_lost", "lost", worker=name)
        touched = np.flatnonzero(
            ((s.worker[: s.count] == row) | (s.target[: s.count] == row)) & (s.state[: s.count] != GONE)
        )
        started = w.state[row] != STARTING
        for r in touched:
            source, target = int(s.worker[r]), int(s.target[r])
            if s.active[r] and source >= 0 and s.state[r] != RESUMING:
                self.active_on[source] -= 1
            for end, flags in ((source, w.outbound), (target, w.inbound)):
                if end >= 0:
                    self.held[end] -= 1
                    if s.state[r] != HELD:
                        flags[end] = False
            self.batches.session[r, HOLD] = 0
            if self.batches.session[r, WORKER] not in (-1, row):
                self.batches.detach(int(r))
            s.state[r] = HOST
            s.worker[r] = s.target[r] = NOWHERE
            s.transfer_end_s[r] = 0.0
            self._reasons.pop(int(r), None)
        self._end_worker(row, now_us)
        assert started or touched.size == 0
        for r in touched:
            if int(r) in self._leaving:
                self._leaving.discard(int(r))
                self.close_session(int(r))

    _HANDLERS: ClassVar[dict[type, Any]] = {
        Place: _place,
        Migrate: _migrate,
        Suspend: _suspend,
        Resume: _resume,
        SetSteps: _set_steps,
        Queue: _queue,
        Shed: _shed,
        AddWorker: _add,
        DrainWorker: _drain,
        UndrainWorker: _undrain,
    }


def _fit(array: Any, n: int) -> Any:
    return array if array.size >= n else np.concatenate([array, np.zeros(n - array.size, array.dtype)])
