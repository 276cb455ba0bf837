"""The launcher's part in a fleet that changes: it hears the controller's wishes and says what became of processes.

How a process comes to be is a backend's business (`launch_local`, `launch_hook`, `launch_ray`); everything after that
is the same code.
"""

from __future__ import annotations

import socket
from collections import OrderedDict
from typing import Any, Protocol

from turboserve.errors import ProtocolError
from turboserve.runtime import messages as m
from turboserve.runtime.fleet_link import FleetLink

REQUESTS_KEPT = 4096


class Backend(Protocol):
    """How worker processes come to be, and nothing else. No method waits for a process or a command."""

    def add(self, worker_id: str, request_id: str) -> None:
        """See to it that such a worker starts; one that is there already is left alone."""

    def remove(self, worker_id: str, request_id: str) -> None:
        """See to it that it is gone and stays gone."""

    def kill(self, worker_id: str) -> bool:
        """SIGKILL, as an accident would; it is started again. False when the process is not ours."""

    def events(self) -> list[m.FleetEvent]:
        """What happened since the last call."""

    def present(self) -> list[m.FleetEvent]:
        """One `started` or `backing_off` for each worker there is or is to be."""

    def close(self) -> None:
        """Forget about wishes that are not carried out yet."""


class BothBackends:
    """The first workers are local, those that the fleet grows by come from the second backend."""

    def __init__(self, local: Backend, grown: Backend) -> None:
        self._local = local
        self._grown = grown

    def add(self, worker_id: str, request_id: str) -> None:
        self._grown.add(worker_id, request_id)

    def remove(self, worker_id: str, request_id: str) -> None:
        self._local.remove(worker_id, request_id)
        self._grown.remove(worker_id, request_id)

    def kill(self, worker_id: str) -> bool:
        return self._local.kill(worker_id) or self._grown.kill(worker_id)

    def events(self) -> list[m.FleetEvent]:
        return self._local.events() + self._grown.events()

    def present(self) -> list[m.FleetEvent]:
        return self._local.present() + self._grown.present()

    def close(self) -> None:
        self._local.close()
        self._grown.close()


class SeenWishes:
    """Which requests were carried out, of this controller and of those before it; the newest REQUESTS_KEPT."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, None] = OrderedDict()

    def is_new(self, request_id: str) -> bool:
        """True once for each request."""
        if request_id in self._seen:
            return False
        self._seen[request_id] = None
        while len(self._seen) > REQUESTS_KEPT:
            self._seen.popitem(last=False)
        return True


class FleetHost:
    """The launcher's end of the fleet link."""

    def __init__(self, backend: Backend, log: Any) -> None:
        self._backend = backend
        self._log = log
        self._link: FleetLink | None = None
        self._seen = SeenWishes()

    def new_link(self) -> socket.socket:
        """For a controller that is about to start: its end, to be handed down and then closed here."""
        if self._link is not None:
            self.poll()  # what an earlier one wished before it died may have been answered by it
            self._link.close()
        self._link, theirs = FleetLink.pair()
        for event in self._backend.present():
            self._link.send(event)
        return theirs

    def poll(self) -> None:
        """Carry out what is wished, tell what happened. Never waits."""
        link = self._link
        if link is not None:
            try:
                wishes = link.receive()
            except ProtocolError as error:
                self._log.error("the controller broke the protocol", error=str(error))
                link.close()
                wishes = []
            for wish in wishes:
                if isinstance(wish, m.FleetWish):
                    self._carry_out(wish)
        for event in self._backend.events():
            self._log.info("fleet", worker=event.worker_id, what=event.kind, reason=event.reason)
            if link is not None:
                link.send(event)

    def _carry_out(self, wish: m.FleetWish) -> None:
        if not self._seen.is_new(wish.request_id):
            self._tell_again(wish)
            return
        self._log.info("wish", kind=wish.kind, worker=wish.worker_id)
        if wish.kind == "add":
            self._backend.add(wish.worker_id, wish.request_id)
        elif wish.kind == "remove":
            self._backend.remove(wish.worker_id, wish.request_id)
        elif wish.kind == "kill":
            self._backend.kill(wish.worker_id)
        else:
            self._log.error("no such wish", kind=wish.kind)

    def _tell_again(self, wish: m.FleetWish) -> None:
        """A controller repeats what one before it had asked for: it missed what came of it."""
        there = [one for one in self._backend.present() if one.worker_id == wish.worker_id]
        gone = m.FleetEvent(
            worker_id=wish.worker_id, kind="exited", request_id=wish.request_id, reason="it came, and has gone since"
        )
        if self._link is not None:
            self._link.send(there[0] if there else gone)

    def say_stopping(self, at_once: bool) -> None:
        """The server ends: the controller suspends every session and stops every worker. `at_once`: told twice."""
        self._backend.close()
        if self._link is not None:
            self._link.send(m.FleetEvent(worker_id="", kind="stopping_now" if at_once else "stopping"))
