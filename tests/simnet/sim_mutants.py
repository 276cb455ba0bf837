"""Deliberate bugs, one at a time, in the real logic (and one in what a worker puts into a recovery point). The
simulated network must catch each; one that survives shows a check that is missing, or a line that is not needed.

Left out after trial. Because they change nothing that a viewer or an operator can see: a source that goes on after it
was stopped (its chunks are the same), a wrong `next_index` in SessionPlaced (the owner corrects it), prepared slots
that nobody drops (they expire). Because sixty seeds did not reach them: an end that is lost with a gateway between disk
and controller, an op_id forgotten, a failure that is not told, moves without a deadline, a compacted log without its
earlier inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import sim_worker
from sim_store import SimDirectory

from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import ControllerBooks, DropPoints
from turboserve.runtime.controller_fleet import ControllerFleet
from turboserve.runtime.controller_logic import ControllerLogic
from turboserve.runtime.controller_moves import ControllerMoves
from turboserve.runtime.controller_recovery import ControllerRecovery
from turboserve.runtime.controller_suspects import ControllerSuspects
from turboserve.runtime.worker_books import CONTROLLER, WorkerBooks
from turboserve.runtime.worker_credits import WorkerCredits
from turboserve.runtime.worker_logic import WorkerLogic
from turboserve.server import session_credits
from turboserve.server.effects import Append
from turboserve.server.gateway_logic import GatewayLogic
from turboserve.server.log_records import Frontier, LoggedSession
from turboserve.server.operations import Operations
from turboserve.server.outbox import Outbox
from turboserve.server.prompt_line import PromptLine
from turboserve.server.session_credits import SessionCredits
from turboserve.server.session_stream import SessionStream, StoredChunk

Mutant = Callable[[], contextlib.AbstractContextManager[None]]
MUTANTS: dict[str, Mutant] = {}


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def mutant(owner: Any, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`owner.name` becomes the decorated function, whose first argument is the original."""

    def register(wrong: Callable[..., Any]) -> Callable[..., Any]:
        right = getattr(owner, name)

        def value(*args: Any, **kwargs: Any) -> Any:
            return wrong(right, *args, **kwargs)

        MUTANTS[wrong.__name__] = lambda: patched(owner, name, value)
        return wrong

    return register


def nothing(*_: Any, **__: Any) -> None:
    return None


# ---------------------------------------------------------------- gateway


@mutant(SessionCredits, "_bind")
def credit_before_inputs_are_durable(right: Any, self: Any, now_s: float) -> None:
    right(self, now_s)
    self.durable = self.bound


@mutant(Outbox, "append")
def log_answers_before_it_is_on_disk(right: Any, self: Any, record: Any, then: Any = None) -> None:
    self._appended += 1
    self._effects.append(Append(record))
    if then is not None:
        then(0.0)


@mutant(SessionCredits, "chunk")
def gateway_does_not_fence_epochs(right: Any, self: Any, message: Any, data: Any, now_s: float) -> Any:
    return right(self, msgspec.structs.replace(message, epoch=self.epoch), data, now_s)


@mutant(PromptLine, "at")
def replayed_credit_carries_the_newest_prompt(right: Any, self: Any, index: int) -> tuple[int, str]:
    return self.inputs[-1][1:]


@mutant(SessionStream, "prompt")
def prompt_accepted_before_it_is_durable(right: Any, self: Any, *args: Any) -> None:
    append, self.outbox.append = self.outbox.append, lambda record, then: then(0.0)
    try:
        right(self, *args)
    finally:
        self.outbox.append = append


@mutant(LoggedSession, "waiting")
def restarted_gateway_forgets_prompts_that_wait(right: Any, self: Any) -> list[Any]:
    return []


@mutant(SessionCredits, "_accept")
def frontier_is_what_was_sent_not_what_was_acked(right: Any, self: Any, *args: Any) -> None:
    right(self, *args)
    self.outbox.append(Frontier(sid=self.sid, delivered=self.next_index, digest=self.digest))


@mutant(SessionCredits, "_may_bind")
def credits_without_regard_to_acks(right: Any, self: Any) -> bool:
    return self.period is not None and not self.paused and self.owned and self.bound == self.next_index


@mutant(SessionCredits, "refused")
def owner_that_moves_counts_as_failed(right: Any, self: Any, message: Any, now_s: float) -> None:
    if message.code == "moving":
        self.fail("session_failed", "refused", now_s)
    else:
        right(self, message, now_s)


@mutant(GatewayLogic, "_adopt")
def gateway_does_not_say_what_sessions_there_are(right: Any, self: Any, session: Any, now_s: float) -> None:
    return None


@mutant(SessionCredits, "send_again")
def lost_credit_is_not_sent_again(right: Any, self: Any, now_s: float) -> None:
    self.pump(now_s)


@mutant(Operations, "send_again")
def operations_are_not_repeated(right: Any, self: Any) -> None:
    return None


@mutant(SessionStream, "_attached")
def viewer_gets_the_ring_from_its_beginning(right: Any, self: Any, connection: int, token: str, now_s: float) -> None:
    if self.viewer is not None and self.viewer.connection == connection and self.ring:
        self.viewer.next_index = self.ring[0].index
    right(self, connection, token, now_s)


@mutant(SessionCredits, "_next_credit")
def chunk_in_another_format_is_not_asked_for(right: Any, self: Any) -> int | None:
    return self.sent if self.sent < self.durable else None


