"""How a worker that is told to end does: part of `WorkerLogic`, without I/O like the rest.

    SIGTERM           WorkerLeaving            ->  the controller moves its sessions away, then says StopWorker
    a second one      WorkerLeaving(at_once)   ->  every session writes its point at its next chunk boundary and is
                                                   suspended, asked or not; the controller puts the points on disk
    a third one       ends there and then

Each ends by a time of its own whatever happens. What was not suspended by then goes on from its last recovery point,
or from the input log, wherever it is opened next.
"""

from __future__ import annotations

from turboserve.model.interface import ModelSpec
from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_books import CONTROLLER, Action, Phase, Stop
from turboserve.runtime.worker_moves import WorkerMoves

AT_ONCE_S = 3.0
"""From the second signal on: a chunk or two of the models that are fast enough to be watched."""


class WorkerEnding(WorkerMoves):
    """Being told to end, once and again."""

    def __init__(
        self, hello: m.WorkerHello, spec: ModelSpec, *, leave_timeout_s: float, prepared_keep_s: float
    ) -> None:
        super().__init__(hello, spec, prepared_keep_s=prepared_keep_s)
        self._leave_timeout_s = leave_timeout_s
        self._leave_by_s: float | None = None
        self._at_once = False

    def on_terminate(self, now_s: float) -> list[Action]:
        """A signal to end; see above for the first, the second and the third."""
        if self._at_once:
            self._out.append(Stop(f"told to end three times; {self._left()}"))
            return self._flush()
        if self._leave_by_s is None:
            self._leave_by_s = now_s + self._leave_timeout_s
        else:
            self._at_once = True
            self._leave_by_s = min(self._leave_by_s, now_s + AT_ONCE_S)
        self.draining = True
        self._tell_leaving()
        if self._at_once:
            self._suspend_all()
        self._stop_when_left(now_s)
        return self._flush()

    def _tell_leaving(self) -> None:
        hello = self.hello
        self._tell(m.WorkerLeaving(worker_id=hello.worker_id, worker_epoch=hello.worker_epoch, at_once=self._at_once))

    def _suspend_all(self) -> None:
        """As if the controller had asked for each; one that is being opened or moved is asked for when that is over."""
        for session_id, held in self.sessions.items():
            if held.phase is Phase.OPEN:
                held.phase, held.move_id = Phase.STOPPING, 0
                self._out.append(e.Stop(session_id, held.epoch, release=True))

    def _stop_when_left(self, now_s: float) -> None:
        """Once told to end: at the deadline, or when nothing is held and there is no controller to say StopWorker."""
        if self._leave_by_s is None:
            return
        if now_s >= self._leave_by_s:
            self._out.append(Stop(f"the time to leave is over; {self._left()}"))
        elif not self.sessions and not self.closing and CONTROLLER not in self._connected:
            self._out.append(Stop("drained"))

    def _left(self) -> str:
        if not self.sessions:
            return "nothing was left here"
        names = ", ".join(sorted(self.sessions)[:20])
        return f"not suspended, to go on from their last points or the input log: {len(self.sessions)} ({names})"
