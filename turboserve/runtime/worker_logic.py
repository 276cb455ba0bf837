"""A worker's protocol as a state machine without I/O: messages, engine events and time in, actions out.

    controller  OpenSession CloseSession Lease DrainWorker StopWorker  ->  SessionOpened|Refused|Released|Broken
    controller  SuspendSession HandOver PrepareSession DropPrepared    ->  `worker_moves.py`
    gateway     Credit ChunkAccepted                                   ->  ChunkReady (an Emit) | ChunkRefused
    engine      Opened OpenFailed FinishedChunk BrokenSession Closed   <-  Open Begin Close Hold

What it guards:

- **Epochs.** A session is held under one epoch; whatever names an older one is refused, a newer OpenSession replaces
  what is held, or takes it over as it is (`adopt`). Closed epochs are remembered, so a late OpenSession does not bring
  one back.
- **Order.** A credit must be for the next chunk. One for a chunk already made is answered with the same frames again
  (the last `KEPT_CHUNKS` are kept), so a gateway that reconnects or restarts loses nothing.
- **Lease.** Nothing is emitted when the lease has run out. It counts from the moment the heartbeat was sent that the
  Lease answers, so it ends here before it ends at the controller. Hearing the gateway renews it too: killing the
  controller stops no stream. Without either the engine is held; all state is kept until somebody tells.

Everything may arrive twice or late. A chunk's frames live in `Session.made` alone; an Emit only points at them, and
whoever carries it out asks `may_emit` again at that moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from turboserve.model.interface import ModelSpec
from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_books import (
    CONTROLLER,
    GATEWAY,
    KEPT_CHUNKS,
    Action,
    Beat,
    Drop,
    Phase,
    RefusePoint,
    Send,
    Session,
    Stop,
    open_command,
)
from turboserve.runtime.worker_ending import WorkerEnding
from turboserve.runtime.worker_moves import PREPARED_KEEP_S, handlers


class WorkerLogic(WorkerEnding):
    """One worker. All times are seconds of one monotonic clock, passed in."""

    def __init__(
        self,
        hello: m.WorkerHello,
        spec: ModelSpec,
        *,
        heartbeat_s: float = 0.5,
        leave_timeout_s: float = 8.0,
        prepared_keep_s: float = PREPARED_KEEP_S,
    ) -> None:
        super().__init__(hello, spec, leave_timeout_s=leave_timeout_s, prepared_keep_s=prepared_keep_s)
        self._heartbeat_s = heartbeat_s
        self._unanswered_s: deque[float] = deque()
        self._lease_s = 0.0
        self._held = True
        self._next_beat_s = float("inf")
        self._out.append(e.Hold(True))

    # ------------------------------------------------------------------ events

    def on_connect(self, source: str, now_s: float) -> list[Action]:
        """A channel stands. Say who we are, then everything the peer may have missed."""
        self._connected.add(source)
        self._out.append(Send(source, self.hello))
        if source == CONTROLLER:
            self._unanswered_s.clear()
            self._unanswered_s.append(now_s)
            self._next_beat_s = now_s + self._heartbeat_s
            for message in self.suspended.values():
                self._tell(message)
            for session_id, session in self.sessions.items():
                if session.phase in (Phase.OPEN, Phase.STOPPING):
                    self._tell_opened(session_id, session)
                elif session.handed_over is not None:
                    self._tell(session.handed_over)
                elif session.broken is not None:
                    self._tell(session.broken)
            for session_id, known in self.prepared.items():
                self._tell_prepared(session_id, known)
            self._points_due_s = now_s + self.points_told_s
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
        if isinstance(event, e.Prepared | e.PrepareFailed):
            self._on_prepare_event(event)
            return self._flush()
        if isinstance(event, e.Profiling):
            self._tell(
                m.WorkerProfiling(op_id=event.op_id, path=event.path, code=event.code, message=event.message[:1024])
            )
            return self._flush()
        session = self.sessions.get(event.session_id)
        if session is None or not session.since_epoch <= epoch <= session.epoch:
            return self._flush()  # closed or replaced while the engine was at it
        if isinstance(event, e.FinishedChunk):
            self._on_chunk(event, session, now_s)
        elif isinstance(event, e.BrokenSession):
            self._on_broken(event, session)
        elif epoch != session.epoch:
            pass  # adopted since: the engine's answer to that comes
        elif isinstance(event, e.Opened):
            self._on_opened(event, session, now_s)
            if self._at_once:
                self._suspend_all()
        elif isinstance(event, e.OpenFailed):
            del self.sessions[event.session_id]
            for credit in session.early:
                self._refuse_credit(credit, 0, "not_found")
            self._refuse_open(event.session_id, epoch, event.code, event.message)
        elif isinstance(event, e.Stopped):
            self._on_stopped(event, session, now_s)
            self._stop_when_left(now_s)
        else:
            self._on_stop_failed(event, session, now_s)
        return self._flush()

    def _on_opened(self, event: e.Opened, session: Session, now_s: float) -> None:
        session.phase = Phase.OPEN
        session.restored = session.restored or event.restored
        self._forget_from(session, event.next_index)
        # What is made has left under an epoch before or is asked for again by a credit: nothing is emitted unasked, and
        # nothing may be held back for it.
        session.sent = session.accepted = event.next_index
        if not event.adopted:
            session.made.clear()
            session.made.update((chunk.chunk_index, chunk) for chunk in event.made[-KEPT_CHUNKS:])
            session.since_epoch = session.epoch
        self._tell_opened(event.session_id, session)
        self._take_early(session, now_s)

    def _on_chunk(self, event: e.FinishedChunk, session: Session, now_s: float) -> None:
        session.made[event.chunk_index] = event
        while len(session.made) > KEPT_CHUNKS:
            session.made.popitem(last=False)
        if session.phase is not Phase.OPENING:  # else it is asked for when it has been adopted
            self._emit(event.session_id, session, event.chunk_index, now_s)

    def _on_broken(self, event: e.BrokenSession, session: Session) -> None:
        session.phase = Phase.BROKEN
        session.broken = m.SessionBroken(
            session_id=event.session_id,
            epoch=session.epoch,
            chunk_index=event.chunk_index,
            code=event.code[:256],
            message=event.message[:1024],
        )
        early, session.early = session.early, []
        for credit in early:
            self._refuse_credit(credit, session.next_index, "session_poisoned")
        self._tell(session.broken)

    def on_timer(self, now_s: float) -> list[Action]:
        """Heartbeats, the end of the lease, the end of leaving. Call it at `wake_at_s` or more often."""
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + self._heartbeat_s
            self._unanswered_s.append(now_s)
            self._out.append(Beat())
            self._tell_handed_over()
            self._tell_points(now_s)
        self._drop_forgotten(now_s)
        if not self._held and now_s >= self._lease_until_s:
            self._held = True
            self._out.append(e.Hold(True))
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
        return min(times + [one.until_s for one in self.prepared.values()])

    def lease_left_s(self, now_s: float) -> float:
        return max(0.0, self._lease_until_s - now_s)

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
            if held.phase in (Phase.OPEN, Phase.STOPPING):  # the same message again
                self._tell_opened(asked.session_id, held)
            return
        if held is not None and asked.adopt and held.phase is not Phase.BROKEN:
            self._adopt(asked, held)
            return
        refused = self._why_not_open(asked)
        if refused:
            self._refuse_open(asked.session_id, asked.epoch, *refused)
            return
        if held is not None:
            self._close(asked.session_id, held)
        if (known := self.prepared.pop(asked.session_id, None)) is not None and known.awaits:
            self._out.append(RefusePoint(asked.session_id))  # what was to come is here; the engine uses the slot
        self.suspended.pop(asked.session_id, None)
        # Without a recovery point a session begins anew whatever `next_index` says: SessionOpened then names chunk 0,
        # and the gateway gives the credits of its log again. Exact, if slow.
        self.sessions[asked.session_id] = Session(asked.epoch, asked.epoch)
        self._out.append(open_command(asked))

    def _adopt(self, asked: m.OpenSession, held: Session) -> None:
        """A move was given up, or its controller was: what is held goes on under a newer epoch."""
        former, held.epoch = held.epoch, asked.epoch
        held.phase, held.handed_over, held.stopped, held.move_id = Phase.OPENING, None, None, 0
        self._out.append(open_command(asked, adopt_epoch=former))

    def _why_not_open(self, asked: m.OpenSession) -> tuple[str, str] | None:
        if asked.adopt and not asked.restore:
            return "not_found", "this worker does not hold the session"
        if (asked.width, asked.height) != (self._spec.width, self._spec.height):
            return "invalid_request", f"this worker makes {self._spec.width}x{self._spec.height} only"
        if asked.prompt_switch not in self._spec.prompt_switch:
            return "invalid_request", f"this model cannot {asked.prompt_switch!r} on a new prompt"
        if asked.decoder and asked.decoder not in self._spec.decoders:
            return "invalid_request", f"this worker has no decoder {asked.decoder!r}"
        if self.draining:
            return "overloaded", "this worker is draining"
        return None

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
            self.suspended.pop(asked.session_id, None)

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

    def _on_profile(self, asked: m.ProfileWorker, now_s: float) -> None:
        if asked.worker_id == self.hello.worker_id:
            self._out.append(e.Profile(asked.op_id, asked.chunks))

    def _on_failure(self, failure: m.Failure, now_s: float) -> None:
        self._out.append(Stop(f"refused by a peer: {failure.code}: {failure.message}", code=1))


_HANDLERS: dict[tuple[str, type[m.Message]], Callable[[WorkerLogic, Any, float], None]] = {
    **{(CONTROLLER, kind): handler for kind, handler in handlers().items()},
    (CONTROLLER, m.Lease): WorkerLogic._on_lease,
    (CONTROLLER, m.OpenSession): WorkerLogic._on_open,
    (CONTROLLER, m.CloseSession): WorkerLogic._on_close,
    (CONTROLLER, m.DrainWorker): WorkerLogic._on_drain,
    (CONTROLLER, m.StopWorker): WorkerLogic._on_stop,
    (CONTROLLER, m.ProfileWorker): WorkerLogic._on_profile,
    (CONTROLLER, m.Failure): WorkerLogic._on_failure,
    (GATEWAY, m.Credit): WorkerLogic._on_credit,
    (GATEWAY, m.ChunkAccepted): WorkerLogic._on_accepted,
    (GATEWAY, m.Failure): WorkerLogic._on_failure,
}
