"""How the controller asks the launcher for workers, and under which ids.

An id is free once nobody runs under it. A worker that was cut off is lost to the controller while its process lives:
the launcher would find it there and start none, so its id stays taken until the launcher says that it has ended. Of a
worker that joined from elsewhere nobody says so: its id is not given to another one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from turboserve.orchestrator import view as views
from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import LAUNCHER, Send
from turboserve.runtime.controller_recovery import ControllerRecovery


class ControllerGrowth(ControllerRecovery):
    """Wishes for workers, and those that are on their way."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.launched: set[str] = set()
        """Workers whose process runs or is started again, as the launcher says, whether they can be reached or not."""
        self._joined: set[str] = set()
        """Ids like those given out here that workers came with unasked, from other machines: they may come again."""

    def _there(self) -> set[str]:
        """Workers that serve, that are on their way, and that were cut off and may come back."""
        return {*self.workers, *self.expected, *self.launched}

    def _note_joined(self, hello: m.WorkerHello) -> None:
        asked = hello.worker_id in self.launched or hello.worker_id in self.expected  # by a scale hook's launcher, say
        if hello.ring_fd < 0 and not asked and re.fullmatch(r"w\d{1,4}", hello.worker_id):
            self._joined.add(hello.worker_id)

    def _add_workers(
        self,
        count: int,
        reason: str,
        now_s: float,
        record: Callable[[list[tuple[str, str]]], None] = lambda wishes: None,
    ) -> list[str]:
        """Ask the launcher for workers; their ids. `record` makes an operator's wish durable before it leaves: it is
        said again to the next controller, where the tick's own is decided anew from the workers that there are."""
        wishes = []
        for _ in range(count):
            number = 0
            taken = self._there() | self._joined
            while (worker_id := f"w{number}") in taken:
                number += 1
            self._expect(worker_id, now_s)
            self._wishes += 1
            self._note(now_s, "worker_request", worker=worker_id, reason=reason)
            wishes.append((f"{self.generation}-{self._wishes}", worker_id))
        record(wishes)
        for request_id, worker_id in wishes:
            self._out.append(Send(LAUNCHER, m.FleetWish(request_id=request_id, kind="add", worker_id=worker_id)))
        return [worker_id for _, worker_id in wishes]

    def _ask_again(self, wishes: list[tuple[str, str]], now_s: float) -> None:
        """The same requests as before. The launcher carries out those that it has not seen, and says of the others
        what became of them."""
        for request_id, worker_id in wishes:
            self._expect(worker_id, now_s)
            self._out.append(Send(LAUNCHER, m.FleetWish(request_id=request_id, kind="add", worker_id=worker_id)))

    def _expect(self, worker_id: str, now_s: float) -> None:
        """It is on its way: the scheduler counts it as starting."""
        if worker_id in self.workers or worker_id in self.expected:
            return
        self.expected[worker_id] = now_s
        self._starting_rows[worker_id] = views.add_worker(
            self.view,
            worker_id,
            state=views.STARTING,
            request_s=now_s,
            ready_at_s=now_s + self.view.provision_s,
            row=self._free_worker_rows.pop() if self._free_worker_rows else None,
        )

    def _unexpect(self, worker_id: str) -> None:
        self.expected.pop(worker_id, None)
        row = self._starting_rows.pop(worker_id, None)
        if row is not None:
            self.view.workers.state[row] = views.ABSENT
            self._free_worker_rows.append(row)

    def _wish(self, kind: str, worker_id: str) -> None:
        self._wishes += 1
        self._out.append(
            Send(
                LAUNCHER,
                m.FleetWish(request_id=f"{self.generation}-{self._wishes}", kind=kind, worker_id=worker_id),
            )
        )
