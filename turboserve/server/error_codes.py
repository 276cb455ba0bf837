"""Every error code and close code the server gives out, in one place; docs/errors.md is generated from it.

python -m turboserve.server.error_codes > docs/errors.md
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """`http` is the status where a route answers with it; None where it is only told on a stream."""

    code: str
    http: int | None
    retryable: bool
    meaning: str
    remedy: str


CODES: tuple[ErrorCode, ...] = (
    ErrorCode("malformed", 400, False, "The body or message is not JSON, or not one of ours.", "Correct it."),
    ErrorCode("unauthenticated", 401, False, "No key, or one that is not known.", "Send `Authorization: Bearer KEY`."),
    ErrorCode("forbidden", 403, False, "The key's role, or the page's origin, may not do this.", "Use an admin key."),
    ErrorCode("not_found", 404, False, "No such thing, or it belongs to another key.", "Check the id."),
    ErrorCode("method_not_allowed", 405, False, "The path exists, the method does not.", "See `/openapi.json`."),
    ErrorCode("too_slow", 408, True, "Header or body did not arrive in time.", "Send it again, faster."),
    ErrorCode("conflict", 409, False, "The session's state does not allow this.", "Read the state first."),
    ErrorCode("event_id_conflict", 409, False, "This event_id was used for other words.", "Use a fresh one."),
    ErrorCode("state_error", 409, False, "Stored session state cannot be used.", "Open a new session."),
    ErrorCode("state_incompatible", 409, False, "State of another model, layout or numerics.", "Open a new session."),
    ErrorCode("state_corrupt", 409, False, "A digest or checksum is wrong; the session ends.", "Open a new session."),
    ErrorCode("too_large", 413, False, "Body, header or nesting above its bound.", "Send less."),
    ErrorCode("unsupported_media_type", 415, False, "The body is not JSON.", "Send `application/json`."),
    ErrorCode("host_not_allowed", 421, False, "The Host header is not this server's.", "Use its own address."),
    ErrorCode("invalid_request", 422, False, "A field is unknown, missing or out of range.", "See `expected`."),
    ErrorCode("invalid_prompt", 422, False, "Empty, too long, or with control characters.", "Change the prompt."),
    ErrorCode("unknown_model", 422, False, "No such model here.", "`GET /v1/models` lists them."),
    ErrorCode(
        "index_out_of_range", 422, False, "A chunk index that cannot be replayed or asked for.", "See `expected`."
    ),
    ErrorCode("index_passed", 422, False, "The chunk has begun; its inputs are fixed.", "Name a later `from_index`."),
    ErrorCode("quota_exceeded", 429, True, "A limit of this key.", "Wait for `Retry-After`, or end a session."),
    ErrorCode("flood", None, True, "Messages come too fast; some were dropped.", "At most 10 a second."),
    ErrorCode("headers_too_large", 431, False, "Too many or too large headers.", "Send fewer."),
    ErrorCode("internal", 500, False, "Our mistake; the log has the request id.", "Report it with the id."),
    ErrorCode("protocol_error", 500, False, "A process of the server broke the internal protocol.", "Report it."),
    ErrorCode("auth_failed", 500, False, "Two processes of the server do not share a token.", "Restart the server."),
    ErrorCode("worker_failed", 500, True, "The worker of the session failed.", "Open a new session."),
    ErrorCode("worker_lost", 500, True, "The worker of the session was lost.", "Open a new session."),
    ErrorCode("session_failed", 500, False, "The session cannot go on.", "Open a new session."),
    ErrorCode("session_poisoned", 500, False, "The session's video became invalid numbers.", "Open a new session."),
    ErrorCode("config_error", 500, False, "A setting of the server does not fit.", "Tell its operator."),
    ErrorCode("trace_error", 500, False, "A trace or recording that cannot be read.", "Tell the operator."),
    ErrorCode("checkpoint_error", 500, False, "Weights that do not fit the model.", "Tell the operator."),
    ErrorCode("not_offered", 501, False, "This deployment cannot do that.", "See the message."),
    ErrorCode("refused", 503, True, "Right, but not now.", "Wait for `Retry-After`."),
    ErrorCode("overloaded", 503, True, "No room in queue or memory, or shutting down.", "Wait for `Retry-After`."),
    ErrorCode("queue_timeout", 503, True, "No room came free in time.", "Open the session again later."),
    ErrorCode("pool_exhausted", 503, True, "No memory for one more session.", "Wait for `Retry-After`."),
)

BY_CODE = {one.code: one for one in CODES}


@dataclass(frozen=True, slots=True)
class CloseCode:
    code: int
    name: str
    resumable: str
    meaning: str


CLOSE_CODES: tuple[CloseCode, ...] = (
    CloseCode(1000, "ended", "no", "The session ended; an `end` message came before."),
    CloseCode(1001, "going_away", "at once", "The server goes away."),
    CloseCode(1009, "message_too_big", "at once", "A message over 64 KiB."),
    CloseCode(1012, "restart", "at once", "The server restarts; attach again with the same token."),
    CloseCode(4400, "bad_messages", "yes", "Twenty bad messages within a minute."),
    CloseCode(4401, "token", "no", "No attach within 5 s, or a token that does not open the session."),
    CloseCode(4404, "unknown", "no", "No such session."),
    CloseCode(4409, "attached_elsewhere", "no", "A newer connection took the stream over."),
    CloseCode(4410, "expired", "no", "Nobody attached within the grace time, or the session's time is up."),
    CloseCode(4413, "too_slow", "yes", "Four chunks stood unacked for a minute, or messages were not read."),
    CloseCode(4429, "flood", "after the hint", "Too many messages or attaches."),
    CloseCode(4500, "session_failed", "no", "The session failed; an `error` message says why."),
)


def as_markdown() -> str:
    """docs/errors.md."""
    lines = [
        "# Errors",
        "",
        "Generated by `python -m turboserve.server.error_codes`; do not edit.",
        "",
        'Every HTTP error is `{"error": {"code", "message", "expected"?, "hint"?, "retryable", "request_id"}}`;',
        "`/v1/videos` adds `type` and `param`. On a stream an error is the message",
        '`{"type": "error", "code", "message", "retryable"}`. 429 and 503 carry `Retry-After`.',
        "",
        "| code | HTTP | retryable | meaning | what to do |",
        "|---|---|---|---|---|",
    ]
    for one in CODES:
        status = one.http if one.http is not None else "stream only"
        lines.append(f"| `{one.code}` | {status} | {'yes' if one.retryable else 'no'} | {one.meaning} | {one.remedy} |")
    lines += [
        "",
        "## Close codes of the WebSocket",
        "",
        "| code | name | attach again | meaning |",
        "|---|---|---|---|",
    ]
    lines += [f"| {one.code} | {one.name} | {one.resumable} | {one.meaning} |" for one in CLOSE_CODES]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
