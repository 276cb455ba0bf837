"""A small server that speaks the public API, with a script for each connection: how streams break, on purpose.

One session. Chunk i is seeded noise of i, so its digest chain can be computed here too. Every WebSocket takes the next
behaviour from `script` (then `serve`). REST runs on a port of its own; `stream_url` is absolute.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from turboserve.digest import next_digest

WIDTH, HEIGHT, FRAMES = 8, 6, 3
SESSION_ID = "abcdefghijklmnopqrstuvwxy2"

Behaviour = Callable[["Scripted", ServerConnection], Awaitable[None]]


def frames_of(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), np.uint8)


def chain(count: int) -> list[str]:
    digests = [""]
    for index in range(count):
        digests.append(next_digest(digests[-1], frames_of(index).tobytes()))
    return digests[1:]


@dataclass
class Scripted:
    """State of the one session, and what the tests look at afterwards."""

    chunk_count: int = 12
    script: list[Behaviour] = field(default_factory=list)
    http_script: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    http_refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=lambda: ["t0"])
    delivered: int = 0
    sent_index: int = -1
    unacked_max: int = 0
    attaches: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    requests: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    format: str = "raw"
    base_url: str = ""
    _stream_url: str = ""

    async def __aenter__(self) -> Scripted:
        self._ws = await serve(self._socket, "127.0.0.1", 0, process_request=self._handshake)
        self._http = await asyncio.start_server(self._rest, "127.0.0.1", 0)
        self._stream_url = f"ws://127.0.0.1:{self._ws.sockets[0].getsockname()[1]}/v1/sessions/{SESSION_ID}/stream"
        self.base_url = f"http://127.0.0.1:{self._http.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._http.close()
        self._ws.close()
        await self._ws.wait_closed()

    # ------------------------------------------------------------------ REST

    async def _rest(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if ": " in line)}
        data = await reader.readexactly(int(headers.get("content-length", 0)))
        self.requests.append((method, path, headers, json.loads(data) if data else None))
        status, extra, body = self.http_script.pop(0) if self.http_script else (200, {}, self._answer(method))
        lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", "connection: close"]
        lines += [f"{name}: {value}" for name, value in extra.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    def _answer(self, method: str) -> bytes:
        body = {
            "id": SESSION_ID,
            "state": "active",
            "stream_url": self._stream_url,
            "model": "noise",
            "seed": 3,
            "fps": 12,
            "width": WIDTH,
            "height": HEIGHT,
            "chunk_frames": {"first": FRAMES, "rest": FRAMES},
            "ignored_words": ["purple"],
            "added_later": 1,
        }
        if method == "POST":
            body["token"] = self.tokens[-1]
        return b"" if method == "DELETE" else json.dumps(body).encode()

    # ------------------------------------------------------------------ the stream

    def _handshake(self, connection: ServerConnection, request: Request) -> Response | None:
        if not self.http_refusals:
            return None
        status, headers = self.http_refusals.pop(0)
        response = connection.respond(status, "refused\n")
        response.headers.update(headers)
        return response

    async def _socket(self, socket: ServerConnection) -> None:
        await (self.script.pop(0) if self.script else serve_all)(self, socket)

    async def attach(self, socket: ServerConnection) -> int:
        """Take the attach message, answer it, return the next index."""
        message = json.loads(await socket.recv())
        self.attaches.append(message)
        if message["token"] not in self.tokens[-2:]:
            await socket.close(4401, "this token does not open the session")
            raise asyncio.CancelledError
        if message["next_index"] == self.delivered + 4:
            self.delivered += 4  # all that stands unacked lies behind this viewer: it counts as received
        fresh = f"t{len(self.attaches)}"
        self.tokens = [message["token"], fresh]
        await say(socket, "attached", token=fresh, epoch=1, next_index=message["next_index"], numerics_id="n")
        return int(message["next_index"])

    async def chunks(self, socket: ServerConnection, first: int, upto: int) -> None:
        """Send chunks as acks allow, answering prompts; stops when `upto` - 1 is sent and, at the end, acked."""
        index = first
        while index < upto or (upto == self.chunk_count and self.delivered < upto):
            if index < upto and index - self.delivered < 4:
                await self.chunk(socket, index)
                index += 1
                continue
            await self.listen(socket)

    async def listen(self, socket: ServerConnection) -> None:
        message = json.loads(await socket.recv())
        if message["type"] == "ack":
            assert message["index"] <= self.sent_index
            self.delivered = max(self.delivered, message["index"] + 1)
            self.tokens = self.tokens[-1:]
        elif message["type"] == "prompt":
            self.prompts.append(message)
            await say(socket, "prompt_accepted", event_id=message["event_id"], prompt_version=2, from_index=7)

    async def chunk(self, socket: ServerConnection, index: int, /, **changes: Any) -> None:
        payload = changes.pop("payload", frames_of(index).tobytes())
        digests = ["", *chain(index + 1)]
        header = {
            "index": index,
            "epoch": 1,
            "frames": FRAMES,
            "prompt_version": 1,
            "steps": 4,
            "digest": digests[-1],
            "digest_prev": digests[-2],
            "latency_ms": 1.5,
            "bytes": len(payload),
            "format": self.format,
        }
        self.sent_index = max(self.sent_index, index)
        self.unacked_max = max(self.unacked_max, index + 1 - self.delivered)
        await say(socket, "chunk", **{**header, **changes})
        await socket.send(payload)


async def say(socket: ServerConnection, kind: str, **values: Any) -> None:
    await socket.send(json.dumps({"type": kind, **values}))


async def serve_all(server: Scripted, socket: ServerConnection) -> None:
    """All that is left, then the end."""
    first = await server.attach(socket)
    await say(socket, "state", state="active")
    await server.chunks(socket, first, server.chunk_count)
    await say(socket, "end", delivered=server.delivered, reason="completed")
    await socket.close(1000, "completed")


def cut(count: int, code: int | None = None, reason: str = "") -> Behaviour:
    """`count` chunks, then a close with `code`, or the bare loss of the connection."""

    async def behave(server: Scripted, socket: ServerConnection) -> None:
        first = await server.attach(socket)
        await server.chunks(socket, first, first + count)
        await leave(socket, code, reason)

    return behave


def before_attached(code: int | None = None, reason: str = "") -> Behaviour:
    """The attach arrives, its answer is never sent."""

    async def behave(server: Scripted, socket: ServerConnection) -> None:
        server.attaches.append(json.loads(await socket.recv()))
        await leave(socket, code, reason)

    return behave


async def leave(socket: ServerConnection, code: int | None, reason: str = "") -> None:
    if code is None:
        socket.transport.abort()
    else:
        await socket.close(code, reason)
