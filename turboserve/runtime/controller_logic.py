"""The controller as a state machine without I/O: messages and time in, messages and directory writes out.

It alone writes the directory. A change of owner is one compare-and-set there; only then does the new owner hear of
it. Decisions are the scheduler's (`decide` is `orchestrator.scheduler.tick`, the simulator calls the same); this file
takes the gateway's wishes and carries the plan out. In the files below it: operators (`controller_admin`), workers that
come and go (`controller_fleet`), what is lost (`controller_recovery`), how sessions move (`controller_moves`,
`controller_opening`), accounts (`controller_books`).

    gateway   CreateSession EndSession SessionActivity AdminCommand  ->  OpDone SessionState SessionPlaced WorkerChanged
    worker    hello, heartbeats, what docs/moving.md lists           ->  Lease, what docs/moving.md lists
    launcher  FleetEvent                                             ->  FleetWish

Every message may come twice or too late: an epoch that is not the session's newest is ignored, an op_id that was
answered gets its first answer again.
"""

from __future__ import annotations

from turboserve.orchestrator import plan as plans
from turboserve.orchestrator import view as views
from turboserve.runtime import messages as m
from turboserve.runtime.controller_admin import ControllerAdmin
from turboserve.runtime.controller_books import (
    DECISIONS_KEPT,
    GATEWAY,
    Drop,
    DropPoints,
    Effect,
    Kind,
    Live,
    Phase,
    Send,
    Spill,
)
from turboserve.session import SessionRecord, SessionState, public_state

ANEW_BITS = 20
"""A session that had epochs nobody remembers begins above all of them: each new record takes a range of its own."""


