"""What a decision reads: the cluster as numpy columns, one row per session and per worker.

The caller (live control loop or simulator) owns a `ClusterView` and keeps it up incrementally; policies only read it.
Columns, because building 200,000 Python objects takes half a second and a decision may take 250 ms. `SessionView` and
`WorkerView` are one row read out by name, for tests, logs and code that is not hot.

Rows are reused after a session closed (`state == GONE`). A row number is therefore no identity: ids are. All times
are seconds on the caller's clock; the view holds no clock.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from turboserve.orchestrator.latency import LatencyProfile

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bytes: TypeAlias = npt.NDArray[np.int8]
Flags: TypeAlias = npt.NDArray[np.bool_]

# Where a session's state is. The transfer states name both ends: `worker` (source) and `target`.
GONE = 0  # the row is free
NEW = 1  # open, no state anywhere yet: placing it costs nothing
HELD = 2  # on `worker`
MIGRATING = 3  # leaves `worker` for `target`; held at both until it is over
SUSPENDING = 4  # leaves `worker` for host memory; held by `worker` until it is over
RESUMING = 5  # comes from host memory to `target`
HOST = 6  # in host memory, on no worker (suspended, or its worker was lost)
SESSION_STATES = ("gone", "new", "held", "migrating", "suspending", "resuming", "host")

# What a worker is doing.
ABSENT = 0  # the row is free: never asked for, released or lost
STARTING = 1  # asked for and billed, ready at `ready_at_s`
READY = 2
DRAINING = 3  # runs what it holds, takes nothing new
WORKER_STATES = ("absent", "starting", "ready", "draining")

NOWHERE = -1


@dataclass(slots=True)
class SessionColumns:
    """One row per open session; `count` rows are in use or reusable."""

    capacity: int
    count: int = 0
    ids: list[str] = field(default_factory=list)
    state: Bytes = field(init=False)
    active: Flags = field(init=False)  # inside an active period: has chunks to make
    in_chunk: Flags = field(init=False)  # a chunk of it is in work; a transfer would have to wait for its end
    worker: Ints = field(init=False)
    target: Ints = field(init=False)
    tenant: Ints = field(init=False)
    size: Ints = field(init=False)  # number of the picture size; equal numbers, equal cost
    load: Floats = field(init=False)  # cost of its chunk in units of the profile's reference session
    state_bytes: Floats = field(init=False)
    steps: Ints = field(init=False)  # denoise steps of its next chunk
    steps_full: Ints = field(init=False)
    may_reduce: Flags = field(init=False)  # viewer allows fewer denoise steps under overload
    active_since_s: Floats = field(init=False)
    idle_since_s: Floats = field(init=False)
    next_deadline_s: Floats = field(init=False)  # playout deadline of its next undelivered chunk; +inf when idle
    moved_s: Floats = field(init=False)  # end of its last transfer; -inf when it never moved
    transfer_end_s: Floats = field(init=False)  # +inf while the transfer waits for the chunk in work

    def __post_init__(self) -> None:
        n = self.capacity
        self.state = np.zeros(n, np.int8)
        self.active = np.zeros(n, np.bool_)
        self.in_chunk = np.zeros(n, np.bool_)
        for name, fill in (
            ("worker", NOWHERE),
            ("target", NOWHERE),
            ("tenant", 0),
            ("size", 0),
            ("steps", 0),
            ("steps_full", 0),
        ):
            setattr(self, name, np.full(n, fill, np.int64))
        self.may_reduce = np.ones(n, np.bool_)
        for name, value in (
            ("load", 1.0),
            ("state_bytes", 0.0),
            ("active_since_s", 0.0),
            ("idle_since_s", 0.0),
            ("next_deadline_s", np.inf),
            ("moved_s", -np.inf),
            ("transfer_end_s", 0.0),
        ):
            setattr(self, name, np.full(n, value, np.float64))


@dataclass(slots=True)
class WorkerColumns:
    """One row per worker that was ever asked for; released rows stay ABSENT and are reused."""

    capacity: int
    count: int = 0
    ids: list[str] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    device_classes: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    state: Bytes = field(init=False)
    node: Ints = field(init=False)  # number of the node; equal numbers, same node
    unit: Ints = field(init=False)  # provisioning unit: came together, goes together
    gpu_count: Ints = field(init=False)
    profile: Ints = field(init=False)  # row in ClusterView.profiles
    request_s: Floats = field(init=False)
    ready_at_s: Floats = field(init=False)
    busy_until_s: Floats = field(init=False)  # when the batch or pass in work is expected to end
    inbound: Flags = field(init=False)  # a transfer towards it is under way or waits for a chunk to end
    outbound: Flags = field(init=False)

    def __post_init__(self) -> None:
        n = self.capacity
        self.state = np.zeros(n, np.int8)
        for name, fill in (("node", 0), ("unit", 0), ("gpu_count", 1), ("profile", 0)):
            setattr(self, name, np.full(n, fill, np.int64))
        self.request_s = np.zeros(n, np.float64)
        self.ready_at_s = np.zeros(n, np.float64)
        self.busy_until_s = np.zeros(n, np.float64)
        self.inbound = np.zeros(n, np.bool_)
        self.outbound = np.zeros(n, np.bool_)


@dataclass(frozen=True, slots=True)
class SessionView:
    """One session, read out of the columns."""

    row: int
    id: str
    state: str
    active: bool
    worker: int | None
    target: int | None
    tenant: int
    size: int
    load: float
    steps: int
    steps_full: int
    state_bytes: float
    next_deadline_s: float


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker, read out of the columns."""

    row: int
    id: str
    state: str
    node: str
    unit: int
    gpu_count: int
    device_class: str
    profile: str
    model: str
    ready_at_s: float
    inbound: bool
    outbound: bool


