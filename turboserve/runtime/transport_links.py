"""What transfers run over: a pair of queues in one process (tests), or an authenticated socket.

The socket's handshake and its codes are those of runtime/channel.py, under a purpose of its own, so that a control
channel is never taken for a transfer. A frame is `length u32 | MAC 16 | payload`; the MAC covers a counter and the
payload, so a changed, replayed, dropped or reordered frame does not verify.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

from turboserve.errors import AuthFailed, ProtocolError
from turboserve.runtime.channel import (
    HANDSHAKE_TIMEOUT_S,
    MAC_BYTES,
    check_named_address,
    client_handshake,
    server_handshake,
)
from turboserve.runtime.transport import CHUNK_BYTES, FRAME_BYTES_MAX

PURPOSE = b"transfer\n"
_HEADER = struct.Struct("<I")
_COUNTER = struct.Struct("<Q")
_BUFFER_BYTES = 2 * CHUNK_BYTES  # one chunk on its way, one being made


class MemoryLink:
    """One end of a pair in one process."""

    def __init__(self, outgoing: asyncio.Queue[bytes], incoming: asyncio.Queue[bytes], closed: asyncio.Event) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._closed = closed

    @classmethod
    def pair(cls, frames_max: int = 2) -> tuple[MemoryLink, MemoryLink]:
        """Two ends; each holds at most `frames_max` frames that the other has not taken."""
        one: asyncio.Queue[bytes] = asyncio.Queue(frames_max)
        other: asyncio.Queue[bytes] = asyncio.Queue(frames_max)
        closed = asyncio.Event()
        return cls(one, other, closed), cls(other, one, closed)

    async def _unless_closed(self, work: Any) -> Any:
        task, ending = asyncio.ensure_future(work), asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait((task, ending), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ConnectionError("the link is closed")
            return task.result()
        finally:
            task.cancel()
            ending.cancel()

    async def send(self, *parts: Any) -> None:
        if self._closed.is_set():
            raise ConnectionError("the link is closed")
        await self._unless_closed(self._outgoing.put(b"".join(parts)))

    async def receive(self) -> bytes:
        frame: bytes = await self._unless_closed(self._incoming.get())
        return frame

    async def close(self) -> None:
        self._closed.set()


class SocketLink:
    """One end of an authenticated TCP connection."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, send_key: bytes, receive_key: bytes
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._keys = (send_key, receive_key)
        self._sent = 0
        self._received = 0
        writer.transport.set_write_buffer_limits(high=_BUFFER_BYTES)
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        name = writer.get_extra_info("peername")
        self.peer = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name)

    async def send(self, *parts: Any) -> None:
        length = sum(len(part) for part in parts)
        if length > FRAME_BYTES_MAX:
            raise ProtocolError(f"a frame of {length} B", expected=f"at most {FRAME_BYTES_MAX}")
        code = hmac.new(self._keys[0], _COUNTER.pack(self._sent), hashlib.sha256)
        for part in parts:
            code.update(part)
        self._sent += 1
        self._writer.write(_HEADER.pack(length) + code.digest()[:MAC_BYTES])
        for part in parts:
            self._writer.write(part)
        await self._writer.drain()

    async def receive(self) -> bytes:
        try:
            header = await self._reader.readexactly(_HEADER.size + MAC_BYTES)
            (length,) = _HEADER.unpack_from(header)
            if length > FRAME_BYTES_MAX:
                raise ProtocolError(f"{self.peer} announced a frame of {length} B", expected=f"{FRAME_BYTES_MAX}")
            payload = await self._reader.readexactly(length)
        except asyncio.IncompleteReadError:
            raise ConnectionError(f"{self.peer} closed the link") from None
        code = hmac.new(self._keys[1], _COUNTER.pack(self._received), hashlib.sha256)
        code.update(payload)
        if not hmac.compare_digest(code.digest()[:MAC_BYTES], header[_HEADER.size :]):
            raise AuthFailed(f"a frame from {self.peer} does not verify")
        self._received += 1
        return payload

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError, TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), 1.0)


async def connect_link(host: str, port: int, token: bytes, *, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> SocketLink:
    """Open a link; ConnectionError or TimeoutError when nobody answers, AuthFailed on a wrong token."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(host, port, limit=_BUFFER_BYTES)
        try:
            return SocketLink(reader, writer, *await client_handshake(reader, writer, token, PURPOSE))
        except asyncio.IncompleteReadError:
            writer.close()
            raise AuthFailed(f"{host}:{port} closed the connection during the handshake") from None
        except BaseException:
            writer.close()
            raise


async def listen_for_links(
    host: str,
    port: int,
    token: bytes,
    on_link: Callable[[SocketLink], Awaitable[None]],
    *,
    links_max: int = 16,
) -> asyncio.Server:
    """Listen on a named address; `on_link` runs for each authenticated peer, at most `links_max` at a time, and the
    link is closed when it returns. Others are dropped without an answer."""
    check_named_address(host)
    open_links = 0

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_links
        if open_links >= links_max:
            writer.close()
            return
        open_links += 1
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                keys = await server_handshake(reader, writer, token, PURPOSE)
            link = SocketLink(reader, writer, *keys)
            try:
                await on_link(link)
            finally:
                await link.close()
        except (ProtocolError, asyncio.IncompleteReadError, TimeoutError, ConnectionError):
            writer.close()
        finally:
            open_links -= 1

    return await asyncio.start_server(accept, host, port, limit=_BUFFER_BYTES)
