"""A trace played against a policy on simulated time.

    run = simulate(trace, profile, policy, Settings(workers=8))

The loop: let the compiled part run to the next instant at which something happens that a decision must see, bring the
view up to date, ask the policy once, carry the plan out. The live control loop does the same with a real cluster.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from turboserve.errors import ConfigError, TraceError
from turboserve.orchestrator.latency import LatencyProfile
from turboserve.orchestrator.view import GONE, READY, ClusterView, make_view
from turboserve.sim.batch_steps import PERIOD_OVER, R_FINISH, T_LATE, T_REDUCED, T_ROWS
from turboserve.sim.batches import Batches
from turboserve.sim.cluster import SimCluster
from turboserve.sim.events import NEVER_US, TRANSFER_END, US, WAKE, WORKER_LOST, WORKER_READY, Timers, to_us, up_us
from turboserve.sim.policies.base import Policy
from turboserve.sim.run_log import Log
from turboserve.sim.trace import ACTIVE, ARRIVE, DEPART, IDLE, Trace

WORKERS_MAX_DEFAULT = 100_000
INITIAL_WORKERS = 2
SECONDS_MOST = 1e9  # thirty years; keeps microseconds within 64 bits
STUCK_US = 24 * 3600 * US  # no chunk for this long after the trace has ended: the policy lets sessions wait for ever


@dataclass(frozen=True, slots=True)
class Settings:
    """Flags of `turboserve simulate`. `provision_s` None: the profile's."""

    workers: int | None = None
    workers_max: int = WORKERS_MAX_DEFAULT
    initial_workers: int = INITIAL_WORKERS
    provision_s: float | None = None
    pace: str = "realtime"
    batching: str = "chunk"
    warmup_s: float = 600.0
    steps_floor: int | None = None
    seed: int = 0
    losses_s: tuple[float, ...] = ()  # at each of these times one present worker, drawn by seed, is lost


@dataclass(slots=True)
class Timeline:
    """The fleet over time: one row per instant at which a decision was made."""

    time_us: list[int] = field(default_factory=list)
    active: list[int] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)
    billed: list[int] = field(default_factory=list)
    fullest: list[int] = field(default_factory=list)

    def add(self, now_us: int, active: int, ready: int, billed: int, fullest: int) -> None:
        if self.time_us and self.time_us[-1] == now_us:
            for column in (self.time_us, self.active, self.ready, self.billed, self.fullest):
                column.pop()
        self.time_us.append(now_us)
        self.active.append(active)
        self.ready.append(ready)
        self.billed.append(billed)
        self.fullest.append(fullest)


@dataclass(slots=True)
class Run:
    """What came out of a simulation; `report.py` makes figures of it, `files.py` writes it."""

    trace: Trace
    profile: LatencyProfile
    policy: str
    settings: Settings
    end_us: int
    rows: npt.NDArray[np.int64]  # delivered chunks, columns R_* of batches.py
    log: Log
    timeline: Timeline
    decision_s: list[float]  # processor time of each decision: wall time would measure the neighbours too
    wall_s: float
    cpu_s: float


def simulate(trace: Trace, profile: LatencyProfile, policy: Policy, settings: Settings) -> Run:
    """Play the whole trace; equal arguments give an equal run (but for its wall-clock times)."""
    return _Replay(trace, profile, policy, settings).run()


def check(settings: Settings, profile: LatencyProfile, policy: Policy | None) -> None:
    """Refuse settings that cannot be run, naming what would be right. `policy` None: the clairvoyant."""
    if policy is not None and settings.workers is None and not policy.scales:
        raise ConfigError(f"policy {policy.name} has a fixed fleet", expected="--workers N", hint="turboserve scales")
    _check_fleet(settings)
    if settings.pace not in ("realtime", "closed"):
        raise ConfigError(f"--pace {settings.pace}", expected="realtime or closed")
    if settings.batching not in ("chunk", "pass"):
        raise ConfigError(f"--batching {settings.batching}", expected="chunk or pass")
    floor = settings.steps_floor
    if floor is not None and not profile.denoise_steps_floor <= floor <= profile.denoise_steps:
        raise ConfigError(f"--steps-floor {floor}", expected=f"{profile.denoise_steps_floor}..{profile.denoise_steps}")
    if settings.seed < 0:
        raise ConfigError(f"--seed {settings.seed}", expected="at least 0")
    if settings.provision_s is not None:
        check_seconds("--provision-s", settings.provision_s)
    check_seconds("--warmup-s", settings.warmup_s)
    for time_s in settings.losses_s:
        check_seconds("--lose-at", time_s)


def _check_fleet(settings: Settings) -> None:
    if settings.workers is not None:
        if settings.workers < 1:
            raise ConfigError(f"--workers {settings.workers}", expected="at least 1")
        return
    if settings.workers_max < 1:
        raise ConfigError(f"--max-workers {settings.workers_max}", expected="at least 1")
    if settings.initial_workers < 0:
        raise ConfigError(f"--initial-workers {settings.initial_workers}", expected="at least 0")
    if settings.initial_workers > settings.workers_max:
        raise ConfigError(
            f"--initial-workers {settings.initial_workers} is more than --max-workers {settings.workers_max}",
            expected=f"at most {settings.workers_max}",
            hint="give a smaller --initial-workers or a larger --max-workers",
        )