@dataclass(slots=True)
class Observed:
    """Running totals since the start, kept by the caller; a policy takes differences."""

    periods_started: int = 0
    periods_ended: int = 0
    period_seconds: float = 0.0  # summed length of the ended periods
    chunks: int = 0  # chunks begun; live: those of live pace that viewers got
    reduced_chunks: int = 0  # of these with fewer denoise steps than full
    late_chunks: int = 0


@dataclass(slots=True)
class ClusterView:
    """Everything a tick may look at. Read-only for policies."""

    sessions: SessionColumns
    workers: WorkerColumns
    profiles: tuple[LatencyProfile, ...]
    workers_max: int  # the fleet may not grow past this
    workers_min: int = 1  # nor shrink below; equal to workers_max for a fixed fleet
    provision_s: float = 0.0  # from asking for a worker until it is ready
    tenant_weights: tuple[float, ...] = (1.0,)
    steps_floor: int | None = None  # None: brownout is off
    observed: Observed = field(default_factory=Observed)

    @property
    def profile(self) -> LatencyProfile:
        """Profile of the fleet that AddWorker grows (row 0)."""
        return self.profiles[0]

    def session(self, row: int) -> SessionView:
        s = self.sessions
        return SessionView(
            row=row,
            id=s.ids[row],
            state=SESSION_STATES[s.state[row]],
            active=bool(s.active[row]),
            worker=int(s.worker[row]) if s.worker[row] >= 0 else None,
            target=int(s.target[row]) if s.target[row] >= 0 else None,
            tenant=int(s.tenant[row]),
            size=int(s.size[row]),
            load=float(s.load[row]),
            steps=int(s.steps[row]),
            steps_full=int(s.steps_full[row]),
            state_bytes=float(s.state_bytes[row]),
            next_deadline_s=float(s.next_deadline_s[row]),
        )

    def worker(self, row: int) -> WorkerView:
        w = self.workers
        return WorkerView(
            row=row,
            id=w.ids[row],
            state=WORKER_STATES[w.state[row]],
            node=w.nodes[row],
            unit=int(w.unit[row]),
            gpu_count=int(w.gpu_count[row]),
            device_class=w.device_classes[row],
            profile=self.profiles[int(w.profile[row])].name,
            model=w.models[row],
            ready_at_s=float(w.ready_at_s[row]),
            inbound=bool(w.inbound[row]),
            outbound=bool(w.outbound[row]),
        )

    def open_sessions(self) -> Iterator[SessionView]:
        """Every open session by row; for tests and logs, not for hot code."""
        for row in np.flatnonzero(self.sessions.state[: self.sessions.count] != GONE):
            yield self.session(int(row))

    def present_workers(self) -> Iterator[WorkerView]:
        """Every worker that is asked for, ready or draining, by row."""
        for row in np.flatnonzero(self.workers.state[: self.workers.count] != ABSENT):
            yield self.worker(int(row))

    def snapshot(self) -> ClusterView:
        """An independent copy, to record and replay a decision."""
        return copy.deepcopy(self)


