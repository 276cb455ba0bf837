"""Bounds that must hold below ASGI: slow and endless headers, half-open connections, and a way to drop a peer.

uvicorn's parser collects headers without a limit and waits for them without a clock; these two subclasses add both.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from turboserve.server.gateway_config import Limits
from turboserve.server.http_errors import error_response
from turboserve.server.stream import ABORT

HALF_OPEN_MAX = 64
"""Connections of one address that have not sent a whole header yet."""


def bounded_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """The HTTP protocol class with these limits; uvicorn makes one instance per connection."""
    half_open: Counter[str] = Counter()

    class BoundedHttp(HttpToolsProtocol):
        _header_timer: asyncio.TimerHandle | None = None
        _header_bytes = 0
        _address = ""
        _reading_header = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._address = self.client[0] if self.client else ""
            self._expect_header()
            if half_open[self._address] > HALF_OPEN_MAX:
                self._refuse("quota_exceeded", "too many connections without a request from this address", 429)

        def connection_lost(self, exc: Exception | None) -> None:
            self._header_done()
            super().connection_lost(exc)

        def _expect_header(self) -> None:
            if not self._reading_header:
                self._reading_header = True
                half_open[self._address] += 1
                self._header_bytes = 0
                self._header_timer = self.loop.call_later(limits.header_s, self._too_slow)

        def _header_done(self) -> None:
            if self._reading_header:
                self._reading_header = False
                half_open[self._address] -= 1
                if half_open[self._address] <= 0:
                    del half_open[self._address]
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            was_header = self._reading_header
            super().data_received(data)
            if was_header and self._reading_header:  # all of it was header: one line without an end is bounded too
                self._header_bytes += len(data)
                if self._header_bytes > limits.header_bytes:
                    self._refuse("headers_too_large", "too large headers", 431)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._expect_header()

        def on_header(self, name: bytes, value: bytes) -> None:
            super().on_header(name, value)
            size = sum(len(one) + len(other) for one, other in self.headers[-1:])
            self._header_sum = getattr(self, "_header_sum", 0) + size
            if len(self.headers) > limits.header_count or self._header_sum > limits.header_bytes:
                self._refuse("headers_too_large", "too many or too large headers", 431)

        def on_headers_complete(self) -> None:
            self._header_sum = 0
            self._header_done()
            if not self.transport.is_closing():
                super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if self.cycle is not None:
                super().on_body(body)

        def on_message_complete(self) -> None:
            if self.cycle is not None:
                super().on_message_complete()

        def _too_slow(self) -> None:
            self._header_timer = None
            if self._header_bytes == 0:
                self.transport.close()  # a connection opened ahead of need, as browsers do
                return
            self._refuse("too_slow", "the request did not arrive in time", 408)

        def _refuse(self, code: str, message: str, status: int) -> None:
            self._header_done()
            if self.transport.is_closing():
                return
            response = error_response(code, message, request_id="", status=status)
            lines = [f"HTTP/1.1 {status} {code}".encode(), *(b": ".join(one) for one in response.raw_headers)]
            self.transport.write(b"\r\n".join([*lines, b"connection: close", b"", bytes(response.body)]))
            self.transport.close()

    return BoundedHttp


class DroppableWebSocket(WebSocketsSansIOProtocol):
    """Gives the app a way to drop a peer that reads nothing."""

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        scope: Any = getattr(self, "scope", None)
        if scope is not None:
            scope["extensions"][ABORT] = self.transport.abort
