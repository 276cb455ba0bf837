"""What operators wish of the controller: sessions moved, workers drained, added, or killed to see what happens."""

from __future__ import annotations

from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import PROFILING_MAX, Live, Send
from turboserve.runtime.controller_fleet import WORKERS_MAX, ControllerFleet
from turboserve.session import SessionState, public_state


class ControllerAdmin(ControllerFleet):
    """AdminCommand and its answers."""

    # ------------------------------------------------------------------ operators

    def _on_AdminCommand(self, source: str, asked: m.AdminCommand, now_s: float) -> None:
        if self._answered(asked.op_id):
            return
        live = self.sessions.get(asked.session_id)
        if asked.kind in ("migrate", "suspend", "resume") and live is None:
            self._answer(asked.op_id, code="not_found", message="no such session on any worker")
        elif asked.kind in ("drain", "kill_worker", "profile") and asked.worker_id not in self.workers:
            self._answer(asked.op_id, code="not_found", message=f"no worker {asked.worker_id!r}")
        elif asked.kind == "drain":
            self._drain(asked.worker_id, "asked by an operator", now_s)
            held = len(self._held_by(asked.worker_id))
            self._tick(now_s)
            self._answer(asked.op_id, state="draining", message=f"{held} sessions left")
        elif asked.kind == "kill_worker" and not self.may_kill:
            message = "workers are killed only where the server listens on loopback and has no keys"
            self._answer(asked.op_id, code="forbidden", message=message)
        elif asked.kind == "kill_worker":
            self.workers[asked.worker_id].blamed = False
            self._note(now_s, "kill", worker=asked.worker_id, reason="asked by an operator")
            self._wish("kill", asked.worker_id)
            self._answer(asked.op_id, state="killed", message=f"{asked.worker_id} gets SIGKILL")
        elif asked.kind == "profile":
            self._profiling[asked.op_id] = asked.worker_id
            if len(self._profiling) > PROFILING_MAX:
                del self._profiling[next(iter(self._profiling))]
            wish = m.ProfileWorker(worker_id=asked.worker_id, op_id=asked.op_id, chunks=max(1, min(asked.count, 1000)))
            self._out.append(Send(asked.worker_id, wish))
        elif asked.kind == "add_workers":
            self._admin_add(asked, now_s)
        elif live is not None and asked.kind == "migrate":
            self._admin_migrate(asked, live, now_s)
        elif live is not None and asked.kind == "suspend" and self.can_move:
            if live.record.state in (SessionState.HOST, SessionState.SPILLING, SessionState.DISK):
                self._answer(asked.op_id, state="suspended", message="it was suspended already")
            elif self._suspend(live, "host", now_s, "asked by an operator"):
                self._answer(asked.op_id, state="suspended", message="at its next chunk boundary")
            else:
                self._answer_not_now(asked.op_id, live)
        elif live is not None and asked.kind == "resume":
            self._admin_resume(asked, live, now_s)
        else:
            self._answer(asked.op_id, code="conflict", message=f"this fleet cannot {asked.kind}")

    def _admin_resume(self, asked: m.AdminCommand, live: Live, now_s: float) -> None:
        """Have it on a worker. One that rests there already is left as it is: whether chunks are wanted is the
        gateway's to say, and it would not say again that nobody wants them."""
        rests = live.record.state in (SessionState.RUNNING, SessionState.STALLED)
        if rests and live.adopt_by_s is None:
            state = public_state(live.record.state).value
            self._answer(asked.op_id, state=state, message=f"{live.record.owner} has it already")
            return
        live.wanted = True
        self._show(live)
        self._tick(now_s)
        self._answer_state(asked.op_id, live)

    def _on_WorkerProfiling(self, source: str, told: m.WorkerProfiling, now_s: float) -> None:
        if self._profiling.get(told.op_id) != source:
            return  # nobody asked that worker
        del self._profiling[told.op_id]
        if told.code:
            self._answer(told.op_id, code=told.code, message=told.message)
        else:
            self._note(now_s, "profile", worker=source, reason="asked by an operator")
            self._answer(told.op_id, state="capturing", message=told.path)

    def _answer_not_now(self, op_id: int, live: Live) -> None:
        message = f"the session is {live.record.state.value}; expected running or stalled on a worker"
        self._answer(op_id, code="conflict", message=message, retry_after_s=0.2)

    def _admin_add(self, asked: m.AdminCommand, now_s: float) -> None:
        view = self.view
        fixed = view.workers_min == view.workers_max
        asked_before = self._store.recorded_wish(asked.op_id)
        if asked_before is not None:
            # An earlier controller was about to ask, or had asked: the launcher knows which, by the request ids.
            self._ask_again(asked_before, now_s)
            self._added(asked.op_id, [worker_id for _, worker_id in asked_before], fixed)
            return
        there = len(self._there())
        most = WORKERS_MAX if fixed else view.workers_max
        if asked.count < 1 or there + asked.count > most:
            message = f"{there} workers are here; at most {most} may be"
            self._answer(asked.op_id, code="conflict", message=message)
            return
        wished = self._add_workers(
            asked.count, "asked by an operator", now_s, lambda wishes: self._store.record_wish(asked.op_id, wishes)
        )
        self._added(asked.op_id, wished, fixed)

    def _added(self, op_id: int, worker_ids: list[str], fixed: bool) -> None:
        if fixed:
            self.view.workers_min = self.view.workers_max = len(self._there())
        self._answer(op_id, state="starting", message=", ".join(worker_ids))

    def _admin_migrate(self, asked: m.AdminCommand, live: Live, now_s: float) -> None:
        target, reason = asked.worker_id, "asked by an operator"
        if target not in self.workers:
            self._answer(asked.op_id, code="not_found", message=f"no worker {target!r}")
            return
        if live.record.owner == target and live.move is None:
            self._answer(asked.op_id, state=public_state(live.record.state).value, message="it is there already")
            return
        numerics_id, fits = self.workers[target].hello.numerics_id, self._fits(live, target)
        if not fits and not asked.allow_approximate:
            message = (
                f"{target} makes other bits (numerics_id {numerics_id}) than the session has ({live.numerics_id}): its "
                "stream would go on, but not as it would have; expected a worker with the same numerics_id, or "
                '"allow_approximate": true'
            )
            self._answer(asked.op_id, code="conflict", message=message)
            return
        if not self._takes(target):
            self._answer(asked.op_id, code="overloaded", message=f"{target} has no free slot", retry_after_s=1.0)
            return
        if not fits:
            live.allowed_numerics, reason = numerics_id, f"{reason}, who allows other numerics"
        state = live.record.state
        if state in (SessionState.HOST, SessionState.DISK) and self._resume(live, target, now_s, reason, there=True):
            self._answer(asked.op_id, state="suspended", message=f"it is brought to {target}")
        elif state is SessionState.RECOVERING and not live.record.owner:
            self._place(live, target, now_s, reason)
            self._answer_state(asked.op_id, live)
        elif self.can_move and self._migrate(live, target, now_s, reason):
            self._answer(asked.op_id, state="migrating", message=f"to {target}")
        else:
            live.allowed_numerics = ""
            self._answer_not_now(asked.op_id, live)

    def _place(self, live: Live, wanted: str, now_s: float, reason: str) -> None:
        raise NotImplementedError

    def _resume(self, live: Live, wanted: str, now_s: float, reason: str, *, there: bool = False) -> bool:
        raise NotImplementedError

    def _answer_state(self, op_id: int, live: Live) -> None:
        raise NotImplementedError