# Adding rows is the caller's part; it stands here so that live loop, simulator and tests do it alike.


def add_session(
    view: ClusterView,
    session_id: str,
    *,
    now_s: float,
    tenant: int = 0,
    size: int = 0,
    load: float = 1.0,
    row: int | None = None,
) -> int:
    """Open a session in a fresh (or given, GONE) row and return the row. Its state is NEW and it is idle."""
    s = view.sessions
    if row is None:
        row = s.count
        s.count += 1
        if row == s.capacity:
            _grow(s)
        s.ids.append(session_id)
    else:
        s.ids[row] = session_id
    profile = view.profile
    s.state[row] = NEW
    s.active[row] = False
    s.in_chunk[row] = False
    s.worker[row] = s.target[row] = NOWHERE
    s.tenant[row] = tenant
    s.size[row] = size
    s.load[row] = load
    s.state_bytes[row] = profile.state_bytes
    s.steps[row] = s.steps_full[row] = profile.denoise_steps
    s.may_reduce[row] = True
    s.active_since_s[row] = s.idle_since_s[row] = now_s
    s.next_deadline_s[row] = np.inf
    s.moved_s[row] = -np.inf
    s.transfer_end_s[row] = 0.0
    return row


def add_worker(
    view: ClusterView,
    worker_id: str,
    *,
    state: int,
    request_s: float,
    ready_at_s: float,
    node: int = 0,
    unit: int | None = None,
    profile: int = 0,
    gpu_count: int = 1,
    device_class: str = "any",
    model: str = "any",
    row: int | None = None,
) -> int:
    """Put a worker into a fresh (or given, ABSENT) row and return the row; by default it is a unit of its own."""
    w = view.workers
    if row is None:
        row = w.count
        w.count += 1
        if row == w.capacity:
            _grow(w)
        for column in (w.ids, w.nodes, w.device_classes, w.models):
            column.append("")
    w.ids[row], w.nodes[row], w.device_classes[row], w.models[row] = worker_id, f"node{node}", device_class, model
    w.state[row] = state
    w.node[row] = node
    w.unit[row] = row if unit is None else unit
    w.gpu_count[row] = gpu_count
    w.profile[row] = profile
    w.request_s[row] = request_s
    w.ready_at_s[row] = ready_at_s
    w.busy_until_s[row] = 0.0
    w.inbound[row] = w.outbound[row] = False
    return row


def _grow(columns: Any) -> None:
    """Double the capacity of every array column."""
    old = columns.capacity
    columns.capacity = max(16, 2 * old)
    fresh = type(columns)(columns.capacity)
    for name in columns.__slots__:
        value = getattr(columns, name)
        if isinstance(value, np.ndarray):
            grown = getattr(fresh, name)
            grown[:old] = value
            setattr(columns, name, grown)


def make_view(
    profiles: tuple[LatencyProfile, ...],
    *,
    session_capacity: int = 1024,
    worker_capacity: int = 64,
    workers_max: int = 10_000,
    workers_min: int = 1,
    provision_s: float | None = None,
    steps_floor: int | None = None,
) -> ClusterView:
    """An empty cluster; `provision_s` None: the first profile's."""
    return ClusterView(
        sessions=SessionColumns(session_capacity),
        workers=WorkerColumns(worker_capacity),
        profiles=profiles,
        workers_max=workers_max,
        workers_min=workers_min,
        provision_s=profiles[0].provision_s if provision_s is None else provision_s,
        steps_floor=steps_floor,
    )
