"""A worker's protocol as a state machine without I/O: messages, engine events and time in, actions out.

    controller  OpenSession CloseSession Lease DrainWorker StopWorker  ->  SessionOpened|Refused|Released|Broken
    gateway     Credit ChunkAccepted                                   ->  ChunkReady (an Emit) | ChunkRefused
    engine      Opened OpenFailed FinishedChunk BrokenSession Closed   <-  Open Begin Close Hold

What it guards:

- **Epochs.** A session is held under one epoch; whatever names an older one is refused, a newer OpenSession replaces
  what is held. Closed epochs are remembered, so a late OpenSession does not bring one back.
- **Order.** A credit must be for the next chunk. One for a chunk already made is answered with the same frames again
  (the last `KEPT_CHUNKS` are kept), so a gateway that reconnects or restarts loses nothing.
- **Lease.** Nothing is emitted when the lease has run out. It counts from the moment the heartbeat was sent that the
  Lease answers, so it ends here before it ends at the controller. Hearing the gateway renews it too: killing the
  controller stops no stream. Without either the engine is held; all state is kept until somebody tells.

Everything may arrive twice or late. A chunk's frames live in `Session.made` alone; an Emit only points at them, and
whoever carries it out asks `may_emit` again at that moment.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from turboserve.model.interface import Control, ModelSpec
from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_books import (
    CONTROLLER,
    GATEWAY,
    KEPT_CHUNKS,
    Action,
    Beat,
    Counts,
    Drop,
    Emit,
    Phase,
    Send,
    Session,
    Stop,
    request_of,
)

_FENCES_KEPT = 65536


class WorkerLogic:
    """One worker. All times are seconds of one monotonic clock, passed in."""

    def __init__(
        self, hello: m.WorkerHello, spec: ModelSpec, *, heartbeat_s: float = 0.5, leave_timeout_s: float = 8.0
    ) -> None:
        self.hello = hello
        self.sessions: dict[str, Session] = {}
        self.closing: dict[str, deque[int]] = {}
        self.counts = Counts()
        self.draining = False
        self._spec = spec
        self._heartbeat_s = heartbeat_s
        self._leave_timeout_s = leave_timeout_s
        self._leave_by_s: float | None = None
        self._connected: set[str] = set()
        self._fences: OrderedDict[str, int] = OrderedDict()
        self._unanswered_s: deque[float] = deque()
        self._lease_s = 0.0
        self._lease_until_s = float("-inf")
        self._held = True
        self._next_beat_s = float("inf")
        self._out: list[Action] = [e.Hold(True)]

    # ------------------------------------------------------------------ events

    def on_connect(self, source: str, now_s: float) -> list[Action]:
        """A channel stands. Say who we are, then everything the peer may have missed."""
        self._connected.add(source)
        self._out.append(Send(source, self.hello))
        if source == CONTROLLER:
            self._unanswered_s.clear()
            self._unanswered_s.append(now_s)
            self._next_beat_s = now_s + self._heartbeat_s
            for session_id, session in self.sessions.items():
                if session.phase is Phase.OPEN:
                    self._tell(m.SessionOpened(session_id=session_id, epoch=session.epoch))
                elif session.broken is not None:
                    self._tell(session.broken)
            if self._leave_by_s is not None:
                self._tell_leaving()
        else:
            self._emit_unaccepted()
        return self._flush()

    def on_disconnect(self, source: str, now_s: float) -> list[Action]:
        """A channel ended. Nothing is given up: the lease decides what still may happen."""
        self._connected.discard(source)
        if source == CONTROLLER:
            self._next_beat_s = float("inf")
            self._unanswered_s.clear()
            self._stop_when_left(now_s)
        return self._flush()

    def on_message(self, source: str, message: m.Message, now_s: float) -> list[Action]:
        """One message from CONTROLLER or GATEWAY. A peer that sends what is not its to send is dropped."""
        handler = _HANDLERS.get((source, type(message)))
        if handler is None:
            self._out.append(Drop(source, f"{type(message).__name__} is not the {source}'s to send"))
        else:
            if source == GATEWAY:
                self._renew(now_s + self._lease_s)
            handler(self, message, now_s)
        return self._flush()

    def on_engine(self, event: e.EngineEvent, epoch: int, now_s: float) -> list[Action]:
        """Something the engine did for a session it held under `epoch`."""
        if isinstance(event, e.Closed):
            self._on_closed(event.session_id, epoch, now_s)
            return self._flush()
        session = self.sessions.get(event.session_id)
        if session is None or session.epoch != epoch:
            return self._flush()  # closed or replaced while the engine was at it
        if isinstance(event, e.Opened):
            session.phase = Phase.OPEN
            self._tell(m.SessionOpened(session_id=event.session_id, epoch=epoch))
        elif isinstance(event, e.OpenFailed):
            del self.sessions[event.session_id]
            self._refuse_open(event.session_id, epoch, event.code, event.message)
        elif isinstance(event, e.FinishedChunk):
            session.made[event.chunk_index] = event
            while len(session.made) > KEPT_CHUNKS:
                session.made.popitem(last=False)
            self._emit(event.session_id, session, event.chunk_index, now_s)
        else:
            session.phase = Phase.BROKEN
            session.broken = m.SessionBroken(
                session_id=event.session_id,
                epoch=epoch,
                chunk_index=event.chunk_index,
                code=event.code[:256],
                message=event.message[:1024],
            )
            self._tell(session.broken)
        return self._flush()

    def on_timer(self, now_s: float) -> list[Action]:
        """Heartbeats, the end of the lease, the end of leaving. Call it at `wake_at_s` or more often."""
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + self._heartbeat_s
            self._unanswered_s.append(now_s)
            self._out.append(Beat())
        if not self._held and now_s >= self._lease_until_s:
            self._held = True
            self._out.append(e.Hold(True))
        self._stop_when_left(now_s)
        return self._flush()

    def on_terminate(self, now_s: float) -> list[Action]:
        """SIGTERM: ask to be drained, and end when nothing is held or the time is over; the second ends at once."""
        if self._leave_by_s is not None:
            self._out.append(Stop("told to end twice"))
            return self._flush()
        self.draining = True
        self._leave_by_s = now_s + self._leave_timeout_s
        self._tell_leaving()
        self._stop_when_left(now_s)
        return self._flush()

    @property
    def wake_at_s(self) -> float:
        """When `on_timer` next has something to do; infinity if never."""
        times = [self._next_beat_s]
        if not self._held:
            times.append(self._lease_until_s)
        if self._leave_by_s is not None:
            times.append(self._leave_by_s)
        return min(times)

    def may_emit(self, emit: Emit, now_s: float) -> e.FinishedChunk | None:
        """The chunk to send now, or None when it must not or need not go out any more."""
        session = self.sessions.get(emit.session_id)
        if session is None or session.epoch != emit.epoch:
            self.counts.fenced += 1
            return None
        if now_s >= self._lease_until_s or emit.chunk_index > session.sent:
            # Without a lease; or behind one that was withheld: both are emitted again, in order, when it is renewed.
            self.counts.withheld += 1
            return None
        return session.made.get(emit.chunk_index)

    def did_emit(self, emit: Emit) -> None:
        """The chunk has left."""
        self.counts.emitted += 1
        session = self.sessions.get(emit.session_id)
        if session is not None and session.epoch == emit.epoch:
            session.sent = max(session.sent, emit.chunk_index + 1)

    def lease_left_s(self, now_s: float) -> float:
        return max(0.0, self._lease_until_s - now_s)

    def _flush(self) -> list[Action]:
        out, self._out = self._out, []
        return out

    def _tell(self, message: m.Message) -> None:
        if CONTROLLER in self._connected:
            self._out.append(Send(CONTROLLER, message))

    # ------------------------------------------------------------------ controller

    def _on_lease(self, lease: m.Lease, now_s: float) -> None:
        if lease.worker_epoch != self.hello.worker_epoch or not self._unanswered_s:
            return
        self._lease_s = lease.lease_s
        self._renew(self._unanswered_s.popleft() + lease.lease_s, now_s)

    def _renew(self, until_s: float, now_s: float | None = None) -> None:
        self._lease_until_s = max(self._lease_until_s, until_s)
        if self._held and (now_s is None or now_s < self._lease_until_s) and self._lease_s > 0:
            self._held = False
            self._out.append(e.Hold(False))
            self._emit_unaccepted()

    def _on_open(self, asked: m.OpenSession, now_s: float) -> None:
        held = self.sessions.get(asked.session_id)
        if asked.epoch <= self._fences.get(asked.session_id, -1) or (held and asked.epoch < held.epoch):
            self.counts.fenced += 1
            self._refuse_open(asked.session_id, asked.epoch, "stale_epoch", "a newer epoch has been here")
            return
        if held is not None and asked.epoch == held.epoch:
            if held.phase is Phase.OPEN:  # the same message again
                self._tell(m.SessionOpened(session_id=asked.session_id, epoch=asked.epoch))
            return
        if (asked.width, asked.height) != (self._spec.width, self._spec.height):
            size = f"{self._spec.width}x{self._spec.height}"
            self._refuse_open(asked.session_id, asked.epoch, "invalid_request", f"this worker makes {size} only")
            return
        if asked.prompt_switch not in self._spec.prompt_switch:
            message = f"this model cannot {asked.prompt_switch!r} on a new prompt"
            self._refuse_open(asked.session_id, asked.epoch, "invalid_request", message)
            return
        if self.draining:
            self._refuse_open(asked.session_id, asked.epoch, "overloaded", "this worker is draining")
            return
        if held is not None:
            self._close(asked.session_id, held)
        # Without a recovery point a session begins anew whatever `next_index` says: the first credit is then refused
        # with next_index 0, and the gateway gives the credits of its log again. Exact, if slow.
        self.sessions[asked.session_id] = Session(asked.epoch)
        control = Control(asked.prompt, asked.prompt_version)
        self._out.append(e.Open(asked.session_id, asked.epoch, asked.seed, control))

    def _refuse_open(self, session_id: str, epoch: int, code: str, message: str) -> None:
        self._tell(m.SessionRefused(session_id=session_id, epoch=epoch, code=code[:256], message=message[:1024]))

    def _on_close(self, asked: m.CloseSession, now_s: float) -> None:
        held = self.sessions.get(asked.session_id)
        if held is not None and asked.epoch >= held.epoch:
            self._close(asked.session_id, held)
            return
        if asked.epoch not in self.closing.get(asked.session_id, ()):
            self._tell(m.SessionReleased(session_id=asked.session_id, epoch=asked.epoch))
        if held is None:
            self._fence(asked.session_id, asked.epoch)

    def _close(self, session_id: str, session: Session) -> None:
        del self.sessions[session_id]
        self._fence(session_id, session.epoch)
        self.closing.setdefault(session_id, deque()).append(session.epoch)
        self._out.append(e.Close(session_id, session.epoch))

    def _fence(self, session_id: str, epoch: int) -> None:
        self._fences[session_id] = max(epoch, self._fences.get(session_id, -1))
        self._fences.move_to_end(session_id)
        while len(self._fences) > _FENCES_KEPT:
            self._fences.popitem(last=False)

    def _on_closed(self, session_id: str, epoch: int, now_s: float) -> None:
        waiting = self.closing.get(session_id)
        if waiting and epoch in waiting:
            waiting.remove(epoch)
            if not waiting:
                del self.closing[session_id]
            self._tell(m.SessionReleased(session_id=session_id, epoch=epoch))
            self._stop_when_left(now_s)

    def _on_drain(self, asked: m.DrainWorker, now_s: float) -> None:
        if asked.worker_id == self.hello.worker_id:
            self.draining = True

    def _on_stop(self, asked: m.StopWorker, now_s: float) -> None:
        if asked.worker_id == self.hello.worker_id:
            self._out.append(Stop(asked.reason or "told to stop"))

    def _on_failure(self, failure: m.Failure, now_s: float) -> None:
        self._out.append(Stop(f"refused by a peer: {failure.code}: {failure.message}", code=1))

    def _tell_leaving(self) -> None:
        self._tell(m.WorkerLeaving(worker_id=self.hello.worker_id, worker_epoch=self.hello.worker_epoch))

    def _stop_when_left(self, now_s: float) -> None:
        """Once told to end: at the deadline, or when nothing is held and there is no controller to say StopWorker."""
        if self._leave_by_s is None:
            return
        if now_s >= self._leave_by_s:
            self._out.append(Stop(f"{len(self.sessions)} sessions were still here at the deadline"))
        elif not self.sessions and not self.closing and CONTROLLER not in self._connected:
            self._out.append(Stop("drained"))

    # ------------------------------------------------------------------ gateway

    def _on_credit(self, credit: m.Credit, now_s: float) -> None:
        session = self.sessions.get(credit.session_id)
        if session is None:
            self._refuse_credit(credit, 0, "not_found")
        elif credit.epoch != session.epoch:
            self.counts.fenced += 1
            self._refuse_credit(credit, session.next_index, "stale_epoch")
        elif session.phase is Phase.BROKEN:
            self._refuse_credit(credit, session.next_index, "session_poisoned")
        elif credit.prompt_switch not in self._spec.prompt_switch:
            self._refuse_credit(credit, session.next_index, "invalid_request")
        elif credit.chunk_index > session.next_index:
            self._refuse_credit(credit, session.next_index, "index_out_of_range")
        elif credit.chunk_index < session.next_index:
            self._credit_again(credit, session, now_s)
        elif session.next_index - session.accepted >= KEPT_CHUNKS:
            self._refuse_credit(credit, session.next_index, "overloaded")
        else:
            request = request_of(credit)
            session.next_index += 1
            session.requests[credit.chunk_index] = request
            session.requests.pop(credit.chunk_index - 2 * KEPT_CHUNKS, None)
            self._out.append(e.Begin(credit.session_id, credit.epoch, request, now_s, now_s + credit.deadline_s))

    def _credit_again(self, credit: m.Credit, session: Session, now_s: float) -> None:
        """A credit for a chunk that was begun before: the same frames, or a reason why not."""
        known = session.requests.get(credit.chunk_index)
        if known is not None and known != request_of(credit):
            self._refuse_credit(credit, session.next_index, "conflict")
        elif credit.chunk_index in session.made:
            self._emit(credit.session_id, session, credit.chunk_index, now_s)
        elif known is None or credit.chunk_index < min(session.made, default=0):
            self._refuse_credit(credit, session.next_index, "index_passed")

    def _refuse_credit(self, credit: m.Credit, next_index: int, code: str) -> None:
        self.counts.refused += 1
        refusal = m.ChunkRefused(
            session_id=credit.session_id,
            epoch=credit.epoch,
            chunk_index=credit.chunk_index,
            next_index=next_index,
            code=code,
        )
        self._out.append(Send(GATEWAY, refusal))

    def _on_accepted(self, accepted: m.ChunkAccepted, now_s: float) -> None:
        session = self.sessions.get(accepted.session_id)
        if session is not None and accepted.epoch == session.epoch:
            # Never beyond what was sent: else chunks could be dropped from `made` before they left.
            session.accepted = max(session.accepted, min(accepted.chunk_index + 1, session.sent))

    def _emit(self, session_id: str, session: Session, chunk_index: int, now_s: float) -> None:
        if GATEWAY in self._connected and now_s < self._lease_until_s:
            self._out.append(Emit(session_id, session.epoch, chunk_index))

    def _emit_unaccepted(self) -> None:
        """After a reconnect or a renewed lease: all that the gateway has not confirmed; it takes each once."""
        if GATEWAY not in self._connected:
            return
        for session_id, session in self.sessions.items():
            for chunk_index in session.made:
                if chunk_index >= session.accepted:
                    self._out.append(Emit(session_id, session.epoch, chunk_index))


_HANDLERS: dict[tuple[str, type[m.Message]], Callable[[WorkerLogic, Any, float], None]] = {
    (CONTROLLER, m.Lease): WorkerLogic._on_lease,
    (CONTROLLER, m.OpenSession): WorkerLogic._on_open,
    (CONTROLLER, m.CloseSession): WorkerLogic._on_close,
    (CONTROLLER, m.DrainWorker): WorkerLogic._on_drain,
    (CONTROLLER, m.StopWorker): WorkerLogic._on_stop,
    (CONTROLLER, m.Failure): WorkerLogic._on_failure,
    (GATEWAY, m.Credit): WorkerLogic._on_credit,
    (GATEWAY, m.ChunkAccepted): WorkerLogic._on_accepted,
    (GATEWAY, m.Failure): WorkerLogic._on_failure,
}
