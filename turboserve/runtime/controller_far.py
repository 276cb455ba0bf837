"""The controller's half of points between nodes (docs/moving.md). Every node has an arena of its own; the server's
outlives its workers, a joined worker's ends with it. Within a node nothing is carried; here is only what differs:

    migrate   PrepareSession(awaits) -> SendPoint (the session goes on) -> HandOver(target_address) -> the one commit
    bring     a session that nobody owns comes to a worker of another node: PrepareSession(awaits) -> SendPoint, and
              then OpenSession as on its own node; or, without a slot, only the point comes (KEEP)

Until the owner changes in the directory nothing has happened: a bring that fails leaves the session where it waits, and
after `BRINGS_MAX` of them it is opened without (an older point of that node, or the input log). What is left over on a
node is always a true point of the session, only older; it is dropped when its node's worker next says what it has.
"""

from __future__ import annotations

from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import Kind, Live, Move, Phase, Send
from turboserve.runtime.controller_opening import RETRY_MIN_S, ControllerOpening
from turboserve.session import SessionState

BRINGS_MAX = 2


class ControllerFar(ControllerOpening):
    """Points from one node to another."""

    # ------------------------------------------------------------------ which worker, and from where

    def _has_arena(self, worker_id: str) -> bool:
        worker = self.workers.get(worker_id)
        return worker is not None and worker.hello.arena_bytes > 0

    def _must_carry(self, source: str, target: str) -> bool:
        """Whether a point has to go from node to node, and can."""
        apart = self._node_of(source) != self._node_of(target)
        return apart and self._has_arena(source) and self._has_arena(target)

    def _holder(self, live: Live) -> str | None:
        """A worker that can send the session's point: any of the node where it lies."""
        there = [one for one in sorted(self.workers) if self._node_of(one) == live.point_node and self._has_arena(one)]
        return min(there, key=lambda one: (self.workers[one].state != "ready", self._held_count(one)), default=None)

    def _by_its_point(self, live: Live, chosen: str | None) -> str | None:
        """The worker to open it on when `chosen` was decided: one of the node where its point lies, if one has room
        within its capacity. A suspect goes where it was put, and nobody goes to one."""
        if chosen is None or live.record.strikes or live.point_node in ("", self._node_of(chosen)):
            return chosen
        roomy = [
            one
            for one in sorted(self.workers)
            if self._node_of(one) == live.point_node
            and one != live.avoid
            and self._takes(one)
            and self._fits(live, one)
        ]
        roomy = [one for one in roomy if not any(held.record.strikes for held in self._held_by(one))]
        counts = {one: sum(held.wanted for held in self._held_by(one)) for one in roomy}
        roomy = [one for one in roomy if counts[one] < self.workers[one].hello.capacity]
        return min(roomy, key=lambda one: (counts[one], one), default=chosen)

    # ------------------------------------------------------------------ bringing

    def _bring(self, live: Live, target: str, kind: Kind, now_s: float, reason: str) -> bool:
        """Have the session's point come to the target's node first. False when it is there already, cannot come, or
        could not often enough: then it is opened with what is there."""
        record, holder = live.record, self._holder(live)
        if live.move is not None or live.anew or not live.began:
            return False
        if record.state is SessionState.DISK and not live.point_bytes:
            return False
        if holder is None or not self._must_carry(holder, target) or live.brings_failed >= BRINGS_MAX:
            return False
        move_id = self._store.next_epoch("move")
        live.move = Move(
            kind,
            Phase.PREPARE,
            move_id,
            holder,
            target,
            now_s,
            now_s + self.move_deadline_s,
            record.epoch,
            reason,
            carried=True,
        )
        self._store.set_move(record.session_id, move_id, target)
        self._show(live)
        self._ask_to_prepare(live, live.move)
        self._note(now_s, "bring", worker=target, session=record.session_id, source=holder, reason=reason)
        self._tell_session(live)
        return True

    def _ask_to_prepare(self, live: Live, move: Move) -> None:
        record, asked = live.record, live.request
        prepare = m.PrepareSession(
            session_id=record.session_id,
            move_id=move.id,
            seed=record.seed,
            width=record.width,
            height=record.height,
            prompt=asked.prompt,
            prompt_version=asked.prompt_version,
            awaits=move.carried,
            slot=move.kind is not Kind.KEEP,
        )
        self._out.append(Send(move.target, prepare))

    def _send_ahead(self, live: Live, move: Move, address: str, now_s: float) -> None:
        """The target awaits the point. The session goes on meanwhile, if somebody has it."""
        move.phase, move.address, move.deadline_s = Phase.AHEAD, address, now_s + self.move_deadline_s
        send = m.SendPoint(
            session_id=live.record.session_id,
            epoch=live.record.epoch,
            move_id=move.id,
            target=move.target,
            target_address=address,
        )
        self._out.append(Send(move.source, send))

    def _on_PointSent(self, source: str, sent: m.PointSent, now_s: float) -> None:
        live = self.sessions.get(sent.session_id)
        move = live.move if live is not None else None
        if live is None or move is None or (move.id, move.phase, move.source) != (sent.move_id, Phase.AHEAD, source):
            return
        move.sent_bytes = sent.sent_bytes
        if move.kind is Kind.MIGRATE:
            self._ask_to_hand_over(live, move)
            return
        node = self._node_of(move.target)
        reason = f"{sent.sent_bytes} B of its point from {source} to {node}: {move.reason}"
        self._note(now_s, "brought", worker=move.target, session=sent.session_id, source=source, reason=reason)
        self._store.set_move(sent.session_id, 0, "")
        self._lies_on(live, node)
        live.brings_failed = 0
        if move.kind is Kind.KEEP:
            live.move = None
            self._send_drop(move.target, sent.session_id, move.id)
            self._show(live)
            self._tell_session(live)
        else:
            state = SessionState.RESUMING if move.kind is Kind.RESUME else SessionState.LOADING
            if not self._open(live, move.target, move.kind, state, now_s, reason=move.reason, move_id=move.id):
                self._give_up_before_the_stop(live, move, now_s, "the directory names another epoch")
        self._stop_if_empty(source)
        self._tick(now_s)

    def _on_PointKept(self, source: str, kept: m.PointKept, now_s: float) -> None:
        live = self.sessions.get(kept.session_id)
        move = live.move if live is not None else None
        if live is None or move is None or (move.id, move.phase, move.source) != (kept.move_id, Phase.AHEAD, source):
            return
        self._give_up_before_the_stop(live, move, now_s, f"{source} keeps it: {kept.message}")
        self._tick(now_s)

    def _give_up_before_the_stop(self, live: Live, move: Move, now_s: float, why: str) -> None:
        """Nobody has stopped for it yet: its owner just goes on, or it waits as before."""
        if move.kind is Kind.MIGRATE:
            self._stay(live, now_s, why)
            return
        self._drop_prepared(live)
        live.move = None
        live.brings_failed += 1
        live.retry_at_s = now_s + RETRY_MIN_S * 2**live.brings_failed
        self._store.set_move(live.record.session_id, 0, "")
        self._note(now_s, "move_given_up", session=live.record.session_id, reason=why)
        self._show(live)
        self._shelve_unwatched(live)
        self._tell_session(live)

    def _note_carried(self, live: Live, move: Move, handed: m.HandedOver, now_s: float) -> None:
        """What it cost: the second number is the time that the session stood still for the transfer."""
        reason = (
            f"{move.sent_bytes} B of its point ahead, {handed.sent_bytes} B while it stood still for "
            f"{handed.stopped_ms:.1f} ms, of {handed.point_bytes} B"
        )
        self._note(
            now_s, "carried", worker=move.target, session=live.record.session_id, source=move.source, reason=reason
        )

    # ------------------------------------------------------------------ a node that goes

    def _points_to_save(self, worker_id: str) -> list[Live]:
        """Suspended sessions whose points end with this worker and can still be brought to the server's node."""
        worker = self.workers.get(worker_id)
        if worker is None or not worker.hello.own_arena or self._keeper() is None:
            return []
        return [
            live
            for live in self.sessions.values()
            if live.record.state is SessionState.HOST
            and live.point_node == worker.hello.node
            and live.brings_failed < BRINGS_MAX
        ]

    def _keeper(self) -> str | None:
        """A worker of the server's node, into whose arena points can be brought; not while the server ends."""
        home = [
            one
            for one, worker in sorted(self.workers.items())
            if worker.hello.node == self.node and worker.state == "ready" and self._has_arena(one)
        ]
        return home[0] if home and not self.stopping else None

    def _save_points(self, now_s: float) -> None:
        """Of workers that drain: one point at a time each comes to the server's node."""
        for worker_id, worker in list(self.workers.items()):
            if worker.state != "draining" or not worker.hello.own_arena:
                continue
            waiting, keeper = self._points_to_save(worker_id), self._keeper()
            if not waiting and worker.blamed:  # not told to end yet
                self._stop_if_empty(worker_id)
            if keeper is None or any(one.move is not None for one in waiting):
                continue
            for live in waiting:
                if live.retry_at_s is None:
                    self._bring(live, keeper, Kind.KEEP, now_s, f"{worker_id} drains, and its arena ends with it")
                    break

    # ------------------------------------------------------------------ what lies elsewhere

    def _on_PointsHeld(self, source: str, held: m.PointsHeld, now_s: float) -> None:
        """Have dropped what has ended, and what lives on another node by now."""
        worker = self.workers.get(source)
        if worker is None or worker.hello.worker_epoch != held.worker_epoch or not worker.hello.own_arena:
            return
        for session_id, bytes_ in held.sessions.items():
            live = self.sessions.get(session_id)
            if live is None:
                self._out.append(Send(source, m.ForgetPoint(session_id=session_id)))
            elif live.point_node == worker.hello.node:
                live.point_bytes = bytes_
            elif live.record.owner != source and (
                live.move is None or source not in (live.move.source, live.move.target)
            ):
                self._out.append(Send(source, m.ForgetPoint(session_id=session_id)))

    # ------------------------------------------------------------------ `controller_moves.py`

    def _ask_to_hand_over(self, live: Live, move: Move) -> None:
        raise NotImplementedError

    def _stay(self, live: Live, now_s: float, why: str) -> None:
        raise NotImplementedError