class ControllerLogic(ControllerAdmin):
    """One controller. All times are seconds of one monotonic clock, passed in."""

    # ------------------------------------------------------------------ events

    def on_message(self, source: str, message: m.Message, now_s: float) -> list[Effect]:
        """One message from a worker id, GATEWAY or LAUNCHER."""
        handler = getattr(self, f"_on_{type(message).__name__}", None)
        if handler is None:
            self._out.append(Drop(source, f"{type(message).__name__} is not for the controller"))
        else:
            handler(source, message, now_s)
        return self._flush()

    def on_disconnect(self, source: str, now_s: float) -> list[Effect]:
        """A channel ended. A worker without its channel is lost at once; the gateway comes back by itself."""
        if source in self.workers:
            self._lose_worker(source, "its connection closed", now_s)
            self._tick(now_s)
        return self._flush()

    def on_timer(self, now_s: float) -> list[Effect]:
        """Leases, deadlines, queue ages and the scheduler's own wake-up. Call it at least every `lease_s` / 4."""
        changed = False
        stood_s = now_s - self._timer_s - self.lease_s / 4
        self._timer_s = now_s
        for worker_id, worker in list(self.workers.items()):
            if stood_s > 0:
                # This process stood still and heard nobody: that was not the workers' silence.
                worker.lease_until_s += stood_s
            if now_s > worker.lease_until_s:
                self._lose_worker(worker_id, f"no heartbeat for {self.lease_s:g} s", now_s)
                self._out.append(Drop(worker_id, "lease ran out"))
                changed = True
        changed |= self._move_deadlines(now_s)
        changed |= self._adoption_deadlines(now_s)
        for live in self._queue():
            if live.adopt_by_s is None and now_s - live.queued_since_s > self.queue_age_max_s:
                self._fail(live, "queue_timeout", f"no room within {self.queue_age_max_s:g} s")
        self._empty_late(now_s)
        self._save_points(now_s)
        if self.stopping:
            self._stop_step(now_s)
        if changed or (self.wake_at_s is not None and now_s >= self.wake_at_s):
            self._tick(now_s)
        return self._flush()

    # ------------------------------------------------------------------ gateway

    def _on_GatewayHello(self, source: str, hello: m.GatewayHello, now_s: float) -> None:
        self.gateway_hello = hello
        self._delivered = None
        for worker_id in self.workers:
            self._tell_worker(worker_id)
            self._tell_where_the_gateway_is(worker_id)
        for live in self.sessions.values():
            if live.adopt_by_s is not None:
                continue  # not known yet whether its worker still has it: the gateway goes on as it was
            if live.record.state in (SessionState.RUNNING, SessionState.STALLED, SessionState.PRECOPY):
                self._tell_placed(live)
            self._tell_session(live)

    def _on_CreateSession(self, source: str, asked: m.CreateSession, now_s: float) -> None:
        if self._answered(asked.op_id):
            return
        known = self.sessions.get(asked.session_id)
        if known is not None:
            # The same wish after a controller was restarted, or a gateway's that was: it is there already.
            if known.request.op_id != asked.op_id and not asked.adopt:
                self._answer(asked.op_id, code="conflict", message="this session exists already")
                return
            if known.record.state is SessionState.CLOSING:
                self._answer(asked.op_id, code="conflict", message="this session ends", retry_after_s=0.2)
                return
            if known.adopt_by_s is None and known.record.state in (SessionState.RUNNING, SessionState.STALLED):
                self._tell_placed(known)
            self._tell_session(known)
            self._agree_on_steps(known, asked)
            self._answer_state(asked.op_id, known)
            return
        if asked.session_id in self.failed:
            code, message = self.failed[asked.session_id]
            self._answer(asked.op_id, code=code, message=message)
            return
        if len(self._queue()) >= self.queue_max:
            self._answer(asked.op_id, code="overloaded", message="the queue is full", retry_after_s=5.0)
            return
        record = SessionRecord(
            session_id=asked.session_id,
            tenant=asked.tenant,
            model=asked.model,
            seed=asked.seed,
            created_s=now_s,
            width=asked.width,
            height=asked.height,
            steps=asked.steps,
            epoch=max(asked.epoch, self._store.next_epoch("anew") << ANEW_BITS) if asked.adopt else 0,
        )
        self._store.insert(record, m.encode(asked))
        live = self._add(record, asked, now_s)
        # Of a gateway that had it before: there may be a recovery point, else it is made again from the input log.
        live.began = asked.adopt or asked.next_index > 0
        self._agree_on_steps(live, asked)
        self._tick(now_s)
        self._answer_state(asked.op_id, live)

    def _answer_state(self, op_id: int, live: Live) -> None:
        record = live.record
        self._answer(
            op_id, state=public_state(record.state).value, queue_position=self._queue_position(record.session_id)
        )

    def _agree_on_steps(self, live: Live, asked: m.CreateSession) -> None:
        """A controller that starts learns here which sessions run on reduced steps. After that its own word holds, and
        is said again to a gateway that has missed it."""
        steps = self.view.sessions.steps
        if not live.steps_known:
            live.steps_known = True
            steps[live.row] = min(asked.steps_now, live.request.steps) or live.request.steps
        elif asked.adopt and asked.steps_now not in (0, steps[live.row]):
            said = m.SetSteps(session_id=asked.session_id, steps=int(steps[live.row]))
            self._out.append(Send(GATEWAY, said))

    def _add(self, record: SessionRecord, asked: m.CreateSession, now_s: float) -> Live:
        row = views.add_session(
            self.view,
            asked.session_id,
            now_s=now_s,
            tenant=self._tenant(asked.tenant, asked.tenant_weight),
            row=self._free_rows.pop() if self._free_rows else None,
        )
        columns = self.view.sessions
        columns.steps[row] = columns.steps_full[row] = asked.steps
        columns.may_reduce[row] = asked.allow_reduced_steps
        # A viewer is on the way; SessionActivity corrects it.
        live = Live(record, asked, row, queued_since_s=now_s)
        self.sessions[asked.session_id] = live
        self._show(live)
        return live

    def _on_EndSession(self, source: str, asked: m.EndSession, now_s: float) -> None:
        if self._answered(asked.op_id):
            return
        live = self.sessions.get(asked.session_id)
        if live is not None and live.record.state is not SessionState.CLOSING:
            owner, move = live.record.owner, live.move
            self._count_period(live, False, now_s)
            self._drop_prepared(live)
            if move is not None and move.kind is Kind.MIGRATE and move.phase is Phase.OPEN:
                self._send_close(move.source, asked.session_id, move.source_epoch)
            live.move, live.retry_at_s = None, None
            self._move(live, SessionState.CLOSING, asked.reason)
            if owner is not None and (owner in self.workers or live.adopt_by_s is not None):
                self._send_close(owner, asked.session_id, live.record.epoch)
            else:
                self._forget(live, SessionState.CLOSED)
            self._tick(now_s)
        self._answer(asked.op_id, state="closed")

    def _on_SessionReleased(self, source: str, released: m.SessionReleased, now_s: float) -> None:
        worker = self.workers.get(source)
        if worker is not None:
            worker.closing.discard((released.session_id, released.epoch))
        live = self._owned(source, released.session_id, released.epoch)
        if live is not None and live.record.state is SessionState.CLOSING:
            self._forget(live, SessionState.CLOSED)
        elif live is not None and (live.move is None or live.move.phase is not Phase.OPEN):
            self._recover(live, now_s, f"{source} does not have it")
        elif released.session_id not in self.sessions:
            # It may have written a point after the session had ended.
            self._out.append(DropPoints(released.session_id))
        self._stop_if_empty(source)
        self._tick(now_s)

    def _on_SessionActivity(self, source: str, seen: m.SessionActivity, now_s: float) -> None:
        live = self.sessions.get(seen.session_id)
        if live is None or live.record.state is SessionState.CLOSING:
            return
        live.attached = seen.attached
        live.wanted = seen.active
        self._count_period(live, seen.active, now_s)
        self._take_deadline(live, seen, now_s)
        if live.record.state in (SessionState.RUNNING, SessionState.STALLED) and live.move is None:
            # In memory only: a controller that restarts hears it again from the gateway.
            live.record.move(SessionState.RUNNING if seen.active else SessionState.STALLED)
        self._show(live)
        self._shelve_unwatched(live)
        self._tick(now_s)

    # ------------------------------------------------------------------ deciding

    def _tick(self, now_s: float) -> None:
        if self.stopping:
            return
        plan, self._memory = self._decide(self.view, self._memory, now_s)
        self.wake_at_s = plan.wake_at_s
        for action in plan.actions:
            self._carry_out(action, now_s)
        self._tell_queue()

    def _carry_out(self, action: plans.Action, now_s: float) -> None:
        """One action of a plan. What does not fit what is (a session that closes, a worker just lost) is left out:
        the next tick sees what is."""
        live = self.sessions.get(getattr(action, "session", ""))
        match action:
            case plans.Place() if live is not None:
                self._place(live, action.worker, now_s, action.reason)
            case plans.Resume() if live is not None:
                self._resume(live, action.worker, now_s, action.reason)
            case plans.Migrate() if live is not None and self.can_move:
                if live.record.owner == action.source:
                    self._migrate(live, action.worker, now_s, action.reason)
            case plans.Suspend() if live is not None and self.can_move:
                if live.record.owner == action.worker:
                    self._suspend(live, "host", now_s, action.reason)
            case plans.SetSteps() if live is not None:
                self.view.sessions.steps[live.row] = action.steps
                live.steps_known = True
                self._out.append(Send(GATEWAY, m.SetSteps(session_id=action.session, steps=action.steps)))
                self._note(now_s, "set_steps", session=action.session, reason=action.reason)
            case plans.Queue():
                self._note(now_s, "queue", session=action.session, reason=action.reason)
            case plans.AddWorker():
                self._add_workers(action.count, action.reason, now_s)
            case plans.DrainWorker() if action.worker in self.workers:
                self._drain(action.worker, action.reason, now_s)
            case plans.UndrainWorker():
                self._undrain(action, now_s)
            case plans.ReleaseWorker():
                self._release(action, now_s)
            case _ if live is not None or not hasattr(action, "session"):
                # Said once, not hidden: what this fleet cannot carry out stands in the decision log.
                line = f"{type(action).__name__}: {action.reason}"
                if line not in self._not_carried_out:
                    self._not_carried_out[line] = None
                    self._note(now_s, "not_carried_out", reason=line)
                    while len(self._not_carried_out) > DECISIONS_KEPT:
                        del self._not_carried_out[next(iter(self._not_carried_out))]

    def _place(self, live: Live, wanted: str, now_s: float, reason: str) -> None:
        record = live.record
        if record.state not in (SessionState.QUEUED, SessionState.RECOVERING) or live.move or record.owner:
            return
        worker_id = self._by_its_point(live, self._apart(live, wanted, now_s))
        if worker_id is None or not self._takes(worker_id):
            return
        kind = Kind.PLACE if record.state is SessionState.QUEUED else Kind.RECOVER
        if kind is Kind.RECOVER and self._bring(live, worker_id, kind, now_s, reason):
            return
        if self._open(live, worker_id, kind, SessionState.LOADING, now_s, reason=reason):
            self._note(now_s, "place", worker=worker_id, session=record.session_id, reason=reason)

    def _resume(self, live: Live, wanted: str, now_s: float, reason: str, *, there: bool = False) -> bool:
        """`there`: on that worker, and not on another one of the node where its point lies."""
        if live.record.state not in (SessionState.HOST, SessionState.DISK) or live.move is not None:
            return False
        worker_id = self._apart(live, wanted, now_s)
        if not there:
            worker_id = self._by_its_point(live, worker_id)
        if worker_id is None or not self._takes(worker_id):
            return False
        if live.record.state is SessionState.DISK and live.disk_bytes and not live.point_bytes:
            self._load(live)
            return True  # the tick puts it somewhere once its point is there
        if self._bring(live, worker_id, Kind.RESUME, now_s, reason):
            return True
        if not self._open(live, worker_id, Kind.RESUME, SessionState.RESUMING, now_s, reason=reason):
            return False
        self._note(now_s, "resume", worker=worker_id, session=live.record.session_id, reason=reason)
        self._tell_session(live)
        return True


__all__ = ["GATEWAY", "ControllerLogic", "Drop", "DropPoints", "Send", "Spill"]
