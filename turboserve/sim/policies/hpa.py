"""Kubernetes' Horizontal Pod Autoscaler over the share of a worker's capacity in use.

Source: Kubernetes documentation, "Horizontal Pod Autoscaling", behaviour defaults of autoscaling/v2: sync
every 15 s; desired = ceil(current * metric / target); no change within a tolerance of 10%; scale-up at most
by the larger of 4 pods and 100% in 15 s, without stabilisation; scale-down to the highest recommendation of
the last 300 s. Pods that are not ready count as using nothing, which damps scale-up. Knob: the target
utilisation.
"""

from __future__ import annotations

import math
from collections import deque

from turboserve.sim.policies.fleet import Book, FleetPolicy

SYNC_S = 15.0
TOLERANCE = 0.1
STABILISATION_S = 300.0
UP_PODS = 4
UP_SHARE = 1.0


class Hpa(FleetPolicy):
    """Recommends at every sync; between syncs only sessions are placed."""

    name = "hpa"
    tuning = tuple({"target": t} for t in (0.5, 0.6, 0.7, 0.8, 0.9))

    def __init__(self, *, scaling: bool = True, target: float = 0.7) -> None:
        super().__init__(scaling=scaling)
        self.target = target
        self._next_sync_s = 0.0
        self._recommended: deque[tuple[float, int]] = deque()

    def wake_at_s(self, now_s: float) -> float:
        return self._next_sync_s

    def wanted(self, book: Book, now_s: float) -> tuple[int, str] | None:
        if now_s < self._next_sync_s:
            return None
        self._next_sync_s = now_s + SYNC_S
        current = max(1, book.size)
        used = book.active_sessions / (book.view.profile.capacity * current)
        ratio = used / self.target
        desired = current if abs(ratio - 1) <= TOLERANCE + 1e-9 else max(1, math.ceil(current * ratio))
        self._recommended.append((now_s, desired))
        while self._recommended[0][0] <= now_s - STABILISATION_S:
            self._recommended.popleft()
        if desired > current:
            desired = min(desired, max(current + UP_PODS, math.floor(current * (1 + UP_SHARE))))
        else:
            desired = min(current, max(n for _, n in self._recommended))
        return desired, f"HPA: {used:.2f} of capacity in use, target {self.target:.2f}"
