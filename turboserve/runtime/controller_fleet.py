"""The controller's side of the fleet: workers that come, report, drain and go, and wishes to the launcher.

The launcher starts and reaps processes; the controller says how many there should be. A worker counts from the wish
on (`starting`), takes sessions from its hello on (`ready`), and takes nothing new while it drains. Workers that join
from elsewhere with the cluster's token are taken in as they are, up to `JOINED_MAX`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from turboserve.orchestrator import plan as plans
from turboserve.orchestrator import view as views
from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import GATEWAY, LAUNCHER, Drop, Phase, Send, Worker
from turboserve.runtime.controller_growth import ControllerGrowth
from turboserve.session import SessionState

JOINED_MAX = 64
WORKERS_MAX = 64
ROUNDING = 1e-4
"""A measured time this little above the target is the target: a playback rate is written with a few digits."""
LEAVE_S = 4.0
"""A worker that was told to end gets this long to be emptied by migration; what is left is then suspended."""
ANSWER_S = 1.5
"""A server that was told twice to end waits so long for its workers; the launcher waits longer (launcher.HURRY_S)."""
DRAIN_S = 60.0
"""The same for one that an operator drains, whose process waits for us."""


class ControllerFleet(ControllerGrowth):
    """Which workers there are and should be."""

    # ------------------------------------------------------------------ from workers

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
        elif hello.worker_id not in self.expected and len(self.workers) >= WORKERS_MAX + JOINED_MAX:
            refusal = m.Failure(code="overloaded", message=f"{len(self.workers)} workers are here already")
            self._out += [Send(source, refusal), Drop(source, "too many workers")]
            return
        self._take_strikes_back(hello)
        self._note_joined(hello)
        asked_s = self.expected.pop(hello.worker_id, None)
        row = self._starting_rows.pop(hello.worker_id, None)
        if row is None and self._free_worker_rows:
            row = self._free_worker_rows.pop()
        row = views.add_worker(
            self.view,
            hello.worker_id,
            state=views.READY,
            request_s=now_s if asked_s is None else asked_s,
            ready_at_s=now_s,
            node=self._node(hello.node),
            gpu_count=max(1, hello.gpu_count),
            device_class=hello.device_class,
            model=hello.model,
            row=row,
        )
        if hello.start_s:
            self._measured_start(hello.start_s)
        self._learn_latency(hello)
        self.workers[hello.worker_id] = Worker(hello, row, "ready", now_s + self.lease_s)
        self._note(now_s, "worker_ready", worker=hello.worker_id, reason=f"{hello.device}, {hello.slot_count} slots")
        self._out.append(Send(hello.worker_id, m.Lease(lease_s=self.lease_s, worker_epoch=hello.worker_epoch)))
        self._tell_worker(hello.worker_id)
        self._tell_where_the_gateway_is(hello.worker_id)
        for session_id, move_id in self.old_moves.pop(hello.worker_id, ()):
            self._send_drop(hello.worker_id, session_id, move_id)
        for live in self._held_by(hello.worker_id):
            self._show(live)  # of an earlier controller: the worker's row is known now
        if self.stopping:
            self._stop_if_empty(hello.worker_id)
        self._tick(now_s)

    def _tell_where_the_gateway_is(self, worker_id: str) -> None:
        """A worker that joined knows the controller's address alone."""
        gateway = self.gateway_hello
        if gateway is not None and self.workers[worker_id].hello.ring_fd < 0:
            self._out.append(Send(worker_id, m.GatewayAt(host=gateway.data_host, port=gateway.data_port)))

    def _node(self, name: str) -> int:
        return self._nodes.setdefault(name, len(self._nodes))

    def _measured_start(self, took_s: float) -> None:
        """What starting a worker takes here: the scheduler's provisioning delay (smoothed)."""
        before_s = self._measured.get("provision_s")
        self._measured["provision_s"] = took_s if before_s is None else 0.7 * before_s + 0.3 * took_s
        self.view.provision_s = self._measured["provision_s"]

    def _learn_latency(self, hello: m.WorkerHello) -> None:
        """Plan with what workers measured at their start; of several, with the mean of the latest and those before.

        A table that says `capacity` sessions are too many is believed: then fewer are put on a worker.
        """
        profile, said = self.view.profile, hello.batch_latency_s
        if not said or any(one <= 0 for one in said) or any(b < a for a, b in pairwise(said)):
            return
        before = profile.batch_latency_s if self._latency_known else said
        table = tuple((new + old) / 2 for new, old in zip(said, before, strict=False))
        self._latency_known = True
        fits = sum(one <= profile.chunk_target_s * (1 + ROUNDING) for one in table)
        capacity = max(1, min(self._capacity_asked, fits))
        self._set_profile(
            batch_latency_s=table,
            capacity=capacity,
            # A worker may have fewer slots than asked for: what its device has room for.
            resident_max=max(capacity, min(profile.resident_max, hello.slot_count)),
            about="measured by the workers at their start",
        )

    def _on_Heartbeat(self, source: str, beat: m.Heartbeat, now_s: float) -> None:
        worker = self.workers.get(beat.worker_id)
        if worker is None or worker.hello.worker_epoch != beat.worker_epoch:
            return
        before = worker.stats.points_refused if worker.stats is not None else 0
        self.count_soon |= beat.points_refused > before
        worker.stats = beat
        worker.lease_until_s = now_s + self.lease_s
        self.changed = True
        self._progress(source, beat)
        self._out.append(Send(source, m.Lease(lease_s=self.lease_s, worker_epoch=beat.worker_epoch)))

    def _on_WorkerLeaving(self, source: str, leaving: m.WorkerLeaving, now_s: float) -> None:
        worker = self.workers.get(leaving.worker_id)
        if worker is None:
            return
        if leaving.at_once and not worker.at_once:
            # No session did it if it is gone before they have left.
            worker.at_once, worker.blamed = True, False
            reason = "it was told to end twice: what is left there goes to disk"
            self._note(now_s, "drain", worker=leaving.worker_id, reason=reason)
        self._drain(leaving.worker_id, "it was told to end", now_s, 0.0 if leaving.at_once else LEAVE_S)
        self._empty_late(now_s)
        self._tick(now_s)

    # ------------------------------------------------------------------ drain and stop

    def _drain(self, worker_id: str, reason: str, now_s: float, within_s: float = DRAIN_S) -> None:
        """Nothing new goes there; the tick moves away what it holds, one by one, and what is left is suspended."""
        worker = self.workers[worker_id]
        suspend_at_s = now_s + within_s
        worker.suspend_at_s = min(suspend_at_s, worker.suspend_at_s or suspend_at_s)
        if worker.state != "draining":
            worker.state = "draining"
            self.view.workers.state[worker.row] = views.DRAINING
            self._note(now_s, "drain", worker=worker_id, reason=reason)
            self._tell_worker(worker_id)
        self._stop_if_empty(worker_id)

    def _undrain(self, action: plans.UndrainWorker, now_s: float) -> None:
        worker = self.workers.get(action.worker)
        if worker is None or worker.state != "draining" or worker.blamed is False:
            return
        worker.state, worker.suspend_at_s = "ready", None
        self.view.workers.state[worker.row] = views.READY
        self._note(now_s, "undrain", worker=action.worker, reason=action.reason)
        self._tell_worker(action.worker)

    def _stop_if_empty(self, worker_id: str) -> None:
        worker = self.workers.get(worker_id)
        if worker is None or worker.closing or (worker.state != "draining" and not self.stopping):
            return
        if self._held_count(worker_id) or self._points_to_save(worker_id):
            return
        worker.blamed = False
        self._out.append(Send(worker_id, m.StopWorker(worker_id=worker_id, reason="drained, it owns nothing")))

    def _empty_late(self, now_s: float) -> None:
        """Workers that could not be emptied by migration in time: their sessions go to host memory."""
        for worker_id, worker in self.workers.items():
            if worker.suspend_at_s is not None and now_s >= worker.suspend_at_s:
                reason = f"{worker_id} ends, and no other worker had room in time"
                for live in self._held_by(worker_id):
                    if worker.at_once and live.move is not None and live.move.phase is Phase.PREPARE:
                        self._stay(live, now_s, f"{worker_id} was told to end twice")
                    if live.adopt_by_s is None:
                        self._suspend(live, "disk" if worker.at_once else "host", now_s, reason)

    def stop(self, now_s: float) -> list[Any]:
        """The server ends: every session is suspended to disk, then every worker is stopped. See `stopped`."""
        self.stopping = True
        for worker_id, worker in self.workers.items():
            worker.state = "draining"
            self.view.workers.state[worker.row] = views.DRAINING
            self._tell_worker(worker_id)
        self._stop_step(now_s)
        return self._flush()

    def stop_now(self, now_s: float) -> list[Any]:
        """Told to end twice: workers have a moment to answer, then what they hold is taken from them."""
        if self.take_away_at_s is None:
            self.take_away_at_s = now_s + ANSWER_S
        return self.stop(now_s)

    def _take_away(self, now_s: float) -> None:
        """Every session goes to disk as its newest point has it; the chunks after that are made again."""
        for live in list(self.sessions.values()):
            record, owner = live.record, live.record.owner
            if owner is None or record.state is SessionState.CLOSING:
                continue
            why = f"the server stops at once, and {owner} has not suspended it"
            self._drop_prepared(live)
            live.move = live.adopt_by_s = live.retry_at_s = None
            self._to_recovering(live, why)
            if self._own(live, None, SessionState.RECOVERING, why):
                self._note(now_s, "recover", session=record.session_id, reason=why)

    def _stop_step(self, now_s: float) -> None:
        if self.take_away_at_s is not None and now_s >= self.take_away_at_s:
            self._take_away(now_s)
        for live in list(self.sessions.values()):
            if live.record.state is SessionState.RECOVERING and live.record.owner is None:
                self._move(live, SessionState.HOST, live.record.reason)  # its worker is gone: its point is left
            if live.record.state in (SessionState.RUNNING, SessionState.STALLED) and live.adopt_by_s is None:
                self._suspend(live, "disk", now_s, "the server stops")
            elif live.record.state is SessionState.HOST and not live.spill_tried:
                self._spill(live)
        for worker_id in list(self.workers):
            self._stop_if_empty(worker_id)

    @property
    def stopped(self) -> bool:
        """While stopping: no worker has a session any more and nothing is being written to disk."""
        return self.stopping and not any(
            live.record.owner in self.workers or live.record.state is SessionState.SPILLING
            for live in self.sessions.values()
        )

    # ------------------------------------------------------------------ the launcher

    def _release(self, action: plans.ReleaseWorker, now_s: float) -> None:
        worker_id = action.worker
        self._note(now_s, "worker_release", worker=worker_id, reason=action.reason)
        if worker_id in self.workers:
            self._stop_if_empty(worker_id)
            if self.workers[worker_id].hello.ring_fd < 0:
                self._wish("remove", worker_id)  # its machine is somebody's to give back
        elif worker_id in self.expected:
            self._unexpect(worker_id)
            self._wish("remove", worker_id)

    def _on_FleetEvent(self, source: str, event: m.FleetEvent, now_s: float) -> None:
        """What became of a process. The controller notices a loss by its socket; this says what comes after it."""
        if source != LAUNCHER:
            self._out.append(Drop(source, "FleetEvent is the launcher's to send"))
        elif event.kind == "stopping":
            self._out += self.stop(now_s)
        elif event.kind == "stopping_now":
            self._out += self.stop_now(now_s)
        elif event.kind == "started":
            self.launched.add(event.worker_id)
            self._expect(event.worker_id, now_s)
        elif event.kind == "backing_off":
            self.launched.add(event.worker_id)
            known = self.workers.get(event.worker_id)
            if known is not None and known.hello.pid == event.pid:
                self._lose_worker(event.worker_id, event.reason, now_s)  # its connection's end is still under way
            self._judge(event, now_s)
            self._expect(event.worker_id, now_s)
            self._note(now_s, "backing_off", worker=event.worker_id, reason=event.reason)
            self._tick(now_s)
        elif event.kind in ("exited", "failed"):
            self.launched.discard(event.worker_id)
            self._unexpect(event.worker_id)
            if event.worker_id in self.workers:
                self._lose_worker(event.worker_id, event.reason or f"it exited with {event.exit_code}", now_s)
            self._judge(event, now_s)
            self._note(now_s, f"worker_{event.kind}", worker=event.worker_id, reason=event.reason or "it ended")
            self._tick(now_s)

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
