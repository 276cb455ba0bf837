"""Static round robin: a fixed fleet, each arrival to the next worker in rotation, sticky for life.

Source: the first baseline of TurboServe (arXiv 2606.19271), fixed GPU count with round robin on its serving
base.
"""

from __future__ import annotations

from turboserve.orchestrator.view import ClusterView, Ints
from turboserve.sim.policies.base import HomePlacer


class StaticRoundRobin(HomePlacer):
    """The rotation goes on over the workers that are ready; a lost one is skipped."""

    name = "static-rr"
    scales = False

    def __init__(self) -> None:
        super().__init__()
        self._turn = 0

    def home_of(self, view: ClusterView, row: int, ready: Ints) -> int:
        chosen = int(ready[self._turn % ready.size])
        self._turn += 1
        return chosen
