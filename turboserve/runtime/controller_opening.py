"""How a session comes to a worker: OpenSession under a new epoch, and what the worker answers.

Placing, resuming, recovering, the last step of a migration and its giving up all end here; docs/moving.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import GATEWAY, DropFile, Kind, Live, Move, Phase, Send
from turboserve.runtime.controller_storage import ControllerStorage
from turboserve.runtime.controller_view import ControllerView
from turboserve.session import SessionState

REFUSALS_MAX = 3
RETRY_MIN_S, RETRY_MAX_S = 0.2, 5.0
NO_ROOM = frozenset({"pool_exhausted", "overloaded", "refused"})
"""Refusals that say "not now": the session waits and does not count them."""


class ControllerOpening(ControllerStorage, ControllerView):
    """Giving a session to a worker."""

    def _open(
        self,
        live: Live,
        worker_id: str,
        kind: Kind,
        state: SessionState,
        now_s: float,
        *,
        reason: str,
        source: str = "",
        move_id: int = 0,
    ) -> bool:
        """Give the session to a worker under a new epoch and have it opened there. False when that was refused."""
        record = live.record
        before, deadline_s = live.move, now_s + self.move_deadline_s
        live.retry_at_s = None
        live.move = Move(kind, Phase.OPEN, move_id, source, worker_id, now_s, deadline_s, record.epoch, reason)
        if not self._own(live, worker_id, state, reason):
            live.move = before
            self._note(now_s, "conflict", session=record.session_id, reason="the directory names another epoch")
            return False
        asked = live.request
        self._out.append(
            Send(
                worker_id,
                m.OpenSession(
                    session_id=record.session_id,
                    epoch=record.epoch,
                    seed=record.seed,
                    width=record.width,
                    height=record.height,
                    prompt=asked.prompt,
                    prompt_version=asked.prompt_version,
                    prompt_switch=asked.prompt_switch,
                    decoder=asked.decoder,
                    next_index=asked.next_index,
                    restore=(kind is not Kind.PLACE or live.began) and not live.anew,
                    adopt=kind is Kind.ABORT,
                    move_id=move_id if kind is not Kind.ABORT else 0,
                    # An operator allowed it, else it would not be brought there.
                    any_numerics=live.numerics_id not in ("", self.workers[worker_id].hello.numerics_id),
                ),
            )
        )
        return True

    def _takes(self, worker_id: str) -> bool:
        """Whether one more session may be put there."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.state != "ready":
            return False
        return self._held_count(worker_id) < worker.hello.slot_count

    def _fits(self, live: Live, worker_id: str) -> bool:
        """Whether the worker makes the same bits as the one that had the session before, or others that are allowed."""
        worker = self.workers.get(worker_id)
        if worker is None:
            return False
        return live.numerics_id in ("", worker.hello.numerics_id) or live.allowed_numerics == worker.hello.numerics_id

    # ------------------------------------------------------------------ answers to OpenSession

    def _on_SessionOpened(self, source: str, opened: m.SessionOpened, now_s: float) -> None:
        known = self.sessions.get(opened.session_id)
        if known is None or opened.epoch < known.record.epoch:
            move = known.move if known is not None else None
            if move is None or source != move.source or opened.epoch < move.source_epoch:
                # Given up while the worker's channel was down: it says what it still holds, nobody else would free it.
                self._send_close(source, opened.session_id, opened.epoch)
            return
        live = self._owned(source, opened.session_id, opened.epoch)
        if live is None:
            return
        if live.adopt_by_s is not None:
            self._adopt(live, source, opened, now_s)
            return
        move = live.move
        if move is None or move.phase is not Phase.OPEN:
            return
        if move.kind is Kind.MIGRATE and move.source in self.workers and move.source != source:
            self._send_close(move.source, opened.session_id, move.source_epoch)
        far = move.kind is Kind.MIGRATE and self._node_of(move.source) not in ("", self._node_of(source))
        measured = {Kind.MIGRATE: "migrate_cross_node_s" if far else "migrate_s", Kind.RESUME: "resume_s"}
        self._measure(measured.get(move.kind, ""), move, now_s)
        self._arrived(live, source, opened, now_s)
        self._stop_if_empty(move.source)
        self._tick(now_s)

    def _arrived(self, live: Live, worker_id: str, opened: m.SessionOpened, now_s: float) -> None:
        """The owner has it open: credits may flow."""
        kind = live.move.kind if live.move is not None else None
        if kind is Kind.MIGRATE:
            self._store.set_move(opened.session_id, 0, "")
        if kind not in (None, Kind.PLACE):
            self.view.sessions.moved_s[live.row] = now_s
        lies = self._where_it_lies(live, worker_id)
        if live.began and not opened.restored and kind in (Kind.RECOVER, Kind.RESUME, Kind.MIGRATE):
            reason = f"no recovery point could be used{lies}: its chunks are made again from the input log"
            self._note(now_s, "replay", worker=worker_id, session=opened.session_id, reason=reason)
        elif lies and opened.restored and kind in (Kind.RECOVER, Kind.RESUME):
            reason = f"from an older point of its, at chunk {opened.next_index}{lies}"
            self._note(now_s, "replay", worker=worker_id, session=opened.session_id, reason=reason)
        self._lies_on(live, self.workers[worker_id].hello.node)
        live.brings_failed, live.told_other_bits = 0, False
        if live.record.strikes and (opened.restored or live.strike_index < 0):
            # Of strikes under an earlier controller nobody knows the chunk: what is made from here on has to do.
            live.strike_index = opened.next_index
        live.move, live.adopt_by_s, live.retry_at_s = None, None, None
        live.refusals, live.avoid, live.anew, live.own_by_s = 0, "", False, None
        live.began = True
        self._take_numerics(live, self.workers[worker_id].hello.numerics_id, opened, now_s)
        if live.disk_bytes:
            live.disk_bytes = 0
            self._out.append(DropFile(opened.session_id))
        live.next_index = opened.next_index
        self._move(live, SessionState.RUNNING if live.wanted else SessionState.STALLED)
        self._tell_placed(live)
        self._tell_session(live)

    def _take_numerics(self, live: Live, numerics_id: str, opened: m.SessionOpened, now_s: float) -> None:
        """Which bits it is made of from now on. Where they are others than before, or chunks of one that has changed
        them are all made again, the next chunk of its stream does not follow from the one before."""
        live.allowed_numerics = ""
        changed = live.numerics_id not in ("", numerics_id)
        again = live.approximate_from >= 0 and opened.next_index == 0
        if changed or again:
            live.approximate_from = max(live.next_index, opened.next_index)
            reason = f"it goes on under numerics {numerics_id} from chunk {live.approximate_from} on"
            self._note(now_s, "approximate", session=opened.session_id, reason=reason)
        if changed or again or live.numerics_id != numerics_id:
            live.numerics_id = numerics_id
            self._store.set_numerics(opened.session_id, numerics_id, live.approximate_from)

    def _adopt(self, live: Live, source: str, opened: m.SessionOpened, now_s: float) -> None:
        raise NotImplementedError

    def _tell_placed(self, live: Live) -> None:
        record = live.record
        owner = self.workers.get(record.owner or "")
        if owner is None:
            return
        self._out.append(
            Send(
                GATEWAY,
                m.SessionPlaced(
                    session_id=record.session_id,
                    epoch=record.epoch,
                    worker_id=record.owner or "",
                    numerics_id=owner.hello.numerics_id,
                    next_index=live.next_index,
                    # Said again until the chunk is made: a gateway may have missed it.
                    continuity="approximate" if live.next_index <= live.approximate_from else "",
                ),
            )
        )

    def _on_SessionRefused(self, source: str, refused: m.SessionRefused, now_s: float) -> None:
        live = self._owned(source, refused.session_id, refused.epoch)
        if live is None or live.move is None or live.move.phase is not Phase.OPEN:
            return
        why = f"{source} refused: {refused.message}"
        if live.allowed_numerics:
            live.allowed_numerics = ""  # it waits, or goes on, where it is made as before
            self._not_opened(live, now_s, why)
            return
        if refused.code not in NO_ROOM and live.move.kind is not Kind.ABORT:
            live.refusals += 1
            if live.refusals >= REFUSALS_MAX:
                self._fail(live, refused.code, refused.message)
                return
        self._not_opened(live, now_s, why)

    def _not_opened(self, live: Live, now_s: float, why: str) -> None:
        """The owner did not open it: back to a source that still has it, else back to where it waits."""
        move = live.move
        if move is not None and move.kind is Kind.MIGRATE and move.source in self.workers:
            self._go_on_at_source(live, now_s, why)
            return
        self._wait_again(live, now_s, why)

    def _wait_again(self, live: Live, now_s: float, why: str, *, pause: bool = True) -> None:
        """Nobody owns it from now on; a worker is looked for after a pause that grows with each refusal."""
        record = live.record
        stored = SessionState.DISK if live.disk_bytes and not live.point_bytes else SessionState.HOST
        was_stored = record.state is SessionState.RESUMING
        live.move = None
        if pause:
            waits = min(8, live.refusals)
            live.retry_at_s = now_s + min(RETRY_MAX_S, RETRY_MIN_S * 2**waits)
        if was_stored:
            state = stored
        elif live.began:
            state = SessionState.RECOVERING
        else:
            state = SessionState.QUEUED
            live.queued_since_s = now_s
        if not self._own(live, None, state, why):
            return
        self._shelve_unwatched(live)
        event = "queue" if state is SessionState.QUEUED else "wait"
        self._note(now_s, event, session=record.session_id, reason=why)
        self._tell_session(live)

    def _shelve_unwatched(self, live: Live) -> None:
        """Nobody has it and nobody watches it: its recovery point is where it waits."""
        record = live.record
        if record.state is SessionState.RECOVERING and record.owner is None and not live.wanted and live.move is None:
            self._move(live, SessionState.HOST, "nobody watches it: it waits in host memory")
            self._tell_session(live)

    # ------------------------------------------------------------------ where its newest point lies

    def _node_of(self, worker_id: str) -> str:
        """ "" for a worker that is not here."""
        worker = self.workers.get(worker_id)
        return worker.hello.node if worker is not None else ""

    def _lies_on(self, live: Live, node: str) -> None:
        """From now on the session's newest point is to be looked for there; durable, for the next controller."""
        before, live.point_node = live.point_node or self.node, node
        if before != node:
            self._store.set_point(live.record.session_id, node)

    def _where_it_lies(self, live: Live, worker_id: str) -> str:
        """For a decision's reason: that its newest point is on another node than the worker's, if it is."""
        node = live.point_node
        if node in ("", self._node_of(worker_id)):
            return ""
        there = any(one.hello.node == node for one in self.workers.values()) or node == self.node
        return f" (the newest lies on {node[:64]}, {'which did not send it' if there else 'which is gone'})"

    # ------------------------------------------------------------------ small things

    def _owned(self, source: str, session_id: str, epoch: int) -> Live | None:
        """The session, if `source` speaks for its newest epoch."""
        live = self.sessions.get(session_id)
        if live is None or live.record.epoch != epoch or live.record.owner != source:
            return None
        return live

    def _send_close(self, worker_id: str, session_id: str, epoch: int) -> None:
        worker = self.workers.get(worker_id)
        if worker is not None:
            worker.closing.add((session_id, epoch))
            self._out.append(Send(worker_id, m.CloseSession(session_id=session_id, epoch=epoch)))

    def _send_close_old(self, worker_id: str, session_id: str, epoch: int) -> None:
        """A worker speaks of a session that has ended, or that others own by now: nobody else would free it there."""
        known = self.sessions.get(session_id)
        if known is None or epoch < known.record.epoch:
            self._send_close(worker_id, session_id, epoch)

    def _send_drop(self, worker_id: str, session_id: str, move_id: int) -> None:
        if worker_id in self.workers:
            self._out.append(Send(worker_id, m.DropPrepared(session_id=session_id, move_id=move_id)))

    def _measure(self, field: str, move: Move | None, now_s: float) -> None:
        """Let the scheduler reckon with what such a move takes here (smoothed; the first one counts whole)."""
        if not field or move is None:
            return
        took_s = max(0.0, now_s - move.began_s)
        before_s = self._measured.get(field)
        self._measured[field] = took_s if before_s is None else 0.8 * before_s + 0.2 * took_s
        self._set_profile(**{field: self._measured[field]})

    def _set_profile(self, **changes: Any) -> None:
        self.view.profiles = (replace(self.view.profile, **changes), *self.view.profiles[1:])

    def _stop_if_empty(self, worker_id: str) -> None:
        raise NotImplementedError

    def _go_on_at_source(self, live: Live, now_s: float, why: str) -> None:
        raise NotImplementedError

    def _drop_prepared(self, live: Live) -> None:
        move = live.move
        if move is not None and move.phase in (Phase.PREPARE, Phase.AHEAD, Phase.HANDOVER):
            self._send_drop(move.target, live.record.session_id, move.id)