def check_seconds(option: str, value: float) -> None:
    """Refuse what is no length of time; NaN passes every comparison of an option's range."""
    if not 0 <= value <= SECONDS_MOST:
        raise ConfigError(f"{option} {value:g}", expected=f"seconds, from 0 to {SECONDS_MOST:g}")


def check_trace(trace: Trace, warmup_s: float) -> None:
    """Refuse a trace of which nothing lies after the warm-up."""
    if trace.time_us.size == 0:
        raise TraceError(f"trace {trace.name} has no events", expected="at least one session")
    if trace.horizon_us <= to_us(warmup_s):
        raise ConfigError(
            f"trace {trace.name} ends at {trace.horizon_us / US:g} s, before the warm-up of {warmup_s:g} s is over",
            expected="a trace that goes on after it",
            hint="pass a shorter --warmup-s; figures cover the time after it",
        )


def close_at_end(trace: Trace) -> Trace:
    """Sessions that never depart (a recording that was cut) leave with the trace's last line; others as they are."""
    gone = np.zeros(len(trace.session_ids), np.bool_)
    gone[trace.session[trace.event == DEPART]] = True
    left = np.flatnonzero(~gone)
    if left.size == 0:
        return trace
    return dataclasses.replace(
        trace,
        time_us=np.append(trace.time_us, np.full(left.size, trace.horizon_us, np.int64)),
        session=np.append(trace.session, left),
        event=np.append(trace.event, np.full(left.size, DEPART, np.int8)),
        chunks=np.append(trace.chunks, np.zeros(left.size, np.int64)),
    )


