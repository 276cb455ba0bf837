"""The outermost layer of the public port: request ids, whose host and origin, sizes and times of bodies, headers of
every answer, one log line and one metric per request."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turboserve.errors import TooLarge, TooSlow
from turboserve.metrics import Metrics
from turboserve.server.gateway_config import LOOPBACK, GatewayConfig
from turboserve.server.http_errors import error_response

_UNSAFE = frozenset({"POST", "PUT", "PATCH", "DELETE"})
SLOW_AFTER_S = 5.0
MIN_BYTES_PER_S = 1024

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; font-src 'self'; worker-src 'self'; manifest-src 'self'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


class Guard:
    """ASGI middleware, see the module's docstring."""

    def __init__(self, app: ASGIApp, config: GatewayConfig, metrics: Metrics, log: Any) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            scope["request_id"] = new_request_id()
            if not (self.host_allowed(scope) and self.origin_allowed(scope)):
                await _reject(scope, receive, send)
                return
            await self._app(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    # ------------------------------------------------------------------ whose host, whose page

    def host_allowed(self, scope: Scope) -> bool:
        """A server without keys trusts whoever reaches it, so a page elsewhere must not reach it under a name of its
        own (DNS rebinding). With keys any name will do: the key decides."""
        if not self._config.open:
            return True
        host = Headers(scope=scope).get("host", "")
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        return name in LOOPBACK or name == self._config.host or not host

    def origin_allowed(self, scope: Scope) -> bool:
        """No Origin (not a browser), our own, or one on the list; compared whole, never by a part."""
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is None:
            return True
        secure = scope.get("scheme") in ("https", "wss")
        own = f"{'https' if secure else 'http'}://{headers.get('host', '')}"
        return origin == own or origin in self._config.allowed_origins

    # ------------------------------------------------------------------ one request

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = time.monotonic()
        request_id = scope["request_id"] = new_request_id()
        status = 500
        began = False

        async def answer(message: Message) -> None:
            nonlocal status, began
            if message["type"] == "http.response.start":
                began = True
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if headers.get("content-type", "").startswith("text/html"):
                    headers.setdefault("Content-Security-Policy", CONTENT_SECURITY_POLICY)
                elif not scope["path"].endswith((".js", ".css", ".svg", ".png")):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        try:
            if refusal is not None:
                await refusal(scope, receive, answer)
            else:
                await self._app(scope, self._bounded(receive), answer)
        except (TooLarge, TooSlow) as error:
            if not began:
                response = error_response(error.code, error.message, request_id=request_id, expected=error.expected)
                response.headers["Connection"] = "close"
                await response(scope, receive, answer)
        finally:
            self._account(scope, status, time.monotonic() - started_s)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        limits = self._config.limits
        request_id = scope["request_id"]
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if len(scope["headers"]) > limits.header_count or size > limits.header_bytes:
            return error_response(
                "headers_too_large",
                "too many or too large headers",
                request_id=request_id,
                expected=f"at most {limits.header_count} headers and {limits.header_bytes} bytes",
            )
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdigit() or int(length) > limits.body_bytes:
            response = error_response(
                "too_large",
                "the body is too large",
                request_id=request_id,
                expected=f"at most {limits.body_bytes} bytes",
            )
            response.headers["Connection"] = "close"
            return response
        if not self.host_allowed(scope):
            return error_response(
                "host_not_allowed",
                "this host name is not the server's own",
                request_id=request_id,
                expected="127.0.0.1 or localhost, as long as the server has no keys",
            )
        if scope["method"] in _UNSAFE and not self.origin_allowed(scope):
            return error_response(
                "forbidden",
                "a page of another origin may not do this",
                request_id=request_id,
                hint="the operator can allow it: --allowed-origins",
            )
        return None

    def _bounded(self, receive: Receive) -> Receive:
        """The body, counted and timed: no more than the bound, whole within `body_s`, never slower than a crawl."""
        limits = self._config.limits
        taken = 0
        started_s: float | None = None
        whole = False

        async def bounded() -> Message:
            nonlocal taken, started_s, whole
            if whole:  # what follows a body is only the news that the caller went away: no limit on that
                return await receive()
            if started_s is None:
                started_s = time.monotonic()
            left_s = started_s + limits.body_s - time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, left_s)):
                    message = await receive()
            except TimeoutError:
                raise TooSlow("the body did not arrive in time", expected=f"within {limits.body_s:g} s") from None
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if taken > limits.body_bytes:
                    raise TooLarge("the body is too large", expected=f"at most {limits.body_bytes} bytes")
                spent_s = time.monotonic() - started_s
                if not whole and spent_s > SLOW_AFTER_S and taken < MIN_BYTES_PER_S * spent_s:
                    raise TooSlow("the body arrives too slowly", expected=f"at least {MIN_BYTES_PER_S} bytes a second")
            return message

        return bounded

    def _account(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        if route not in ("/healthz", "/readyz", "/metrics", "/assets/{path:path}"):
            self._log.debug(
                "request",
                request_id=scope["request_id"],
                method=scope["method"],
                route=route,
                status=status,
                ms=round(seconds * 1000, 2),
            )


async def _reject(scope: Scope, receive: Receive, send: Send) -> None:
    """403 at the WebSocket's handshake."""
    response = error_response(
        "forbidden", "a page of another origin may not open this stream", request_id=scope["request_id"]
    )
    if "websocket.http.response" in scope.get("extensions", {}):
        await response(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008})


def new_request_id() -> str:
    return secrets.token_hex(8)
