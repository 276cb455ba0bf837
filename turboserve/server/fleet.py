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
from turboserve.runtime import channel, frame_ring, launch_ray, lifeline, logs, ports
from turboserve.runtime.arena import create_arena
from turboserve.runtime.cluster import Backend, BothBackends, FleetHost
from turboserve.runtime.controller_config import ControllerConfig, controller_argv
from turboserve.runtime.launch_hook import HookBackend
from turboserve.runtime.launch_local import STOP_ORDER, LocalBackend
from turboserve.runtime.launcher import Launcher, Start
from turboserve.runtime.work_board import WorkBoard, create_board
from turboserve.runtime.worker_config import WorkerConfig, config_fd, worker_argv
from turboserve.server.gateway_config import GatewayConfig, gateway_argv

RING_CHUNKS = 64
"""Chunks a worker's ring holds: what all its sessions can have unaccepted while the gateway is busy."""

ARENA_BYTES_MAX = 1 << 30
ARENA_SLAB_BYTES = 64 << 10
SPARE_PARTITIONS = 3
"""One is the controller's; the others are for workers that an operator adds to a fixed fleet."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The options of `turboserve serve`, resolved. Seconds and paths as the flags say."""

    model: str
    host: str
    port: int
    workers: int
    workers_max: int
    """Equal to `workers` for a fixed fleet; else the fleet grows from `workers` to this and back."""
    backend: str
    scale_hook: str | None
    control_host: str
    arena_bytes: int | None
    disk_bytes: int
    paced_profile: Path | None
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
    video_pipeline: Path | None = None


