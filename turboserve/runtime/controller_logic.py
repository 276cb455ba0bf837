"""The controller as a state machine without I/O: messages and time in, messages and directory writes out.

It alone writes the directory. A change of owner is one compare-and-set there; only then does the new owner hear of
it. Decisions are the scheduler's (`decide` is `orchestrator.scheduler.tick`, the simulator calls the same); this file
keeps the view that it reads up to date and carries its plan out.

    gateway   CreateSession EndSession SessionActivity AdminCommand  ->  OpDone SessionState SessionPlaced WorkerChanged
    worker    WorkerHello Heartbeat SessionOpened|Refused|Released|Broken  ->  Lease OpenSession CloseSession StopWorker

Every message may come twice or too late: an epoch that is not the session's newest is ignored, an op_id that was
answered gets its first answer again.
"""

from __future__ import annotations

from turboserve.errors import Conflict
from turboserve.orchestrator import plan as plans
from turboserve.orchestrator import view as views
from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import (
    DECISIONS_KEPT,
    GATEWAY,
    ControllerBooks,
    Drop,
    Effect,
    Live,
    Send,
    Worker,
)
from turboserve.session import SessionRecord, SessionState, public_state

STRIKES_MAX = 3


class ControllerLogic(ControllerBooks):
    """One controller. All times are seconds of one monotonic clock, passed in."""

    # ------------------------------------------------------------------ events

    def on_message(self, source: str, message: m.Message, now_s: float) -> list[Effect]:
        """One message from a worker id or GATEWAY."""
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
        """Leases, queue ages and the scheduler's own wake-up. Call it at least every `lease_s` / 4."""
        for worker_id, worker in list(self.workers.items()):
            if now_s > worker.lease_until_s:
                self._lose_worker(worker_id, f"no heartbeat for {self.lease_s:g} s", now_s)
                self._out.append(Drop(worker_id, "lease ran out"))
        for live in self._queue():
            if now_s - live.queued_since_s > self.queue_age_max_s:
                self._fail(live, "queue_timeout", f"no room within {self.queue_age_max_s:g} s")
        if self.wake_at_s is not None and now_s >= self.wake_at_s:
            self._tick(now_s)
        return self._flush()

    def _flush(self) -> list[Effect]:
        out, self._out = self._out, []
        if out:
            self.changed = True
        return out

    # ------------------------------------------------------------------ workers

    def _on_WorkerHello(self, source: str, hello: m.WorkerHello, now_s: float) -> None:
        known = self.workers.get(hello.worker_id)
        if hello.version != m.PROTOCOL_VERSION:
            self._out.append(Send(source, m.Failure(code="version", message=f"speak version {m.PROTOCOL_VERSION}")))
            self._out.append(Drop(source, "another protocol version"))
            return
        if known is not None:
            if known.hello.worker_epoch >= hello.worker_epoch:
                return  # the same hello again, or a zombie's
            self._lose_worker(hello.worker_id, "replaced by a newer process", now_s)
        row = views.add_worker(
            self.view,
            hello.worker_id,
            state=views.READY,
            request_s=now_s,
            ready_at_s=now_s,
            gpu_count=max(1, hello.gpu_count),
            device_class=hello.device_class,
            model=hello.model,
            row=self._free_worker_rows.pop() if self._free_worker_rows else None,
        )
        self.workers[hello.worker_id] = Worker(hello, row, "ready", now_s + self.lease_s)
        self._note(now_s, "worker_ready", worker=hello.worker_id, reason=f"{hello.device}, {hello.slot_count} slots")
        self._out.append(Send(hello.worker_id, m.Lease(lease_s=self.lease_s, worker_epoch=hello.worker_epoch)))
        self._tell_worker(hello.worker_id)
        self._tick(now_s)

    def _on_Heartbeat(self, source: str, beat: m.Heartbeat, now_s: float) -> None:
        worker = self.workers.get(beat.worker_id)
        if worker is None or worker.hello.worker_epoch != beat.worker_epoch:
            return
        worker.stats = beat
        worker.lease_until_s = now_s + self.lease_s
        self.changed = True
        self._out.append(Send(source, m.Lease(lease_s=self.lease_s, worker_epoch=beat.worker_epoch)))

    def _on_WorkerLeaving(self, source: str, leaving: m.WorkerLeaving, now_s: float) -> None:
        if leaving.worker_id in self.workers:
            self._drain(leaving.worker_id, "it was told to end", now_s)

    def _drain(self, worker_id: str, reason: str, now_s: float) -> None:
        worker = self.workers[worker_id]
        if worker.state != "draining":
            worker.state = "draining"
            self.view.workers.state[worker.row] = views.DRAINING
            self._note(now_s, "drain", worker=worker_id, reason=reason)
            self._tell_worker(worker_id)
        self._stop_if_empty(worker_id)

    def _stop_if_empty(self, worker_id: str) -> None:
        worker = self.workers.get(worker_id)
        if worker and worker.state == "draining" and not self._held_by(worker_id):
            self._out.append(Send(worker_id, m.StopWorker(worker_id=worker_id, reason="drained, it owns nothing")))

    def _lose_worker(self, worker_id: str, reason: str, now_s: float) -> None:
        worker = self.workers.pop(worker_id)
        self.view.workers.state[worker.row] = views.ABSENT
        self._free_worker_rows.append(worker.row)
        self._note(now_s, "worker_lost", worker=worker_id, reason=reason)
        self._out.append(
            Send(
                GATEWAY,
                m.WorkerChanged(
                    worker_id=worker_id, worker_epoch=worker.hello.worker_epoch, state="lost", reason=reason
                ),
            )
        )
        for live in self._held_by(worker_id):
            if live.record.state is SessionState.CLOSING:
                self._forget(live, SessionState.CLOSED)
            else:
                self._fail(live, "worker_lost", f"worker {worker_id} was lost: {reason}")

    def _tell_worker(self, worker_id: str) -> None:
        worker = self.workers[worker_id]
        self._out.append(
            Send(
                GATEWAY,
                m.WorkerChanged(
                    worker_id=worker_id,
                    worker_epoch=worker.hello.worker_epoch,
                    state=worker.state,
                    numerics_id=worker.hello.numerics_id,
                ),
            )
        )

    # ------------------------------------------------------------------ sessions on workers

    def _owned(self, source: str, session_id: str, epoch: int) -> Live | None:
        """The session, if `source` speaks for its newest epoch."""
        live = self.sessions.get(session_id)
        if live is None or live.record.epoch != epoch or live.record.owner != source:
            return None
        return live

    def _on_SessionOpened(self, source: str, opened: m.SessionOpened, now_s: float) -> None:
        known = self.sessions.get(opened.session_id)
        if known is None or opened.epoch < known.record.epoch:
            # Given up while the worker's channel was down: it says what it still holds, and nobody else would free it.
            self._out.append(Send(source, m.CloseSession(session_id=opened.session_id, epoch=opened.epoch)))
            return
        live = self._owned(source, opened.session_id, opened.epoch)
        if live is None or live.record.state is not SessionState.LOADING:
            return
        self._move(live, SessionState.RUNNING)
        placed = m.SessionPlaced(
            session_id=opened.session_id,
            epoch=opened.epoch,
            worker_id=source,
            numerics_id=self.workers[source].hello.numerics_id,
        )
        self._out.append(Send(GATEWAY, placed))
        self._tell_session(live)

    def _on_SessionRefused(self, source: str, refused: m.SessionRefused, now_s: float) -> None:
        live = self._owned(source, refused.session_id, refused.epoch)
        if live is None or live.record.state is not SessionState.LOADING:
            return
        live.record.strikes += 1
        if live.record.strikes >= STRIKES_MAX:
            self._fail(live, refused.code, refused.message)
            return
        live.record.epoch = self._store.own(refused.session_id, live.record.epoch, None, SessionState.QUEUED)
        live.record.owner = None
        self._move(live, SessionState.QUEUED, refused.message)
        self._set_row(live, views.NEW)
        live.queued_since_s = now_s
        self._note(now_s, "queue", session=refused.session_id, reason=f"{source} refused: {refused.message}")
        self.wake_at_s = now_s + 0.2
        self._tell_session(live)

    def _on_SessionBroken(self, source: str, broken: m.SessionBroken, now_s: float) -> None:
        live = self._owned(source, broken.session_id, broken.epoch)
        # One that closes already is on its way out: its release ends it.
        if live is not None and live.record.state is not SessionState.CLOSING:
            message = f"chunk {broken.chunk_index}: {broken.message}"
            self._out.append(Send(source, m.CloseSession(session_id=broken.session_id, epoch=broken.epoch)))
            self._fail(live, broken.code or "session_failed", message)
            self._tick(now_s)

    def _on_SessionReleased(self, source: str, released: m.SessionReleased, now_s: float) -> None:
        live = self._owned(source, released.session_id, released.epoch)
        if live is not None and live.record.state is SessionState.CLOSING:
            self._forget(live, SessionState.CLOSED)
            self._stop_if_empty(source)
            self._tick(now_s)

    # ------------------------------------------------------------------ gateway

    def _on_GatewayHello(self, source: str, hello: m.GatewayHello, now_s: float) -> None:
        for worker_id in self.workers:
            self._tell_worker(worker_id)
        for live in self.sessions.values():
            if live.record.state is SessionState.RUNNING and live.record.owner:
                self._on_reannounce(live)
            self._tell_session(live)

    def _on_reannounce(self, live: Live) -> None:
        owner = live.record.owner or ""
        self._out.append(
            Send(
                GATEWAY,
                m.SessionPlaced(
                    session_id=live.record.session_id,
                    epoch=live.record.epoch,
                    worker_id=owner,
                    numerics_id=self.workers[owner].hello.numerics_id,
                ),
            )
        )

    def _on_CreateSession(self, source: str, asked: m.CreateSession, now_s: float) -> None:
        if self._answered(asked.op_id):
            return
        if asked.adopt and asked.session_id in self.sessions:
            state = public_state(self.sessions[asked.session_id].record.state)
            position = self._queue_position(asked.session_id)
            self._answer(asked.op_id, state=state.value, queue_position=position)
            return
        if asked.session_id in self.sessions:
            self._answer(asked.op_id, code="conflict", message="this session exists already")
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
            epoch=asked.epoch,
        )
        self._store.insert(record)
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
        columns.active[row] = True  # a viewer is on the way; SessionActivity corrects it
        live = Live(record, asked, row, queued_since_s=now_s)
        self.sessions[asked.session_id] = live
        self._tick(now_s)
        self._answer(
            asked.op_id, state=public_state(record.state).value, queue_position=self._queue_position(asked.session_id)
        )

    def _on_EndSession(self, source: str, asked: m.EndSession, now_s: float) -> None:
        if self._answered(asked.op_id):
            return
        live = self.sessions.get(asked.session_id)
        if live is not None and live.record.state is not SessionState.CLOSING:
            owner = live.record.owner
            self._move(live, SessionState.CLOSING, asked.reason)
            if owner is not None and owner in self.workers:
                close = m.CloseSession(session_id=asked.session_id, epoch=live.record.epoch)
                self._out.append(Send(owner, close))
                self.view.sessions.active[live.row] = False
            else:
                self._forget(live, SessionState.CLOSED)
            self._tick(now_s)
        self._answer(asked.op_id, state="closed")

    def _on_SessionStuck(self, source: str, stuck: m.SessionStuck, now_s: float) -> None:
        live = self.sessions.get(stuck.session_id)
        if live is None or live.record.epoch != stuck.epoch or live.record.owner is None:
            return
        if live.record.state in (SessionState.RUNNING, SessionState.STALLED):
            owner = live.record.owner
            self._out.append(Send(owner, m.CloseSession(session_id=stuck.session_id, epoch=stuck.epoch)))
            self._fail(live, "worker_failed", f"chunk {stuck.next_index}: its owner is {stuck.code}")
            self._tick(now_s)

    def _on_SessionActivity(self, source: str, seen: m.SessionActivity, now_s: float) -> None:
        live = self.sessions.get(seen.session_id)
        if live is None or live.record.state is SessionState.CLOSING:
            return
        live.attached = seen.attached
        columns = self.view.sessions
        if bool(columns.active[live.row]) != seen.active:
            columns.active[live.row] = seen.active
            (columns.active_since_s if seen.active else columns.idle_since_s)[live.row] = now_s
        if live.record.state in (SessionState.RUNNING, SessionState.STALLED):
            # In memory only: a controller that restarts hears it again from the gateway.
            live.record.move(SessionState.RUNNING if seen.active else SessionState.STALLED)
        self._tick(now_s)

    def _on_AdminCommand(self, source: str, asked: m.AdminCommand, now_s: float) -> None:
        if self._answered(asked.op_id):
            return
        if asked.kind == "drain":
            if asked.worker_id not in self.workers:
                self._answer(asked.op_id, code="not_found", message=f"no worker {asked.worker_id!r}")
                return
            self._drain(asked.worker_id, "asked by an operator", now_s)
            held = len(self._held_by(asked.worker_id))
            self._tick(now_s)
            self._answer(asked.op_id, state="draining", message=f"{held} sessions left")
        else:
            self._answer(
                asked.op_id,
                code="conflict",
                message=f"this fleet cannot {asked.kind}: sessions stay where they are",
            )

    # ------------------------------------------------------------------ deciding

    def _tick(self, now_s: float) -> None:
        plan, self._memory = self._decide(self.view, self._memory, now_s)
        self.wake_at_s = plan.wake_at_s
        for action in plan.actions:
            if isinstance(action, plans.Place):
                self._place(action, now_s)
            elif isinstance(action, plans.SetSteps):
                live = self.sessions.get(action.session)
                if live is not None:
                    self.view.sessions.steps[live.row] = action.steps
                    self._out.append(Send(GATEWAY, m.SetSteps(session_id=action.session, steps=action.steps)))
                    self._note(now_s, "set_steps", session=action.session, reason=action.reason)
            elif isinstance(action, plans.Queue):
                self._note(now_s, "queue", session=action.session, reason=action.reason)
            else:
                # Said once, not hidden: what this fleet cannot carry out stands in the decision log.
                line = f"{type(action).__name__}: {action.reason}"
                if line not in self._not_carried_out:
                    self._not_carried_out[line] = None
                    self._note(now_s, "not_carried_out", reason=line)
                    while len(self._not_carried_out) > DECISIONS_KEPT:
                        del self._not_carried_out[next(iter(self._not_carried_out))]
        self._tell_queue()

    def _place(self, action: plans.Place, now_s: float) -> None:
        live = self.sessions.get(action.session)
        if live is None or live.record.state is not SessionState.QUEUED or action.worker not in self.workers:
            return
        record = live.record
        try:
            epoch = self._store.own(record.session_id, record.epoch, action.worker, SessionState.LOADING)
        except Conflict:
            return
        record.epoch, record.owner = epoch, action.worker
        record.move(SessionState.LOADING, action.reason)
        self._set_row(live, views.HELD, self.workers[action.worker].row)
        self._note(now_s, "place", worker=action.worker, session=record.session_id, reason=action.reason)
        asked = live.request
        self._out.append(
            Send(
                action.worker,
                m.OpenSession(
                    session_id=record.session_id,
                    epoch=epoch,
                    seed=record.seed,
                    width=record.width,
                    height=record.height,
                    prompt=asked.prompt,
                    prompt_version=asked.prompt_version,
                    prompt_switch=asked.prompt_switch,
                    next_index=asked.next_index,
                ),
            )
        )
