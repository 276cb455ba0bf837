"""Every HTTP error in one shape. Exception text that is not ours never reaches a caller."""

from __future__ import annotations

import math
import random
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from turboserve.errors import TurboServeError
from turboserve.server.error_codes import BY_CODE

_BY_STATUS = {404: "not_found", 405: "method_not_allowed", 400: "malformed", 403: "forbidden", 415: "malformed"}
_VIDEO_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_response(
    code: str,
    message: str,
    *,
    request_id: str,
    status: int | None = None,
    expected: str | None = None,
    hint: str | None = None,
    retry_after_s: float | None = None,
    video: bool = False,
    param: str | None = None,
) -> JSONResponse:
    """The contract's error object. 429 and 503 always say when to come back, with jitter against herds."""
    known = BY_CODE.get(code, BY_CODE["internal"])
    status = status or known.http or 500
    error: dict[str, Any] = {"code": code, "message": message}
    if expected:
        error["expected"] = expected
    if hint:
        error["hint"] = hint
    error["retryable"] = known.retryable
    error["request_id"] = request_id
    if video:
        server_side = "server_error" if status >= 500 else "invalid_request_error"
        error["type"] = _VIDEO_TYPES.get(status, server_side)
        error["param"] = param
    headers = {}
    if status in (429, 503):
        base_s = retry_after_s if retry_after_s is not None else 2.0
        headers["Retry-After"] = str(max(1, math.ceil(base_s * random.uniform(1.0, 1.3))))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error}, status, headers=headers)


def from_exception(error: TurboServeError, request: Request) -> JSONResponse:
    known = BY_CODE.get(error.code)
    return error_response(
        error.code,
        error.message,
        request_id=request.scope.get("request_id", ""),
        status=known.http if known is not None and known.http else error.http_status,
        expected=error.expected,
        hint=error.hint,
        retry_after_s=error.retry_after_s,
        video=is_video(request),
        param=getattr(error, "param", None),
    )


def is_video(request: Request) -> bool:
    return "/v1/videos" in request.url.path


def install(app: FastAPI, log: Any) -> None:
    """Put the handlers in."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, TurboServeError)
        if error.http_status >= 500 and error.code not in ("overloaded", "not_offered"):
            log.error("request failed", request_id=request.scope.get("request_id"), error=str(error))
        return from_exception(error, request)

    async def starlette(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _BY_STATUS.get(error.status_code, "internal" if error.status_code >= 500 else "invalid_request")
        message = {404: "no such path", 405: "this path does not take that method"}.get(error.status_code, "refused")
        response = error_response(
            code,
            message,
            request_id=request.scope.get("request_id", ""),
            status=error.status_code,
            hint="GET /openapi.json lists what there is",
            video=is_video(request),
        )
        for name, value in (error.headers or {}).items():
            response.headers.setdefault(name, value)
        return response

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(
            "invalid_request",
            "the request does not fit",
            request_id=request.scope.get("request_id", ""),
            expected=", ".join(sorted({".".join(str(part) for part in one["loc"]) for one in error.errors()}))[:256],
            video=is_video(request),
        )

    async def unexpected(request: Request, error: Exception) -> Response:
        return error_response(
            "internal",
            "something went wrong on our side",
            request_id=request.scope.get("request_id", ""),
            video=is_video(request),
        )

    app.add_exception_handler(TurboServeError, ours)
    app.add_exception_handler(HTTPException, starlette)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unexpected)
