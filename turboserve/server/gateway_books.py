"""What the gateway's logic keeps: sessions, workers, quotas, times to wake at; how an earlier gateway's sessions come
back, and what is told of them all. `gateway_logic.GatewayLogic` says what an event means."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from turboserve.errors import NotFound
from turboserve.server.attach_tokens import AttachTokens, token_hash
from turboserve.server.effects import Effect, Measure, ToController
from turboserve.server.gateway_config import Limits, Quotas
from turboserve.server.gateway_records import NewSession, Worker, end_message, wish_of
from turboserve.server.log_records import LoggedSession
from turboserve.server.operations import Operations
from turboserve.server.outbox import Outbox
from turboserve.server.pacing import StreamClock
from turboserve.server.prompt_line import PromptLine
from turboserve.server.rates import Rates
from turboserve.server.session_stream import SessionStream, StreamShape
from turboserve.session import PublicState


@dataclass(slots=True)
class GatewayBooks:
    """Fields of a gateway; `operations` are its wishes to the controller that have no answer yet."""

    limits: Limits
    quotas: Quotas
    wide_quotas: Quotas
    new_token: Callable[[], str]
    gateway_epoch: int = 1
    sessions: dict[str, SessionStream] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    controller_up: bool = False
    outbox: Outbox = field(default_factory=Outbox)
    cluster: dict[str, Any] = field(default_factory=dict)
    draining: bool = False
    operations: Operations = field(init=False)
    _wakes: list[tuple[float, str]] = field(default_factory=list)
    _ended: deque[tuple[float, str]] = field(default_factory=deque)
    _creates: Rates = field(default_factory=Rates)
    _attaches: Rates = field(default_factory=Rates)
    _live: dict[str, int] = field(default_factory=dict)
    _retries: deque[tuple[float, str]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.operations = Operations(self.gateway_epoch, self.outbox, self._wake)

    def _wake(self, at_s: float) -> None:
        heapq.heappush(self._wakes, (at_s, ""))

    def quota(self, wide: bool) -> Quotas:
        return self.wide_quotas if wide else self.quotas

    def find(self, sid: str, tenant: str | None) -> SessionStream:
        """A session of the tenant (of any tenant for None). To others it does not exist."""
        session = self.sessions.get(sid)
        if session is None or (tenant is not None and session.tenant != tenant):
            raise NotFound("no such session", hint="it may have ended a while ago, or belong to another key")
        return session

    def _stream(self, wish: NewSession, quota: Quotas, now_s: float) -> SessionStream:
        return SessionStream(
            sid=wish.sid,
            tenant=wish.tenant,
            shape=wish.shape,
            clock=wish.clock,
            seed=wish.seed,
            format=wish.format,
            prompt_switch=wish.prompt_switch,
            decoder=wish.decoder,
            max_chunks=wish.max_chunks,
            tokens=AttachTokens(token_hash(wish.token)),
            prompts=PromptLine(inputs=[(0, 1, wish.prompt)], steps=[(0, wish.steps)]),
            outbox=self.outbox,
            created_s=now_s,
            steps=wish.steps,
            grace_s=self.limits.attach_grace_s,
            slow_close_s=self.limits.slow_close_s,
            session_s=quota.session_s,
            wish=replace(wish, token=""),
        )

    def _attach_quota(self, session: SessionStream) -> int:
        wide = session.session_s >= self.wide_quotas.session_s
        return self.quota(wide).attaches_per_min

    # ------------------------------------------------------------------ after each event

    def _finish(self, session: SessionStream, now_s: float) -> list[Effect]:
        self._schedule(session)
        return self._take(now_s)

    def _take(self, now_s: float) -> list[Effect]:
        """The effects of an event, once ended sessions are let go and changed ones will be looked at in time."""
        self._finish_ended(now_s)
        for session in self.outbox.take_waiting():
            self._schedule(session)
        self._tell_delivered(now_s)
        return self.outbox.take()

    def _tell_delivered(self, now_s: float) -> None:
        """While no controller is there nothing is told: the next one is told all of it first."""
        delivered = self.outbox.delivered
        if not self.controller_up:
            return
        waked_s = delivered.wake_s
        if (told := delivered.take(now_s)) is not None:
            self.outbox.put(ToController(told))
        elif delivered.wake_s is not None and delivered.wake_s != waked_s:
            self._wake(delivered.wake_s)

    def _schedule(self, session: SessionStream) -> None:
        wake_s = session.wake_s()
        if wake_s is not None and wake_s != session.scheduled_s:
            session.scheduled_s = wake_s
            heapq.heappush(self._wakes, (wake_s, session.sid))

    def _finish_ended(self, now_s: float) -> None:
        """Sessions that ended in this event: the controller frees them, quotas give way, a tombstone stays."""
        ended, self.outbox.ended_sessions = self.outbox.ended_sessions, []
        for sid, reason in ended:
            session = self.sessions[sid]
            self._live[session.tenant] = max(0, self._live.get(session.tenant, 0) - 1)
            self._ended.append((now_s, sid))
            self.operations.start(end_message(sid, reason), now_s, sid, lasts=True)
            self._attaches.forget(sid)
            self.outbox.put(Measure("session_ended"))

    # ------------------------------------------------------------------ start

    def restore(
        self, logged: Iterable[tuple[LoggedSession, StreamShape, StreamClock]], now_s: float, now_unix_s: float
    ) -> list[Effect]:
        """Sessions of an earlier gateway: detached; their owners go on with them, or begin anew, once the controller
        is there. Nothing is said before that: `controller_connected` says it."""
        for one, shape, clock in logged:
            opened = one.opened
            quota = self.quota(opened.wide)
            wish = wish_of(one, shape, clock)
            session = self._stream(wish, quota, now_s - max(0.0, now_unix_s - opened.created_unix_s))
            session.tokens = AttachTokens(one.token_hash, one.token_hash_prev)
            session.prompts = PromptLine.restored(one)
            session.bound = session.durable = session.restored = one.bound
            session.delivered = session.next_index = session.sent = one.delivered
            session.digest = one.digest
            session.first_attach_s = session.detached_s = now_s
            session.state = PublicState.RECOVERING.value
            self.sessions[opened.sid] = session
            self._live[opened.tenant] = self._live.get(opened.tenant, 0) + 1
            self._schedule(session)
        return self.outbox.take()

    # ------------------------------------------------------------------ figures

    def _queued(self) -> int:
        return sum(1 for one in self.sessions.values() if one.ended_s is None and one.queue_position >= 0)

    def ready(self) -> tuple[bool, str]:
        """Whether a new viewer would be served, and why not."""
        if self.draining:
            return False, "draining"
        if not self.controller_up:
            return False, "controller_unreachable"
        if not any(worker.state == "ready" for worker in self.workers.values()):
            return False, "no_worker_ready"
        if self._queued() >= self.limits.queue_length:
            return False, "queue_full"
        return True, ""

    def states(self) -> dict[str, int]:
        """Sessions by public state, every state named."""
        counts = {state.value: 0 for state in PublicState}
        for session in self.sessions.values():
            counts[session.public()] += 1
        return counts

    def _picture(self, cluster: dict[str, Any]) -> None:
        """A new picture of the cluster; each session keeps the decisions about it, for `explain`."""
        seen = {_decision_key(one) for one in self.cluster.get("decisions", ())}
        for one in cluster.get("decisions", ()):
            session = self.sessions.get(one.get("session", ""))
            if session is not None and _decision_key(one) not in seen:
                session.times.decided(one)
        self.cluster = cluster


def _decision_key(decision: dict[str, Any]) -> tuple[Any, ...]:
    return decision.get("time_s"), decision.get("event"), decision.get("session"), decision.get("worker")
