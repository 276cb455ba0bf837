"""The gateway's protocol without I/O: all sessions, their tenants' quotas, the controller's and workers' messages.

Every method is one event and returns the effects it calls for, in order. Time and randomness come in from outside,
so the same calls give the same effects: a simulated network can run this code.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from turboserve.errors import IndexOutOfRange, Overloaded, QuotaExceeded, TurboServeError
from turboserve.runtime import messages
from turboserve.server.effects import CloseViewer, Effect, Measure, Resolve, ToViewer
from turboserve.server.gateway_books import GatewayBooks
from turboserve.server.gateway_records import (
    NOT_ATTACHED,
    NewSession,
    Worker,
    create_message,
    end_message,
    error_message,
    opened_record,
)
from turboserve.server.operations import Operation
from turboserve.server.pacing import Pace
from turboserve.server.session_stream import SessionStream
from turboserve.session import PublicState

RETRY_S = 1.0
"""Before a controller that has no room is asked again to take in a session that exists."""


@dataclass(slots=True)
class GatewayLogic(GatewayBooks):
    """See the module's docstring. `new_token` is the only source of randomness."""

    # ------------------------------------------------------------------ the HTTP side

    def create(self, wish: NewSession, now_s: float) -> tuple[int, list[Effect]]:
        """Open a session; the answer comes as Resolve with the returned operation id. Raises on a quota."""
        quota = self.quota(wish.wide)
        if self.draining:
            raise Overloaded("the server is shutting down", hint="try again in a moment", retry_after_s=2.0)
        live = self._live.get(wish.tenant, 0)
        if live >= quota.sessions:
            raise QuotaExceeded(
                f"{live} sessions are open with this key",
                expected=f"at most {quota.sessions} (quota sessions)",
                hint="end one first",
                retry_after_s=10.0,
            )
        wait_s = self._creates.take(wish.tenant, quota.creates_per_min, now_s)
        if wait_s > 0:
            raise QuotaExceeded(
                "sessions are created too fast with this key",
                expected=f"at most {quota.creates_per_min} a minute (quota creates_per_min)",
                retry_after_s=wait_s,
            )
        if self._queued() >= self.limits.queue_length:
            raise Overloaded("the queue for a session is full", hint="try again later", retry_after_s=5.0)
        session = self._stream(wish, quota, now_s)
        self.sessions[wish.sid] = session
        self._live[wish.tenant] = live + 1
        op_id = self.operations.start(create_message(wish), now_s, wish.sid, needs_durable=True)
        self.outbox.append(opened_record(wish), lambda later_s: self.operations.durable(op_id))
        return op_id, self._finish(session, now_s)

    def command(self, kind: str, now_s: float, **fields: Any) -> tuple[int, list[Effect]]:
        """An operator's wish to the controller."""
        op_id = self.operations.start(lambda op: messages.AdminCommand(op_id=op, kind=kind, **fields), now_s)
        return op_id, self.outbox.take()

    def end(self, sid: str, tenant: str | None, reason: str, now_s: float) -> list[Effect]:
        session = self.find(sid, tenant)
        session.end(reason, 1000, now_s)
        return self._finish(session, now_s)

    def pause(self, sid: str, tenant: str | None, now_s: float) -> list[Effect]:
        session = self.find(sid, tenant)
        session.pause(now_s)
        return self._finish(session, now_s)

    def resume(self, sid: str, tenant: str | None, now_s: float) -> list[Effect]:
        session = self.find(sid, tenant)
        session.resume(now_s)
        return self._finish(session, now_s)

    # ------------------------------------------------------------------ the viewer's side

    def attach(
        self, connection: int, sid: str, token: str, next_index: int, format: str | None, pace: Pace, now_s: float
    ) -> list[Effect]:
        session = self.sessions.get(sid)
        if session is None:
            return [CloseViewer(connection, 4404, "no such session")]
        if session.tokens.accepts(token):
            wait_s = self._attaches.take(sid, self._attach_quota(session), now_s)
            if wait_s > 0:
                return [CloseViewer(connection, 4429, f"too many attaches; retry after {wait_s:.0f} s")]
        try:
            session.attach(connection, token, next_index, format, pace, self.new_token(), now_s)
        except IndexOutOfRange as error:
            self.outbox.put(ToViewer(connection, error_message(error)))
        return self._finish(session, now_s)

    def viewer(
        self,
        connection: int,
        sid: str,
        act: Callable[[SessionStream], None],
        now_s: float,
        event_id: str | None = None,
    ) -> tuple[bool, list[Effect]]:
        """A viewer's message other than attach; a typed error goes back to it. False when it was an error."""
        session = self.sessions.get(sid)
        if session is None or session.viewer is None or session.viewer.connection != connection:
            refusal = NOT_ATTACHED if event_id is None else {**NOT_ATTACHED, "event_id": event_id}
            return False, [ToViewer(connection, refusal)]
        try:
            act(session)
            good = True
        except TurboServeError as error:
            self.outbox.put(ToViewer(connection, error_message(error, event_id)))
            good = False
        return good, self._finish(session, now_s)

    def detach(self, connection: int, sid: str, now_s: float) -> list[Effect]:
        session = self.sessions.get(sid)
        if session is None:
            return []
        session.detach(connection, now_s)
        return self._finish(session, now_s)

    # ------------------------------------------------------------------ the controller's side

    def controller_connected(self, now_s: float) -> list[Effect]:
        """The channel is there (again): repeat what may not have arrived, and say which sessions there are. One that
        the controller does not know (its end was told while the channel was down, say) begins anew there."""
        self.controller_up = True
        self.outbox.delivered.connected()
        self.operations.send_again()
        for session in self.sessions.values():
            if session.ended_s is None:
                self._adopt(session, now_s)
                session.reported = None
                session.pump(now_s)
        return self._take(now_s)

    def _adopt(self, session: SessionStream, now_s: float) -> None:
        if self.operations.pending(session.sid, messages.CreateSession):
            return
        wish, index, epoch = session.wish, session.next_index, session.epoch
        build = create_message(wish, adopt=True, next_index=index, epoch=epoch, steps_now=session.steps)
        self.operations.start(build, now_s, session.sid, lasts=True)

    def let_go(self, now_s: float) -> list[Effect]:
        """This gateway stops: no further credit. Its sessions stay: its successor goes on with them, and when the whole
        server stops the controller suspends them to disk."""
        self.draining = True
        for session in self.sessions.values():
            session.lose(now_s)
        return self._take(now_s)

    def controller_lost(self) -> list[Effect]:
        self.controller_up = False
        return []

    def from_controller(self, message: messages.AnyMessage, now_s: float) -> list[Effect]:
        match message:
            case messages.OpDone():
                self._done(message, now_s)
            case messages.SessionPlaced() | messages.SessionState():
                return self._about_session(message, now_s)
            case messages.WorkerChanged():
                return self._worker_changed(message, now_s)
            case messages.SetSteps():
                if (session := self.sessions.get(message.session_id)) is not None:
                    session.steps = message.steps
            case messages.ClusterSnapshot():
                self._picture(json.loads(message.body))
            case _:
                self.outbox.put(Measure("message_refused"))
        return self._take(now_s)

    def _about_session(self, message: messages.SessionPlaced | messages.SessionState, now_s: float) -> list[Effect]:
        if self.draining:
            return self.outbox.take()  # what becomes of our sessions now is for the gateway that reads our log
        session = self.sessions.get(message.session_id)
        if session is None:
            self._end_orphan(message, now_s)
            return self._take(now_s)
        if isinstance(message, messages.SessionPlaced):
            session.placed(message, now_s)
        else:
            session.changed(message, now_s)
        return self._finish(session, now_s)

    def _end_orphan(self, message: messages.SessionPlaced | messages.SessionState, now_s: float) -> None:
        """The controller holds a session that is not in our log: its end was lost with an earlier gateway."""
        ended = isinstance(message, messages.SessionState) and message.state in _ENDED
        if not ended and not self.operations.pending(message.session_id, messages.EndSession):
            build = end_message(message.session_id, "unknown_to_gateway")
            self.operations.start(build, now_s, message.session_id, lasts=True)

    def _done(self, message: messages.OpDone, now_s: float) -> None:
        operation = self.operations.answered(message)
        if operation is None or not isinstance(operation.message, messages.CreateSession):
            return
        session = self.sessions.get(operation.sid)
        if session is None or session.ended_s is not None:
            return
        if not message.code:
            if not session.owned:
                session.state = message.state or session.state
                session.queue_position = message.queue_position
                session.pump(now_s)
                self._schedule(session)
        elif operation.message.adopt and message.code in ("overloaded", "conflict"):
            self._retries.append((now_s + RETRY_S, operation.sid))
            self._wake(now_s + RETRY_S)
        elif operation.message.adopt:
            session.fail(message.code, message.message, now_s)
            self._finish_ended(now_s)
        else:
            session.end(message.code, 1000, now_s)
            self._finish_ended(now_s)

    def _worker_changed(self, message: messages.WorkerChanged, now_s: float) -> list[Effect]:
        known = self.workers.get(message.worker_id)
        if known is not None and message.worker_epoch < known.epoch:
            return []
        worker = Worker(message.worker_id, message.worker_epoch, message.state, message.numerics_id, message.reason)
        self.workers[message.worker_id] = worker
        if message.state == "lost":
            for session in self.sessions.values():
                if session.owned and session.worker_id == message.worker_id:
                    session.lose(now_s)
                    session.pump(now_s)
        return self._take(now_s)

    # ------------------------------------------------------------------ the worker's side

    def worker_connected(self, worker_id: str, now_s: float) -> list[Effect]:
        """The worker's data channel is there (again): credits that went nowhere are sent once more."""
        for session in self.sessions.values():
            if session.owned and session.worker_id == worker_id:
                session.send_again(now_s)
        return self._take(now_s)

    def chunk(self, message: messages.ChunkReady, data: Any, now_s: float) -> list[Effect]:
        session = self.sessions.get(message.session_id)
        if session is None:
            self.outbox.put(Measure("chunk_fenced"))
            return self._take(now_s)
        try:
            session.chunk(message, data, now_s)
        except TurboServeError as error:
            session.check_error(error, now_s)
        return self._finish(session, now_s)

    def chunk_corrupt(self, message: messages.ChunkReady, error: TurboServeError, now_s: float) -> list[Effect]:
        """The pixels of a chunk do not match their digest."""
        session = self.sessions.get(message.session_id)
        if session is None or message.epoch < session.epoch:
            return []
        session.check_error(error, now_s)
        return self._finish(session, now_s)

    def refused(self, message: messages.ChunkRefused, now_s: float) -> list[Effect]:
        session = self.sessions.get(message.session_id)
        if session is None:
            return []
        session.refused(message, now_s)
        return self._finish(session, now_s)

    # ------------------------------------------------------------------ time, log

    def durable(self, count: int, now_s: float) -> list[Effect]:
        self.outbox.durable(count, now_s)
        return self._take(now_s)

    def wake_s(self) -> float | None:
        return self._wakes[0][0] if self._wakes else None

    def tick(self, now_s: float) -> list[Effect]:
        """Run what is due. Cheap when nothing is."""
        while self._wakes and self._wakes[0][0] <= now_s:
            _, sid = heapq.heappop(self._wakes)
            session = self.sessions.get(sid)
            if session is not None:
                session.tick(now_s)
                self._schedule(session)
            elif not sid:
                self._expire_operations(now_s)
        while self._ended and (
            len(self._ended) > self.limits.ended_kept or self._ended[0][0] + self.limits.ended_kept_s <= now_s
        ):
            self.sessions.pop(self._ended.popleft()[1], None)
        return self._take(now_s)

    def _expire_operations(self, now_s: float) -> None:
        while self._retries and self._retries[0][0] <= now_s:
            session = self.sessions.get(self._retries.popleft()[1])
            if session is not None and session.ended_s is None:
                self._adopt(session, now_s)
        for operation in self.operations.expired(now_s):
            error = Overloaded("the controller does not answer", hint="try again in a moment", retry_after_s=2.0)
            self.outbox.put(Resolve(operation.op_id, error))
            self._give_up(operation, now_s)

    def _give_up(self, operation: Operation, now_s: float) -> None:
        session = self.sessions.get(operation.sid)
        if session is not None and isinstance(operation.message, messages.CreateSession):
            session.end("not_placed", 1000, now_s)


_ENDED = (PublicState.CLOSED.value, PublicState.FAILED.value)

__all__ = ["GatewayLogic", "NewSession", "error_message"]
