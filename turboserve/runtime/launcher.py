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
from dataclasses import dataclass
from typing import Any

RESTARTS_MAX = 5
"""Deaths of one process before the server was ever ready: more, and it will not become ready."""
LIVED_S = 10.0
"""A process that lived for so long is started again at once; one that died sooner waits, twice as long each time."""
BACK_OFF_MIN_S, BACK_OFF_MAX_S = 0.1, 10.0
POLL_S = 0.05
HURRY_S = {"gateway": 1.0, "asked": 3.0, "signalled": 1.0, "last": 3.0}
"""After a second signal: what is waited for at most, 8 s in all. Viewers that are sent away; children that were asked
to end by themselves, and then get SIGTERM; and the last ones, which still write to disk."""

Start = Callable[[int], tuple[list[str], int, tuple[int, ...]]]
"""generation (0, 1, …) -> (argv, config descriptor to close after the spawn, other descriptors to hand down)"""


@dataclass(slots=True)
class Child:
    """One process and how to start it again."""

    name: str
    start: Start
    stop_order: int = 0
    """Children of a lower one are stopped first."""
    lived_s: float = LIVED_S
    back_off_max_s: float = BACK_OFF_MAX_S
    process: subprocess.Popen[bytes] | None = None
    generation: int = 0
    deaths: int = 0
    """In a row, each soon after its start."""
    started_s: float = 0.0
    start_at_s: float = 0.0
    unwanted: bool = False
    """It was told to end and is not started again."""