class _Replay:
    def __init__(self, trace: Trace, profile: LatencyProfile, policy: Policy, settings: Settings) -> None:
        check(settings, profile, policy)
        trace = close_at_end(trace)
        self.trace, self.profile, self.policy, self.settings = trace, profile, policy, settings
        self.chunks = trace.chunk_counts(profile.chunk_s)
        fixed = settings.workers
        self.view: ClusterView = make_view(
            (profile,),
            workers_max=fixed if fixed is not None else settings.workers_max,
            workers_min=fixed if fixed is not None else 1,
            provision_s=settings.provision_s,
            worker_capacity=max(64, fixed or 0),
            steps_floor=settings.steps_floor,
        )
        self.view.tenant_weights = (1.0,) * len(trace.tenants)
        batches = Batches(
            self.view,
            profile,
            int(self.chunks.sum()),
            closed=settings.pace == "closed",
            by_pass=settings.batching == "pass",
        )
        self.timers = Timers()
        provision_s = profile.provision_s if settings.provision_s is None else settings.provision_s
        self.cluster = SimCluster(self.view, batches, profile, up_us(provision_s), self.timers)
        self.batches = batches
        self.timeline = Timeline()
        self.decision_s: list[float] = []
        self.rng = np.random.default_rng(settings.seed)
        # Periods whose predecessor has not delivered its last chunk yet, and departures that wait for a period.
        self.later: dict[str, list[tuple[int, int]]] = {}
        self.departing: set[str] = set()
        self.wake_number = 0  # of the newest wake; older ones are void

    def run(self) -> Run:
        began, began_cpu = time.perf_counter(), time.process_time()
        self._first_workers()
        for t in self.settings.losses_s:
            self.timers.add(to_us(t), WORKER_LOST, None)
        times = self.trace.time_us
        now, at, n = 0, 0, times.size
        progress_us, delivered = 0, 0
        while at < n or self.cluster.row_of:
            next_trace = int(times[at]) if at < n else NEVER_US
            limit = min(next_trace, self.timers.next_us(), now + STUCK_US)
            now = self.batches.run_until(now, limit)
            changed = self._take_notes(self.batches.taken_notes, now)
            if at < n or self.batches.totals[T_ROWS] != delivered:
                progress_us, delivered = now, int(self.batches.totals[T_ROWS])
            elif now - progress_us > STUCK_US:
                waiting = len(self.cluster.row_of)
                raise RuntimeError(
                    f"{self.policy.name}: {waiting} sessions wait at {now / US:.0f} s and nothing happens"
                )
            changed |= self._take_timers(now)
            while at < n and times[at] == now:
                changed |= self._take_event(at)
                at += 1
            if changed:
                self._decide(now)
        rows = self.batches.rows[: self.batches.totals[T_ROWS]]
        # A transfer may still be under way when the last chunk has been delivered; nobody pays for that.
        last_us = max(int(rows[:, R_FINISH].max(initial=0)), max((x.time_us for x in self.cluster.log.shed), default=0))
        end_us = max(self.trace.horizon_us, last_us)
        for bill in self.cluster.log.bills:
            if bill.release_us is None:
                bill.release_us = end_us
        self.timeline.add(end_us, 0, self.cluster.fleet.ready, self.cluster.fleet.billed, 0)
        return Run(
            trace=self.trace,
            profile=self.profile,
            policy=self.policy.name,
            settings=self.settings,
            end_us=end_us,
            rows=rows,
            log=self.cluster.log,
            timeline=self.timeline,
            decision_s=self.decision_s,
            wall_s=time.perf_counter() - began,
            cpu_s=time.process_time() - began_cpu,
        )

    def _first_workers(self) -> None:
        count = self.settings.workers
        reason = "fixed fleet" if count is not None else "initial workers"
        count = self.settings.initial_workers if count is None else count
        unit = self.profile.provision_unit_workers
        for i in range(count):
            node = i - i % unit
            self.cluster.fleet.start_worker(0, unit=node, node=node, reason=reason, ready=True)

    # One instant: what happened, then one decision.

    def _take_notes(self, notes: list[tuple[int, int]], now_us: int) -> bool:
        for row, kind in notes:
            self.cluster.chunk_over(row, now_us)
            if kind == PERIOD_OVER:
                self._period_over(row, now_us)
        return bool(notes)

    def _period_over(self, row: int, now_us: int) -> None:
        session = self.view.sessions.ids[row]
        self.cluster.end_period(row, now_us)
        waiting = self.later.get(session)
        if waiting:
            active_us, chunks = waiting.pop(0)
            self.cluster.begin_period(row, active_us, chunks, now_us)
        elif session in self.departing:
            self.departing.discard(session)
            self.cluster.close_session(row)

    def _take_timers(self, now_us: int) -> bool:
        changed = False
        while (due := self.timers.pop_due(now_us)) is not None:
            kind, what = due
            if kind == TRANSFER_END:
                changed |= self.cluster.end_transfer(*what)
            elif kind == WORKER_READY:
                changed |= self.cluster.fleet.worker_ready(what[0], what[1], now_us)
            elif kind == WORKER_LOST:
                changed |= self._lose(now_us)
            else:
                changed |= what == self.wake_number
        return changed

    def _lose(self, now_us: int) -> bool:
        present = np.flatnonzero(self.view.workers.state[: self.view.workers.count] == READY)
        if present.size == 0:
            return False
        self.cluster.lose_worker(int(self.rng.choice(present)), now_us)
        if self.settings.workers is not None:
            # A fixed fleet is kept at its size: the lost worker's successor pays the provisioning delay.
            unit = len(self.cluster.log.worker_names)
            self.cluster.fleet.start_worker(now_us, unit=unit, node=unit, reason="successor of a lost worker")
        return True

    def _take_event(self, at: int) -> bool:
        """One line of the trace; True when a decision has to see it."""
        now_us, kind = int(self.trace.time_us[at]), int(self.trace.event[at])
        number = int(self.trace.session[at])
        session = self.trace.session_ids[number]
        if kind == ARRIVE:
            self.cluster.open_session(session, number, int(self.trace.tenant[number]), now_us)
            return True
        if kind == IDLE:
            return False  # the period's last chunk says when it is over
        row = self.cluster.row_of[session]
        if kind == ACTIVE:
            if self.view.sessions.active[row]:
                self.later.setdefault(session, []).append((now_us, int(self.chunks[at])))
                return False
            self.cluster.begin_period(row, now_us, int(self.chunks[at]), now_us)
            return True
        if self.view.sessions.active[row]:
            self.departing.add(session)
            return False
        self.cluster.close_session(row)
        return True

    def _decide(self, now_us: int) -> None:
        observed, totals = self.view.observed, self.batches.totals
        observed.chunks = int(totals[T_ROWS])
        observed.reduced_chunks, observed.late_chunks = int(totals[T_REDUCED]), int(totals[T_LATE])
        now_s = now_us / US
        for _ in range(1000):
            began = time.thread_time()
            plan = self.policy.decide(self.view, now_s)
            self.decision_s.append(time.thread_time() - began)
            again = self.cluster.apply(plan, now_s)
            for row in self.cluster.ended_by_shedding:
                if self.view.sessions.state[row] != GONE and self.view.sessions.active[row]:
                    self._period_over(row, now_us)
            self.cluster.ended_by_shedding.clear()
            again |= self._take_timers(now_us)
            if not again:
                break
        else:
            raise RuntimeError(f"{self.policy.name}: its plans at {now_s} s never come to rest")
        if plan.wake_at_s is not None:
            self.wake_number += 1
            self.timers.add(max(now_us + 1, up_us(plan.wake_at_s)), WAKE, self.wake_number)
        workers = self.view.workers.count
        fullest = int(self.cluster.fleet.active_on[:workers].max(initial=0))
        self.timeline.add(now_us, self.cluster.active, self.cluster.fleet.ready, self.cluster.fleet.billed, fullest)
