"""Knative's Pod Autoscaler over concurrency: a stable window, and a panic window that answers a burst.

Source: Knative Serving documentation, "Configuring the Autoscaler", and its defaults: stable window 60 s,
panic window 10% of it, panic threshold 200%, tick 2 s, target 70% of the concurrency limit, scale-up at
most to 1000 times and scale-down at most to half of what is ready per tick; no scale-down while in panic.
Knob: the target percentage; our default of 40% is what equal service takes (bench/results/simulation), not
Knative's 70%.
"""

from __future__ import annotations

import math
from collections import deque

from turboserve.sim.policies.fleet import Book, FleetPolicy

TICK_S = 2.0
STABLE_S = 60.0
PANIC_S = 6.0
PANIC_THRESHOLD = 2.0
MAX_UP_RATE = 1000.0
MAX_DOWN_RATE = 2.0


class Kpa(FleetPolicy):
    """Averages concurrency over time, exactly, from the moments at which it is asked."""

    name = "kpa"
    tuning = tuple({"target": t} for t in (0.4, 0.5, 0.6, 0.7, 0.8))

    def __init__(self, *, scaling: bool = True, target: float = 0.4) -> None:
        super().__init__(scaling=scaling)
        self.target = target
        self._next_tick_s = 0.0
        self._area = 0.0
        self._last: tuple[float, int] | None = None
        self._samples: deque[tuple[float, float]] = deque()  # (time, session-seconds so far) at every tick
        self._panic_until_s = -math.inf
        self._panic_most = 0

    def wake_at_s(self, now_s: float) -> float:
        return self._next_tick_s

    def wanted(self, book: Book, now_s: float) -> tuple[int, str] | None:
        active = book.active_sessions
        if self._last is not None:
            self._area += self._last[1] * (now_s - self._last[0])
        self._last = (now_s, active)
        if now_s < self._next_tick_s:
            return None
        self._next_tick_s = now_s + TICK_S
        self._samples.append((now_s, self._area))
        while len(self._samples) > 1 and self._samples[1][0] <= now_s - STABLE_S:
            self._samples.popleft()
        per_worker = book.view.profile.capacity * self.target
        ready = max(1, len(book.ready()))
        most, least = math.ceil(MAX_UP_RATE * ready), math.floor(ready / MAX_DOWN_RATE)
        stable, panic = (
            min(most, max(least, math.ceil(self._average(now_s, window_s, active) / per_worker)))
            for window_s in (STABLE_S, PANIC_S)
        )
        if panic / ready >= PANIC_THRESHOLD:
            if now_s >= self._panic_until_s:
                self._panic_most = 0
            self._panic_until_s = now_s + STABLE_S
        if now_s < self._panic_until_s:
            self._panic_most = max(self._panic_most, panic, stable, book.size)
            return self._panic_most, f"KPA panic: {panic} workers for the last {PANIC_S:.0f} s"
        return max(1, stable), f"KPA: {stable} workers for the last {STABLE_S:.0f} s"

    def _average(self, now_s: float, window_s: float, active: int) -> float:
        """Mean concurrency over the window, or over as much of it as has been seen."""
        begin_s, area = next((one for one in self._samples if one[0] >= now_s - window_s - 1e-9), (now_s, self._area))
        return (self._area - area) / (now_s - begin_s) if now_s > begin_s else float(active)