class Launcher:
    """Supervises children until told to stop. Everything runs in the calling thread, which must be the main one:
    the kernel's parent-death signal follows the thread that spawned."""

    def __init__(self, log: Any, *, shutdown_timeout_s: float = 10.0) -> None:
        self._log = log
        self._timeout_s = shutdown_timeout_s
        self._children: list[Child] = []
        self._generations: dict[str, int] = {}
        self._signal: int | None = None
        self.ready = False
        """Set it once the server was ready: from then on no death is a reason to give up."""
        self.on_event: Callable[[str, str, int, int, str], None] | None = None
        """Called with (name, started|backing_off|exited, pid, exit code, reason)."""
        self._hurried_s: float | None = None
        self.before_stopping: dict[int, Callable[[bool], None]] = {}
        """Stop order -> what asks those children to end by themselves; they get most of the timeout for it. Called
        with True after a second signal."""
        self._parent_read, self._parent_write = os.pipe()
        os.set_inheritable(self._parent_read, True)

    @property
    def parent_fd(self) -> int:
        """Reading end of the pipe that ends with this process; put it into every child's config."""
        return self._parent_read

    @property
    def pids(self) -> dict[str, int]:
        return {one.name: one.process.pid for one in self._children if one.process is not None}

    def add(
        self,
        name: str,
        start: Start,
        *,
        stop_order: int = 0,
        lived_s: float = LIVED_S,
        back_off_max_s: float = BACK_OFF_MAX_S,
    ) -> None:
        """Start a child and keep it running. Stopping goes by `stop_order`, and backwards within one."""
        child = Child(name, start, stop_order, lived_s, back_off_max_s, generation=self._generations.get(name, 0))
        self._children.append(child)
        self._spawn(child)

    def remove(self, name: str) -> None:
        """SIGTERM; it is not started again. One that does not end is the operator's to look at."""
        for child in self._find(name):
            child.unwanted = True
            if child.process is not None:
                child.process.terminate()
            else:
                self._forget(child, 0, "removed before it was started again")

    def kill(self, name: str) -> bool:
        """SIGKILL, as an accident would. False when there is no such process."""
        processes = [child.process for child in self._find(name) if child.process is not None]
        for process in processes:
            process.kill()
        return bool(processes)

    def _find(self, name: str) -> list[Child]:
        return [one for one in self._children if one.name == name]

    def _forget(self, child: Child, code: int, reason: str, pid: int = 0) -> None:
        self._children.remove(child)
        self._say(child.name, "exited", pid, code, reason)

    def _say(self, name: str, kind: str, pid: int, code: int, reason: str) -> None:
        if self.on_event is not None:
            self.on_event(name, kind, pid, code, reason)

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
        self._generations[child.name] = child.generation
        child.started_s = time.monotonic()
        self._log.info("started", process=child.name, pid=child.process.pid)
        self._say(child.name, "started", child.process.pid, 0, "")

    def run(self, on_poll: Callable[[], None] | None = None) -> int:
        """Supervise until SIGTERM or SIGINT; the exit code: 0, 130, or 1 when the server cannot be got up."""
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
        if self._hurried_s is not None:
            self._timeout_s = 0.0  # the third one does not wait at all
        elif self._signal is not None:
            self._hurried_s = time.monotonic()
        self._signal = number

    def _look_after(self) -> int:
        now_s = time.monotonic()
        for child in list(self._children):
            if child.process is None:
                if now_s >= child.start_at_s:
                    self._spawn(child)
                continue
            code = child.process.poll()
            if code is None:
                continue
            pid, child.process = child.process.pid, None
            if code == 0 or child.unwanted:
                self._log.info("process ended", process=child.name)
                self._forget(child, code, "it was told to end", pid)
                continue
            child.deaths = child.deaths + 1 if now_s - child.started_s < child.lived_s else 1
            self._log.error("process died", process=child.name, exit_code=code, deaths=child.deaths)
            if not self.ready and child.deaths > RESTARTS_MAX:
                self._log.error(
                    "giving up",
                    process=child.name,
                    reason=f"it died {child.deaths} times and the server was never ready; its own log says why",
                )
                return 1
            wait_s = 0.0
            if child.deaths > 1:
                wait_s = min(child.back_off_max_s, BACK_OFF_MIN_S * 2 ** min(16, child.deaths - 2))
            child.start_at_s = now_s + wait_s
            reason = f"exit code {code}, {child.deaths} in a row; started again in {wait_s:.1f} s"
            self._say(child.name, "backing_off", pid, code, reason)
        return 0

    def stop(self) -> None:
        """Ask the children to end, group by group; SIGTERM and then SIGKILL to what is left after the timeout."""
        orders = sorted({child.stop_order for child in self._children})
        for order in orders:
            group = [one for one in reversed(self._children) if one.stop_order == order and one.process is not None]
            ask = self.before_stopping.get(order)
            if ask is not None:
                ask(False)
                self._wait(group, 0.7, HURRY_S["asked"], ask)
            for child in group:
                if child.process is not None and child.process.poll() is None:
                    child.process.terminate()
            hurry = "signalled" if ask is not None else "last" if order == orders[-1] else "gateway"
            self._wait(group, 1.0, HURRY_S[hurry])
            for child in group:
                assert child.process is not None
                if child.process.poll() is None:
                    self._log.warning("killed: it did not end in time", process=child.name, timeout_s=self._timeout_s)
                    child.process.kill()
                child.process.wait()
                child.process = None

    def _wait(
        self, group: list[Child], share: float, hurry_s: float, ask: Callable[[bool], None] | None = None
    ) -> None:
        """Until all of them have ended, or that share of the timeout is over; `hurry_s` after a second signal."""
        asked_s = time.monotonic()
        while any(one.process is not None and one.process.poll() is None for one in group):
            # Both are read anew each time: signals change them.
            by_s = asked_s + share * self._timeout_s
            if self._hurried_s is not None:
                by_s = min(by_s, max(asked_s, self._hurried_s) + hurry_s)
                if ask is not None:
                    ask(True)
                    ask = None
            if time.monotonic() >= by_s:
                return
            time.sleep(0.01)


def child_environment() -> dict[str, str]:
    """One compute thread per process: two collapse on a busy machine, and bits must not depend on thread count."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        environment[name] = "1"
    environment["PYTHONUNBUFFERED"] = "1"
    return environment
