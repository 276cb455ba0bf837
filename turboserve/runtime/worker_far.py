"""Recovery points between nodes, the worker's half of docs/moving.md: part of `WorkerLogic`, without I/O like the rest.

    controller  PrepareSession(awaits)  ->  AwaitPoint  ->  SessionPrepared(address)        at the destination
    controller  SendPoint               ->  SendPoint   ->  PointSent | PointKept           while the session goes on
    controller  HandOver(address)       ->  engine Stop, then SendPoint  ->  HandedOver | SessionKept

A session that moves to another node stands still from its chunk boundary until the rest of its point has arrived there.
Its credits wait here meanwhile: if the point does not arrive, it goes on as one whose point could not be written.

What lies in an arena of this worker's own is unknown to everybody else, so it says now and then whose it is.
"""

from __future__ import annotations

from turboserve.model.interface import ModelSpec
from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_books import (
    Action,
    ForgetPoint,
    Phase,
    PointAwaited,
    PointEvent,
    PointNotAwaited,
    PointNotSent,
    PointSent,
    Prepared,
    SendPoint,
    Session,
    TellPoints,
)
from turboserve.runtime.worker_credits import WorkerCredits

POINTS_TOLD_S = 10.0


class WorkerFar(WorkerCredits):
    """Points that leave for another node and that come from one."""

    points_told_s = POINTS_TOLD_S

    def __init__(self, hello: m.WorkerHello, spec: ModelSpec) -> None:
        super().__init__(hello, spec)
        self._points_due_s = float("inf")

    # ------------------------------------------------------------------ from the controller

    def _on_send_point(self, asked: m.SendPoint, now_s: float) -> None:
        held = self.sessions.get(asked.session_id)
        if not self.hello.arena_bytes:
            self._keep_point(asked.session_id, asked.move_id, "not_offered", "this worker has no arena")
        elif held is not None and held.epoch != asked.epoch:
            self.counts.fenced += 1
        else:
            self._out.append(SendPoint(asked.session_id, asked.move_id, asked.target_address, ahead=True))

    def _on_forget_point(self, asked: m.ForgetPoint, now_s: float) -> None:
        here = (self.sessions, self.prepared, self.closing)
        if not any(asked.session_id in books for books in here):
            self.suspended.pop(asked.session_id, None)
            self._out.append(ForgetPoint(asked.session_id))

    # ------------------------------------------------------------------ from who carries the points

    def on_point(self, event: PointEvent, now_s: float) -> list[Action]:
        """What became of a point that was to come or to go."""
        if isinstance(event, PointAwaited | PointNotAwaited):
            self._on_awaited(event)
        elif event.ahead:
            self._on_sent_ahead(event)
        else:
            session = self.sessions.get(event.session_id)
            standing = session is not None and session.phase is Phase.STOPPING and session.move_id == event.move_id
            if session is not None and standing and session.stopped is not None:
                self._on_sent_last(event, session, session.stopped, now_s)
        return self._flush()

    def _on_awaited(self, event: PointAwaited | PointNotAwaited) -> None:
        known = self.prepared.get(event.session_id)
        if known is None or known.move_id != event.move_id:
            return
        if isinstance(event, PointAwaited):
            known.address = event.address
            self._tell_prepared(event.session_id, known)
        else:
            self._drop_prepared(event.session_id, known)
            self._refuse_prepare(event.session_id, event.move_id, event.code, event.message)

    def _on_sent_ahead(self, event: PointSent | PointNotSent) -> None:
        if isinstance(event, PointNotSent) and event.code == "not_found" and event.session_id in self.sessions:
            # It has made no chunk yet: all of it goes with its last point.
            self._tell(m.PointSent(session_id=event.session_id, move_id=event.move_id))
        elif isinstance(event, PointNotSent):
            self._keep_point(event.session_id, event.move_id, event.code, event.message)
        else:
            sent = m.PointSent(session_id=event.session_id, move_id=event.move_id, sent_bytes=event.sent_bytes)
            self._tell(sent)

    def _on_sent_last(
        self, event: PointSent | PointNotSent, session: Session, stopped: e.Stopped, now_s: float
    ) -> None:
        if isinstance(event, PointNotSent):
            failed = e.StopFailed(event.session_id, stopped.next_index, event.code, event.message)
            self._on_stop_failed(failed, session, now_s)
            return
        self._handed_over(stopped, session, event.sent_bytes, max(0.0, 1e3 * (now_s - session.stopped_s)))

    # ------------------------------------------------------------------ sending the last of it

    def _send_last(self, session_id: str, session: Session) -> None:
        """It stands at a boundary and its last point is committed here."""
        if session.target_address:
            self._out.append(SendPoint(session_id, session.move_id, session.target_address, ahead=False))
        elif session.stopped is not None:
            self._handed_over(session.stopped, session)  # the newer move stays within the node

    def _send_again(self, asked: m.HandOver, held: Session) -> None:
        """Handed over already, and now under the name of another move: the point has to go there too."""
        assert held.handed_over is not None
        handed = held.handed_over
        held.phase, held.move_id, held.target_address = Phase.STOPPING, asked.move_id, asked.target_address
        held.stopped = e.Stopped(asked.session_id, handed.next_index, handed.point_bytes)
        held.handed_over = None
        self._send_last(asked.session_id, held)

    def _keep_point(self, session_id: str, move_id: int, code: str, message: str) -> None:
        self._tell(m.PointKept(session_id=session_id, move_id=move_id, code=code[:256], message=message[:1024]))

    # ------------------------------------------------------------------ what lies here

    def _tell_points(self, now_s: float) -> None:
        """A worker of the server's node has no arena of its own: the controller looks into that one itself."""
        if self.hello.own_arena and now_s >= self._points_due_s:
            self._points_due_s = now_s + self.points_told_s
            self._out.append(TellPoints())

    # ------------------------------------------------------------------ `worker_moves.py`

    def _tell_prepared(self, session_id: str, known: Prepared) -> None:
        raise NotImplementedError

    def _drop_prepared(self, session_id: str, known: Prepared) -> None:
        raise NotImplementedError

    def _refuse_prepare(self, session_id: str, move_id: int, code: str, message: str) -> None:
        raise NotImplementedError

    def _on_stop_failed(self, event: e.StopFailed, session: Session, now_s: float) -> None:
        raise NotImplementedError

    def _handed_over(self, event: e.Stopped, session: Session, sent_bytes: int = 0, stopped_ms: float = 0.0) -> None:
        raise NotImplementedError
