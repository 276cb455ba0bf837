"""One viewer's WebSocket: a reader that feeds the logic, a writer that encodes and sends. Let go in a `finally`.

The logic decides what is sent; the bound on memory is its credits: at most four chunks stand unacked, so at most four
wait here, and the writer holds one encoded chunk and what the kernel's socket buffer takes.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from turboserve.errors import Conflict, Malformed, TurboServeError
from turboserve.server import protocol
from turboserve.server.attach_encoder import AttachEncoder
from turboserve.server.gateway import Gateway
from turboserve.server.gateway_logic import error_message
from turboserve.server.guards import MessageGuard, Verdict
from turboserve.server.pacing import Pace
from turboserve.server.session_stream import SessionStream, StoredChunk

if TYPE_CHECKING:
    from collections.abc import Callable

QUEUE_MAX = 512
CLOSE_S = 2.0
"""How long a close may wait for a peer to read what was sent before it."""
ABORT = "turboserve.abort"
"""Name of our extension to the ASGI scope: a function that drops the connection (server/http_protocol.py)."""


@dataclass(frozen=True, slots=True)
class Close:
    code: int
    reason: str


class ViewerSocket:
    """One WebSocket from accept to close."""

    def __init__(
        self, gateway: Gateway, socket: WebSocket, sid: str, check_prompt: Callable[[str, str], dict[str, object]]
    ) -> None:
        self._gateway = gateway
        self._socket = socket
        self._sid = sid
        self._check_prompt = check_prompt
        self._guard = MessageGuard(gateway.config.limits)
        self._queue: deque[dict[str, Any] | StoredChunk | Close] = deque()
        self._filled = asyncio.Event()
        self._closing = False
        self._attached = asyncio.Event()
        self._encoder: AttachEncoder | None = None
        self._format = ""
        self._attached_s = 0.0
        self._connection = 0

    # ------------------------------------------------------------------ what the logic asks for

    def message(self, message: dict[str, Any]) -> None:
        if message["type"] == "attached":
            self._attached.set()
        self._put(message)

    def chunk(self, chunk: StoredChunk) -> None:
        self._put(chunk)

    def close(self, code: int, reason: str) -> None:
        if not self._closing:
            if code != 1000:  # chunks that wait are of no use to whoever is sent away; what was said is
                self._queue = deque(one for one in self._queue if not isinstance(one, StoredChunk))
            self._put(Close(code, reason))
            self._closing = True

    def _put(self, item: dict[str, Any] | StoredChunk | Close) -> None:
        if self._closing:
            return
        if len(self._queue) >= QUEUE_MAX:  # chunks are bounded by credits; this is for a viewer that only talks
            self.close(4413, "too slow; attach again to go on")
            return
        self._queue.append(item)
        self._filled.set()

    # ------------------------------------------------------------------ life

    async def run(self) -> None:
        """Serve the socket until either side closes it."""
        await self._socket.accept()
        self._connection = self._gateway.add_viewer(self)
        writer = asyncio.create_task(self._write())
        reader = asyncio.create_task(self._read())
        deadline = asyncio.create_task(self._attach_deadline())
        try:
            await asyncio.wait((writer, reader), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._gateway.remove_viewer(self._connection, self._sid)
            if self._closing and not writer.done():
                await asyncio.wait((writer,), timeout=CLOSE_S)
            if not writer.done():
                self._abort()
            for task in (writer, reader, deadline):
                task.cancel()
            results = await asyncio.gather(writer, reader, deadline, return_exceptions=True)
            for result in results:
                if isinstance(result, Exception) and not isinstance(result, WebSocketDisconnect):
                    self._gateway.log.error("viewer socket failed", session=self._sid, exc_info=result)

    def _abort(self) -> None:
        """Drop a connection whose peer reads nothing: a close would wait behind what it does not read."""
        abort = self._socket.scope.get("extensions", {}).get(ABORT)
        if abort is not None:
            abort()

    async def _attach_deadline(self) -> None:
        try:
            async with asyncio.timeout(self._gateway.config.limits.attach_s):
                await self._attached.wait()
        except TimeoutError:
            self.close(4401, "no attach message with a valid token in time")

    # ------------------------------------------------------------------ reading

    async def _read(self) -> None:
        limits = self._gateway.config.limits
        while True:
            event = await self._socket.receive()
            if event["type"] == "websocket.disconnect":
                return
            now_s = self._gateway.now()
            verdict = self._guard.message(now_s)
            if verdict is Verdict.CLOSE:
                self.close(4429, "too many messages; retry after 10 s")
                return await self._wait_closed()
            if verdict is Verdict.DROP:
                if self._guard.warn(now_s):
                    self.message(_FLOOD)
                continue
            text = event.get("text")
            if len(text or event.get("bytes") or "") > limits.message_bytes:
                self.close(1009, "a message over the limit")
                return await self._wait_closed()
            if not self._handle(text) and self._guard.bad(now_s):
                self.close(4400, "too many bad messages")
                return await self._wait_closed()

    async def _wait_closed(self) -> None:
        """The writer ends the connection, or its time is up; what still comes in is not read."""
        await asyncio.sleep(CLOSE_S)

    def _handle(self, text: str | None) -> bool:
        """One message; False when it was answered with an error."""
        try:
            if text is None:
                raise Malformed("a binary message", expected="JSON text")
            return self._take(protocol.decode_viewer_message(text))
        except TurboServeError as error:
            self.message(error_message(error, _event_id(text)))
            return False

    def _take(self, message: protocol.AnyViewerMessage) -> bool:
        match message:
            case protocol.Attach():
                if self._attached.is_set():
                    raise Conflict("this connection is attached already", expected="one attach message")
                before = len(self._queue)
                pace = Pace(message.pace or "live")
                self._gateway.attach(
                    self._connection, self._sid, message.token, message.next_index, message.format, pace
                )
                return len(self._queue) == before or self._closing
            case protocol.Ping():
                self.message({"type": "pong"} if message.t is None else {"type": "pong", "t": message.t})
                return True
            case protocol.Ack():
                return self._act(lambda session, now_s: self._ack(session, message.index, now_s))
            case protocol.Prompt():
                text = protocol.clean_prompt(message.text)
                remarks = self._check_prompt(self._sid, text)
                return self._act(
                    lambda session, now_s: session.prompt(
                        self._connection, text, message.event_id, message.from_index, now_s, remarks
                    ),
                    message.event_id,
                )
            case protocol.Pause():
                return self._act(lambda session, now_s: session.pause(now_s))
            case protocol.Resume():
                return self._act(lambda session, now_s: session.resume(now_s))
            case protocol.Stop():
                return self._act(lambda session, now_s: session.end("stopped", 1000, now_s))

    def _ack(self, session: SessionStream, index: int, now_s: float) -> None:
        before = session.delivered
        session.ack(self._connection, index, now_s)
        if session.delivered > before:
            self._guard.refund()

    def _act(self, act: Callable[[SessionStream, float], None], event_id: str | None = None) -> bool:
        return self._gateway.act(self._connection, self._sid, act, event_id)

    # ------------------------------------------------------------------ writing

    async def _write(self) -> None:
        while True:
            while not self._queue:
                self._filled.clear()
                await self._filled.wait()
            item = self._queue.popleft()
            if isinstance(item, Close):
                if self._socket.application_state is WebSocketState.CONNECTED:
                    await self._socket.close(item.code, item.reason[:120])
                return
            if isinstance(item, StoredChunk):
                await self._send_chunk(item)
            elif item["type"] == "attached":
                await self._send_attached(item)
            else:
                await self._socket.send_text(protocol.encode_message(item))

    async def _send_attached(self, message: dict[str, Any]) -> None:
        gateway = self._gateway
        shape = gateway.logic.sessions[self._sid].shape
        self._format = message["format"]
        self._attached_s = gateway.now()
        loop = asyncio.get_running_loop()
        self._encoder = encoder = await loop.run_in_executor(
            gateway.encoders, AttachEncoder, self._format, shape, message["next_index"]
        )
        message["mime"] = encoder.mime
        await self._socket.send_text(protocol.encode_message(message))
        if encoder.init:
            await self._send_init(encoder.init, message["epoch"])

    async def _send_init(self, init: bytes, epoch: int) -> None:
        header = {
            "type": "chunk",
            "index": -1,
            "init": True,
            "epoch": epoch,
            "frames": 0,
            "bytes": len(init),
            "format": self._format,
        }
        await self._socket.send_text(protocol.encode_message(header))
        await self._socket.send_bytes(init)

    async def _send_chunk(self, chunk: StoredChunk) -> None:
        gateway = self._gateway
        assert self._encoder is not None
        started_s = gateway.now()
        loop = asyncio.get_running_loop()
        if chunk.format == "raw":
            encoded = await loop.run_in_executor(gateway.encoders, self._encoder.encode, chunk)
        else:
            encoded = self._encoder.encode(chunk)  # as it came: no time is lost here
        encoded_s, data = gateway.now(), encoded.data
        gateway.metrics.encode_seconds.labels(self._format).observe(encoded_s - started_s + 1e-3 * chunk.encode_ms)
        # A chunk that waited in the ring for its viewer was not late because of that.
        waited_s = started_s - chunk.accepted_s if chunk.accepted_s < self._attached_s else 0.0
        header: dict[str, Any] = {
            "type": "chunk",
            "index": chunk.index,
            "epoch": chunk.epoch,
            "frames": chunk.frames,
            "prompt_version": chunk.prompt_version,
            "steps": chunk.steps,
            "digest": chunk.digest,
            "digest_prev": chunk.digest_prev,
            "latency_ms": round((encoded_s - chunk.released_s - waited_s) * 1000, 3),
            "bytes": len(data),
            "format": self._format,
            "batch_size": round(chunk.batch_size, 2),
        }
        if chunk.continuity:
            header["continuity"] = chunk.continuity
        if encoded.init:
            await self._send_init(encoded.init, chunk.epoch)
        await self._socket.send_text(protocol.encode_message(header))
        await self._socket.send_bytes(data)
        if (session := gateway.logic.sessions.get(self._sid)) is not None:
            session.times.sent(chunk.index, started_s, encoded_s, gateway.now())
        gateway.metrics.sent_bytes.labels(self._format).inc(len(data))


def _event_id(text: str | None) -> str | None:
    """The event_id of a message that was refused, if it has one that fits."""
    try:
        found = json.loads(text or "").get("event_id")
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) and len(found) <= 128 else None


_FLOOD = {
    "type": "error",
    "code": "flood",
    "message": "messages come too fast; some were dropped",
    "expected": "at most 10 a second",
    "retryable": True,
}
