"""Simulated time and the heap of timers.

Simulated time is whole microseconds: sums of table entries stay exact, so "at the same instant" is equality, files with
six decimals lose nothing, and equal seeds give equal files on every machine. Policies see seconds.
"""

from __future__ import annotations

import heapq
import math
from typing import Any

US = 1_000_000
NEVER_US = 1 << 60  # twice as much still fits 64 bits (sim/batches.py)

# Order of what happens at one instant; batches that end come before all of these (sim/batches.py).
TRANSFER_END, WORKER_LOST, WORKER_READY, WAKE = range(4)


def to_us(seconds: float) -> int:
    """Nearest microsecond; for times that come from files."""
    return round(seconds * US)


def up_us(seconds: float) -> int:
    """Next whole microsecond; for durations, which may not come out shorter than stated."""
    return math.ceil(seconds * US - 1e-6)


class Timers:
    """Events in the order (time, priority, number of insertion)."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, Any]] = []
        self._number = 0

    def add(self, time_us: int, kind: int, what: Any = None) -> None:
        heapq.heappush(self._heap, (time_us, kind, self._number, what))
        self._number += 1

    def next_us(self) -> int:
        return self._heap[0][0] if self._heap else NEVER_US

    def pop_due(self, now_us: int) -> tuple[int, Any] | None:
        """The next (kind, what) that is due, or None."""
        if not self._heap or self._heap[0][0] > now_us:
            return None
        _, kind, _, what = heapq.heappop(self._heap)
        return kind, what

    def only_wakes(self) -> bool:
        return all(kind == WAKE for _, kind, _, _ in self._heap)
