"""The real gateway on a real port in the test's own loop, with a scripted cluster; and a small viewer."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import structlog
import uvicorn
import websockets
from real_server import received
from scripted_cluster import ScriptedCluster

from turboserve.digest import next_digest
from turboserve.model import registry
from turboserve.runtime import ports
from turboserve.server.app import guarded
from turboserve.server.catalogue import Catalogue
from turboserve.server.gateway import Gateway
from turboserve.server.gateway_config import GatewayConfig, Limits
from turboserve.server.http_protocol import DroppableWebSocket, bounded_protocol
from turboserve.server.process import GatewayProcess

TEST_FPS = 100.0
"""Chunks of 4 frames then last 40 ms: tests of live pacing do not take long."""


def config_for(folder: Path, **values: Any) -> GatewayConfig:
    limits = values.pop("limits", Limits())
    return GatewayConfig(data_dir=str(folder), token="00" * 32, controller_port=1, limits=limits, **values)


@dataclass
class Harness:
    url: str
    process: GatewayProcess
    gateway: Gateway
    cluster: ScriptedCluster
    http: httpx.AsyncClient

    async def open(self, prompt: str = "a red circle", **body: Any) -> dict[str, Any]:
        answer = await self.http.post("/v1/sessions", json={"prompt": prompt, **body})
        assert answer.status_code == 201, answer.text
        return answer.json()

    @contextlib.asynccontextmanager
    async def socket(self, sid: str, **more: Any) -> AsyncIterator[Any]:
        url = self.url.replace("http", "ws", 1) + f"/v1/sessions/{sid}/stream"
        async with websockets.connect(url, max_size=None, compression=None, **more) as socket:
            yield socket

    @contextlib.asynccontextmanager
    async def viewer(self, opened: dict[str, Any], **attach: Any) -> AsyncIterator[Viewer]:
        async with self.socket(opened["id"]) as socket:
            viewer = Viewer(socket)
            await viewer.attach(opened["token"], **attach)
            yield viewer


@dataclass
class Viewer:
    """What a test does as a viewer. `chunks` are (header, payload) in order of arrival."""

    socket: Any
    token: str = ""
    attached: dict[str, Any] = field(default_factory=dict)
    chunks: list[tuple[dict[str, Any], bytes]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)

    async def send(self, type: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": type, **fields}))

    async def attach(self, token: str, next_index: int = 0, format: str = "raw", pace: str = "free") -> dict[str, Any]:
        await self.send("attach", token=token, next_index=next_index, format=format, pace=pace)
        self.attached = await self.until("attached")
        self.token = self.attached["token"]
        return self.attached

    async def next(self) -> dict[str, Any]:
        """The next message; a chunk's payload is kept with it."""
        message = json.loads(await received(self.socket, 10))
        self.messages.append(message)
        if message["type"] == "chunk":
            payload = await received(self.socket, 10)
            assert len(payload) == message["bytes"]
            self.chunks.append((message, payload))
        return message

    async def until(self, type: str) -> dict[str, Any]:
        while (message := await self.next())["type"] != type:
            assert message["type"] != "error" or type == "error", message
        return message

    async def take(self, count: int, *, ack: bool = True) -> list[dict[str, Any]]:
        """`count` further chunks, acked one by one."""
        headers = []
        for _ in range(count):
            header = await self.until("chunk")
            headers.append(header)
            if ack:
                await self.send("ack", index=header["index"])
        return headers

    async def close_code(self) -> int:
        """Read until the socket closes; its code."""
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                await self.next()
        return self.socket.close_code

    def check_chain(self) -> str:
        """Raw chunks are contiguous and their digests right; the last digest."""
        digest = self.chunks[0][0]["digest_prev"]
        for before, (header, payload) in zip([None, *self.chunks], self.chunks, strict=False):
            assert before is None or header["index"] == before[0]["index"] + 1
            assert header["digest_prev"] == digest
            digest = next_digest(digest, payload)
            assert header["digest"] == digest
        return digest


@contextlib.asynccontextmanager
async def serving(folder: Path, *, workers: int = 1, fps: float = TEST_FPS, **values: Any) -> AsyncIterator[Harness]:
    """A gateway with a scripted cluster."""
    config = config_for(folder, **values)
    catalogue = Catalogue(config, replace(registry.load_spec("shapes"), fps=fps))
    process = GatewayProcess(config, structlog.get_logger(), catalogue)
    sock = ports.listen_socket("127.0.0.1", 0)
    url = f"http://127.0.0.1:{ports.port_of(sock)}"
    server = uvicorn.Server(
        uvicorn.Config(
            guarded(process.app, config, process.gateway),
            http=bounded_protocol(config.limits),
            ws=DroppableWebSocket,
            ws_max_size=config.limits.message_bytes,
            ws_per_message_deflate=False,
            root_path=config.root_path,
            lifespan="off",
            log_config=None,
            access_log=False,
        )
    )
    process.gateway.open_log(catalogue.restore)
    cluster = ScriptedCluster(process.gateway)
    cluster.start(workers)
    task = asyncio.create_task(server._serve([sock]))
    try:
        async with httpx.AsyncClient(base_url=url, timeout=10) as http:
            yield Harness(url, process, process.gateway, cluster, http)
    finally:
        server.should_exit = True
        process.gateway.drain()
        await asyncio.wait_for(task, 10)
        process.app.state.videos.close()
        process.gateway.close()
