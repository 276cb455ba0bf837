"""Which recovery points leave host memory for the disk, and which leave the disk, where there is no room for all.

A point is worth what it saves: the chance that its session comes back soon, times the seconds that its viewer would
wait longer without it. Gaps between visits are heavy-tailed, so the chance falls with the time idle, about as 1 / idle
(residency.py suspends by the same rule). Without its copy in host memory a point is read from disk; without its file
all chunks are made again from the input log. What is short is bytes, so the least worth per byte goes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

HIGH_SHARE = 0.85  # of a partition: above it points go to disk ...
LOW_SHARE = 0.7  # ... until this is left, so that not every new point has to wait for one to go
IDLE_MIN_S = 1.0
READ_S = 0.005  # to open a file and verify it, whatever its size
READ_BYTES_PER_S = 500e6  # a plain disk; only sizes of points relative to each other matter here


@dataclass(frozen=True, slots=True)
class Partition:
    """A part of the arena; one worker writes there."""

    total_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class StoredPoint:
    """A suspended session's point. `lost_s`: what its viewer would wait longer if it went from where it lies;
    `by_partition`: bytes of it in each partition, empty for one that lies on disk."""

    session: str
    bytes_: int
    idle_s: float
    lost_s: float
    by_partition: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """A session whose point goes, and why."""

    session: str
    reason: str


def read_back_s(bytes_: int) -> float:
    """What reading a point from disk is reckoned to take."""
    return READ_S + bytes_ / READ_BYTES_PER_S


def worth(point: StoredPoint, freed_bytes: int) -> float:
    """Seconds saved by keeping it, times the chance that they are wanted in the next second, per byte freed."""
    return point.lost_s / (max(IDLE_MIN_S, point.idle_s) * max(1, freed_bytes))


def short_of(partition: Partition, room_bytes: int) -> int:
    """Bytes that should leave a partition; 0 while it is below its high mark and has room for one more point."""
    total, used = partition.total_bytes, partition.used_bytes
    if used <= HIGH_SHARE * total and total - used >= room_bytes:
        return 0
    return max(0, used - int(LOW_SHARE * total), min(used, room_bytes - (total - used)))


def choose_spills(
    partitions: Sequence[Partition], points: Sequence[StoredPoint], *, room_bytes: int, at_most: int
) -> list[Choice]:
    """Points that go to disk, least worth first, until every partition is below its low mark and has `room_bytes` free.

    A partition from which nothing more can go stays as it is: what lies there belongs to sessions that run.
    """
    short = {number: need for number, one in enumerate(partitions) if (need := short_of(one, room_bytes)) > 0}
    waiting = list(points)
    chosen: list[Choice] = []
    while short and len(chosen) < at_most:
        # Counted anew each time: bytes in a partition that has room by now are no gain.
        gains = [(sum(one.by_partition.get(number, 0) for number in short), one) for one in waiting]
        useful = [(worth(one, gain), one.session, one) for gain, one in gains if gain > 0]
        if not useful:
            break
        _, _, point = min(useful, key=lambda one: one[:2])
        waiting.remove(point)
        number = max(short, key=lambda one: (point.by_partition.get(one, 0), -one))
        full = partitions[number].used_bytes / max(1, partitions[number].total_bytes)
        chosen.append(
            Choice(
                point.session,
                f"partition {number} of the arena is {full:.0%} full; idle {point.idle_s:.0f} s, {point.bytes_} B",
            )
        )
        short = {
            number: left for number, need in short.items() if (left := need - point.by_partition.get(number, 0)) > 0
        }
    return chosen


def choose_evictions(files: Sequence[StoredPoint], incoming: StoredPoint, *, need_bytes: int) -> list[Choice]:
    """Files that make room on disk for `incoming`, least worth first; none where that would cost more than it saves.

    `lost_s` of all of them is the time to make their chunks again.
    """
    limit = worth(incoming, incoming.bytes_)
    chosen: list[Choice] = []
    for point in sorted(files, key=lambda one: (worth(one, one.bytes_), one.session)):
        if need_bytes <= 0 or worth(point, point.bytes_) >= limit:
            break
        need_bytes -= point.bytes_
        chosen.append(
            Choice(
                point.session,
                f"the disk is full; idle {point.idle_s:.0f} s, {point.bytes_} B, "
                f"about {point.lost_s:.1f} s to make again from the input log",
            )
        )
    return chosen if need_bytes <= 0 else []
