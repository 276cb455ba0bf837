"""The launcher: starts controller, gateway and workers, restarts what dies, and takes all of them down with it.

It owns what must survive a child: the listening sockets, the cluster token, the frame rings. Children get them as
inherited descriptors. It takes no part in serving; when it is killed, its children die with it (runtime/lifeline.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

RESTARTS_MAX = 5
RESTART_WINDOW_S = 60.0
POLL_S = 0.05

Start = Callable[[int], tuple[list[str], int, tuple[int, ...]]]
"""generation (0, 1, …) -> (argv, config descriptor to close after the spawn, other descriptors to hand down)"""


@dataclass(slots=True)
class Child:
    """One process and how to start it again."""

    name: str
    start: Start
    process: subprocess.Popen[bytes] | None = None
    generation: int = 0
    deaths_s: list[float] = field(default_factory=list)
    start_at_s: float = 0.0
    ended: bool = False


class Launcher:
    """Supervises children until told to stop. Everything runs in the calling thread, which must be the main one:
    the kernel's parent-death signal follows the thread that spawned."""

    def __init__(self, log: Any, *, shutdown_timeout_s: float = 10.0) -> None:
        self._log = log
        self._timeout_s = shutdown_timeout_s
        self._children: list[Child] = []
        self._signal: int | None = None
        self._parent_read, self._parent_write = os.pipe()
        os.set_inheritable(self._parent_read, True)

    @property
    def parent_fd(self) -> int:
        """Reading end of the pipe that ends with this process; put it into every child's config."""
        return self._parent_read

    @property
    def pids(self) -> dict[str, int]:
        return {one.name: one.process.pid for one in self._children if one.process is not None}

    def add(self, name: str, start: Start) -> None:
        """Start a child and keep it running. Order of adding is order of starting; stopping goes backwards."""
        child = Child(name, start)
        self._children.append(child)
        self._spawn(child)

    def _spawn(self, child: Child) -> None:
        argv, config_fd, fds = child.start(child.generation)
        try:
            child.process = subprocess.Popen(
                argv,
                pass_fds=(config_fd, self._parent_read, *fds),
                stdin=subprocess.DEVNULL,
                # Ctrl-C in a terminal goes to the launcher alone, which then stops the children in order.
                start_new_session=True,
                env=child_environment(),
            )
        finally:
            os.close(config_fd)
        child.generation += 1
        self._log.info("started", process=child.name, pid=child.process.pid)

    def run(self, on_poll: Callable[[], None] | None = None) -> int:
        """Supervise until SIGTERM or SIGINT; returns the exit code: 0, 130, or 1 when a child cannot be kept up."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        code = 0
        try:
            while self._signal is None and code == 0:
                code = self._look_after()
                if on_poll is not None:
                    on_poll()
                time.sleep(POLL_S)
        finally:
            self.stop()
        return 130 if self._signal == signal.SIGINT else code

    def _on_signal(self, number: int, _frame: object) -> None:
        if self._signal is not None:
            self._timeout_s = 0.0  # the second signal does not wait
        self._signal = number

    def _look_after(self) -> int:
        now_s = time.monotonic()
        for child in self._children:
            if child.ended:
                continue
            if child.process is None:
                if now_s >= child.start_at_s:
                    self._spawn(child)
                continue
            code = child.process.poll()
            if code is None:
                continue
            child.process = None
            if code == 0:
                child.ended = True  # drained on purpose
                self._log.info("process ended", process=child.name)
                continue
            child.deaths_s = [then for then in child.deaths_s if now_s - then < RESTART_WINDOW_S] + [now_s]
            self._log.error("process died", process=child.name, exit_code=code, recent_deaths=len(child.deaths_s))
            if len(child.deaths_s) > RESTARTS_MAX:
                self._log.error("giving up", process=child.name, reason=f"died {len(child.deaths_s)} times a minute")
                return 1
            child.start_at_s = now_s + 0.1 * 2 ** (len(child.deaths_s) - 1) - 0.1
        return 0

    def stop(self) -> None:
        """SIGTERM to each child, last started first; SIGKILL to what is left after the timeout."""
        for child in reversed(self._children):
            if child.process is None:
                continue
            child.process.terminate()
            asked_s = time.monotonic()
            # Read anew each time: a second signal sets the timeout to 0.
            while child.process.poll() is None and time.monotonic() < asked_s + self._timeout_s:
                time.sleep(0.01)
            if child.process.poll() is None:
                self._log.warning("killed: it did not end in time", process=child.name, timeout_s=self._timeout_s)
                child.process.kill()
            child.process.wait()
            child.process = None


def child_environment() -> dict[str, str]:
    """One compute thread per process: two collapse on a busy machine, and bits must not depend on thread count."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        environment[name] = "1"
    environment["PYTHONUNBUFFERED"] = "1"
    return environment
