"""Static by memory: a fixed fleet, each arrival to the worker with the most free memory, sticky for life.

Source: the third baseline of TurboServe (arXiv 2606.19271), greedy placement by GPU memory. Memory counts
every state a worker holds, idle sessions too; that is where it differs from counting load.
"""

from __future__ import annotations

import numpy as np

from turboserve.orchestrator.view import GONE, HOST, ClusterView, Ints
from turboserve.sim.policies.base import HomePlacer


class StaticMemory(HomePlacer):
    """Bytes held on each worker, plus the bytes of suspended sessions that will come home there."""

    name = "static-memory"
    scales = False

    def home_of(self, view: ClusterView, row: int, ready: Ints) -> int:
        s = view.sessions
        state, home = s.state[: s.count], self._home_row[: s.count]
        # Homes given in this very plan are in `home` already: two arrivals at once do not pick the same
        # worker.
        where = np.where(s.worker[: s.count] >= 0, s.worker[: s.count], home)
        counted = (state != GONE) & (state != HOST) & (where >= 0)
        used = np.bincount(where[counted], weights=s.state_bytes[: s.count][counted], minlength=view.workers.count)
        return int(ready[np.lexsort((ready, used[ready]))[0]])
