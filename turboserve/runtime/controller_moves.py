"""How the controller moves sessions: the steps of docs/moving.md, their deadlines and what undoes them.

A session without a `Move` rests: it waits, a worker has it, or it lies in host memory or on disk. Every move is one
session's, waits for one answer at a time and ends by its deadline. Whatever was heard, only `Store.own` changes the
owner, and every giving up goes through it, so that an answer that comes too late carries an old epoch or `move_id`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import GATEWAY, ControllerBooks, DropFile, Kind, Live, Move, Phase, Send
from turboserve.session import SessionState

REFUSALS_MAX = 3
RETRY_MIN_S, RETRY_MAX_S = 0.2, 5.0
NO_ROOM = frozenset({"pool_exhausted", "overloaded", "refused"})
"""Refusals that say "not now": the session waits and does not count them."""

_RESTING = frozenset({SessionState.RUNNING, SessionState.STALLED})


class ControllerMoves(ControllerBooks):
    """Opening, suspending and migrating one session at a time."""

    # ------------------------------------------------------------------ beginning a move

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
                    next_index=asked.next_index,
                    restore=(kind is not Kind.PLACE or live.began) and not live.anew,
                    adopt=kind is Kind.ABORT,
                    move_id=move_id if kind is not Kind.ABORT else 0,
                ),
            )
        )
        return True

    def _suspend(self, live: Live, tier: str, now_s: float, reason: str) -> bool:
        """Have the owner write a recovery point and free the slot."""
        record = live.record
        if record.state not in _RESTING or live.move is not None or record.owner not in self.workers:
            return False
        owner = record.owner
        live.move = Move(
            Kind.SUSPEND, Phase.SUSPEND, 0, owner, "", now_s, now_s + self.move_deadline_s, record.epoch, reason, tier
        )
        self._move(live, SessionState.OFFLOADING, reason)
        self._out.append(Send(owner, m.SuspendSession(session_id=record.session_id, epoch=record.epoch, tier=tier)))
        self._note(now_s, "suspend", worker=owner, session=record.session_id, reason=reason)
        self._tell_session(live)
        return True

    def _migrate(self, live: Live, target: str, now_s: float, reason: str) -> bool:
        """Step 1: a slot at the target. The source goes on meanwhile and knows nothing of it."""
        record = live.record
        if record.state not in _RESTING or live.move is not None or record.owner not in self.workers:
            return False
        if target == record.owner or not self._takes(target) or not self._fits(live, target):
            return False
        move_id = self._store.next_epoch("move")
        live.move = Move(
            Kind.MIGRATE,
            Phase.PREPARE,
            move_id,
            record.owner,
            target,
            now_s,
            now_s + self.move_deadline_s,
            record.epoch,
            reason,
        )
        self._store.set_move(record.session_id, move_id, target)
        self._move(live, SessionState.PRECOPY, reason)
        asked = live.request
        self._out.append(
            Send(
                target,
                m.PrepareSession(
                    session_id=record.session_id,
                    move_id=move_id,
                    seed=record.seed,
                    width=record.width,
                    height=record.height,
                    prompt=asked.prompt,
                    prompt_version=asked.prompt_version,
                ),
            )
        )
        self._note(now_s, "migrate", worker=target, session=record.session_id, source=record.owner, reason=reason)
        self._tell_session(live)
        return True

    def _takes(self, worker_id: str) -> bool:
        """Whether one more session may be put there."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.state != "ready":
            return False
        return self._held_count(worker_id) < worker.hello.slot_count

    def _fits(self, live: Live, worker_id: str) -> bool:
        """Whether the worker makes the same bits as the one that had the session before."""
        worker = self.workers.get(worker_id)
        return worker is not None and live.numerics_id in ("", worker.hello.numerics_id)

    # ------------------------------------------------------------------ answers to a migration

    def _on_SessionPrepared(self, source: str, prepared: m.SessionPrepared, now_s: float) -> None:
        live = self.sessions.get(prepared.session_id)
        move = live.move if live is not None else None
        if live is None or move is None or move.id != prepared.move_id or move.target != source:
            # Of a move that was given up: nobody else would free the slot.
            self._send_drop(source, prepared.session_id, prepared.move_id)
            return
        if move.phase is not Phase.PREPARE:
            return
        move.phase = Phase.HANDOVER
        self._move(live, SessionState.HANDOVER, move.reason)
        hand_over = m.HandOver(
            session_id=prepared.session_id, epoch=live.record.epoch, move_id=move.id, target=move.target
        )
        self._out.append(Send(move.source, hand_over))
        # The gateway is not told yet: until the source has stopped it may go on.

    def _on_PrepareRefused(self, source: str, refused: m.PrepareRefused, now_s: float) -> None:
        live = self.sessions.get(refused.session_id)
        move = live.move if live is not None else None
        if live is None or move is None or move.id != refused.move_id or move.phase is not Phase.PREPARE:
            return
        self._stay(live, now_s, f"{source} has no place for it: {refused.message}")
        self._tick(now_s)

    def _on_HandedOver(self, source: str, handed: m.HandedOver, now_s: float) -> None:
        live = self.sessions.get(handed.session_id)
        if live is None:
            self._send_close(source, handed.session_id, handed.epoch)
            return
        record, move = live.record, live.move
        if handed.epoch != record.epoch or record.owner != source:
            involved = record.owner == source or (move is not None and source == move.source)
            if not involved:
                self._send_close(source, handed.session_id, handed.epoch)
            return
        live.next_index, live.point_bytes = handed.next_index, handed.point_bytes
        if move is None or move.phase is not Phase.HANDOVER or move.id != handed.move_id:
            if record.state is not SessionState.CLOSING and (move is None or move.phase is not Phase.OPEN):
                # Stopped for a move that nobody remembers (a controller that was restarted).
                live.adopt_by_s = None
                self._go_on_at_source(live, now_s, "its move is no longer under way")
            return
        # Step 3. The target may have gone in the meantime; then the source goes on.
        if move.target not in self.workers:
            self._go_on_at_source(live, now_s, f"{move.target} is gone")
            return
        self._open(
            live,
            move.target,
            Kind.MIGRATE,
            SessionState.HANDOVER,
            now_s,
            reason=move.reason,
            source=source,
            move_id=move.id,
        )
        self._tell_session(live)

    def _on_SessionKept(self, source: str, kept: m.SessionKept, now_s: float) -> None:
        live = self._owned(source, kept.session_id, kept.epoch)
        move = live.move if live is not None else None
        if live is None or move is None or move.phase not in (Phase.SUSPEND, Phase.HANDOVER):
            return
        if move.phase is Phase.HANDOVER and kept.move_id not in (0, move.id):
            return
        self._go_on_at_source(live, now_s, f"{source} keeps it: {kept.message}")

    def _on_SessionSuspended(self, source: str, suspended: m.SessionSuspended, now_s: float) -> None:
        live = self._owned(source, suspended.session_id, suspended.epoch)
        if live is None or live.record.state is SessionState.CLOSING:
            return
        self._drop_prepared(live)
        if live.record.state is not SessionState.OFFLOADING:  # a worker that ends may do so unasked
            if live.record.state not in _RESTING:
                self._move(live, SessionState.STALLED)
            self._move(live, SessionState.OFFLOADING, "its worker ends")
        to_disk = self.stopping or (live.move is not None and live.move.tier == "disk")
        self._measure("offload_s", live.move, now_s)
        live.move, live.adopt_by_s = None, None
        live.next_index, live.point_bytes = suspended.next_index, suspended.point_bytes
        self._own(live, None, SessionState.HOST, live.record.reason)
        if to_disk:
            self._spill(live)
        self._tell_session(live)
        self._stop_if_empty(source)
        self._tick(now_s)

    def _spill(self, live: Live) -> None:
        raise NotImplementedError

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
        self._measure({Kind.MIGRATE: "migrate_s", Kind.RESUME: "resume_s"}.get(move.kind, ""), move, now_s)
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
        if live.began and not opened.restored and kind in (Kind.RECOVER, Kind.RESUME, Kind.MIGRATE):
            reason = "no recovery point could be used: its chunks are made again from the input log"
            self._note(now_s, "replay", worker=worker_id, session=opened.session_id, reason=reason)
        if live.record.strikes and opened.restored:
            live.strike_index = opened.next_index
        live.move, live.adopt_by_s, live.retry_at_s = None, None, None
        live.refusals, live.avoid, live.anew = 0, "", False
        live.began = True
        live.numerics_id = self.workers[worker_id].hello.numerics_id
        if live.disk_bytes:
            live.disk_bytes = 0
            self._out.append(DropFile(opened.session_id))
        live.next_index = opened.next_index
        self._move(live, SessionState.RUNNING if live.wanted else SessionState.STALLED)
        self._tell_placed(live)
        self._tell_session(live)

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
                ),
            )
        )

    def _on_SessionRefused(self, source: str, refused: m.SessionRefused, now_s: float) -> None:
        live = self._owned(source, refused.session_id, refused.epoch)
        if live is None or live.move is None or live.move.phase is not Phase.OPEN:
            return
        why = f"{source} refused: {refused.message}"
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
        if record.state is SessionState.RECOVERING and record.owner is None and not live.wanted:
            self._move(live, SessionState.HOST, "nobody watches it: it waits in host memory")
            self._tell_session(live)

    # ------------------------------------------------------------------ giving up

    def _stay(self, live: Live, now_s: float, why: str) -> None:
        """The source was never told of the move: it just goes on."""
        self._drop_prepared(live)
        live.move = None
        self._store.set_move(live.record.session_id, 0, "")
        self._move(live, SessionState.RUNNING if live.wanted else SessionState.STALLED)
        self.view.sessions.moved_s[live.row] = now_s  # not again at once
        self._note(now_s, "move_given_up", session=live.record.session_id, reason=why)
        self._tell_session(live)

    def _go_on_at_source(self, live: Live, now_s: float, why: str) -> None:
        """The source may have stopped, or may not: it goes on under a new epoch, which makes all late answers old."""
        self._drop_prepared(live)
        record, move = live.record, live.move
        source = move.source if move is not None else record.owner or ""
        if move is not None and move.kind is Kind.MIGRATE:
            self._store.set_move(record.session_id, 0, "")
            if move.phase is Phase.OPEN and move.target in self.workers:
                self._send_close(move.target, record.session_id, record.epoch)
        self._note(now_s, "move_given_up", session=record.session_id, reason=why)
        state = record.state if record.state in (SessionState.HANDOVER, SessionState.OFFLOADING) else None
        if state is None:
            self._move(live, SessionState.PRECOPY)
            self._move(live, SessionState.HANDOVER)
            state = SessionState.HANDOVER
        if source not in self.workers or not self._open(live, source, Kind.ABORT, state, now_s, reason=why):
            self._wait_again(live, now_s, why)
            return
        self.view.sessions.moved_s[live.row] = now_s
        self._tell_session(live)

    def _drop_prepared(self, live: Live) -> None:
        move = live.move
        if move is not None and move.kind is Kind.MIGRATE and move.phase in (Phase.PREPARE, Phase.HANDOVER):
            self._send_drop(move.target, live.record.session_id, move.id)

    def _move_deadlines(self, now_s: float) -> bool:
        """Give up what has taken too long, whatever was heard. True when something changed."""
        changed = False
        for live in [one for one in self.sessions.values() if one.move is not None or one.retry_at_s is not None]:
            move = live.move
            if live.retry_at_s is not None and now_s >= live.retry_at_s:
                live.retry_at_s = None
                self._show(live)
                changed = True
            if move is None or now_s < move.deadline_s:
                continue
            changed = True
            why = f"no answer within {self.move_deadline_s:g} s ({move.kind}, {move.phase})"
            if move.phase is Phase.PREPARE:
                self._stay(live, now_s, why)
            elif move.phase in (Phase.HANDOVER, Phase.SUSPEND):
                self._go_on_at_source(live, now_s, why)
            else:
                self._send_close(live.record.owner or "", live.record.session_id, live.record.epoch)
                self._not_opened(live, now_s, why)
        return changed

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

    def _tick(self, now_s: float) -> None:
        raise NotImplementedError
