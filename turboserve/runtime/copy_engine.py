"""Batches of copies in the background: submit, go on, ask the ticket.

One engine has one queue and runs its batches in the order they came, and the copies of a batch in the order given, so
the layers of a session can be used one after the other while later ones are still on their way (`ticket.copied`). On a
CPU a thread of its own copies, without the interpreter lock; on a CUDA device a stream of its own, by the driver's
batched copy where it has one (csrc/copy_engine.cpp; not yet run on a GPU). Two engines copy both ways at once.

A copy is (target address, source address, bytes). Both ends must stay where they are until the ticket is done: pass
what owns them as `keep`.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from turboserve.errors import ConfigError, Conflict, InvalidRequest, Overloaded, WorkerError
from turboserve.runtime import native

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


class _NativeTicket:
    def __init__(self, batch: Any) -> None:
        self._batch = batch

    @property
    def copied(self) -> int:
        return self._batch.copied

    @property
    def ended(self) -> bool:
        try:
            return self._batch.done()
        except WorkerError:
            return True

    def done(self) -> bool:
        return self._batch.done()

    def wait(self, timeout_s: float, *, copies: int | None = None) -> None:
        wanted = self._batch.size if copies is None else copies
        if not self._batch.wait(timeout_s, wanted):
            raise TimeoutError(f"{self.copied} of {wanted} copies landed within {timeout_s} s")


class _ThreadTicket:
    def __init__(self, copies: list[list[int]]) -> None:
        self.copies = copies
        self.copied = 0
        self._changed = threading.Condition()

    def advance(self) -> None:
        with self._changed:
            self.copied += 1
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        return self.done()

    def done(self) -> bool:
        return self.copied == len(self.copies)

    def wait(self, timeout_s: float, *, copies: int | None = None) -> None:
        wanted = len(self.copies) if copies is None else min(copies, len(self.copies))
        with self._changed:
            if not self._changed.wait_for(lambda: self.copied >= wanted, timeout_s):
                raise TimeoutError(f"{self.copied} of {wanted} copies landed within {timeout_s} s")


class _ThreadEngine:
    """The twin in Python: one thread and memmove."""

    def __init__(self, queue_max: int) -> None:
        self._queue_max = queue_max
        self._queue: deque[_ThreadTicket] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="copies", daemon=True)
        self._thread.start()

    def submit(self, copies: np.ndarray) -> _ThreadTicket:
        ticket = _ThreadTicket(copies.tolist())
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
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()


class CopyEngine:
    """One queue of batches. Its methods may be called from any thread.

    `device` is "cpu", or "cuda" with or without an index: then every copy may have either end on that device, and the
    arena should be pinned (`Arena.pin`). `stable_sources` says that no source changes while it is copied, as when
    reading back from the arena: the driver may then read in any order. ConfigError where the device cannot be had.
    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        queue_max: int = QUEUE_MAX,
        stable_sources: bool = False,
        implementation: str | None = None,
    ) -> None:
        compiled = native.choose(implementation)
        self.device = device
        self._lock = threading.Lock()
        self._kept: deque[tuple[Any, Any]] = deque()
        kind, _, index = device.partition(":")
        if kind not in ("cpu", "cuda"):
            raise ConfigError(f"copies on {device!r}", expected="cpu, cuda or cuda:<n>")
        if kind == "cuda":
            found, device_count = native.load_cuda()
            if compiled is None or device_count == 0:
                raise ConfigError(f"no copies on {device}: {found}", expected="the compiled part and a CUDA device")
        self.implementation = "native" if compiled is not None else "python"
        if compiled is not None:
            number = int(index or 0) if kind == "cuda" else -1
            self._engine: Any = compiled.CopyEngine(number, queue_max, stable_sources)
        else:
            self._engine = _ThreadEngine(queue_max)

    def submit(self, copies: Sequence[Copy] | np.ndarray, *, keep: Any = None, after_stream: int = 0) -> Ticket:
        """Queue one batch. Overloaded when `queue_max` batches wait, Conflict after `close`.

        `keep` is held until the batch is done. With a CUDA device, `after_stream` (a stream's address) makes the copies
        begin after what is on that stream already.
        """
        rows = np.ascontiguousarray(copies, np.uint64).reshape(-1, 3)
        if len(rows) and not rows[rows[:, 2] > 0, :2].all():
            raise InvalidRequest("a copy from or to address 0")
        if self.implementation == "python":
            batch = self._engine.submit(rows)
        else:
            batch = _NativeTicket(self._engine.submit(rows, after_stream))
        with self._lock:
            while self._kept and self._kept[0][0].ended:
                self._kept.popleft()
            if keep is not None:
                self._kept.append((batch, keep))
        return batch

    def close(self) -> None:
        """Finishes what was submitted, then ends the thread."""
        self._engine.close()
        with self._lock:
            self._kept.clear()

    def __enter__(self) -> CopyEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def copy_now(copies: Sequence[Copy]) -> None:
    """Runs the copies in the calling thread, without the interpreter lock."""
    compiled = native.choose(None)
    if compiled is not None:
        compiled.copy_now(np.array(copies, np.uint64))
        return
    for target, source, count in copies:
        ctypes.memmove(target, source, count)