class Fleet:
    """All that one `serve` owns: sockets, rings, token; it makes each child's config on demand."""

    def __init__(self, options: ServeOptions, launcher: Launcher, log: Any) -> None:
        if options.capacity > options.slots:
            raise ConfigError(f"--capacity {options.capacity}", expected=f"at most --slots ({options.slots})")
        self.options = options
        self.spec: ModelSpec = registry.load_spec(options.model)
        self._launcher = launcher
        self._token = channel.new_token().hex()
        self._controller_end: socket.socket | None = None
        self.http = ports.listen_socket(options.host, options.port)
        if options.control_host in ("", "*", "0.0.0.0", "::"):
            raise ConfigError(
                f"--control-host {options.control_host!r} is every address there is",
                expected="one address of this host",
            )
        self._control = ports.listen_socket(options.control_host, 0)
        # Where workers join they send frames, too.
        self._data = ports.listen_socket(options.control_host, 0)
        options.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        chunk_bytes = (
            max(self.spec.chunk_frames_first, self.spec.chunk_frames_rest) * self.spec.width * self.spec.height * 3
        )
        self._ring_bytes = frame_ring.record_bytes(chunk_bytes) * max(RING_CHUNKS, 4 * options.slots)
        self._partitions = max(options.workers_max, options.workers) + SPARE_PARTITIONS
        self._arena_fd = self._make_arena()
        self._token_file = self._write_token()
        if options.backend == "ray":
            launch_ray.ray_backend()
        self._boards: dict[str, WorkBoard] = {}
        local = LocalBackend(launcher, self._worker_starter, lambda worker_id: self._boards[worker_id].read())
        backend: Backend = local
        if options.scale_hook:
            facts = {
                "model": options.model,
                "controller": f"{options.control_host}:{ports.port_of(self._control)}",
                "token_file": str(self._token_file),
            }
            backend = BothBackends(local, HookBackend(options.scale_hook, facts, log))
        self._local = local
        self.host = FleetHost(backend, log)
        launcher.before_stopping[STOP_ORDER] = self.host.say_stopping
        self._gateway = GatewayConfig(
            data_dir=str(options.data_dir),
            token=self._token,
            controller_port=ports.port_of(self._control),
            controller_host=options.control_host,
            http_fd=self.http.fileno(),
            data_fd=self._data.fileno(),
            parent_fd=launcher.parent_fd,
            host=options.host,
            port=ports.port_of(self.http),
            data_host=options.control_host,
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
            video_pipeline=str(options.video_pipeline.resolve()) if options.video_pipeline else "",
            video_device=options.device,
            record_trace=str(options.record_trace.resolve()) if options.record_trace else "",
        )

    @property
    def control(self) -> str:
        """Where workers find the controller."""
        return f"{self.options.control_host}:{ports.port_of(self._control)}"

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the server."""
        scheme = "https" if self.options.ssl_certfile else "http"
        host = "127.0.0.1" if self.options.host in ("0.0.0.0", "::") else self.options.host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{ports.port_of(self.http)}"

    def _make_arena(self) -> int:
        """The node's shared memory for recovery points; it outlives every process but this one."""
        name = f"port{ports.port_of(self.http)}"
        fd = make_arena(self.options.arena_bytes, name=name, partition_count=self._partitions)
        if fd >= 0:
            os.set_inheritable(fd, True)
        return fd

    def _write_token(self) -> Path:
        """For workers that join from elsewhere: `turboserve worker --join HOST:PORT --token-file F`."""
        path = self.options.data_dir / "cluster.token"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            os.fchmod(fd, 0o600)
            file.write(self._token + "\n")
        return path

    def start(self) -> None:
        """Start all processes; each waits for the one it needs. The gateway is stopped first (it sends its viewers
        away), then the workers (the controller has them suspend what they hold), then the controller."""
        self._launcher.add(
            "controller", self._start_controller, stop_order=STOP_ORDER + 1, lived_s=2.0, back_off_max_s=2.0
        )
        for number in range(self.options.workers):
            self._local.add(f"w{number}", "at start")
        self._launcher.add("gateway", self._start_gateway, stop_order=0, lived_s=2.0, back_off_max_s=2.0)

    def _start_controller(self, generation: int) -> tuple[list[str], int, tuple[int, ...]]:
        spec, options = self.spec, self.options
        if self._controller_end is not None:
            self._controller_end.close()  # the earlier controller's, which it had a copy of
        fleet = self._controller_end = self.host.new_link()
        config = ControllerConfig(
            token=self._token,
            listen_fd=self._control.fileno(),
            data_dir=str(options.data_dir),
            model=options.model,
            # By the wall clock, as the streams play: what is planned is when chunks are due.
            chunk_s=spec.chunk_s / options.playback_rate,
            chunk_target_s=(options.chunk_target_s or spec.chunk_s) / options.playback_rate,
            capacity=options.capacity,
            slots=options.slots,
            paced_profile=str(options.paced_profile.resolve()) if options.paced_profile else "",
            workers=options.workers,
            workers_max=options.workers_max,
            fleet_fd=fleet.fileno(),
            node=socket.gethostname(),
            arena_fd=self._arena_fd,
            disk_bytes=options.disk_bytes,
            may_kill=_is_loopback(options.host) and not (options.api_key or options.api_key_file),
            denoise_steps=spec.denoise_steps,
            parent_fd=self._launcher.parent_fd,
            steps_floor=options.steps_floor,
            record_dir=str(options.record.resolve()) if options.record else "",
            log_format=options.log_format,
            log_level=options.log_level,
        )
        fd = lifeline.json_fd(config.to_json(), "turboserve-controller-config")
        return controller_argv(fd), fd, (self._control.fileno(), fleet.fileno(), *self._arena_fds())

    def _arena_fds(self) -> tuple[int, ...]:
        return (self._arena_fd,) if self._arena_fd >= 0 else ()

    def _start_gateway(self, generation: int) -> tuple[list[str], int, tuple[int, ...]]:
        config = replace(self._gateway, gateway_epoch=generation + 1)
        fd = lifeline.json_fd(config.to_json(), "turboserve-gateway-config")
        return gateway_argv(fd), fd, (self.http.fileno(), self._data.fileno())

    def _worker_starter(self, worker_id: str) -> Start:
        # Partition 0 is the controller's (points read back from disk); a worker beyond the rest leaves no points.
        partition = int(worker_id[1:]) + 1
        has_arena = self._arena_fd >= 0 and partition < self._partitions
        ring_fd = frame_ring.create(self._ring_bytes)
        os.set_inheritable(ring_fd, True)
        board_fd = create_board()
        os.set_inheritable(board_fd, True)
        self._boards[worker_id] = WorkBoard(board_fd)

        def start(generation: int) -> tuple[list[str], int, tuple[int, ...]]:
            options = self.options
            config = WorkerConfig(
                worker_id=worker_id,
                worker_epoch=generation + 1,
                token=self._token,
                controller_port=ports.port_of(self._control),
                gateway_port=ports.port_of(self._data),
                controller_host=options.control_host,
                gateway_host=options.control_host,
                paced_profile=str(options.paced_profile.resolve()) if options.paced_profile else "",
                node=socket.gethostname(),
                model=options.model,
                device=options.device,
                slots=options.slots,
                capacity=options.capacity,
                ring_fd=ring_fd,
                ring_bytes=self._ring_bytes,
                board_fd=board_fd,
                arena_fd=self._arena_fd if has_arena else -1,
                arena_partition=partition if has_arena else 0,
                parent_fd=self._launcher.parent_fd,
                born_s=time.monotonic(),
                shutdown_timeout_s=options.shutdown_timeout,
                profile_dir=str(options.data_dir / "profiles"),
                log_format=options.log_format,
                log_level=options.log_level,
            )
            fd = config_fd(config)
            return worker_argv(fd), fd, (ring_fd, board_fd, *self._arena_fds())

        return start


