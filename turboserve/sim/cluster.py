"""The simulated cluster: keeps the view that policies read, and carries out their plans.

Mechanism only. Who sits where and what a transfer costs (here), when a worker is ready and billed (`fleet`) is decided
from the latency profile; why anything happens is the policy's business and goes to the decision log. An action
that does not fit what is (a full worker, a second inbound transfer, a session that just closed) is dropped and counted,
never bent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    GONE,
    HELD,
    HOST,
    MIGRATING,
    NEW,
    NOWHERE,
    RESUMING,
    STARTING,
    SUSPENDING,
    ClusterView,
    add_session,
)
from turboserve.sim.batch_steps import DONE, HOLD, INDEX, PASSES, PERIOD, RUNNING, WORKER
from turboserve.sim.batches import Batches
from turboserve.sim.events import TRANSFER_END, US, Timers, up_us
from turboserve.sim.fleet import SimFleet
from turboserve.sim.run_log import Log, ShedChunk


class SimCluster:
    """Sessions and workers of one run. `view` is what policies see; `batches` what the compiled part runs on."""

    def __init__(
        self, view: ClusterView, batches: Batches, profile: LatencyProfile, provision_us: int, timers: Timers
    ) -> None:
        self.view, self.batches, self.profile, self.timers = view, batches, profile, timers
        self.log = Log()
        self.fleet = SimFleet(view, batches, profile, provision_us, timers, self.log)
        self.row_of: dict[str, int] = {}  # open sessions
        self.active = 0
        self._free_sessions: list[int] = []
        self._leaving: set[int] = set()  # rows whose session departed during a transfer
        self._migrate_us = up_us(profile.migrate_s)
        self._migrate_far_us = up_us(profile.migrate_cross_node_s or profile.migrate_s)
        self._suspend_us, self._resume_us = up_us(profile.offload_s), up_us(profile.resume_s)
        self._reasons: dict[int, str] = {}  # of transfers that wait for a chunk to end
        self._handlers: dict[type, Callable[[Any, int], bool]] = {
            Place: self._place,
            Migrate: self._migrate,
            Suspend: self._suspend,
            Resume: self._resume,
            SetSteps: self._set_steps,
            Queue: self._queue,
            Shed: self._shed,
            AddWorker: self.fleet.add,
            DrainWorker: self.fleet.drain,
            UndrainWorker: self.fleet.undrain,
        }
        self.ended_by_shedding: list[int] = []  # periods without a chunk left, for the replay to end

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
            self.fleet.active_on[s.worker[row]] += 1
        self.view.observed.periods_started += 1
        self.batches.begin_period(row, active_us, chunks, now_us)

    def end_period(self, row: int, now_us: int) -> None:
        s, observed = self.view.sessions, self.view.observed
        s.active[row] = False
        s.idle_since_s[row] = now_us / US
        self.active -= 1
        if s.worker[row] >= 0:
            self.fleet.active_on[s.worker[row]] -= 1
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
            self.fleet.held[s.worker[row]] -= 1
        s.state[row] = GONE
        s.worker[row] = s.target[row] = NOWHERE
        del self.row_of[s.ids[row]]
        self._free_sessions.append(row)

    # Plans.

    def apply(self, plan: Plan, now_s: float) -> bool:
        """Carry out `plan`; True when something changed that the policy should see at this same instant."""
        now_us = round(now_s * US)
        self.fleet.changed = False
        releases: list[ReleaseWorker] = []
        for action in plan.actions:
            if isinstance(action, ReleaseWorker):
                releases.append(action)
                continue
            if not self._handlers[type(action)](action, now_us):
                self.log.drop(action)
        self.fleet.release(releases, now_us)
        return self.fleet.changed

    def _place(self, a: Place, now_us: int) -> bool:
        row, worker = self.row_of.get(a.session), self.fleet.row_of.get(a.worker)
        s = self.view.sessions
        if row is None or worker is None or s.state[row] != NEW or not self.fleet.takes(worker):
            return False
        s.state[row] = HELD
        self._arrive(row, worker, now_us)
        self.fleet.held[worker] += 1
        self.log.decide(now_us, "place", a.reason, worker=a.worker, session=a.session)
        return True

    def _migrate(self, a: Migrate, now_us: int) -> bool:
        row, target = self.row_of.get(a.session), self.fleet.row_of.get(a.worker)
        s, w = self.view.sessions, self.view.workers
        if row is None or target is None or s.state[row] != HELD or row in self._leaving:
            return False
        source = int(s.worker[row])
        if (
            w.ids[source] != a.source
            or source == target
            or w.outbound[source]
            or w.inbound[target]
            or not self.fleet.takes(target)
        ):
            return False
        s.state[row] = MIGRATING
        s.target[row] = target
        w.outbound[source] = w.inbound[target] = True
        self.fleet.held[target] += 1
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
        row, target = self.row_of.get(a.session), self.fleet.row_of.get(a.worker)
        s, w = self.view.sessions, self.view.workers
        if row is None or target is None or s.state[row] != HOST or w.inbound[target] or not self.fleet.takes(target):
            return False
        s.state[row] = RESUMING
        s.target[row] = target
        w.inbound[target] = True
        self.fleet.held[target] += 1
        self._begin_transfer(row, a.reason, now_us)
        return True

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
            self.fleet.held[source] -= 1
            self.fleet.active_on[source] -= int(s.active[row])
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
            self.fleet.active_on[worker] += 1
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

    def lose_worker(self, row: int, now_us: int) -> None:
        """The worker is gone with the chunks in work; what it held or was to hold goes on from host memory."""
        s, w = self.view.sessions, self.view.workers
        name = w.ids[row]
        self.log.decide(now_us, "worker_lost", "lost", worker=name)
        touched = np.flatnonzero(
            ((s.worker[: s.count] == row) | (s.target[: s.count] == row)) & (s.state[: s.count] != GONE)
        )
        started = w.state[row] != STARTING
        stays = [int(r) for r in touched if s.target[r] == row and s.transfer_end_s[r] == np.inf]
        for kept in stays:  # its move to the lost worker has not begun: it goes on where it is
            w.outbound[s.worker[kept]] = False
            self.fleet.held[row] -= 1
            s.state[kept], s.target[kept], s.transfer_end_s[kept] = HELD, NOWHERE, 0.0
            self.batches.session[kept, HOLD] = 0
            self._reasons.pop(kept, None)
        touched = np.setdiff1d(touched, stays)
        for r in touched:
            source, target = int(s.worker[r]), int(s.target[r])
            if s.active[r] and source >= 0 and s.state[r] != RESUMING:
                self.fleet.active_on[source] -= 1
            for end, flags in ((source, w.outbound), (target, w.inbound)):
                if end >= 0:
                    self.fleet.held[end] -= 1
                    if s.state[r] != HELD:
                        flags[end] = False
            self.batches.session[r, HOLD] = 0
            if self.batches.session[r, WORKER] not in (-1, row):
                self.batches.detach(int(r))
            s.state[r] = HOST
            s.worker[r] = s.target[r] = NOWHERE
            s.transfer_end_s[r] = 0.0
            self._reasons.pop(int(r), None)
        self.fleet.end_worker(row, now_us)
        assert started or touched.size == 0
        for r in touched:
            if int(r) in self._leaving:
                self._leaving.discard(int(r))
                self.close_session(int(r))
