"""Batches of copies in the background: submit, go on, ask the ticket.

One engine has one queue and runs its batches in the order they came, and the copies of a batch in the order given, so
the layers of a session can be used one after the other while later ones are still on their way (`ticket.copied`). On a
CPU a thread of its own copies, without the interpreter lock.

A copy is (target address, source address, bytes). Both ends must stay where they are until the ticket is done: pass
what owns them as `keep`.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from turboserve.errors import Conflict, InvalidRequest, Overloaded

log = logging.getLogger(__name__)

QUEUE_MAX = 256
Copy = tuple[int, int, int]
"""(target address, source address, bytes)"""


class Ticket(Protocol):
    """One submitted batch."""

    @property
    def copied(self) -> int:
        """How many copies of the batch have landed, counted from the front."""
        ...

    def done(self) -> bool:
        """Whether all have. Raises what went wrong, if something did."""
        ...

    def wait(self, timeout_s: float, *, copies: int | None = None) -> None:
        """Until the first `copies` copies (None: all) have landed. TimeoutError; else like `done`."""
        ...


def join_pieces(targets: Sequence[tuple[int, int]], sources: Sequence[tuple[int, int]]) -> list[Copy]:
    """The copies between two lists of (address, bytes) that name the same number of bytes, cut where either is cut."""
    copies: list[Copy] = []
    waiting = deque(targets)
    for source, left in sources:
        while left:
            if not waiting:
                raise InvalidRequest("the copy's target is smaller than its source")
            target, room = waiting.popleft()
            count = min(room, left)
            if count:
                copies.append((target, source, count))
            if count < room:
                waiting.appendleft((target + count, room - count))
            source, left = source + count, left - count
    if any(room for _, room in waiting):
        raise InvalidRequest("the copy's target is larger than its source")
    return copies


class _ThreadTicket:
    def __init__(self, copies: Sequence[Copy], keep: Any) -> None:
        self.copies = copies
        self.copied = 0
        self.error: BaseException | None = None
        self._keep = keep
        self._changed = threading.Condition()

    def advance(self, error: BaseException | None = None) -> None:
        with self._changed:
            if error is None:
                self.copied += 1
            else:
                self.error = error
            if self.error is not None or self.copied == len(self.copies):
                self._keep = None
            self._changed.notify_all()

    def done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.copied == len(self.copies)

    def wait(self, timeout_s: float, *, copies: int | None = None) -> None:
        wanted = len(self.copies) if copies is None else copies
        with self._changed:
            landed = self._changed.wait_for(lambda: self.copied >= wanted or self.error is not None, timeout_s)
        if self.error is not None:
            raise self.error
        if not landed:
            raise TimeoutError(f"{self.copied} of {wanted} copies landed within {timeout_s} s")


class ThreadCopyEngine:
    """The engine in Python: one thread and memmove."""

    implementation = "python"

    def __init__(self, *, queue_max: int = QUEUE_MAX) -> None:
        self._queue_max = queue_max
        self._queue: deque[_ThreadTicket] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="copies", daemon=True)
        self._thread.start()

    def submit(self, copies: Sequence[Copy], *, keep: Any = None) -> Ticket:
        """Queue one batch. Overloaded when `queue_max` batches wait, Conflict after `close`."""
        for target, source, count in copies:
            if count < 0 or not (target and source):
                raise InvalidRequest(f"a copy of {count} B from {source:#x} to {target:#x}")
        ticket = _ThreadTicket(list(copies), keep)
        with self._changed:
            if self._closing:
                raise Conflict("the copy engine is closed")
            if len(self._queue) >= self._queue_max:
                raise Overloaded(f"{len(self._queue)} batches of copies wait", hint="wait for a ticket first")
            self._queue.append(ticket)
            self._changed.notify()
        return ticket

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                ticket = self._queue.popleft()
            for target, source, count in ticket.copies:
                ctypes.memmove(target, source, count)  # ctypes lets go of the interpreter lock
                ticket.advance()

    def close(self) -> None:
        """Finishes what was submitted, then ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> ThreadCopyEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def copy_now(copies: Sequence[Copy]) -> float:
    """Runs the copies in the calling thread; the seconds it took."""
    began_s = time.monotonic()
    for target, source, count in copies:
        ctypes.memmove(target, source, count)
    return time.monotonic() - began_s
