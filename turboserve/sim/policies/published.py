"""The rule of the TurboServe paper, as far as it is known.

Source: arXiv 2606.19271 and notes on its released code (June to August 2026). Known: placement of a waiting
session on the worker that gives the smallest bottleneck, ties to the lighter one; rebalancing by single
moves off the slowest worker while gain = L - L' - eta * kappa is positive; capacity target ceil(active / (K
* rho)) with rho 0.9; scale-out at once, scale-in after a hold of 5 s that resets when demand returns,
consolidating first; idle sessions are offloaded; released defaults eta 0, least gain 5 ms, 12 moves a
cycle. Not known, so not here: the table that maps volatility to (lambda, rho), and how the provisioning
delay is treated. Knob: rho (0.9 as released).

The single-move rule stalls on ties: with loads (4, 4, 1, 1) no one move lowers the bottleneck.
"""

from __future__ import annotations

import math

import numpy as np

from turboserve.sim.policies.fleet import Book, FleetPolicy

HOLD_S = 5.0
LEAST_GAIN_S = 0.005
MOVES_PER_CYCLE = 12


class Published(FleetPolicy):
    """`eta` weighs the seconds that a move takes against the seconds by which it lowers the bottleneck."""

    name = "published"
    tuning = tuple({"rho": r} for r in (0.5, 0.6, 0.7, 0.8, 0.9))

    def __init__(self, *, scaling: bool = True, rho: float = 0.9, eta: float = 0.0) -> None:
        super().__init__(scaling=scaling)
        self.rho, self.eta = rho, eta
        self._surplus_since_s: float | None = None

    def wake_at_s(self, now_s: float) -> float | None:
        return None if self._surplus_since_s is None else self._surplus_since_s + HOLD_S

    def wanted(self, book: Book, now_s: float) -> tuple[int, str] | None:
        active = book.active_sessions
        target = max(1, math.ceil(active / (book.view.profile.capacity * self.rho)))
        if target >= book.size:
            self._surplus_since_s = None
            return (target, f"{active} active at rho {self.rho:.2f}") if target > book.size else None
        if self._surplus_since_s is None:
            self._surplus_since_s = now_s
        if now_s - self._surplus_since_s < HOLD_S - 1e-9:
            return None
        self._surplus_since_s = None
        return target, f"{active} active at rho {self.rho:.2f}, held {HOLD_S:.0f} s"

    def rebalance(self, book: Book, now_s: float) -> None:
        profile = book.view.profile
        kappa_s = profile.migrate_s
        for _ in range(MOVES_PER_CYCLE):
            ready = book.ready()
            if ready.size < 2:
                return
            loads = book.load[ready]
            fullest = int(ready[loads.argmax()])
            load = int(book.load[fullest])
            if np.count_nonzero(loads == load) > 1:
                return  # another worker as full keeps the bottleneck where it is, whatever moves
            others = ready[ready != fullest]
            takers = others[~book.inbound[others] & (book.held[others] < profile.resident_max)]
            if takers.size == 0 or load == 0 or book.outbound[fullest]:
                return
            target = book.lightest(takers)
            after = max(load - 1, int(book.load[others].max()), int(book.load[target]) + 1)
            gain_s = profile.load_latency(load) - profile.load_latency(after) - self.eta * kappa_s
            rows = book.movable(fullest)
            if gain_s < LEAST_GAIN_S or rows.size == 0:
                return
            book.migrate(int(rows[0]), target, f"bottleneck {load} -> {after}, gain {1000 * gain_s:.0f} ms")
