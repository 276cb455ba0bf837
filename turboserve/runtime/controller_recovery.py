"""What the controller does when a worker is gone, a session is broken, or it has itself just started.

**Lost worker.** Each of its sessions belongs to nobody under a new epoch in the same event; the tick that follows puts
those that are watched onto other workers, in order of waiting, as far as there is room. The others wait in host
memory, where their recovery points are. None is failed for lack of room.

**Start.** A session that the directory says a worker owns is left alone for `lease_s` and a margin: its owner says
SessionOpened, or is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from turboserve.orchestrator import view as views
from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import GATEWAY, Kind, Live, Phase, Send
from turboserve.runtime.controller_suspects import STRIKE_CHUNKS, ControllerSuspects
from turboserve.session import SessionRecord, SessionState

ADOPT_MARGIN_S = 1.0


class ControllerRecovery(ControllerSuspects):
    """Losing workers, breaking sessions, and taking over from an earlier controller."""

    # ------------------------------------------------------------------ a worker is gone

    def _lose_worker(self, worker_id: str, reason: str, now_s: float, *, blame: bool = True) -> None:
        """`blame` false: it was ended on purpose, and no session is suspected of it."""
        worker = self.workers.pop(worker_id)
        self.view.workers.state[worker.row] = views.ABSENT
        self._free_worker_rows.append(worker.row)
        left = not worker.blamed and not self._held_by(worker_id)
        self._note(now_s, "worker_left" if left else "worker_lost", worker=worker_id, reason=reason)
        self._out.append(
            Send(
                GATEWAY,
                m.WorkerChanged(
                    worker_id=worker_id, worker_epoch=worker.hello.worker_epoch, state="lost", reason=reason
                ),
            )
        )
        held = self._held_by(worker_id)
        guilty = self._suspect(worker, held) if blame and worker.blamed else None
        for live in held:
            if live.record.state is SessionState.CLOSING:
                self._forget(live, SessionState.CLOSED)
            elif live is guilty:
                self._quarantine(live, now_s)
            else:
                self._recover(live, now_s, f"worker {worker_id} was lost: {reason}")
        self._hold_suspects(worker_id, now_s)
        for live in list(self.sessions.values()):
            move = live.move
            if move is None:
                continue
            if move.phase in (Phase.PREPARE, Phase.AHEAD) and worker_id in (move.source, move.target):
                self._give_up_before_the_stop(live, move, now_s, f"{worker_id} was lost")
            elif move.target == worker_id and move.kind is Kind.MIGRATE:
                # Not yet the owner, else it would have been among the held.
                self._go_on_at_source(live, now_s, f"{worker_id} was lost")
            elif move.source == worker_id:
                move.source = ""  # the copy to fall back on is gone
                if move.kind is Kind.MIGRATE:
                    self._lies_on(live, self._node_of(move.target))  # it was handed over: the point is there

    def _recover(self, live: Live, now_s: float, why: str) -> None:
        """Nobody has it any more; whoever comes next begins at its newest recovery point."""
        record, move = live.record, live.move
        live.adopt_by_s, live.allowed_numerics = None, ""
        self._note(now_s, "recover", session=record.session_id, reason=why)
        if move is not None and move.kind is Kind.MIGRATE:
            if move.phase is Phase.OPEN and move.source in self.workers:
                self._go_on_at_source(live, now_s, why)
                return
            fits = self._fits(live, move.target)
            # To another node, the target may have an older point than the node that the worker was of.
            reachable = move.carried and (live.point_node == self.node or self._holder(live) is not None)
            if not fits or reachable:
                # Not fit: it was to go on there in other bits; nobody asked for that after a loss.
                self._drop_prepared(live)
            if reachable:
                self._store.set_move(record.session_id, 0, "")
            elif move.phase is not Phase.OPEN and fits:
                self._store.set_move(record.session_id, 0, "")
                self._to_recovering(live, why)
                # The slot that was prepared has most of its pages.
                if self._open(
                    live,
                    move.target,
                    Kind.RECOVER,
                    SessionState.LOADING,
                    now_s,
                    reason=f"{why}; prepared",
                    move_id=move.id,
                ):
                    return
        if record.state is SessionState.LOADING and not live.began:
            self._wait_again(live, now_s, why, pause=False)
            return
        live.move = None
        if record.state is SessionState.RESUMING:
            self._wait_again(live, now_s, why, pause=False)
            return
        self._to_recovering(live, why)
        if not self._own(live, None, SessionState.RECOVERING, why):
            return
        self._tell_session(live)
        self._shelve_unwatched(live)

    def _to_recovering(self, live: Live, why: str) -> None:
        """In the record alone; `_own` or `_open` then writes it."""
        if live.record.state is not SessionState.RECOVERING:
            live.record.move(SessionState.RECOVERING, why)
            self._tell_session(live)

    # ------------------------------------------------------------------ a session that breaks

    def _on_SessionBroken(self, source: str, broken: m.SessionBroken, now_s: float) -> None:
        live = self._owned(source, broken.session_id, broken.epoch)
        # One that closes already is on its way out: its release ends it.
        if live is None:
            self._send_close_old(source, broken.session_id, broken.epoch)
        elif live.record.state is not SessionState.CLOSING:
            self._break(live, broken.chunk_index, broken.code or "session_failed", broken.message, now_s)

    def _on_SessionStuck(self, source: str, stuck: m.SessionStuck, now_s: float) -> None:
        """The gateway gets nothing from the owner, or something it cannot follow."""
        live = self.sessions.get(stuck.session_id)
        if live is None or live.record.owner is None or live.record.epoch != stuck.epoch or live.move is not None:
            return
        if live.record.state in (SessionState.RUNNING, SessionState.STALLED):
            live.anew = stuck.code == "ahead"
            self._break(live, stuck.next_index, "worker_failed", f"its owner is {stuck.code}", now_s)

    def _break(self, live: Live, chunk_index: int, code: str, message: str, now_s: float) -> None:
        """Once more, from the recovery point, elsewhere: it may have been that worker. Then it fails."""
        source = live.record.owner or ""
        message = f"chunk {chunk_index}: {message}"
        self._drop_prepared(live)
        self._send_close(source, live.record.session_id, live.record.epoch)
        if live.broken_index >= 0 and chunk_index < live.broken_index + STRIKE_CHUNKS:
            self._fail(live, code, message)
        else:
            live.broken_index, live.avoid = chunk_index, source
            live.move = None
            self._to_recovering(live, message)
            self._own(live, None, SessionState.RECOVERING, message)
            self._note(now_s, "recover", session=live.record.session_id, reason=f"{source}: {message}; tried once more")
            self._tell_session(live)
            self._shelve_unwatched(live)
        self._tick(now_s)

    # ------------------------------------------------------------------ a controller that starts

    def take_over(
        self,
        stored: Iterable[tuple[SessionRecord, m.CreateSession]],
        now_s: float,
        moves: Mapping[str, tuple[int, str]] | None = None,
        on_disk: Mapping[str, int] | None = None,
        numerics: Mapping[str, tuple[str, int]] | None = None,
        nodes: Mapping[str, str] | None = None,
    ) -> None:
        """The sessions of an earlier controller, as the directory has them. Call it before the first message.

        `moves`: session -> (move_id, target) of migrations that were under way; they are given up. `on_disk`: session
        -> bytes of its recovery point there. `numerics`: session -> (numerics_id, approximate_from). `nodes`: session
        -> the node where its newest point lies.
        """
        for session_id, (move_id, target) in (moves or {}).items():
            self.old_moves.setdefault(target, []).append((session_id, move_id))
        adopt_by_s = now_s + self.lease_s + ADOPT_MARGIN_S
        for record, request in stored:
            live = self._add(record, request, now_s)
            live.began = record.epoch > 1 or record.state not in (SessionState.QUEUED, SessionState.LOADING)
            live.numerics_id, live.approximate_from = (numerics or {}).get(record.session_id, ("", -1))
            live.point_node = (nodes or {}).get(record.session_id, "") or (self.node if live.began else "")
            if record.owner is None and record.session_id in (moves or {}):
                self._store.set_move(record.session_id, 0, "")
            live.wanted = record.state in (SessionState.QUEUED, SessionState.RECOVERING)
            if record.state is SessionState.DISK:
                live.disk_bytes = (on_disk or {}).get(record.session_id, 0)
            if record.owner is not None:
                live.adopt_by_s = adopt_by_s
            elif record.state is SessionState.SPILLING:
                # A file that was written and not yet said to be is written again; the arena still has the point.
                self._move(live, SessionState.HOST, "not yet on disk when the controller ended")
            elif record.state is SessionState.CLOSING:
                self._forget(live, SessionState.CLOSED)
                continue
            self._show(live)

    def _adopt(self, live: Live, source: str, opened: m.SessionOpened, now_s: float) -> None:
        """Its owner still has it, under the epoch that the directory names."""
        self._note(now_s, "adopt", worker=source, session=opened.session_id, reason="its worker has it as before")
        state = live.record.state
        if state is SessionState.CLOSING:
            live.adopt_by_s = None
            self._show(live)
            self._send_close(source, opened.session_id, opened.epoch)
            return
        if state is SessionState.RECOVERING:
            live.record.move(SessionState.LOADING)
        self._arrived(live, source, opened, now_s)
        self._store.set_move(opened.session_id, 0, "")
        self._tick(now_s)

    def _adoption_deadlines(self, now_s: float) -> bool:
        """Owners that did not come are given up. True when something changed."""
        late = [one for one in self.sessions.values() if one.adopt_by_s is not None and now_s >= one.adopt_by_s]
        for live in late:
            live.adopt_by_s = None
            owner = live.record.owner or ""
            self._send_close(owner, live.record.session_id, live.record.epoch)
            if live.record.state is SessionState.CLOSING:
                self._forget(live, SessionState.CLOSED)
            else:
                self._recover(live, now_s, f"{owner} did not say that it has it")
        return bool(late)

    def _add(self, record: SessionRecord, request: m.CreateSession, now_s: float) -> Live:
        raise NotImplementedError
