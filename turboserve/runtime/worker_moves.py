"""The worker's half of docs/moving.md: suspend, prepare, hand over. Part of `WorkerLogic`, without I/O like the rest.

    controller  SuspendSession HandOver  ->  engine Stop     ->  SessionSuspended | HandedOver | SessionKept
    controller  PrepareSession           ->  engine Prepare  ->  SessionPrepared | PrepareRefused

A session that is told to stop finishes the chunk in work and forgets the credits behind it. Until the engine says
Stopped its credits wait here (at most EARLY_CREDITS_MAX): if the point could not be written they go on, and the gateway
never notices; if it was, they are refused with code "moving". A source that has handed over says so at every heartbeat
and does nothing else until OpenSession(adopt) or CloseSession tells it who goes on: no time-out of its own decides.

A prepared slot is held under a move's id, not under an epoch: the epoch is decided only by the move's commit. Ids of
moves grow; a word on an older one changes nothing. A slot that nobody asks for is freed after `prepared_keep_s`.
"""

from __future__ import annotations

from typing import Any

from turboserve.model.interface import ModelSpec
from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_books import AwaitPoint, Phase, Prepared, RefusePoint, Session
from turboserve.runtime.worker_far import WorkerFar

PREPARED_KEEP_S = 30.0
"""Longer than any move may take: the controller gives a move up at its deadline and says DropPrepared."""


