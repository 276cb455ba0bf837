"""Which ready segments share the next pass. Engine and simulator both ask this one function.

Two kinds of batch, told apart by the cost model alone:

- **Pass batching** (our engine). A segment is one session's part of one packed forward: a denoise step, a context
  pass, a recache. `PassCost` is measured: t(pass) = base_s + sum of the segments' own times. Sessions join at any pass.
  Batching is not taken on faith: where packing saves nothing (base_s about 0, compute-bound passes) the segments run
  one by one in deadline order, because sharing would only delay the most urgent one; where it does save, a segment
  stays out of the pass if it would push a chunk past its deadline that makes it otherwise.
- **Chunk batching** (the paper, and the simulator's default, which an auditor can check). A segment is a whole chunk
  and a free worker starts one batch of all that are ready, at most the profile's table, earliest deadline first.
  `ChunkCost` says `pack_all`.

`pick` is the decision over plain sequences, written so that numba can compile it; `choose_batch` is the same decision
over segments by name. Nothing here keeps state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from turboserve.orchestrator.latency import LatencyProfile

GAIN_MIN = 0.02  # packing must save this share of a segment's own pass, else it is noise of the measurement


@dataclass(frozen=True, slots=True)
class ReadySegment:
    """One session's part of the next pass, ready to run.

    `deadline_s`: when its chunk has to be finished. `remaining_passes`: passes until then, this one included.
    """

    session: str
    kind: str
    tokens: int
    deadline_s: float
    remaining_passes: int = 1


class CostModel(Protocol):
    """Predicted seconds: a pass costs `base_s` plus each segment's own time."""

    @property
    def base_s(self) -> float: ...
    @property
    def segment_max(self) -> int: ...
    @property
    def pack_all(self) -> bool: ...
    def segment_s(self, segment: ReadySegment) -> float: ...


@dataclass(frozen=True, slots=True)
class PassCost:
    """Measured cost of packed passes: launch overhead plus a time per token that depends on the segment's kind.

    `fixed_s` is time a segment of that kind takes whatever its tokens (attention over its own pages, per-session work).
    """

    base_s: float
    token_s: Mapping[str, float]
    fixed_s: Mapping[str, float] = field(default_factory=dict)
    segment_max: int = 16
    pack_all: bool = False

    def segment_s(self, segment: ReadySegment) -> float:
        """A kind not measured yet is taken at the dearest known rate."""
        rate = self.token_s.get(segment.kind)
        if rate is None:
            rate = max(self.token_s.values(), default=0.0)
        return self.fixed_s.get(segment.kind, 0.0) + rate * segment.tokens


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """Whole chunks from a latency profile: every ready chunk joins, at most one per entry of the table."""

    profile: LatencyProfile
    pack_all: bool = True

    @property
    def base_s(self) -> float:
        return linear_cost(self.profile)[0]

    @property
    def segment_max(self) -> int:
        return self.profile.batch_max

    def segment_s(self, segment: ReadySegment) -> float:
        return linear_cost(self.profile)[1]


def linear_cost(profile: LatencyProfile) -> tuple[float, float]:
    """(base_s, segment_s) of the straight line through the table's entries 1 and capacity."""
    table = profile.batch_latency_s
    last = max(profile.capacity, min(2, len(table)))
    if last == 1:
        return 0.0, table[0]
    slope = (table[last - 1] - table[0]) / (last - 1)
    return max(0.0, table[0] - slope), slope


def choose_batch(ready: Sequence[ReadySegment], now_s: float, cost: CostModel) -> list[int]:
    """Indices of the segments that run in the next pass, most urgent first; empty only if nothing is ready.

    Ties in the deadline fall to the session id, so equal inputs give equal batches.
    """
    order = sorted(range(len(ready)), key=lambda i: (ready[i].deadline_s, ready[i].session))
    count = pick(
        [ready[i].deadline_s for i in order],
        [cost.segment_s(ready[i]) for i in order],
        [ready[i].remaining_passes for i in order],
        [True] * len(order),
        now_s,
        cost.base_s,
        cost.segment_max,
        cost.pack_all,
        chosen := [False] * len(order),
    )
    batch = [i for i, taken in zip(order, chosen, strict=True) if taken]
    assert len(batch) == count
    return batch


def pick(
    deadline_s: Any,
    segment_s: Any,
    remaining: Any,
    eligible: Any,
    now_s: float,
    base_s: float,
    segment_max: int,
    pack_all: bool,
    chosen: Any,
) -> int:
    """Mark in `chosen` which segments (sorted by urgency) share the next pass; returns how many.

    The most urgent always runs. Another one joins when packing saves time and nobody who is in time without it, at the
    pace of such passes, would be late with it. A session that is late either way holds nobody back.
    """
    count = 0
    total_s = base_s
    for i in range(len(deadline_s)):
        if count == segment_max:
            break
        if not eligible[i]:
            continue
        if count > 0 and not pack_all:
            if base_s <= GAIN_MIN * (base_s + segment_s[i]):
                break  # no gain for this one; the later ones are no more urgent
            harmful = False
            for k in range(i):
                if not chosen[k]:
                    continue
                in_time = now_s + remaining[k] * total_s <= deadline_s[k]
                if in_time and now_s + remaining[k] * (total_s + segment_s[i]) > deadline_s[k]:
                    harmful = True
                    break
            if harmful:
                continue
        chosen[i] = True
        count += 1
        total_s += segment_s[i]
    return count
