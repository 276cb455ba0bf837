"""What the gateway's logic remembers besides sessions, and its answers as records, messages and errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from turboserve.errors import TurboServeError, WorkerError
from turboserve.runtime import messages
from turboserve.server.attach_tokens import token_hash
from turboserve.server.log_records import LoggedSession, Opened
from turboserve.server.pacing import StreamClock
from turboserve.server.stream_shape import StreamShape


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSession:
    """A checked wish for a session."""

    sid: str
    token: str
    tenant: str
    tenant_weight: float
    wide: bool
    shape: StreamShape
    clock: StreamClock
    seed: int
    steps: int
    format: str
    prompt: str
    prompt_switch: str = "swap"
    decoder: str = ""
    allow_reduced_steps: bool = True
    max_chunks: int | None = None
    created_unix_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Worker:
    worker_id: str
    epoch: int
    state: str
    numerics_id: str = ""
    reason: str = ""


def create_message(
    wish: NewSession, *, adopt: bool = False, next_index: int = 0, epoch: int = 0, steps_now: int = 0
) -> Callable[[int], messages.Message]:
    """The controller's order for a session, once its operation id is known."""
    return lambda op_id: messages.CreateSession(
        op_id=op_id,
        session_id=wish.sid,
        tenant=wish.tenant,
        tenant_weight=wish.tenant_weight,
        model=wish.shape.model,
        seed=wish.seed,
        width=wish.shape.width,
        height=wish.shape.height,
        steps=wish.steps,
        steps_now=steps_now,
        prompt=wish.prompt,
        prompt_switch=wish.prompt_switch,
        decoder=wish.decoder,
        allow_reduced_steps=wish.allow_reduced_steps,
        next_index=next_index,
        adopt=adopt,
        epoch=epoch,
    )


def end_message(sid: str, reason: str) -> Callable[[int], messages.Message]:
    return lambda op_id: messages.EndSession(op_id=op_id, session_id=sid, reason=reason[:256])


def wish_of(logged: LoggedSession, shape: StreamShape, clock: StreamClock) -> NewSession:
    """What a session of an earlier gateway was opened with. Its token is only known as a hash."""
    opened = logged.opened
    return NewSession(
        sid=opened.sid,
        token="",
        tenant=opened.tenant,
        tenant_weight=opened.tenant_weight,
        wide=opened.wide,
        shape=shape,
        clock=clock,
        seed=opened.seed,
        steps=opened.steps,
        format=opened.format,
        prompt=opened.prompt,
        prompt_switch=opened.prompt_switch,
        decoder=opened.decoder,
        allow_reduced_steps=opened.allow_reduced_steps,
        max_chunks=opened.max_chunks,
    )


def opened_record(wish: NewSession) -> Opened:
    return Opened(
        sid=wish.sid,
        tenant=wish.tenant,
        model=wish.shape.model,
        model_hash=wish.shape.model_hash,
        seed=wish.seed,
        width=wish.shape.width,
        height=wish.shape.height,
        steps=wish.steps,
        format=wish.format,
        prompt=wish.prompt,
        prompt_switch=wish.prompt_switch,
        decoder=wish.decoder,
        token_hash=token_hash(wish.token),
        created_unix_s=wish.created_unix_s,
        allow_reduced_steps=wish.allow_reduced_steps,
        max_chunks=wish.max_chunks,
        tenant_weight=wish.tenant_weight,
        wide=wish.wide,
    )


def error_message(error: TurboServeError, event_id: str | None = None) -> dict[str, Any]:
    """An error as the viewer sees it, with the event_id of the message it answers."""
    message: dict[str, Any] = {"type": "error", "code": error.code, "message": error.message}
    if event_id is not None:
        message["event_id"] = event_id
    if error.expected:
        message["expected"] = error.expected
    if error.hint:
        message["hint"] = error.hint
    message["retryable"] = error.retryable
    return message


NOT_ATTACHED = {
    "type": "error",
    "code": "conflict",
    "message": "this connection is not attached to the session",
    "expected": "an attach message first",
    "retryable": False,
}


def error_of(done: messages.OpDone) -> TurboServeError:
    """A controller's refusal as the error its code stands for; an unknown code is a plain failure."""
    kind = next((kind for kind in _errors(TurboServeError) if kind.code == done.code), WorkerError)
    error = kind(done.message or done.code, retry_after_s=done.retry_after_s or None)
    return error


def _errors(kind: type[TurboServeError]) -> Iterable[type[TurboServeError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _errors(child)
