"""What a server's refusals become here: typed errors that keep its code, message, expectation and hint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turboserve import errors
from turboserve.errors import TurboServeError


def _by_code() -> dict[str, type[TurboServeError]]:
    found: dict[str, type[TurboServeError]] = {}
    todo: list[type[TurboServeError]] = [TurboServeError]
    while todo:
        one = todo.pop(0)
        todo += one.__subclasses__()
        if one.__module__ == errors.__name__:
            found[one.code] = one
    # Two classes share these codes; a caller should catch the public one.
    return found | {"conflict": errors.Conflict, "unauthenticated": errors.Unauthenticated}


_BY_CODE = _by_code()

_BY_STATUS: dict[int, type[TurboServeError]] = {
    400: errors.InvalidRequest,
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    413: errors.InvalidRequest,
    422: errors.InvalidRequest,
    429: errors.QuotaExceeded,
    503: errors.Overloaded,
}


def from_body(body: Mapping[str, Any], *, status: int = 0, retry_after_s: float | None = None) -> TurboServeError:
    """The error that an `{"code", "message", ...}` object stands for; an unknown code falls back to the status."""
    code = str(body.get("code", ""))
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status) or (errors.WorkerError if status >= 500 else TurboServeError)
    error = kind(
        str(body.get("message") or f"the server answered {status or code}"),
        expected=_text(body.get("expected")),
        hint=_text(body.get("hint")),
        retry_after_s=retry_after_s,
    )
    if code:
        error.code = code
    if isinstance(body.get("retryable"), bool):
        error.retryable = body["retryable"]
    return error


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def unreachable(url: str, why: object) -> TurboServeError:
    """No answer from the server at all, or no longer."""
    error = errors.Refused(
        f"cannot reach {url}: {why}",
        hint="is the server running? `turboserve serve` starts one; TURBOSERVE_URL says where to look",
    )
    error.code = "unreachable"
    return error


@dataclass(frozen=True, slots=True)
class Resumable:
    """A connection that is worth coming back to. `at_once`: the server said so; `wait_s`: its own hint."""

    why: str
    at_once: bool = False
    wait_s: float | None = None
    too_slow: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """The stream is over, as it should be."""

    reason: str


_RESUMABLE = {
    1001: "the server is going away",
    1005: "the connection was closed without a code",
    1006: "the connection was lost",
    1011: "the server stumbled",
    1012: "the server restarts",
    1013: "the server is busy",
    4400: "the server did not understand some messages",
    4413: "this client was too slow",
    4429: "too many messages",
    4503: "the server has no room right now",
}

_FINAL: dict[int, tuple[type[TurboServeError], str]] = {
    1002: (errors.ProtocolError, "the server broke off: protocol error"),
    1003: (errors.ProtocolError, "the server does not take this kind of data"),
    1007: (errors.ProtocolError, "the server could not read a message"),
    1008: (errors.Forbidden, "the server refuses this connection"),
    1009: (errors.InvalidRequest, "a message was too long for the server"),
    4401: (errors.Unauthenticated, "the attach token is not valid (any more)"),
    4403: (errors.Forbidden, "this session may not be watched from here"),
    4404: (errors.NotFound, "the server does not know this session"),
    4409: (errors.Conflict, "somebody else attached to this session"),
    4410: (errors.NotFound, "the session has expired"),
    4500: (errors.WorkerError, "the session failed on the server"),
}

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def after_close(code: int, reason: str) -> Ended | Resumable | TurboServeError:
    """What a close code means: the end, a reason to come back, or an error."""
    if code == 1000:
        return Ended(reason or "ended")
    if code in _FINAL:
        kind, text = _FINAL[code]
        error = kind(f"{text}: {reason}" if reason else text)
        error.retryable = False
        return error
    why = _RESUMABLE.get(code, f"the connection closed with code {code}")
    hint = _NUMBER.search(reason) if code in (1013, 4429, 4503) else None
    return Resumable(
        f"{why}: {reason}" if reason else why,
        at_once=code in (1001, 1012),
        wait_s=float(hint.group()) if hint else None,
        too_slow=code == 4413,
    )
