"""How many chunks of live pace viewers got, for the controller: totals since this gateway started, told now and then.

A session of free pace takes what room there is: its chunks say nothing of the load that must be met or the service.
"""

from __future__ import annotations

from turboserve.runtime import messages

DELIVERED_S = 0.5
"""The controller is told at most so often."""


class Delivered:
    """Counts of accepted chunks. `wake_s` is when a change that was not told yet is due to be told."""

    def __init__(self) -> None:
        self.chunks = self.reduced = self.late = 0
        self.wake_s: float | None = None
        self._changed = False
        self._next_s = 0.0

    def count(self, *, reduced: bool, late: bool) -> None:
        self.chunks += 1
        self.reduced += reduced
        self.late += late
        self._changed = True

    def connected(self) -> None:
        """A controller is there (again): it counts from what it hears first."""
        self._changed, self._next_s, self.wake_s = True, 0.0, None

    def take(self, now_s: float) -> messages.ChunksDelivered | None:
        """What to tell now, if anything."""
        if not self._changed:
            return None
        if now_s < self._next_s:
            self.wake_s = self._next_s
            return None
        self._changed, self._next_s, self.wake_s = False, now_s + DELIVERED_S, None
        return messages.ChunksDelivered(chunks=self.chunks, reduced=self.reduced, late=self.late)
