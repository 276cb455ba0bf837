"""The gateway process: public port, internal listener for workers, channel to the controller.

python -m turboserve.server.process --config-fd N
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

from turboserve.errors import ConfigError
from turboserve.metrics import Metrics
from turboserve.runtime import lifeline, logs
from turboserve.server.app import build_app, guarded
from turboserve.server.auth import KeyRing
from turboserve.server.catalogue import Catalogue
from turboserve.server.gateway import Gateway
from turboserve.server.gateway_config import GatewayConfig
from turboserve.server.http_protocol import DroppableWebSocket, bounded_protocol
from turboserve.server.links import WorkerListener, keep_controller
from turboserve.server.loop_watch import LoopWatch
from turboserve.server.trace_recorder import TraceRecorder, trace_path

DRAIN_S = 0.5
"""Between telling viewers to go and closing the port, so that closes reach them."""


class GatewayProcess:
    """Everything the process runs, started and stopped in order."""

    def __init__(self, config: GatewayConfig, log: Any, catalogue: Catalogue | None = None) -> None:
        self.config = config
        self.log = log
        self.metrics = Metrics()
        self.gateway = Gateway(config, self.metrics, log)
        self.catalogue = catalogue or Catalogue(config)
        self.keys = KeyRing(config.api_key, config.api_key_file)
        self.workers = WorkerListener(self.gateway, bytes.fromhex(config.token))
        self.app = build_app(self.gateway, self.catalogue, self.keys, frame_ring_bytes=lambda: self.workers.ring_bytes)
        self._tasks: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Internal side up: log read, workers accepted, controller sought."""
        if self.config.record_trace:
            clock = self.catalogue.clock
            path = trace_path(self.config.record_trace, self.config.gateway_epoch)
            self.gateway.trace = TraceRecorder(path, self.gateway.now(), clock.chunk_s)
        restored = self.gateway.open_log(self.catalogue.restore)
        if restored:
            self.log.info("sessions of an earlier gateway restored", count=restored)
        port = await self.workers.start()
        self.log.info("gateway listens for workers", port=port)
        token = bytes.fromhex(self.config.token)
        self._tasks = [
            asyncio.create_task(keep_controller(self.gateway, token), name="controller"),
            asyncio.create_task(LoopWatch(self.metrics, self.log).run(), name="loop-watch"),
            asyncio.create_task(self._watch_keys(), name="keys"),
            asyncio.create_task(self.gateway.keep_history(), name="history"),
            asyncio.create_task(self.gateway.keep_trace(), name="trace"),
        ]
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self.workers.close()
            self.app.state.videos.close()
            if self.app.state.pipeline is not None:
                await self.app.state.pipeline.close()
            self.gateway.close()

    async def serve(self) -> int:
        """Serve until SIGTERM or a fatal error; the exit code."""
        config = self.config
        server = uvicorn.Server(
            uvicorn.Config(
                guarded(self.app, config, self.gateway),
                host=config.host,
                port=config.port,
                http=bounded_protocol(config.limits),
                ws=DroppableWebSocket,
                ws_max_size=config.limits.message_bytes,
                ws_per_message_deflate=False,
                ws_ping_interval=20,
                ws_ping_timeout=20,
                root_path=config.root_path,
                ssl_certfile=config.ssl_certfile or None,
                ssl_keyfile=config.ssl_keyfile or None,
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=max(1, int(config.shutdown_timeout_s)),
                limit_concurrency=max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2),
            )
        )
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.gateway.stopped.set)
        sockets = [socket.socket(fileno=config.http_fd)] if config.http_fd >= 0 else None
        async with self.running():
            # _serve, not serve: the latter would put its own signal handlers over ours.
            serving = asyncio.create_task(server._serve(sockets))
            stopped = asyncio.create_task(self.gateway.stopped.wait())
            await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
            self.log.info("gateway stops")
            self.gateway.drain()
            if not serving.done():
                await asyncio.sleep(min(DRAIN_S, config.shutdown_timeout_s / 2))
                server.should_exit = True
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(serving, max(1.0, config.shutdown_timeout_s))
            stopped.cancel()
        return 1 if self.gateway.failed else 0

    async def _watch_keys(self) -> None:
        """Look at the key file once a second; wrong content leaves the old keys in force."""
        while True:
            await asyncio.sleep(1.0)
            try:
                if await asyncio.to_thread(self.keys.reload):
                    self.log.info("keys reloaded")
            except ConfigError as error:
                self.log.error("keys not reloaded", error=str(error))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="turboserve-gateway")
    parser.add_argument("--config-fd", type=int, required=True)
    config = GatewayConfig.from_json(lifeline.read_fd(parser.parse_args(argv).config_fd))
    lifeline.hold_to_parent(config.parent_fd)
    log = logs.set_up_logs("gateway", log_format=config.log_format, level=config.log_level)

    async def run() -> int:
        return await GatewayProcess(config, log).serve()

    try:
        import uvloop
    except ImportError:
        runner: Any = asyncio.run
    else:
        runner = uvloop.run
    try:
        return int(runner(run()))
    except ConfigError as error:
        log.critical("the gateway cannot start", error=str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
