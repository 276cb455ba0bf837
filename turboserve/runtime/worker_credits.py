"""Credits in, chunks out: the gateway's side of a worker's protocol. Part of `WorkerLogic`, without I/O.

A credit must be for the next chunk. One for a chunk already made is answered with the same frames again. What is
emitted is decided twice: when the chunk is there, and again (`may_emit`) when the ring has room for it.
"""

from __future__ import annotations

from turboserve.model.interface import ModelSpec
from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_books import (
    EARLY_CREDITS_MAX,
    GATEWAY,
    KEPT_CHUNKS,
    Action,
    Emit,
    Phase,
    Session,
    WorkerBooks,
    request_of,
)


class WorkerCredits(WorkerBooks):
    """What the gateway asks for and gets."""

    def __init__(self, hello: m.WorkerHello, spec: ModelSpec) -> None:
        super().__init__(hello)
        self._spec = spec
        self._lease_until_s = float("-inf")

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def may_emit(self, emit: Emit, now_s: float) -> e.FinishedChunk | None:
        """The chunk to send now, or None when it must not or need not go out any more."""
        session = self.sessions.get(emit.session_id)
        if session is None or session.epoch != emit.epoch:
            self.counts.fenced += 1
            return None
        if now_s >= self._lease_until_s or emit.chunk_index > session.sent:
            # Without a lease; or behind one that was withheld: both are emitted again, in order, when it is renewed.
            self.counts.withheld += 1
            return None
        return session.made.get(emit.chunk_index)

    def did_emit(self, emit: Emit) -> None:
        """The chunk has left."""
        self.counts.emitted += 1
        session = self.sessions.get(emit.session_id)
        if session is not None and session.epoch == emit.epoch:
            session.sent = max(session.sent, emit.chunk_index + 1)

    def made(self, emit: Emit) -> e.FinishedChunk | None:
        """The chunk that an Emit is about, as long as it is kept."""
        session = self.sessions.get(emit.session_id)
        return session.made.get(emit.chunk_index) if session is not None and session.epoch == emit.epoch else None

    def cannot_encode(self, emit: Emit) -> list[Action]:
        """The chunk cannot be had in its format; the gateway ends the session and says why."""
        session = self.sessions.get(emit.session_id)
        if session is not None and session.epoch == emit.epoch:
            self._refuse_chunk(emit.session_id, emit.epoch, emit.chunk_index, session.next_index, m.NOT_ENCODED)
        return self._flush()

    def _on_credit(self, credit: m.Credit, now_s: float) -> None:
        session = self.sessions.get(credit.session_id)
        if session is None:
            self._refuse_credit(credit, 0, "not_found")
        elif credit.epoch != session.epoch:
            self.counts.fenced += 1
            self._refuse_credit(credit, session.next_index, "stale_epoch")
        elif session.phase is Phase.BROKEN:
            self._refuse_credit(credit, session.next_index, "session_poisoned")
        elif session.phase is Phase.OPENING:
            self._wait_early(credit, session)
        elif session.phase is Phase.HANDED_OVER and credit.chunk_index >= session.next_index:
            self._refuse_credit(credit, session.next_index, "moving")
        elif session.phase is Phase.STOPPING and credit.chunk_index >= session.next_index:
            self._wait_early(credit, session)
        elif credit.prompt_switch not in self._spec.prompt_switch:
            self._refuse_credit(credit, session.next_index, "invalid_request")
        elif credit.chunk_index > session.next_index:
            self._refuse_credit(credit, session.next_index, "index_out_of_range")
        elif credit.chunk_index < session.next_index:
            self._credit_again(credit, session, now_s)
        elif session.next_index - session.accepted >= KEPT_CHUNKS:
            self._refuse_credit(credit, session.next_index, "overloaded")
        else:
            request = request_of(credit)
            session.next_index += 1
            session.format = credit.format
            session.requests[credit.chunk_index] = request
            session.requests.pop(credit.chunk_index - 2 * KEPT_CHUNKS, None)
            self._out.append(e.Begin(credit.session_id, credit.epoch, request, now_s, now_s + credit.deadline_s))

    def _credit_again(self, credit: m.Credit, session: Session, now_s: float) -> None:
        """A credit for a chunk that was begun before: the same frames, or a reason why not."""
        session.format = credit.format
        known = session.requests.get(credit.chunk_index)
        if known is not None and known != request_of(credit):
            self._refuse_credit(credit, session.next_index, "conflict")
        elif credit.chunk_index in session.made:
            self._emit(credit.session_id, session, credit.chunk_index, now_s)
        elif known is None or credit.chunk_index < min(session.made, default=0):
            self._refuse_credit(credit, session.next_index, "index_passed")

    def _on_accepted(self, accepted: m.ChunkAccepted, now_s: float) -> None:
        session = self.sessions.get(accepted.session_id)
        if session is not None and accepted.epoch == session.epoch:
            # Never beyond what was sent: else chunks could be dropped from `made` before they left.
            session.accepted = max(session.accepted, min(accepted.chunk_index + 1, session.sent))

    def _emit(self, session_id: str, session: Session, chunk_index: int, now_s: float) -> None:
        if GATEWAY in self._connected and now_s < self._lease_until_s:
            self._out.append(Emit(session_id, session.epoch, chunk_index, session.format))

    def _emit_unaccepted(self) -> None:
        """After a reconnect or a renewed lease: all that the gateway has not confirmed; it takes each once."""
        if GATEWAY not in self._connected:
            return
        for session_id, session in self.sessions.items():
            if session.phase is Phase.OPENING:
                continue  # being adopted: it is asked for under the new epoch
            for chunk_index in session.made:
                if chunk_index >= session.accepted:
                    self._out.append(Emit(session_id, session.epoch, chunk_index, session.format))

    def _wait_early(self, credit: m.Credit, session: Session) -> None:
        """Keep a credit until the engine has opened or stopped the session."""
        if credit in session.early:
            return
        if len(session.early) >= EARLY_CREDITS_MAX:
            self._refuse_credit(credit, session.next_index, "overloaded")
            return
        session.early.append(credit)

    def _take_early(self, session: Session, now_s: float) -> None:
        early, session.early = session.early, []
        for credit in early:
            self._on_credit(credit, now_s)
