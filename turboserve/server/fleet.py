"""From the options of `serve` to running processes: who gets which socket, ring and config."""

from __future__ import annotations

import getpass
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from turboserve.errors import ConfigError
from turboserve.model import registry
from turboserve.model.interface import ModelSpec
from turboserve.runtime import channel, frame_ring, lifeline, logs, ports
from turboserve.runtime.controller_config import ControllerConfig, controller_argv
from turboserve.runtime.launcher import Launcher
from turboserve.runtime.worker_config import WorkerConfig, config_fd, worker_argv
from turboserve.server.gateway_config import GatewayConfig, gateway_argv

RING_CHUNKS = 64
"""Chunks a worker's ring holds: what all its sessions can have unaccepted while the gateway is busy."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The options of `turboserve serve`, resolved. Seconds and paths as the flags say."""

    model: str
    host: str
    port: int
    workers: int
    device: str
    capacity: int
    slots: int
    chunk_target_s: float | None
    data_dir: Path
    api_key: str | None
    api_key_file: Path | None
    shutdown_timeout: float
    playback_rate: float
    steps_floor: int | None
    root_path: str
    allowed_origins: tuple[str, ...]
    ssl_certfile: str | None
    ssl_keyfile: str | None
    log_format: str
    log_level: str
    record: Path | None = None
    record_trace: Path | None = None


