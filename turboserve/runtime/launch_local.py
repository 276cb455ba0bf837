"""Workers as processes of this machine, children of the launcher."""

from __future__ import annotations

from collections.abc import Callable

from turboserve.runtime import messages as m
from turboserve.runtime.launcher import Launcher, Start

STOP_ORDER = 1
"""After the gateway has sent its viewers away, before the controller."""


class LocalBackend:
    """`starter(worker_id)` says how to start one; it is asked once for each start of that id's child. `at_work` says
    which sessions a worker that has died was working on."""

    def __init__(
        self,
        launcher: Launcher,
        starter: Callable[[str], Start],
        at_work: Callable[[str], tuple[str, ...]] = lambda worker_id: (),
    ) -> None:
        self._launcher = launcher
        self._starter = starter
        self._at_work = at_work
        self._starts: dict[str, Start] = {}
        self._events: list[m.FleetEvent] = []
        self._ids: set[str] = set()
        launcher.on_event = self._on_event

    def add(self, worker_id: str, request_id: str) -> None:
        if worker_id in self._ids:
            return
        if worker_id not in self._starts:
            self._starts[worker_id] = self._starter(worker_id)  # one per id for ever: its frame ring goes on
        self._ids.add(worker_id)
        self._launcher.add(worker_id, self._starts[worker_id], stop_order=STOP_ORDER)

    def remove(self, worker_id: str, request_id: str) -> None:
        if worker_id in self._ids:
            self._launcher.remove(worker_id)

    def kill(self, worker_id: str) -> bool:
        return worker_id in self._ids and self._launcher.kill(worker_id)

    def events(self) -> list[m.FleetEvent]:
        found, self._events = self._events, []
        return found

    def present(self) -> list[m.FleetEvent]:
        pids = self._launcher.pids
        return [m.FleetEvent(worker_id=one, kind="started", pid=pids.get(one, 0)) for one in sorted(self._ids)]

    def close(self) -> None:
        """Nothing waits here."""

    def _on_event(self, name: str, kind: str, pid: int, code: int, reason: str) -> None:
        if name not in self._ids:
            return
        if kind in ("exited", "failed"):
            self._ids.discard(name)
        at_work = () if kind == "started" else self._at_work(name)
        self._events.append(
            m.FleetEvent(worker_id=name, kind=kind, pid=pid, exit_code=code, reason=reason, at_work=at_work)
        )
