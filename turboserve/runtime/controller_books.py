"""What the controller knows: workers, sessions, their rows in the scheduler's view, and what it told whom.

The books only keep accounts; `controller_logic.ControllerLogic` decides what a message means. They agree at every
moment: a session stands in `sessions`, in the directory and in one row of the view, or in none of them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from turboserve.errors import Conflict
from turboserve.orchestrator import plan as plans
from turboserve.orchestrator import view as views
from turboserve.orchestrator.latency import LatencyProfile
from turboserve.runtime import cluster_picture
from turboserve.runtime import messages as m
from turboserve.runtime.controller_records import (
    GATEWAY,
    LAUNCHER,
    OWNED_BY_GATEWAY,
    Drop,
    DropFile,
    DropHost,
    DropPoints,
    Effect,
    Kind,
    Live,
    Load,
    Move,
    Phase,
    Send,
    Spill,
    Suspected,
    Touch,
    Worker,
)
from turboserve.session import SessionRecord, SessionState, public_state

_TRANSFERS = frozenset({Kind.RESUME, Kind.MIGRATE, Kind.SUSPEND, Kind.ABORT})
OPS_KEPT = 4096
PROFILING_MAX = 64
DECISIONS_KEPT = 100
FAILED_KEPT = 1024
__all__ = [
    "DECISIONS_KEPT",
    "GATEWAY",
    "LAUNCHER",
    "PROFILING_MAX",
    "ControllerBooks",
    "Drop",
    "DropFile",
    "DropHost",
    "DropPoints",
    "Effect",
    "Kind",
    "Live",
    "Load",
    "Move",
    "Phase",
    "Send",
    "Spill",
    "Touch",
    "Worker",
]

Decide: TypeAlias = Callable[[views.ClusterView, Any, float], tuple[plans.Plan, Any]]


class Store(Protocol):
    """The directory as the logic needs it (runtime/directory.py; in memory for simulated networks)."""

    def insert(self, record: SessionRecord, request: bytes = b"") -> None: ...
    def own(self, session_id: str, seen_epoch: int, owner: str | None, state: SessionState) -> int: ...
    def set_state(self, session_id: str, state: SessionState, reason: str = "", strikes: int | None = None) -> None: ...
    def set_move(self, session_id: str, move_id: int, target: str) -> None: ...
    def set_numerics(self, session_id: str, numerics_id: str, approximate_from: int) -> None: ...
    def set_point(self, session_id: str, node: str) -> None: ...
    def forget(self, session_id: str) -> None: ...
    def record_wish(self, op_id: int, wishes: list[tuple[str, str]]) -> None: ...
    def recorded_wish(self, op_id: int) -> list[tuple[str, str]] | None: ...
    def next_epoch(self, name: str) -> int: ...


class ControllerBooks:
    """Accounts of one controller. All times are seconds of one monotonic clock, passed in."""

    def __init__(
        self,
        store: Store,
        decide: Decide,
        profile: LatencyProfile,
        *,
        lease_s: float = 2.0,
        queue_max: int = 64,
        queue_age_max_s: float = 120.0,
        steps_floor: int | None = None,
        workers: int = 1,
        workers_max: int | None = None,
        memory: Any = None,
        move_deadline_s: float = 10.0,
        can_move: bool = True,
        may_kill: bool = True,
        node: str = "local",
    ) -> None:
        self._store = store
        self.node = node
        """The server's own, whose arena the controller maps."""
        self._decide = decide
        self._memory = memory
        self._not_carried_out: dict[str, None] = {}
        # Equal bounds are a fixed fleet: the launcher keeps it up, the scheduler neither adds nor removes.
        self.view = views.make_view(
            (profile,), workers_min=workers, workers_max=workers_max or workers, steps_floor=steps_floor
        )
        self.move_deadline_s = move_deadline_s
        self.may_kill = may_kill
        self.can_move = can_move
        """Whether the workers can suspend and hand over; recovery needs neither."""
        self.lease_s = lease_s
        self.queue_max = queue_max
        self.queue_age_max_s = queue_age_max_s
        self.workers: dict[str, Worker] = {}
        self.gateway_hello: m.GatewayHello | None = None
        self.sessions: dict[str, Live] = {}
        self.decisions: deque[dict[str, Any]] = deque(maxlen=DECISIONS_KEPT)
        self.wake_at_s: float | None = None
        self.changed = True
        self._transfers: dict[str, Live] = {}
        self._measured: dict[str, float] = {}
        self._latency_known = False
        self._capacity_asked = profile.capacity
        self.expected: dict[str, float] = {}
        """Workers on their way, and since when."""
        self.old_moves: dict[str, list[tuple[str, int]]] = {}
        """Target -> (session, move_id) of an earlier controller's moves; the target is told when it says hello."""
        self.suspected: dict[str, Suspected] = {}
        """By worker: who was at work when it was lost last."""
        self.failed: OrderedDict[str, tuple[str, str]] = OrderedDict()
        """Sessions that failed: code and message, for a gateway that missed it and asks for them."""
        self.storage: dict[str, int] = {}
        """Arena and disk, in bytes: the ledger as last counted."""
        self.point_counts = {"spilled": 0, "read_back": 0, "evicted": 0, "not_spilled": 0}
        """What became of points for want of room, since this controller's start."""
        self.stopping = False
        self.take_away_at_s: float | None = None
        """The server was told twice to end: workers that have not suspended a session by then are not asked again."""
        self.generation = 0
        self._timer_s = float("inf")
        self._starting_rows: dict[str, int] = {}
        self._nodes: dict[str, int] = {}
        self._wishes = 0
        self._free_rows: list[int] = []
        self._free_worker_rows: list[int] = []
        self._tenants: dict[str, int] = {}
        self._ops: OrderedDict[int, m.OpDone] = OrderedDict()
        self._profiling: dict[int, str] = {}  # op_id -> the worker that is to answer it
        self._out: list[Effect] = []

    def _held_by(self, worker_id: str) -> list[Live]:
        return [live for live in self.sessions.values() if live.record.owner == worker_id]

    def _held_count(self, worker_id: str) -> int:
        """Slots taken there: both ends of a move count."""
        held = 0
        for live in self.sessions.values():
            move = live.move
            at = (live.record.owner, move.source if move else "", move.target if move else "")
            held += worker_id in at
        return held

    def _queue(self) -> list[Live]:
        """Waiting sessions, longest first (sessions is in order of arrival)."""
        return [live for live in self.sessions.values() if live.record.state is SessionState.QUEUED]

    def _queue_position(self, session_id: str) -> int:
        """1 for the next one; -1 when it does not wait."""
        ids = [live.record.session_id for live in self._queue()]
        return ids.index(session_id) + 1 if session_id in ids else -1

    def _tell_queue(self) -> None:
        for live in self._queue():
            self._tell_session(live)

    def _tell_session(self, live: Live, code: str = "") -> None:
        record = live.record
        self._out.append(
            Send(
                GATEWAY,
                m.SessionState(
                    session_id=record.session_id,
                    state=public_state(record.state).value,
                    epoch=record.epoch,
                    owned=record.state in OWNED_BY_GATEWAY and live.adopt_by_s is None,
                    reason=record.reason[:256],
                    code=code,
                    queue_position=self._queue_position(record.session_id),
                    next_index=live.next_index,
                    device_bytes=self._device_bytes(record.owner),
                    host_bytes=live.point_bytes,
                    disk_bytes=live.disk_bytes,
                ),
            )
        )

    def _device_bytes(self, owner: str | None) -> int:
        worker = self.workers.get(owner or "")
        return worker.hello.session_bytes if worker is not None else 0

    def _move(self, live: Live, to: SessionState, reason: str = "") -> None:
        """Change the state, in the record, the directory and the view."""
        live.record.move(to, reason)
        self._store.set_state(live.record.session_id, to, reason, live.record.strikes)
        self._show(live)

    def _own(self, live: Live, owner: str | None, state: SessionState, reason: str = "") -> bool:
        """The one step that changes the owner: a compare-and-set in the directory. False when it was refused."""
        record = live.record
        try:
            record.epoch = self._store.own(record.session_id, record.epoch, owner, state)
        except Conflict:
            return False
        record.owner = owner
        record.move(state, reason)
        self.view.sessions.in_chunk[live.row] = False  # whatever an earlier owner still does, nobody waits for it
        self._show(live)
        return True

    def _fail(self, live: Live, code: str, message: str) -> None:
        live.record.move(SessionState.FAILED, message)
        self._tell_session(live, code)
        self.failed[live.record.session_id] = (code, message)
        while len(self.failed) > FAILED_KEPT:
            self.failed.popitem(last=False)
        self._forget(live, SessionState.FAILED)

    def _forget(self, live: Live, last: SessionState) -> None:
        """A session ended: its row is free, and the directory no longer lists it."""
        if live.record.state is not last:
            live.record.move(last)
            self._tell_session(live)
        self._store.forget(live.record.session_id)
        self._set_row(live, views.GONE)
        self.view.sessions.active[live.row] = self.view.sessions.in_chunk[live.row] = False
        self.view.sessions.next_deadline_s[live.row] = float("inf")
        self._free_rows.append(live.row)
        del self.sessions[live.record.session_id]
        self._transfers.pop(live.record.session_id, None)
        self._set_flags()
        self._out.append(DropPoints(live.record.session_id))

    def _show(self, live: Live) -> None:
        """Bring the session's row of the view in line with its record and its move."""
        record, move = live.record, live.move
        owner = self._row_of(record.owner)
        match record.state:
            case SessionState.LOADING | SessionState.RUNNING | SessionState.STALLED:
                row = (views.HELD, owner, views.NOWHERE)
            case SessionState.PRECOPY | SessionState.HANDOVER if move is not None and move.kind is Kind.MIGRATE:
                row = (views.MIGRATING, self._row_of(move.source), self._row_of(move.target))
            case SessionState.PRECOPY | SessionState.HANDOVER | SessionState.OFFLOADING | SessionState.CLOSING:
                row = (views.SUSPENDING, owner, views.NOWHERE)
            case SessionState.RESUMING:
                row = (views.RESUMING, views.NOWHERE, owner)
            case SessionState.HOST | SessionState.SPILLING | SessionState.DISK:
                row = (views.HOST, views.NOWHERE, views.NOWHERE)
            case _:  # waits for a worker: no state of it stands in the way of putting it anywhere
                row = (views.NEW, views.NOWHERE, views.NOWHERE)
        if move is not None and record.owner is None:  # its point is on the way to a worker of another node
            row = (views.RESUMING, views.NOWHERE, self._row_of(move.target))
        if live.adopt_by_s is not None or live.retry_at_s is not None or live.loading:
            # The tick has nothing to decide about it now, but it may take a slot.
            row = (views.RESUMING if owner < 0 else views.SUSPENDING, owner, views.NOWHERE)
        self._set_row(live, *row)
        self.view.sessions.active[live.row] = live.wanted and record.state is not SessionState.CLOSING
        # A session that is placed, or placed again after a loss, takes no transfer's turn: several may come at once.
        if move is not None and (move.kind in _TRANSFERS or move.carried):
            self._transfers[record.session_id] = live
        else:
            self._transfers.pop(record.session_id, None)
        self._set_flags()

    def _row_of(self, worker_id: str | None) -> int:
        worker = self.workers.get(worker_id or "")
        return worker.row if worker is not None else views.NOWHERE

    def _set_row(
        self, live: Live, state: int, worker_row: int = views.NOWHERE, target_row: int = views.NOWHERE
    ) -> None:
        sessions = self.view.sessions
        sessions.state[live.row] = state
        sessions.worker[live.row] = worker_row
        sessions.target[live.row] = target_row

    def _set_flags(self) -> None:
        """Which workers have a transfer towards them or away from them."""
        workers = self.view.workers
        workers.inbound[:] = workers.outbound[:] = False
        for session_id, live in list(self._transfers.items()):
            move = live.move
            if session_id not in self.sessions or move is None:
                del self._transfers[session_id]
                continue
            for end, flags in ((move.source, workers.outbound), (move.target, workers.inbound)):
                if (row := self._row_of(end)) >= 0:
                    flags[row] = True

    def _tenant(self, name: str, weight: float) -> int:
        if name not in self._tenants:
            self._tenants[name] = len(self._tenants)
            weights = list(self.view.tenant_weights)[: len(self._tenants) - 1]
            self.view.tenant_weights = (*weights, weight)
        return self._tenants[name]

    def _flush(self) -> list[Effect]:
        out, self._out = self._out, []
        if out:
            self.changed = True
        return out

    def _answered(self, op_id: int) -> bool:
        first = self._ops.get(op_id)
        if first is None:
            return False
        self._out.append(Send(GATEWAY, first))
        return True

    def _answer(self, op_id: int, **fields: Any) -> None:
        done = m.OpDone(op_id=op_id, **fields)
        self._ops[op_id] = done
        while len(self._ops) > OPS_KEPT:
            self._ops.popitem(last=False)
        self._out.append(Send(GATEWAY, done))

    def _note(
        self, now_s: float, event: str, *, reason: str, worker: str = "", session: str = "", source: str = ""
    ) -> None:
        row: dict[str, Any] = {"time_s": round(now_s, 3), "event": event, "reason": reason}
        if source:
            row["source"] = source
        if worker:
            row["worker"] = worker
        if session:
            row["session"] = session
        self.decisions.append(row)

    def snapshot(self) -> dict[str, Any]:
        """What GET /v1/cluster shows."""
        return cluster_picture.picture(self)
