"""When a chunk may begin and when it is late: the formulas of a live stream, nothing else.

A *period* starts when a viewer attaches or resumes. Within it chunk i (counted from the period's first chunk) may
begin at t0 + max(0, i - 1) * chunk_s, one chunk ahead of nominal time, and is on time when its frames are there by
t0 + 2.5 * chunk_target_s + i * chunk_s: the viewer's player starts 2.5 chunk targets after t0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

START_TARGETS = 2.5
"""The player's start buffer, in chunk targets."""


class Pace(StrEnum):
    LIVE = "live"
    FREE = "free"


@dataclass(frozen=True, slots=True)
class StreamClock:
    """A session's times: `chunk_s` at the playback rate in force, and the latency target of one chunk."""

    chunk_s: float
    chunk_target_s: float


@dataclass(frozen=True, slots=True)
class Period:
    """A stretch of a stream played in one go. `first_index` is the chunk that plays first."""

    start_s: float
    first_index: int
    pace: Pace

    def release_s(self, index: int, clock: StreamClock) -> float:
        """Earliest time at which chunk `index` may begin."""
        if self.pace is Pace.FREE:
            return self.start_s
        return self.start_s + max(0, index - self.first_index - 1) * clock.chunk_s

    def due_s(self, index: int, clock: StreamClock, now_s: float) -> float:
        """Latest time at which chunk `index`, begun now, is on time. Free pace has no player: a target from now."""
        if self.pace is Pace.FREE:
            return now_s + START_TARGETS * clock.chunk_target_s
        return self.start_s + START_TARGETS * clock.chunk_target_s + (index - self.first_index) * clock.chunk_s