class Fleet:
    """All that one `serve` owns: sockets, rings, token; it makes each child's config on demand."""

    def __init__(self, options: ServeOptions, launcher: Launcher) -> None:
        if options.capacity > options.slots:
            raise ConfigError(f"--capacity {options.capacity}", expected=f"at most --slots ({options.slots})")
        self.options = options
        self.spec: ModelSpec = registry.load_spec(options.model)
        self._launcher = launcher
        self._token = channel.new_token().hex()
        self.http = ports.listen_socket(options.host, options.port)
        self._control = ports.listen_socket("127.0.0.1", 0)
        self._data = ports.listen_socket("127.0.0.1", 0)
        options.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        chunk_bytes = (
            max(self.spec.chunk_frames_first, self.spec.chunk_frames_rest) * self.spec.width * self.spec.height * 3
        )
        self._ring_bytes = frame_ring.record_bytes(chunk_bytes) * max(RING_CHUNKS, 4 * options.slots)
        self._gateway = GatewayConfig(
            data_dir=str(options.data_dir),
            token=self._token,
            controller_port=ports.port_of(self._control),
            http_fd=self.http.fileno(),
            data_fd=self._data.fileno(),
            parent_fd=launcher.parent_fd,
            host=options.host,
            port=ports.port_of(self.http),
            data_port=ports.port_of(self._data),
            model=options.model,
            api_key=options.api_key or "",
            api_key_file=str(options.api_key_file or ""),
            allowed_origins=options.allowed_origins,
            root_path=options.root_path,
            ssl_certfile=options.ssl_certfile or "",
            ssl_keyfile=options.ssl_keyfile or "",
            chunk_target_s=options.chunk_target_s,
            playback_rate=options.playback_rate,
            shutdown_timeout_s=options.shutdown_timeout,
            log_format=options.log_format,
            log_level=options.log_level,
            record_trace=str(options.record_trace.resolve()) if options.record_trace else "",
        )

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the server."""
        scheme = "https" if self.options.ssl_certfile else "http"
        host = "127.0.0.1" if self.options.host in ("0.0.0.0", "::") else self.options.host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{ports.port_of(self.http)}"

    def start(self) -> None:
        """Start all processes; each waits for the one it needs. They stop in the opposite order: the gateway sends
        its viewers away and lets its sessions go, so that the workers then hold nothing and end at once."""
        self._launcher.add("controller", self._start_controller)
        for number in range(self.options.workers):
            self._launcher.add(f"w{number}", self._worker_starter(f"w{number}"))
        self._launcher.add("gateway", self._start_gateway)

    def _start_controller(self, generation: int) -> tuple[list[str], int, tuple[int, ...]]:
        spec, options = self.spec, self.options
        config = ControllerConfig(
            token=self._token,
            listen_fd=self._control.fileno(),
            data_dir=str(options.data_dir),
            model=options.model,
            chunk_s=spec.chunk_s,
            chunk_target_s=options.chunk_target_s or spec.chunk_s,
            capacity=options.capacity,
            slots=options.slots,
            workers=options.workers,
            denoise_steps=spec.denoise_steps,
            parent_fd=self._launcher.parent_fd,
            steps_floor=options.steps_floor,
            record_dir=str(options.record.resolve()) if options.record else "",
            log_format=options.log_format,
            log_level=options.log_level,
        )
        fd = lifeline.json_fd(config.to_json(), "turboserve-controller-config")
        return controller_argv(fd), fd, (self._control.fileno(),)

    def _start_gateway(self, generation: int) -> tuple[list[str], int, tuple[int, ...]]:
        config = replace(self._gateway, gateway_epoch=generation + 1)
        fd = lifeline.json_fd(config.to_json(), "turboserve-gateway-config")
        return gateway_argv(fd), fd, (self.http.fileno(), self._data.fileno())

    def _worker_starter(self, worker_id: str) -> Any:
        ring_fd = frame_ring.create(self._ring_bytes)
        os.set_inheritable(ring_fd, True)

        def start(generation: int) -> tuple[list[str], int, tuple[int, ...]]:
            options = self.options
            config = WorkerConfig(
                worker_id=worker_id,
                worker_epoch=generation + 1,
                token=self._token,
                controller_port=ports.port_of(self._control),
                gateway_port=ports.port_of(self._data),
                node=socket.gethostname(),
                model=options.model,
                device=options.device,
                slots=options.slots,
                capacity=options.capacity,
                ring_fd=ring_fd,
                ring_bytes=self._ring_bytes,
                parent_fd=self._launcher.parent_fd,
                shutdown_timeout_s=options.shutdown_timeout,
                log_format=options.log_format,
                log_level=options.log_level,
            )
            fd = config_fd(config)
            return worker_argv(fd), fd, (ring_fd,)

        return start


def serve(options: ServeOptions) -> int:
    """Run until stopped; the exit code."""
    log = logs.set_up_logs("launcher", log_format=options.log_format, level=options.log_level)
    launcher = Launcher(log, shutdown_timeout_s=options.shutdown_timeout)
    fleet = Fleet(options, launcher)
    fleet.start()
    return launcher.run(on_poll=_Announcer(fleet, time.monotonic()))


class _Announcer:
    """Prints the address once the server is ready; asks /readyz at most ten times a second until then."""

    def __init__(self, fleet: Fleet, started_s: float) -> None:
        self._fleet = fleet
        self._started_s = started_s
        self._next_s = started_s
        self._done = False

    def __call__(self) -> None:
        now_s = time.monotonic()
        if self._done or now_s < self._next_s:
            return
        self._next_s = now_s + 0.1
        if not _ready(self._fleet.url):
            return
        self._done = True
        url = self._fleet.url
        port = ports.port_of(self._fleet.http)
        lines = [f"TurboServe is ready ({now_s - self._started_s:.1f} s): {url}"]
        if self._fleet.options.host in ("127.0.0.1", "localhost", "::1"):
            lines.append(
                f"From another machine: ssh -L {port}:127.0.0.1:{port} {getpass.getuser()}@{socket.gethostname()}"
            )
        if self._fleet.options.playback_rate != 1.0:
            lines.append(f"Live streams play at {self._fleet.options.playback_rate:g}x real time (--playback-rate).")
        lines.append("Stop with Ctrl-C.")
        print("\n".join(lines), file=sys.stderr, flush=True)


def _ready(url: str) -> bool:
    import ssl

    # Only to find out whether our own child answers; its certificate is the user's, maybe for another name.
    context = ssl._create_unverified_context() if url.startswith("https") else None
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=1.0, context=context) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
