"""Authenticated message channels between our processes, over TCP on a named address.

Handshake, both ways, with the cluster's shared token (32 random bytes that never cross the wire):

    server -> client   magic, nonce_s (32 bytes)
    client -> server   nonce_c (32 bytes), HMAC(token, "client" + nonce_s + nonce_c)
    server -> client   HMAC(token, "server" + nonce_s + nonce_c)

Each direction then has its own key, HMAC(token, direction + nonces). A record is

    length u32 little-endian | MAC (16 bytes) | payload (msgpack, runtime/messages.py)

where MAC = HMAC-SHA256(key, counter u64 + payload) cut to 16 bytes. The counter starts at 0, is never sent and
grows by one a record, so a replayed, dropped or reordered record does not verify and the channel closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from turboserve.errors import AuthFailed, ConfigError, Overloaded, ProtocolError
from turboserve.runtime import messages

MAGIC = b"turboserve-1\n"
NONCE_BYTES = 32
MAC_BYTES = 16
HANDSHAKE_TIMEOUT_S = 5.0
SEND_BUFFER_BYTES_MAX = 8 << 20
TOKEN_BYTES = 32

_HEADER = struct.Struct("<I")
_COUNTER = struct.Struct("<Q")
_WILDCARDS = frozenset({"", "*", "::", "0.0.0.0"})


def new_token() -> bytes:
    """A fresh cluster token."""
    return secrets.token_bytes(TOKEN_BYTES)


def read_token(path: Path) -> bytes:
    """The token in a file only its owner may read (hex, one line)."""
    mode = path.stat().st_mode & 0o077
    if mode:
        raise ConfigError(
            f"token file {path} can be read by others", expected="mode 0600", hint=f"run: chmod 600 {path}"
        )
    try:
        token = bytes.fromhex(path.read_text().strip())
    except ValueError:
        token = b""
    if len(token) != TOKEN_BYTES:
        raise ConfigError(f"token file {path} does not hold a token", expected=f"{TOKEN_BYTES} bytes as hex")
    return token


def _mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(parts), hashlib.sha256)


class Channel:
    """One authenticated connection. Receiving is for one task at a time; sending never blocks the caller."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, send_key: bytes, receive_key: bytes
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._send_key = send_key
        self._receive_key = receive_key
        self._sent = 0
        self._received = 0
        name = writer.get_extra_info("peername")
        self.peer = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name)
        own = writer.get_extra_info("sockname")
        self.own_host = str(own[0]) if isinstance(own, tuple) else str(own)
        """The address of this machine that the peer sees."""

    def send(self, message: messages.Message) -> None:
        """Queue one message. Overloaded when the peer has not read SEND_BUFFER_BYTES_MAX of earlier ones."""
        payload = messages.encode(message)
        transport = self._writer.transport
        if transport.is_closing():
            raise ProtocolError(f"the channel to {self.peer} is closed")
        if transport.get_write_buffer_size() > SEND_BUFFER_BYTES_MAX:
            raise Overloaded(f"{self.peer} does not read its messages", hint="the channel should be closed")
        mac = _mac(self._send_key, _COUNTER.pack(self._sent), payload)[:MAC_BYTES]
        self._sent += 1
        self._writer.write(_HEADER.pack(len(payload)) + mac + payload)

    @property
    def unsent_bytes(self) -> int:
        """Bytes of messages that have not left this process."""
        return self._writer.transport.get_write_buffer_size()

    async def receive(self) -> messages.AnyMessage | None:
        """The next message, or None when the peer has closed. ProtocolError on anything that does not verify."""
        try:
            header = await self._reader.readexactly(_HEADER.size + MAC_BYTES)
            (length,) = _HEADER.unpack_from(header)
            if length > messages.MAX_MESSAGE_BYTES:
                raise ProtocolError(
                    f"{self.peer} announced a message of {length} bytes",
                    expected=f"at most {messages.MAX_MESSAGE_BYTES}",
                )
            payload = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        expected = _mac(self._receive_key, _COUNTER.pack(self._received), payload)[:MAC_BYTES]
        if not hmac.compare_digest(expected, header[_HEADER.size :]):
            raise AuthFailed(f"a message from {self.peer} does not verify")
        self._received += 1
        return messages.decode(payload)

    async def __aiter__(self) -> AsyncIterator[messages.AnyMessage]:
        while (message := await self.receive()) is not None:
            yield message

    async def drain(self) -> None:
        """Wait until what was sent has left this process."""
        await self._writer.drain()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError, TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), 1.0)


