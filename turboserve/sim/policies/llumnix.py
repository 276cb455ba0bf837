"""Llumnix-like: dispatch to the freest worker, migrate between the busiest and the freest, scale by mean
freeness.

Source: Sun et al., "Llumnix: Dynamic Scheduling for Large Language Model Serving", OSDI 2024, and the
defaults of its code: busiest and freest are paired while a move shrinks the gap and keeps it above zero,
one migration a worker at a time; waiting requests count as virtual usage, a draining instance as full;
scaling is checked every 10 s against two thresholds and changes the fleet by one. (Its poll of 50 ms is our
"at every event".) A session here is a request that never ends, so usage is counted in active sessions.

Knobs: `up` and `down`, the loads (share of capacity) above and below which the fleet changes; `step_share`,
which lets a large fleet change by more than the source's single instance, or it could not follow a rise.
"""

from __future__ import annotations

import math

from turboserve.sim.policies.fleet import Book, FleetPolicy

CHECK_S = 10.0
MOVES_PER_DECISION = 16


class Llumnix(FleetPolicy):
    """Virtual usage: active sessions on workers and those waiting for one."""

    name = "llumnix"
    tuning = tuple(
        {"up": up, "down": down} for up, down in ((0.5, 0.3), (0.6, 0.4), (0.7, 0.5), (0.8, 0.6), (0.9, 0.7))
    )

    def __init__(self, *, scaling: bool = True, up: float = 0.6, down: float = 0.4, step_share: float = 0.1) -> None:
        super().__init__(scaling=scaling)
        self.up, self.down, self.step_share = up, down, step_share
        self._next_check_s = 0.0

    def wake_at_s(self, now_s: float) -> float:
        return self._next_check_s

    def wanted(self, book: Book, now_s: float) -> tuple[int, str] | None:
        if now_s < self._next_check_s:
            return None
        self._next_check_s = now_s + CHECK_S
        if book.size == 0 and book.active_sessions:
            return 1, "Llumnix: sessions wait and there is no worker"  # all were lost; usage has no meaning
        size = max(1, book.size)
        usage = book.active_sessions / (book.view.profile.capacity * size)
        step = max(book.view.profile.provision_unit_workers, math.floor(self.step_share * size))
        if usage > self.up:
            return size + step, f"Llumnix: usage {usage:.2f} above {self.up:.2f}"
        if usage < self.down and size > 1:
            # Never so far down that the next check would turn round.
            least = math.ceil(book.active_sessions / (book.view.profile.capacity * self.up))
            return max(1, least, size - step), f"Llumnix: usage {usage:.2f} below {self.down:.2f}"
        return None

    def rebalance(self, book: Book, now_s: float) -> None:
        # The gap must shrink and stay above zero: a pair (n, n - 1) would only change places.
        book.level(most_moves=MOVES_PER_DECISION, gap=2)
