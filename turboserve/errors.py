"""Every exception TurboServe raises, drawn as a tree.

TurboServeError
├── InvalidRequest            the caller sent something we cannot take (HTTP 4xx)
│   ├── InvalidPrompt         empty, too long, or with control characters
│   ├── UnknownModel          a model name or path that cannot be served
│   ├── IndexOutOfRange       a chunk index outside what can be replayed or asked for
│   ├── IndexPassed           an input for a chunk that has already begun
│   ├── Conflict              a command that the session's state does not allow
│   │   └── EventIdConflict   a prompt's event_id was used before
│   ├── Malformed             bytes that are no JSON, or a message that is none of ours
│   ├── TooLarge              a body or header above its bound
│   ├── TooSlow               a request that did not arrive in time
│   └── NotOffered            a command that this deployment cannot carry out
├── AuthError                 no key, a wrong key, or a role that may not do this
│   ├── Unauthenticated       401 / close 4401
│   └── Forbidden             403
├── NotFound                  no such thing, or it belongs to somebody else
├── Refused                   right, but not now
│   ├── QuotaExceeded         429: a limit of this key
│   └── Overloaded            503: no room in queue or memory
├── ProtocolError             a peer process broke the internal wire rules
│   └── AuthFailed            handshake or message code did not verify
├── StateError                session state that cannot be used
│   ├── IllegalTransition     a move the session table does not have
│   ├── LayoutMismatch        another layout, model or numerics than the state was made with
│   ├── CorruptState          digest or checksum of stored bytes is wrong
│   └── PoolExhausted         no page, slot or byte left where one was asked for
│       └── ArenaFull         a worker's part of the host arena has too few free slabs
├── WorkerError               a worker process failed
│   └── SessionPoisoned       one session's pass failed or made NaN; its neighbours are untouched
├── ConfigError               a file, flag or environment value that does not fit
├── TraceError                a trace, profile or recording that cannot be read
└── CheckpointError           weights with missing, unexpected or misshapen keys

Each carries `expected` (what would have been right) and `hint` (what to do next); both may be empty.
"""

from __future__ import annotations


class TurboServeError(Exception):
    """Base of all errors raised on purpose.

    `code` is the stable name that reaches clients; `http_status` what an HTTP route answers with;
    `retryable` says whether the same call can succeed later without being changed.
    """

    code = "internal"
    http_status = 500
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        expected: str | None = None,
        hint: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.expected = expected
        self.hint = hint
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        parts = [self.message]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.hint:
            parts.append(self.hint)
        return "; ".join(parts)


class InvalidRequest(TurboServeError):
    code = "invalid_request"
    http_status = 422


class InvalidPrompt(InvalidRequest):
    code = "invalid_prompt"


class UnknownModel(InvalidRequest):
    code = "unknown_model"


class IndexOutOfRange(InvalidRequest):
    code = "index_out_of_range"


class IndexPassed(InvalidRequest):
    code = "index_passed"


class Conflict(InvalidRequest):
    code = "conflict"
    http_status = 409


class EventIdConflict(Conflict):
    code = "event_id_conflict"


class Malformed(InvalidRequest):
    code = "malformed"
    http_status = 400


class TooLarge(InvalidRequest):
    code = "too_large"
    http_status = 413


class TooSlow(InvalidRequest):
    code = "too_slow"
    http_status = 408
    retryable = True


class NotOffered(InvalidRequest):
    code = "not_offered"
    http_status = 501


class AuthError(TurboServeError):
    code = "unauthenticated"
    http_status = 401


class Unauthenticated(AuthError):
    code = "unauthenticated"


class Forbidden(AuthError):
    code = "forbidden"
    http_status = 403


class NotFound(TurboServeError):
    code = "not_found"
    http_status = 404


class Refused(TurboServeError):
    code = "refused"
    http_status = 503
    retryable = True


class QuotaExceeded(Refused):
    code = "quota_exceeded"
    http_status = 429


class Overloaded(Refused):
    code = "overloaded"
    http_status = 503


class ProtocolError(TurboServeError):
    code = "protocol_error"


class AuthFailed(ProtocolError):
    code = "auth_failed"


class StateError(TurboServeError):
    code = "state_error"
    http_status = 409


class IllegalTransition(StateError):
    code = "conflict"


class LayoutMismatch(StateError):
    code = "state_incompatible"


class CorruptState(StateError):
    code = "state_corrupt"


class PoolExhausted(StateError):
    code = "pool_exhausted"
    http_status = 503
    retryable = True


class ArenaFull(PoolExhausted):
    pass


class WorkerError(TurboServeError):
    code = "worker_failed"
    retryable = True


class SessionPoisoned(WorkerError):
    code = "session_poisoned"
    retryable = False


class ConfigError(TurboServeError):
    code = "config_error"


class TraceError(TurboServeError):
    code = "trace_error"


class CheckpointError(TurboServeError):
    code = "checkpoint_error"
