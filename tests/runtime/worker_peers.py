"""A controller and a gateway in one event loop, and a real worker process between them."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
from pathlib import Path

from turboserve.runtime import channel, frame_ring
from turboserve.runtime import messages as m
from turboserve.runtime.worker_config import WorkerConfig, config_fd

LEASE_S = 2.0
SCRIPT = Path(__file__).parent / "tiny_worker.py"


class Peers:
    """Listens as both peers; answers heartbeats with leases while `leasing`; collects what the worker says."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(32)
        self.hello: m.WorkerHello | None = None
        self.leasing = True
        self.beats: list[m.Heartbeat] = []
        self.reports: list[m.WorkReport] = []
        self.told: asyncio.Queue[m.Message] = asyncio.Queue()
        self.chunks: dict[tuple[str, int], list[frame_ring.FrameRecord]] = {}
        self.ready: asyncio.Queue[m.ChunkReady] = asyncio.Queue()
        self.refused: asyncio.Queue[m.ChunkRefused] = asyncio.Queue()
        self.controller: channel.Channel | None = None
        self.gateway: channel.Channel | None = None
        self.both = asyncio.Event()
        self.process: subprocess.Popen[bytes] | None = None
        self.consumer: frame_ring.FrameConsumer | None = None
        self.ring_fd = -1
        self._servers: list[asyncio.Server] = []
        self._parent = os.pipe()

    async def __aenter__(self) -> Peers:
        token = bytes.fromhex(self.token)
        for serve in (self._serve_controller, self._serve_gateway):
            self._servers.append(await channel.listen("127.0.0.1", 0, token, serve))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
        for server in self._servers:
            server.close()
        if self.consumer is not None:
            self.consumer.close()
        for fd in (self.ring_fd, *self._parent):
            if fd >= 0:
                os.close(fd)

    async def start_worker(
        self, *, ring_bytes: int = 1 << 16, frames_repeat: int = 1, failpoints: str = "", **changes: object
    ) -> None:
        """Spawn the process and wait until it has said hello to both."""
        self.ring_fd = frame_ring.create(ring_bytes)
        os.set_inheritable(self.ring_fd, True)
        self.consumer = frame_ring.attach_consumer(self.ring_fd)
        defaults = {
            "worker_id": "w0",
            "worker_epoch": 1,
            "token": self.token,
            "controller_port": channel.bound_port(self._servers[0]),
            "gateway_port": channel.bound_port(self._servers[1]),
            "slots": 4,
            "ring_fd": self.ring_fd,
            "parent_fd": self._parent[0],
            "heartbeat_s": 0.1,
        }
        config = WorkerConfig(**{**defaults, **changes})
        fd = config_fd(config)
        argv = [sys.executable, str(SCRIPT), "--config-fd", str(fd)]
        environment = {
            **os.environ,
            "TINY_FRAMES_REPEAT": str(frames_repeat),
            "TURBOSERVE_FAILPOINTS": failpoints,
        }
        handed = [fd, self.ring_fd, self._parent[0]] + ([config.arena_fd] if config.arena_fd >= 0 else [])
        self.process = subprocess.Popen(argv, pass_fds=handed, env=environment)  # noqa: ASYNC220
        os.close(fd)
        async with asyncio.timeout(60):
            await self.both.wait()

    def end_parent(self) -> None:
        """What the worker sees when its launcher dies."""
        os.close(self._parent[1])
        self._parent = (self._parent[0], -1)

    async def _serve_controller(self, peer: channel.Channel) -> None:
        self.controller = peer
        async for message in peer:
            if isinstance(message, m.WorkerHello | m.Heartbeat) and self.leasing:
                peer.send(m.Lease(lease_s=LEASE_S, worker_epoch=1))
            if isinstance(message, m.WorkerHello):
                self.hello = message
                self._seen()
            elif isinstance(message, m.Heartbeat):
                self.beats.append(message)
            elif isinstance(message, m.WorkReport):
                self.reports.append(message)
            else:
                self.told.put_nowait(message)

    async def _serve_gateway(self, peer: channel.Channel) -> None:
        async for message in peer:
            if isinstance(message, m.WorkerHello):
                self.gateway = peer
                self._seen()
            elif isinstance(message, m.ChunkReady):
                self.drain_ring()
                self.ready.put_nowait(message)
            elif isinstance(message, m.ChunkRefused):
                self.refused.put_nowait(message)

    def _seen(self) -> None:
        if self.hello is not None and self.gateway is not None:
            self.both.set()

    def drain_ring(self) -> None:
        assert self.consumer is not None
        while (record := self.consumer.pop()) is not None:
            key = (record.header.session_id, record.header.chunk_index)
            self.chunks.setdefault(key, []).append(record)

    async def told_next(self, kind: type[m.Message], timeout_s: float = 20.0) -> m.Message:
        """The next message to the controller, which must be of this kind."""
        async with asyncio.timeout(timeout_s):
            message = await self.told.get()
        assert isinstance(message, kind), message
        return message

    async def next_ready(self, timeout_s: float = 20.0) -> m.ChunkReady:
        async with asyncio.timeout(timeout_s):
            return await self.ready.get()

    async def open(self, session_id: str, seed: int, prompt: str, epoch: int = 1) -> None:
        assert self.controller is not None
        self.controller.send(
            m.OpenSession(session_id=session_id, epoch=epoch, seed=seed, width=8, height=8, prompt=prompt)
        )
        await self.told_next(m.SessionOpened)

    def credit(self, session_id: str, index: int, prompt: str, epoch: int = 1, version: int = 1) -> None:
        assert self.gateway is not None
        self.gateway.send(
            m.Credit(
                session_id=session_id,
                epoch=epoch,
                chunk_index=index,
                steps=4,
                prompt=prompt,
                prompt_version=version,
                deadline_s=1.0,
            )
        )

    def accept(self, session_id: str, index: int, epoch: int = 1) -> None:
        assert self.gateway is not None
        self.gateway.send(m.ChunkAccepted(session_id=session_id, epoch=epoch, chunk_index=index))
