"""Lazy capacity provisioning, with exact balancing of sessions.

Source: Lin, Wierman, Andrew and Thereska, "Dynamic right-sizing for power-proportional data centers",
INFOCOM 2011 (and IEEE/ACM ToN 2013); 3-competitive. At each slot two bounds come from the optimum of
everything seen so far: x_low, its last fleet when growing costs beta, and x_high, its last fleet when
shrinking costs beta. The fleet stays where it is unless it leaves [x_low, x_high]; then it goes to the
nearer bound, no further.

The slot's cost is linear: x workers, infinite below the need. beta is what a start costs here: the
provisioning delay, billed. Knobs: `target` (share of capacity that counts as needed, which buys headroom
for the delay that the paper does not have) and `beta_scale`.
"""

from __future__ import annotations

import math

import numpy as np

from turboserve.sim.policies.fleet import Book, FleetPolicy

SLOT_S = 1.0
LEAST_BETA_S = 1.0
MOVES_PER_DECISION = 64


class Lcp(FleetPolicy):
    """Keeps, for every fleet size, the least cost of having ended the last slot with it, for both ways of
    paying."""

    name = "lcp"
    tuning = tuple({"target": t} for t in (0.5, 0.6, 0.7, 0.8, 0.9))

    def __init__(
        self, *, scaling: bool = True, target: float = 0.6, beta_scale: float = 1.0, provision_s: float = 30.0
    ) -> None:
        super().__init__(scaling=scaling)
        self.target = target
        self.beta = max(LEAST_BETA_S, beta_scale * provision_s) / SLOT_S
        self._next_slot_s = 0.0
        self._pay_up = np.zeros(1)
        self._pay_down = np.zeros(1)
        self._fleet = 0

    def wake_at_s(self, now_s: float) -> float:
        return self._next_slot_s

    def wanted(self, book: Book, now_s: float) -> tuple[int, str] | None:
        need = max(1, math.ceil(book.active_sessions / (book.view.profile.capacity * self.target)))
        if now_s < self._next_slot_s:
            # A slot is short, the need is not: growing waits for no slot.
            if need > max(self._fleet, book.size):
                self._fleet = need
                return need, f"LCP: {need} workers needed now"
            return None
        self._next_slot_s = now_s + SLOT_S
        low, high = self._bounds(need)
        self._fleet = min(max(self._fleet, low), high)
        return self._fleet, f"LCP: between {low} and {high}"

    def _bounds(self, need: int) -> tuple[int, int]:
        """Add a slot with this need to both programmes; answer (x_low, x_high)."""
        self._grow(2 * need + 2)
        sizes = np.arange(self._pay_up.size, dtype=float)
        # min over x' of cost(x') + beta * (x - x')^+ : from below a start is paid, from above nothing.
        from_below = np.minimum.accumulate(self._pay_up - self.beta * sizes) + self.beta * sizes
        from_above = np.minimum.accumulate(self._pay_up[::-1])[::-1]
        self._pay_up = np.minimum(from_below, from_above) + sizes
        # Mirrored: stops are paid, starts are free.
        from_above = np.minimum.accumulate((self._pay_down + self.beta * sizes)[::-1])[::-1] - self.beta * sizes
        from_below = np.minimum.accumulate(self._pay_down)
        self._pay_down = np.minimum(from_below, from_above) + sizes
        for cost in (self._pay_up, self._pay_down):
            cost[:need] = np.inf
            cost -= cost[need:].min()
        # The least minimiser when growing is paid, the largest when shrinking is.
        low = int(np.argmin(self._pay_up))
        high = int(np.flatnonzero(self._pay_down <= self._pay_down.min() + 1e-9)[-1])
        return low, max(low, high)

    def _grow(self, size: int) -> None:
        """Fleets never thought of so far: their cost is that of the largest known, plus what growing
        costs."""
        missing = size - self._pay_up.size
        if missing > 0:
            steps = np.arange(1, missing + 1)
            self._pay_up = np.append(self._pay_up, self._pay_up[-1] + self.beta * steps)
            self._pay_down = np.append(self._pay_down, np.full(missing, self._pay_down[-1]))

    def rebalance(self, book: Book, now_s: float) -> None:
        book.level(most_moves=MOVES_PER_DECISION)