async def client_handshake(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes, purpose: bytes = b""
) -> tuple[bytes, bytes]:
    """Proves both ends' knowledge of the token; (key to send with, key to receive with).

    `purpose` keeps kinds of connections apart: both ends must name the same.
    """
    magic = MAGIC + purpose
    greeting = await reader.readexactly(len(magic) + NONCE_BYTES)
    if not greeting.startswith(magic):
        raise ProtocolError("the peer does not speak this protocol", expected=repr(magic))
    nonce_c = secrets.token_bytes(NONCE_BYTES)
    nonces = greeting[len(magic) :] + nonce_c + purpose
    writer.write(nonce_c + _mac(token, b"client", nonces))
    proof = await reader.readexactly(hashlib.sha256().digest_size)
    if not hmac.compare_digest(proof, _mac(token, b"server", nonces)):
        raise AuthFailed("the server does not hold our token")
    return _mac(token, b"c2s", nonces), _mac(token, b"s2c", nonces)


async def server_handshake(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes, purpose: bytes = b""
) -> tuple[bytes, bytes]:
    """The other end of `client_handshake`."""
    nonce_s = secrets.token_bytes(NONCE_BYTES)
    writer.write(MAGIC + purpose + nonce_s)
    answer = await reader.readexactly(NONCE_BYTES + hashlib.sha256().digest_size)
    nonces = nonce_s + answer[:NONCE_BYTES] + purpose
    if not hmac.compare_digest(answer[NONCE_BYTES:], _mac(token, b"client", nonces)):
        raise AuthFailed("the client does not hold our token")
    writer.write(_mac(token, b"server", nonces))
    return _mac(token, b"s2c", nonces), _mac(token, b"c2s", nonces)


async def connect(host: str, port: int, token: bytes, *, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> Channel:
    """Open a channel; ConnectionError or TimeoutError when nobody answers, AuthFailed on a wrong token."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            return Channel(reader, writer, *await client_handshake(reader, writer, token))
        except asyncio.IncompleteReadError:
            writer.close()
            raise AuthFailed(f"{host}:{port} closed the connection during the handshake") from None
        except BaseException:
            writer.close()
            raise


def check_named_address(host: str) -> None:
    """ConfigError when a port would be open on every interface."""
    if host in _WILDCARDS:
        raise ConfigError(f"internal port on wildcard address {host!r}", expected="one named address")


async def listen(
    host: str,
    port: int,
    token: bytes,
    on_channel: Callable[[Channel], Awaitable[None]],
    *,
    sock: socket.socket | None = None,
) -> asyncio.Server:
    """Listen on a named address (or on a listening socket that was handed down, which then is that address).

    `on_channel` runs for each peer that passed the handshake; the channel is closed when it returns. A peer that
    fails the handshake is dropped without an answer.
    """
    check_named_address(host if sock is None else str(sock.getsockname()[0]))

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                channel = Channel(reader, writer, *await server_handshake(reader, writer, token))
        except (ProtocolError, asyncio.IncompleteReadError, TimeoutError, ConnectionError):
            writer.close()
            return
        try:
            await on_channel(channel)
        except asyncio.CancelledError:
            pass  # nobody but the loop's end cancels this task, and asyncio's own callback would log that as an error
        finally:
            await channel.close()

    if sock is not None:
        return await asyncio.start_server(accept, sock=sock)
    return await asyncio.start_server(accept, host, port)


def bound_port(server: asyncio.Server) -> int:
    """The port an ephemeral listener got."""
    return int(server.sockets[0].getsockname()[1])
