"""How the controller moves sessions: the steps of docs/moving.md, their deadlines and what undoes them.

A session without a `Move` rests: it waits, a worker has it, or it lies in host memory or on disk. Every move is one
session's, waits for one answer at a time and ends by its deadline. Whatever was heard, only `Store.own` changes the
owner, and every giving up goes through it, so that an answer that comes too late carries an old epoch or `move_id`.
"""

from __future__ import annotations

from turboserve.errors import ArenaFull
from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import Kind, Live, Move, Phase, Send
from turboserve.runtime.controller_far import ControllerFar
from turboserve.session import SessionState

_RESTING = frozenset({SessionState.RUNNING, SessionState.STALLED})
KEPT_PAUSE_S = 2.0
"""A session that could not leave for want of room in the arena makes chunks for so long before it is asked again."""


class ControllerMoves(ControllerFar):
    """Suspending and migrating one session at a time."""

    # ------------------------------------------------------------------ beginning a move

    def _may_leave(self, live: Live, now_s: float) -> bool:
        record = live.record
        rests = record.state in _RESTING and live.move is None and record.owner in self.workers
        return rests and now_s >= live.stays_until_s

    def _suspend(self, live: Live, tier: str, now_s: float, reason: str) -> bool:
        """Have the owner write a recovery point and free the slot."""
        record = live.record
        if not self._may_leave(live, now_s) or record.owner is None:
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
        if not self._may_leave(live, now_s) or record.owner is None:
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
            carried=self._must_carry(record.owner, target),
        )
        self._store.set_move(record.session_id, move_id, target)
        self._move(live, SessionState.PRECOPY, reason)
        self._ask_to_prepare(live, live.move)
        self._note(now_s, "migrate", worker=target, session=record.session_id, source=record.owner, reason=reason)
        self._tell_session(live)
        return True

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
        if move.carried:
            self._send_ahead(live, move, prepared.address, now_s)
        else:
            self._ask_to_hand_over(live, move)

    def _ask_to_hand_over(self, live: Live, move: Move) -> None:
        move.phase = Phase.HANDOVER
        self._move(live, SessionState.HANDOVER, move.reason)
        hand_over = m.HandOver(
            session_id=live.record.session_id,
            epoch=live.record.epoch,
            move_id=move.id,
            target=move.target,
            target_address=move.address,
        )
        self._out.append(Send(move.source, hand_over))
        # The gateway is not told yet: until the source has stopped it may go on.

    def _on_PrepareRefused(self, source: str, refused: m.PrepareRefused, now_s: float) -> None:
        live = self.sessions.get(refused.session_id)
        move = live.move if live is not None else None
        if live is None or move is None or move.id != refused.move_id or move.phase is not Phase.PREPARE:
            return
        self._give_up_before_the_stop(live, move, now_s, f"{source} has no place for it: {refused.message}")
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
        if move.carried:
            self._note_carried(live, move, handed, now_s)
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
        if kept.code == ArenaFull.code:
            self.count_soon, live.stays_until_s = True, now_s + KEPT_PAUSE_S
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
        at_once = source in self.workers and self.workers[source].at_once
        to_disk = self.stopping or at_once or (live.move is not None and live.move.tier == "disk")
        self._measure("offload_s", live.move, now_s)
        live.move, live.adopt_by_s = None, None
        live.next_index, live.point_bytes = suspended.next_index, suspended.point_bytes
        self._own(live, None, SessionState.HOST, live.record.reason)
        if to_disk:
            self._spill(live)
        self._tell_session(live)
        self._stop_if_empty(source)
        self._tick(now_s)

    # ------------------------------------------------------------------ giving up

    def _stay(self, live: Live, now_s: float, why: str) -> None:
        """The source was never told of the move: it just goes on."""
        live.allowed_numerics = ""
        self._drop_prepared(live)
        live.move = None
        self._store.set_move(live.record.session_id, 0, "")
        self._move(live, SessionState.RUNNING if live.wanted else SessionState.STALLED)
        self.view.sessions.moved_s[live.row] = now_s  # not again at once
        self._note(now_s, "move_given_up", session=live.record.session_id, reason=why)
        self._tell_session(live)

    def _go_on_at_source(self, live: Live, now_s: float, why: str) -> None:
        """The source may have stopped, or may not: it goes on under a new epoch, which makes all late answers old."""
        live.allowed_numerics = ""
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
            if move.phase in (Phase.PREPARE, Phase.AHEAD):
                self._give_up_before_the_stop(live, move, now_s, why)
            elif move.phase in (Phase.HANDOVER, Phase.SUSPEND):
                self._go_on_at_source(live, now_s, why)
            else:
                self._send_close(live.record.owner or "", live.record.session_id, live.record.epoch)
                self._not_opened(live, now_s, why)
        return changed
