"""The gateway's ends of the internal channels: one to the controller, one from each worker with its frame ring."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

from turboserve.errors import AuthFailed, CorruptState, ProtocolError
from turboserve.model import registry
from turboserve.runtime import channel, messages
from turboserve.runtime.frame_parts import PartAssembler
from turboserve.runtime.frame_ring import FrameConsumer, FrameRecord, attach_consumer
from turboserve.server.gateway import Gateway

RECONNECT_S = 0.2
VERIFY_INLINE_BYTES = 512 << 10
"""Larger chunks are copied and hashed in a thread: 0.7 ms a megabyte is too long for the loop."""


async def keep_controller(gateway: Gateway, token: bytes) -> None:
    """Stay connected to the controller for as long as the gateway lives."""
    config = gateway.config
    while True:
        try:
            peer = await channel.connect(config.controller_host, config.controller_port, token)
        except (ConnectionError, TimeoutError, AuthFailed, ProtocolError) as error:
            gateway.log.debug("controller not there", error=str(error))
            await asyncio.sleep(RECONNECT_S)
            continue
        try:
            peer.send(
                messages.GatewayHello(
                    gateway_epoch=config.gateway_epoch,
                    pid=os.getpid(),
                    data_host=config.data_host,
                    data_port=config.data_port,
                )
            )
            gateway.controller_connected(peer.send)
            gateway.log.info("controller connected")
            async for message in peer:
                gateway.from_controller(message)
        except ProtocolError as error:
            gateway.log.warning("controller broke the protocol", error=str(error))
        finally:
            gateway.controller_lost()
            await peer.close()
        gateway.log.warning("controller lost; connecting again")
        await asyncio.sleep(RECONNECT_S)


class WorkerListener:
    """Accepts workers on the internal data port."""

    def __init__(self, gateway: Gateway, token: bytes) -> None:
        self._gateway = gateway
        self._token = token
        self._server: asyncio.Server | None = None
        self._rings: dict[str, FrameConsumer] = {}
        self._parts: dict[str, PartAssembler] = {}

    async def start(self) -> int:
        """Listen; the port."""
        config = self._gateway.config
        sock = socket.socket(fileno=config.data_fd) if config.data_fd >= 0 else None
        self._server = await channel.listen(config.data_host, config.data_port, self._token, self._serve, sock=sock)
        return channel.bound_port(self._server)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    @property
    def ring_bytes(self) -> int:
        """Frames that workers have written and we have not read."""
        rings = sum(ring.used_bytes for ring in self._rings.values())
        return rings + sum(parts.held_bytes for parts in self._parts.values())

    async def _serve(self, peer: channel.Channel) -> None:
        gateway = self._gateway
        hello = await peer.receive()
        if not isinstance(hello, messages.WorkerHello) or hello.version != messages.PROTOCOL_VERSION:
            peer.send(messages.Failure(code="protocol_error", message="say WorkerHello first, in our version"))
            return
        if hello.ring_fd < 0:
            await self._serve_joined(peer, hello)
            return
        with contextlib.ExitStack() as stack:
            fd = os.open(f"/proc/{hello.pid}/fd/{hello.ring_fd}", os.O_RDWR)
            stack.callback(os.close, fd)
            ring = stack.enter_context(attach_consumer(fd))
            self._rings[hello.worker_id] = ring
            send = peer.send
            gateway.worker_connected(hello.worker_id, send)
            gateway.log.info("worker connected", worker=hello.worker_id, pid=hello.pid, device=hello.device)
            try:
                async for message in peer:
                    await self._take(message, ring)
            except ProtocolError as error:
                gateway.log.warning("worker broke the protocol", worker=hello.worker_id, error=str(error))
            finally:
                if self._rings.get(hello.worker_id) is ring:
                    del self._rings[hello.worker_id]
                gateway.worker_lost(hello.worker_id, send)
                gateway.log.info("worker disconnected", worker=hello.worker_id)

    async def _serve_joined(self, peer: channel.Channel, hello: messages.WorkerHello) -> None:
        """A worker of another node: chunks come in parts, encoded there, each before its announcement."""
        gateway, send = self._gateway, peer.send
        spec = registry.load_spec(gateway.config.model)
        frames_max = max(spec.chunk_frames_first, spec.chunk_frames_rest)
        parts = self._parts[hello.worker_id] = PartAssembler(frames_max * spec.width * spec.height * 3)
        gateway.worker_connected(hello.worker_id, send)
        gateway.log.info("worker joined", worker=hello.worker_id, address=peer.peer, device=hello.device)
        try:
            async for message in peer:
                if isinstance(message, messages.FramePart):
                    parts.take(message)
                elif isinstance(message, messages.ChunkReady):
                    await self._take_parts(message, parts)
                elif isinstance(message, messages.ChunkRefused):
                    gateway.chunk_refused(message)
                else:
                    gateway.metrics.refused_messages.inc()
        except ProtocolError as error:
            gateway.log.warning("worker broke the protocol", worker=hello.worker_id, error=str(error))
        finally:
            if self._parts.get(hello.worker_id) is parts:
                del self._parts[hello.worker_id]
            gateway.worker_lost(hello.worker_id, send)
            gateway.log.info("worker disconnected", worker=hello.worker_id)

    async def _take_parts(self, message: messages.ChunkReady, parts: PartAssembler) -> None:
        try:
            if parts.held_bytes > VERIFY_INLINE_BYTES:
                data = await asyncio.to_thread(parts.chunk, message)
            else:
                data = parts.chunk(message)
        except CorruptState as error:
            self._gateway.chunk_corrupt(message, error)
            return
        self._gateway.chunk_ready(message, data)

    async def _take(self, message: messages.AnyMessage, ring: FrameConsumer) -> None:
        match message:
            case messages.ChunkReady():
                await self._take_chunk(message, ring)
            case messages.ChunkRefused():
                self._gateway.chunk_refused(message)
            case _:
                self._gateway.metrics.refused_messages.inc()

    async def _take_chunk(self, message: messages.ChunkReady, ring: FrameConsumer) -> None:
        """The chunk's record in the ring, checked, to the logic. Records come in the order of their messages; one
        whose message was lost (a channel that broke) is stepped over."""
        if message.format != "raw":
            raise ProtocolError(f"a chunk as {message.format} through the frame ring", expected="raw frames")
        try:
            while True:
                record = await self._pop(ring)
                if record is None:
                    raise CorruptState("the chunk's frames are not in the ring")
                if _belongs(record, message):
                    break
        except CorruptState as error:
            self._gateway.chunk_corrupt(message, error)
            return
        self._gateway.chunk_ready(message, record.array())

    async def _pop(self, ring: FrameConsumer) -> FrameRecord | None:
        header = ring.peek()
        if header is not None and header.payload_bytes > VERIFY_INLINE_BYTES:
            return await asyncio.to_thread(ring.pop)
        return ring.pop()


def _belongs(record: FrameRecord, message: messages.ChunkReady) -> bool:
    header = record.header
    return (
        header.session_id == message.session_id
        and header.session_epoch == message.epoch
        and header.chunk_index == message.chunk_index
        and header.digest.hex() == message.digest
    )
