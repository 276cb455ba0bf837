"""A seeded world for the real protocol code: one virtual clock, processes that may be killed or stopped, TCP-like
channels that may be cut or blocked. Nothing here knows what is sent.

Everything random comes from one generator, every event goes into one hash: the same seed gives the same hash.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from turboserve.runtime import messages as m


class Violation(AssertionError):
    """A promise that was broken; its name comes first."""


class World:
    """Clock, randomness, event queue, trace."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now_s = 1000.0
        self.events = 0
        self.coverage: Counter[str] = Counter()
        self.checks: list[Callable[[], None]] = []
        self.tail: deque[str] = deque(maxlen=400)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def at(self, delay_s: float, act: Callable[[], None]) -> None:
        """Do something later."""
        self._count += 1
        heapq.heappush(self._heap, (self.now_s + max(0.0, delay_s), self._count, act))

    def note(self, what: str, *facts: Any) -> None:
        """One line of the trace."""
        line = f"{self.now_s:.6f} {what} {facts}"
        self._hash.update(line.encode())
        self.tail.append(line)

    def cover(self, name: str) -> None:
        self.coverage[name] += 1

    @property
    def trace_hash(self) -> str:
        return self._hash.hexdigest()

    def run(self, until_s: float) -> None:
        """All events up to a time; every check after each of them."""
        while self._heap and self._heap[0][0] <= until_s:
            self.now_s, _, act = heapq.heappop(self._heap)
            self.events += 1
            act()
            for check in self.checks:
                check()
        self.now_s = until_s


class Process:
    """Something that can be killed, and stopped as by SIGSTOP: what comes meanwhile waits."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = False
        self.paused = False
        self.life = 0
        self.channels: list[Channel] = []
        self._waiting: deque[Callable[[], None]] = deque()

    def born(self) -> None:
        self.alive, self.paused = True, False
        self.life += 1
        self._waiting.clear()

    def call(self, act: Callable[[], None]) -> Callable[[], None]:
        """`act`, only in this life of the process, and not while it is stopped."""
        life = self.life

        def run() -> None:
            if not self.alive or self.life != life:
                return
            if self.paused:
                self._waiting.append(run)
            else:
                act()

        return run

    def later(self, delay_s: float, act: Callable[[], None]) -> None:
        self.world.at(delay_s, self.call(act))

    def stop(self) -> None:
        self.paused = True

    def cont(self) -> None:
        """SIGCONT: everything that waited, in order."""
        if not self.paused:
            return
        self.paused = False
        waiting, self._waiting = self._waiting, deque()
        for act in waiting:
            self.world.at(0.0, act)

    def die(self) -> None:
        """kill -9: memory is gone, the kernel closes the sockets."""
        self.alive = self.paused = False
        self._waiting.clear()
        for channel in list(self.channels):
            channel.shut(self, graceful=self.world.rng.random() < 0.6)


class Links:
    """Which pairs of processes cannot hear each other now, and how slow the network is."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.blocked_until: dict[tuple[str, str], float] = {}
        self.delay_s = 0.001
        self.jitter = 0.0
        self.jitter_s = 0.05

    def delay(self) -> float:
        rng = self.world.rng
        slow = rng.expovariate(1 / self.jitter_s) if rng.random() < self.jitter else 0.0
        return self.delay_s * (0.5 + rng.random()) + slow

    def block(self, a: str, b: str, seconds: float) -> None:
        """What `a` sends to `b` does not arrive for so long: a partition in one direction. TCP sends it again after."""
        self.blocked_until[a, b] = max(self.blocked_until.get((a, b), 0.0), self.world.now_s + seconds)

    def blocked_s(self, a: str, b: str) -> float:
        return max(0.0, self.blocked_until.get((a, b), 0.0) - self.world.now_s)


class Channel:
    """One TCP connection between two processes: in order, until it ends; what was under way then may be lost."""

    def __init__(self, links: Links, a: Process, b: Process) -> None:
        self.links = links
        self.world = links.world
        self.ends = (a, b)
        self.open = {a: True, b: True}
        self.on_message: dict[Process, Callable[[Any], None]] = {}
        self.on_close: dict[Process, Callable[[], None]] = {}
        self._queues: dict[Process, deque[Any]] = {a: deque(), b: deque()}
        self._last_s = {a: 0.0, b: 0.0}
        a.channels.append(self)
        b.channels.append(self)

    def other(self, process: Process) -> Process:
        return self.ends[1] if process is self.ends[0] else self.ends[0]

    def send(self, sender: Process, message: Any, payload: Any = None) -> None:
        """A message from one end to the other. It is encoded and checked as on a real socket."""
        if not self.open[sender]:
            return
        self._put(sender, (m.encode(message), payload))

    def _put(self, sender: Process, item: Any) -> None:
        to = self.other(sender)
        self._queues[to].append(item)
        at_s = max(self._last_s[to], self.world.now_s + self.links.delay())
        self._last_s[to] = at_s
        self.world.at(at_s - self.world.now_s, lambda: self._arrive(to))

    def _arrive(self, to: Process) -> None:
        blocked_s = self.links.blocked_s(self.other(to).name, to.name)
        if blocked_s > 0:
            self.world.at(blocked_s + 1e-6, lambda: self._arrive(to))
            return
        queue = self._queues[to]
        if queue:
            self._hand(to, queue.popleft())

    def _hand(self, to: Process, item: Any) -> None:
        def receive() -> None:
            if not self.open[to]:
                return
            if item is None:
                self._end(to)
                return
            data, payload = item
            message = m.decode(data)
            self.on_message[to](message if payload is None else (message, payload))

        to.call(receive)()

    def _end(self, process: Process) -> None:
        """This end has seen that the connection is over."""
        if not self.open[process]:
            return
        self.open[process] = False
        if self in process.channels:
            process.channels.remove(self)
        self.on_close[process]()

    def shut(self, by: Process, *, graceful: bool = True) -> None:
        """`by` closes its end (or dies). What it had sent arrives before the end, or, not gracefully, some is lost."""
        self.open[by] = False
        if self in by.channels:
            by.channels.remove(self)
        self._queues[by].clear()
        to = self.other(by)
        queue = self._queues[to]
        if not graceful and queue:
            for _ in range(self.world.rng.randint(1, len(queue))):
                queue.pop()
        if self.open[to]:
            self._put(by, None)

    def cut(self) -> None:
        """The connection breaks by itself: both ends learn it, each in its own time; what is under way may be lost."""
        for process in self.ends:
            if not self.open[process]:
                continue
            queue = self._queues[process]
            keep = self.world.rng.randint(0, len(queue))
            while len(queue) > keep:
                queue.pop()
            self._put(self.other(process), None)
