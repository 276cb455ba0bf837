"""What the controller knows: workers, sessions, their rows in the scheduler's view, and what it told whom.

The books only keep accounts; `controller_logic.ControllerLogic` decides what a message means. They agree at every
moment: a session stands in `sessions`, in the directory and in one row of the view, or in none of them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from turboserve.orchestrator import plan as plans
from turboserve.orchestrator import view as views
from turboserve.orchestrator.latency import LatencyProfile
from turboserve.runtime import cluster_picture
from turboserve.runtime import messages as m
from turboserve.session import SessionRecord, SessionState, public_state

OPS_KEPT = 4096
DECISIONS_KEPT = 100
GATEWAY = "gateway"

Decide: TypeAlias = Callable[[views.ClusterView, Any, float], tuple[plans.Plan, Any]]


class Store(Protocol):
    """The directory as the logic needs it (runtime/directory.py; in memory for simulated networks)."""

    def insert(self, record: SessionRecord) -> None: ...
    def own(self, session_id: str, seen_epoch: int, owner: str | None, state: SessionState) -> int: ...
    def set_state(self, session_id: str, state: SessionState, reason: str = "", strikes: int | None = None) -> None: ...
    def forget(self, session_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Send:
    """Put `message` on the channel to `to`: a worker id, or GATEWAY."""

    to: str
    message: m.Message


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the channel to `to`."""

    to: str
    reason: str


Effect: TypeAlias = Send | Drop


@dataclass(slots=True)
class Worker:
    hello: m.WorkerHello
    row: int
    state: str
    lease_until_s: float
    stats: m.Heartbeat | None = None


@dataclass(slots=True)
class Live:
    """A session that has not ended, with what the gateway asked for."""

    record: SessionRecord
    request: m.CreateSession
    row: int
    attached: bool = False
    queued_since_s: float = 0.0


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
        memory: Any = None,
    ) -> None:
        self._store = store
        self._decide = decide
        self._memory = memory
        self._not_carried_out: dict[str, None] = {}
        # A fixed fleet: the launcher keeps it up, the scheduler neither adds nor removes.
        self.view = views.make_view((profile,), workers_min=workers, workers_max=workers, steps_floor=steps_floor)
        self.lease_s = lease_s
        self.queue_max = queue_max
        self.queue_age_max_s = queue_age_max_s
        self.workers: dict[str, Worker] = {}
        self.sessions: dict[str, Live] = {}
        self.decisions: deque[dict[str, Any]] = deque(maxlen=DECISIONS_KEPT)
        self.wake_at_s: float | None = None
        self.changed = True
        self._free_rows: list[int] = []
        self._free_worker_rows: list[int] = []
        self._tenants: dict[str, int] = {}
        self._ops: OrderedDict[int, m.OpDone] = OrderedDict()
        self._out: list[Effect] = []

    def _held_by(self, worker_id: str) -> list[Live]:
        return [live for live in self.sessions.values() if live.record.owner == worker_id]

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
                    owned=record.state in (SessionState.RUNNING, SessionState.STALLED),
                    reason=record.reason[:256],
                    code=code,
                    queue_position=self._queue_position(record.session_id),
                ),
            )
        )

    def _move(self, live: Live, to: SessionState, reason: str = "") -> None:
        live.record.move(to, reason)
        self._store.set_state(live.record.session_id, to, reason, live.record.strikes)

    def _fail(self, live: Live, code: str, message: str) -> None:
        live.record.move(SessionState.FAILED, message)
        self._tell_session(live, code)
        self._forget(live, SessionState.FAILED)

    def _forget(self, live: Live, last: SessionState) -> None:
        """A session ended: its row is free, and the directory no longer lists it."""
        if live.record.state is not last:
            live.record.move(last)
            self._tell_session(live)
        self._store.forget(live.record.session_id)
        self._set_row(live, views.GONE)
        self.view.sessions.active[live.row] = False
        self._free_rows.append(live.row)
        del self.sessions[live.record.session_id]

    def _set_row(self, live: Live, state: int, worker_row: int = views.NOWHERE) -> None:
        self.view.sessions.state[live.row] = state
        self.view.sessions.worker[live.row] = worker_row

    def _tenant(self, name: str, weight: float) -> int:
        if name not in self._tenants:
            self._tenants[name] = len(self._tenants)
            weights = list(self.view.tenant_weights)[: len(self._tenants) - 1]
            self.view.tenant_weights = (*weights, weight)
        return self._tenants[name]

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

    def _note(self, now_s: float, event: str, *, reason: str, worker: str = "", session: str = "") -> None:
        row: dict[str, Any] = {"time_s": round(now_s, 3), "event": event, "reason": reason}
        if worker:
            row["worker"] = worker
        if session:
            row["session"] = session
        self.decisions.append(row)

    def snapshot(self) -> dict[str, Any]:
        """What GET /v1/cluster shows."""
        return cluster_picture.picture(self)