@mutant(StoredChunk, "fits")
def chunk_in_another_format_is_delivered(right: Any, self: Any, format: str) -> bool:
    return True


# ---------------------------------------------------------------- worker


@mutant(WorkerCredits, "_credit_again")
def chunk_is_sent_again_in_its_old_format(right: Any, self: Any, credit: Any, session: Any, now_s: float) -> None:
    right(self, msgspec.structs.replace(credit, format=session.format), session, now_s)


@mutant(WorkerCredits, "may_emit")
def chunk_leaves_after_the_lease(right: Any, self: Any, emit: Any, now_s: float) -> Any:
    session = self.sessions.get(emit.session_id)
    if session is None or session.epoch != emit.epoch or emit.chunk_index > session.sent:
        return None
    return session.made.get(emit.chunk_index)


@mutant(WorkerCredits, "_credit_again")
def repeated_credit_is_begun_again(right: Any, self: Any, credit: Any, session: Any, now_s: float) -> None:
    session.next_index = credit.chunk_index
    self._on_credit(credit, now_s)


@mutant(WorkerLogic, "on_connect")
def worker_does_not_say_what_it_holds(right: Any, self: Any, source: str, now_s: float) -> Any:
    if source != CONTROLLER:
        return right(self, source, now_s)
    held, self.sessions = self.sessions, {}
    try:
        return right(self, source, now_s)
    finally:
        self.sessions = held


@mutant(WorkerLogic, "_on_closed")
def release_is_not_told(right: Any, self: Any, *args: Any) -> None:
    return None


@mutant(WorkerBooks, "_forget_from")
def stopped_worker_counts_credits_it_never_began(right: Any, self: Any, session: Any, next_index: int) -> None:
    return None


# ---------------------------------------------------------------- controller


@mutant(ControllerMoves, "_go_on_at_source")
def given_up_move_goes_back_without_a_new_epoch(right: Any, self: Any, live: Any, now_s: float, why: str) -> None:
    self._stay(live, now_s, why)


@mutant(ControllerBooks, "_own")
def owner_changes_without_the_directory(
    right: Any, self: Any, live: Any, owner: Any, state: Any, why: str = ""
) -> bool:
    live.record.owner = owner
    live.record.epoch += 1
    live.record.move(state, why)
    self._show(live)
    return True


@mutant(ControllerMoves, "_open")
def epoch_does_not_grow(right: Any, self: Any, live: Any, worker: str, *args: Any, **more: Any) -> bool:
    store, right_own = self._store, self._store.own

    def own(session_id: str, seen_epoch: int, owner: Any, state: Any) -> int:
        if seen_epoch < 1:
            return int(right_own(session_id, seen_epoch, owner, state))
        row = store.rows[session_id].record
        row.owner, row.state = owner, state
        return seen_epoch

    store.own = own
    try:
        return bool(right(self, live, worker, *args, **more))
    finally:
        del store.own


@mutant(ControllerRecovery, "_recover")
def sessions_of_a_lost_worker_are_left(right: Any, self: Any, live: Any, now_s: float, why: str) -> None:
    return None


@mutant(ControllerRecovery, "take_over")
def controller_starts_without_reading_the_directory(right: Any, self: Any, *args: Any, **fields: Any) -> None:
    return None


@mutant(ControllerMoves, "_owned")
def anybody_may_speak_for_a_session(right: Any, self: Any, source: str, session_id: str, epoch: int) -> Any:
    return self.sessions.get(session_id)


@mutant(ControllerMoves, "_on_SessionOpened")
def zombie_is_not_told_to_let_go(right: Any, self: Any, source: str, opened: Any, now_s: float) -> None:
    known = self.sessions.get(opened.session_id)
    if known is not None and opened.epoch >= known.record.epoch:
        right(self, source, opened, now_s)


@mutant(ControllerLogic, "_resume")
def copy_is_freed_before_its_successor_is_there(right: Any, self: Any, live: Any, *args: Any) -> Any:
    self._out.append(DropPoints(live.record.session_id))
    return right(self, live, *args)


@mutant(SimDirectory, "record_wish")
def wish_is_not_durable_before_the_launcher_is_asked(right: Any, self: Any, op_id: int, wishes: Any) -> None:
    return None


@mutant(ControllerSuspects, "_judge")
def a_kill_from_outside_makes_suspects_of_all(right: Any, self: Any, event: Any, now_s: float) -> None:
    right(self, msgspec.structs.replace(event, exit_code=1), now_s)


@mutant(ControllerFleet, "_stop_if_empty")
def drained_worker_is_stopped_too_early(right: Any, self: Any, worker_id: str) -> None:
    worker = self.workers.get(worker_id)
    if worker is not None and worker.state == "draining":
        self._send_stop(worker_id) if hasattr(self, "_send_stop") else _stop(self, worker_id)


def _stop(self: Any, worker_id: str) -> None:
    from turboserve.runtime.controller_books import Send

    self._out.append(Send(worker_id, m.StopWorker(worker_id=worker_id, reason="drained, it owns nothing")))


# ---------------------------------------------------------------- recovery points


@mutant(sim_worker.ToyEngine, "_write_point")
def point_without_what_nobody_has_accepted(right: Any, self: Any, sid: str, held: Any) -> Any:
    made, held.made = held.made, []
    try:
        return right(self, sid, held)
    finally:
        held.made = made


assert session_credits.REFUSALS_MAX