class WorkerMoves(WorkerFar):
    """Stopping sessions and holding slots for those that come."""

    def __init__(self, hello: m.WorkerHello, spec: ModelSpec, *, prepared_keep_s: float = PREPARED_KEEP_S) -> None:
        super().__init__(hello, spec)
        self._prepared_keep_s = prepared_keep_s

    # ------------------------------------------------------------------ stopping

    def _on_suspend(self, asked: m.SuspendSession, now_s: float) -> None:
        held = self.sessions.get(asked.session_id)
        if held is None:
            before = self.suspended.get(asked.session_id)
            if before is not None and before.epoch == asked.epoch:
                self._tell(before)
            elif asked.epoch not in self.closing.get(asked.session_id, ()):
                self._tell(m.SessionReleased(session_id=asked.session_id, epoch=asked.epoch))
            return
        self._stop(asked, held, move_id=0)

    def _on_hand_over(self, asked: m.HandOver, now_s: float) -> None:
        held = self.sessions.get(asked.session_id)
        if held is None:
            if asked.epoch not in self.closing.get(asked.session_id, ()):
                self._tell(m.SessionReleased(session_id=asked.session_id, epoch=asked.epoch))
            return
        if held.phase is Phase.HANDED_OVER and held.epoch == asked.epoch and held.handed_over is not None:
            if asked.target_address and asked.move_id > held.move_id:
                self._send_again(asked, held)  # to another place than the point has gone to
                return
            # The same state under the newest name: a controller that was restarted may move it again.
            held.move_id = max(held.move_id, asked.move_id)
            held.handed_over = m.HandedOver(
                session_id=asked.session_id,
                epoch=held.epoch,
                move_id=held.move_id,
                next_index=held.next_index,
                point_bytes=held.handed_over.point_bytes,
                sent_bytes=held.handed_over.sent_bytes,
                stopped_ms=held.handed_over.stopped_ms,
            )
            self._tell(held.handed_over)
            return
        self._stop(asked, held, move_id=asked.move_id, target_address=asked.target_address)

    def _stop(
        self, asked: m.SuspendSession | m.HandOver, held: Session, move_id: int, target_address: str = ""
    ) -> None:
        if asked.epoch != held.epoch:
            self.counts.fenced += 1  # of an earlier owner's time, or of a later one's that this worker has not heard of
            return
        if held.phase is Phase.OPEN:
            held.phase, held.move_id, held.target_address = Phase.STOPPING, move_id, target_address
            self._out.append(e.Stop(asked.session_id, held.epoch, release=move_id == 0))
        elif held.phase is Phase.OPENING:
            self._keep(asked.session_id, held, move_id, "conflict", "the session is still being opened")
        elif held.phase is Phase.BROKEN:
            self._keep(asked.session_id, held, move_id, "session_poisoned", "the session is broken")
        elif held.phase is Phase.STOPPING and 0 < held.move_id < move_id:  # the move's newer name, maybe another move
            held.move_id, held.target_address = move_id, target_address
            if held.stopped is not None:
                self._send_last(asked.session_id, held)

    def _keep(self, session_id: str, held: Session, move_id: int, code: str, message: str) -> None:
        self.counts.kept += 1
        kept = m.SessionKept(
            session_id=session_id, epoch=held.epoch, move_id=move_id, code=code[:256], message=message[:1024]
        )
        self._tell(kept)

    def _on_stopped(self, event: e.Stopped, session: Session, now_s: float) -> None:
        if session.phase is not Phase.STOPPING:
            return  # adopted or closed while the engine was at it: what the engine says next counts
        session.stopped, session.stopped_s = event, now_s
        if session.target_address:
            self._send_last(event.session_id, session)
            return  # its credits wait: if the point does not arrive, the session goes on as if nothing had been
        if session.move_id == 0:
            self._hand_back(session, event.next_index)
            del self.sessions[event.session_id]
            self._fence(event.session_id, session.epoch)
            self.counts.suspended += 1
            suspended = m.SessionSuspended(
                session_id=event.session_id,
                epoch=session.epoch,
                next_index=event.next_index,
                point_bytes=event.point_bytes,
            )
            self._remember_suspended(suspended)
            self._tell(suspended)
            return
        self._handed_over(event, session)

    def _handed_over(self, event: e.Stopped, session: Session, sent_bytes: int = 0, stopped_ms: float = 0.0) -> None:
        self._hand_back(session, event.next_index)
        session.phase, session.stopped = Phase.HANDED_OVER, None
        self.counts.handed_over += 1
        session.handed_over = m.HandedOver(
            session_id=event.session_id,
            epoch=session.epoch,
            move_id=session.move_id,
            next_index=event.next_index,
            point_bytes=event.point_bytes,
            sent_bytes=sent_bytes,
            stopped_ms=stopped_ms,
        )
        self._tell(session.handed_over)

    def _hand_back(self, session: Session, next_index: int) -> None:
        """The credits that were not begun: the gateway gives them again, to whoever owns the session then."""
        self._forget_from(session, next_index)
        early, session.early = session.early, []
        for credit in early:
            self._refuse_credit(credit, next_index, "moving")

    def _on_stop_failed(self, event: e.StopFailed, session: Session, now_s: float) -> None:
        if session.phase is not Phase.STOPPING:
            return
        session.phase, session.stopped, session.handed_over = Phase.OPEN, None, None
        self._keep(event.session_id, session, session.move_id, event.code, event.message)
        # The engine forgot what it had not begun; the credits for it are still known here.
        again = [session.requests[index] for index in sorted(session.requests) if index >= event.next_index]
        for request in again:
            self._out.append(e.Begin(event.session_id, session.epoch, request, now_s, now_s + self._spec.chunk_s))
        self._take_early(session, now_s)

    def _tell_handed_over(self) -> None:
        for session in self.sessions.values():
            if session.phase is Phase.HANDED_OVER and session.handed_over is not None:
                self._tell(session.handed_over)

    # ------------------------------------------------------------------ slots for those that come

    def _on_prepare(self, asked: m.PrepareSession, now_s: float) -> None:
        refused = self._why_not_prepare(asked)
        if refused:
            self._refuse_prepare(asked.session_id, asked.move_id, *refused)
            return
        known = self.prepared.get(asked.session_id)
        if known is not None and (known.slot, known.awaits) != (asked.slot, asked.awaits):
            self._drop_prepared(asked.session_id, known)
            known = None
        until_s = now_s + self._prepared_keep_s
        if known is None:
            known = Prepared(asked.move_id, asked.move_id, until_s, not asked.slot, asked.slot, asked.awaits)
            self.prepared[asked.session_id] = known
            if asked.slot:
                self._out.append(e.Prepare(asked.session_id, asked.move_id))
        elif asked.move_id == known.move_id:
            known.until_s = until_s
            self._tell_prepared(asked.session_id, known)
            return
        known.move_id, known.until_s, known.address = asked.move_id, until_s, ""
        if asked.awaits:
            self._out.append(AwaitPoint(asked.session_id, asked.move_id))
        self._tell_prepared(asked.session_id, known)

    def _tell_prepared(self, session_id: str, known: Prepared) -> None:
        if known.stands:
            self._tell(m.SessionPrepared(session_id=session_id, move_id=known.move_id, address=known.address))

    def _why_not_prepare(self, asked: m.PrepareSession) -> tuple[str, str] | None:
        known = self.prepared.get(asked.session_id)
        if known is not None and asked.move_id < known.move_id:
            return "conflict", f"a slot is held for move {known.move_id}"
        if asked.session_id in self.sessions:
            return "conflict", "this worker holds the session"
        if self.draining:
            return "overloaded", "this worker is draining"
        if asked.awaits and not self.hello.arena_bytes:
            return "not_offered", "this worker has no arena for a point from another node"
        if (asked.width, asked.height) != (self._spec.width, self._spec.height):
            return "invalid_request", f"this worker makes {self._spec.width}x{self._spec.height} only"
        return None

    def _refuse_prepare(self, session_id: str, move_id: int, code: str, message: str) -> None:
        self._tell(m.PrepareRefused(session_id=session_id, move_id=move_id, code=code[:256], message=message[:1024]))

    def _on_prepare_event(self, event: e.Prepared | e.PrepareFailed) -> None:
        known = self.prepared.get(event.session_id)
        if known is None or known.asked_id != event.move_id:
            return  # dropped or used while the engine was at it
        if isinstance(event, e.Prepared):
            known.ready = True
            self.counts.prepared += 1
            self._tell_prepared(event.session_id, known)
        else:
            del self.prepared[event.session_id]
            if known.awaits:
                self._out.append(RefusePoint(event.session_id))
            self._refuse_prepare(event.session_id, known.move_id, event.code, event.message)

    def _on_drop_prepared(self, asked: m.DropPrepared, now_s: float) -> None:
        known = self.prepared.get(asked.session_id)
        if known is not None and asked.move_id >= known.move_id:
            self._drop_prepared(asked.session_id, known)

    def _drop_prepared(self, session_id: str, known: Prepared) -> None:
        del self.prepared[session_id]
        if known.slot:
            self._out.append(e.DropPrepared(session_id, known.asked_id))
        if known.awaits:
            self._out.append(RefusePoint(session_id))

    def _drop_forgotten(self, now_s: float) -> None:
        for session_id, known in list(self.prepared.items()):
            if now_s >= known.until_s:
                self._drop_prepared(session_id, known)


def handlers() -> dict[type[m.Message], Any]:
    """What the controller may send of this part."""
    return {
        m.SuspendSession: WorkerMoves._on_suspend,
        m.HandOver: WorkerMoves._on_hand_over,
        m.PrepareSession: WorkerMoves._on_prepare,
        m.DropPrepared: WorkerMoves._on_drop_prepared,
        m.SendPoint: WorkerMoves._on_send_point,
        m.ForgetPoint: WorkerMoves._on_forget_point,
    }
