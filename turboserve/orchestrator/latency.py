"""The measured latency profile of one (model, size, steps, device): how long a batch of n chunks takes.

The JSON is what `turboserve calibrate` writes; field names and units are those of the file. Derived profiles (from a
roofline, not a measurement) say so in `about`.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from turboserve.errors import ConfigError

TOLERANCE_S = 2e-6  # times in files carry six decimals


@dataclass(frozen=True, slots=True)
class LatencyProfile:
    """`batch_latency_s[n - 1]` is the time of a batch of n full-step chunks; larger n than the table is forbidden."""

    name: str
    chunk_s: float  # video seconds per chunk
    chunk_target_s: float  # the latency bound that `capacity` meets at full steps
    batch_latency_s: tuple[float, ...]
    capacity: int
    resident_max: int  # sessions a worker can hold, active and idle
    denoise_steps: int
    denoise_steps_floor: int
    step_latency_share: float  # share of a chunk's time that shrinks with its denoise steps
    state_bytes: float = 0.0
    offload_s: float = 0.0
    resume_s: float = 0.0
    migrate_s: float = 0.0
    migrate_cross_node_s: float = 0.0
    provision_s: float = 0.0
    release_s: float = 0.0
    provision_unit_workers: int = 1
    gpu_count: int = 1  # GPUs of the worker that was measured
    price_per_worker_hour: float = 1.0
    about: str = ""

    def __post_init__(self) -> None:
        table = self.batch_latency_s
        if not table or any(t <= 0 for t in table) or any(b < a for a, b in pairwise(table)):
            raise ConfigError(
                f"profile {self.name}: batch_latency_s must be positive and not decreasing",
                hint="calibrate writes it isotonic; run `turboserve calibrate` again",
            )
        if not 1 <= self.capacity <= len(table):
            raise ConfigError(f"profile {self.name}: capacity {self.capacity}", expected=f"1..{len(table)}")
        if not 1 <= self.denoise_steps_floor <= self.denoise_steps:
            raise ConfigError(f"profile {self.name}: denoise_steps_floor", expected=f"1..{self.denoise_steps}")
        if self.resident_max < self.capacity:
            raise ConfigError(f"profile {self.name}: resident_max", expected=f"at least capacity ({self.capacity})")

    @property
    def batch_max(self) -> int:
        return len(self.batch_latency_s)

    def step_factor(self, steps: int) -> float:
        """Time of a chunk with `steps` denoise steps over one with all of them."""
        return 1.0 - self.step_latency_share * (1.0 - steps / self.denoise_steps)

    def batch_latency(self, n: int, steps: int | None = None) -> float:
        """Seconds for a batch of n chunks, the one with the most denoise steps having `steps` (None: full)."""
        if not 1 <= n <= len(self.batch_latency_s):
            raise ConfigError(f"profile {self.name}: batch of {n}", expected=f"1..{len(self.batch_latency_s)}")
        full = self.batch_latency_s[n - 1]
        return full if steps is None else full * self.step_factor(steps)

    def load_latency(self, load: float) -> float:
        """Predicted latency under a load that need not be whole (unequal sessions); straight lines between entries.

        Load 0 takes no time; past the table the last slope goes on, so that comparing overfull workers still works.
        """
        table = self.batch_latency_s
        if load <= 0:
            return 0.0
        if load <= 1:
            return table[0] * load if load < 1 else table[0]
        below = int(load)
        if below >= len(table):
            slope = table[-1] - table[-2] if len(table) > 1 else table[0]
            return table[-1] + (load - len(table)) * max(slope, 1e-9)
        return table[below - 1] + (load - below) * (table[below] - table[below - 1])

    def capacity_at(self, steps: int) -> int:
        """Most sessions that keep pace (one chunk per chunk_target_s) with `steps` denoise steps."""
        bound = self.chunk_target_s / self.step_factor(steps) + TOLERANCE_S
        return max(1, bisect_right(self.batch_latency_s, bound))


_FIELDS = {f.name for f in dataclasses.fields(LatencyProfile)}
_REQUIRED = {f.name for f in dataclasses.fields(LatencyProfile) if f.default is dataclasses.MISSING}


def profile_from_dict(data: dict[str, Any], source: str) -> LatencyProfile:
    """A profile from parsed JSON; fields we do not know (provenance, confidence) are ignored, missing ones an error."""
    missing = sorted(_REQUIRED - data.keys())
    if missing:
        raise ConfigError(
            f"{source}: latency profile lacks {', '.join(missing)}",
            hint="`turboserve calibrate` writes them; sim/profiles has examples",
        )
    known = {k: v for k, v in data.items() if k in _FIELDS}
    known["batch_latency_s"] = tuple(float(x) for x in data["batch_latency_s"])
    return LatencyProfile(**known)
