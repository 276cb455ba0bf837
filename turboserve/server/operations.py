"""What the gateway asked of the controller and has no answer to: sent again at every connect, under the same op_id.

A wish of the HTTP side is given up after `OP_TIMEOUT_S`. What must come about in the end (a session that ended, one
that the controller must know of) lasts until it is answered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from turboserve.runtime import messages
from turboserve.server.effects import Resolve, ToController
from turboserve.server.gateway_records import error_of
from turboserve.server.outbox import Outbox

OP_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Operation:
    """One wish. It is resolved once it is both answered and, where it needs that, durable."""

    op_id: int
    message: messages.Message
    deadline_s: float
    sid: str = ""
    lasts: bool = False
    needs_durable: bool = False
    done: messages.OpDone | None = None


class Operations:
    """All that are open. `wake` is told when `expired` should be asked."""

    def __init__(self, gateway_epoch: int, outbox: Outbox, wake: Callable[[float], None]) -> None:
        self._first = gateway_epoch << 32
        self._count = 0
        self._outbox = outbox
        self._wake = wake
        self._open: dict[int, Operation] = {}
        self._by_session: dict[tuple[str, str], int] = {}

    def start(
        self,
        build: Callable[[int], messages.Message],
        now_s: float,
        sid: str = "",
        *,
        lasts: bool = False,
        needs_durable: bool = False,
    ) -> int:
        """Send a message under a fresh op_id, which is returned."""
        self._count += 1
        op_id = self._first + self._count
        message = build(op_id)
        self._open[op_id] = Operation(op_id, message, now_s + OP_TIMEOUT_S, sid, lasts, needs_durable)
        if sid:
            self._by_session[sid, type(message).__name__] = op_id
        if not lasts:
            self._wake(now_s + OP_TIMEOUT_S)
        self._outbox.put(ToController(message))
        return op_id

    def pending(self, sid: str, kind: type[messages.Message]) -> bool:
        """Whether such a message of the session waits for its answer."""
        return self._by_session.get((sid, kind.__name__)) in self._open

    def send_again(self) -> None:
        """The channel to the controller is there again. A session that it was to open may be there by now, or may have
        been and failed: it is to be adopted."""
        for operation in self._open.values():
            if isinstance(operation.message, messages.CreateSession):
                operation.message = replace(operation.message, adopt=True)
            if operation.done is None:
                self._outbox.put(ToController(operation.message))

    def answered(self, done: messages.OpDone) -> Operation | None:
        """The operation this answers, unless it was answered or given up before."""
        operation = self._open.get(done.op_id)
        if operation is None or operation.done is not None:
            return None
        operation.done = done
        self._resolve(operation)
        return operation

    def durable(self, op_id: int) -> None:
        operation = self._open.get(op_id)
        if operation is not None:
            operation.needs_durable = False
            self._resolve(operation)

    def _resolve(self, operation: Operation) -> None:
        done = operation.done
        if done is None or operation.needs_durable:
            return
        self._drop(operation)
        if not operation.lasts:
            self._outbox.put(Resolve(operation.op_id, error_of(done) if done.code else done))

    def expired(self, now_s: float) -> list[Operation]:
        """Those whose time is up; they are forgotten."""
        late = [one for one in self._open.values() if not one.lasts and one.deadline_s <= now_s]
        for operation in late:
            self._drop(operation)
        return late

    def _drop(self, operation: Operation) -> None:
        del self._open[operation.op_id]
        key = (operation.sid, type(operation.message).__name__)
        if self._by_session.get(key) == operation.op_id:
            del self._by_session[key]