def serve(options: ServeOptions) -> int:
    """Run until stopped; the exit code."""
    log = logs.set_up_logs("launcher", log_format=options.log_format, level=options.log_level)
    launcher = Launcher(log, shutdown_timeout_s=options.shutdown_timeout)
    fleet = Fleet(options, launcher, log)
    fleet.start()
    announce = _Announcer(fleet, launcher, time.monotonic())

    def poll() -> None:
        fleet.host.poll()
        announce()

    return launcher.run(on_poll=poll)


def make_arena(asked_bytes: int | None, *, name: str, partition_count: int) -> int:
    """An arena of the size that was asked for (None: the default); -1 for a size of 0."""
    bytes_ = default_arena_bytes() if asked_bytes is None else asked_bytes
    if bytes_ == 0:
        return -1
    # By default it takes memory as it is used; a size that was asked for is there from the start.
    return create_arena(
        bytes_,
        name=name,
        partition_count=partition_count,
        slab_bytes=ARENA_SLAB_BYTES,
        reserve_memory=asked_bytes is not None,
    )


def default_arena_bytes() -> int:
    """A sixteenth of the memory, at most 1 GiB: what is not used is not taken."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(ARENA_BYTES_MAX, memory // 16))


def _is_loopback(host: str) -> bool:
    return host in ("127.0.0.1", "localhost", "::1")


class _Announcer:
    """Prints the address once the server is ready; asks /readyz at most ten times a second until then."""

    def __init__(self, fleet: Fleet, launcher: Launcher, started_s: float) -> None:
        self._fleet = fleet
        self._launcher = launcher
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
        self._done = self._launcher.ready = True
        url = self._fleet.url
        port = ports.port_of(self._fleet.http)
        lines = [f"TurboServe is ready ({now_s - self._started_s:.1f} s): {url}"]
        if _is_loopback(self._fleet.options.host):
            lines.append(
                f"From another machine: ssh -L {port}:127.0.0.1:{port} {getpass.getuser()}@{socket.gethostname()}"
            )
        if self._fleet.options.control_host != "127.0.0.1":
            lines.append(f"Workers join with: turboserve worker --join {self._fleet.control} --token-file FILE")
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
