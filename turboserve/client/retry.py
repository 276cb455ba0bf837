"""When to try again: bounded, growing, jittered, and counted afresh after progress."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from turboserve.client.failures import Resumable


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """At most `attempts` in a row and `window_s` seconds without a chunk; waits are drawn from [0, bound],
    the bound doubling from `first_s` to `longest_s`, so that many viewers of a restarted server spread out."""

    attempts: int = 12
    window_s: float = 90.0
    first_s: float = 0.2
    longest_s: float = 8.0


@dataclass(slots=True)
class Retries:
    """The attempts of one outage."""

    policy: RetryPolicy = field(default_factory=RetryPolicy)
    rng: random.Random = field(default_factory=random.Random)
    count: int = 0
    since_s: float | None = None

    def progress(self) -> None:
        """A chunk came: the outage is over."""
        self.count = 0
        self.since_s = None

    def next_wait_s(self, lost: Resumable, now_s: float) -> float | None:
        """Seconds to wait before the next attempt, or None when enough has been tried."""
        self.since_s = now_s if self.since_s is None else self.since_s
        if self.count >= self.policy.attempts or now_s - self.since_s > self.policy.window_s:
            return None
        bound = min(self.policy.first_s * 2.0**self.count, self.policy.longest_s)
        self.count += 1
        jitter = self.rng.uniform(0.0, bound)
        if lost.wait_s is not None:
            return min(lost.wait_s, self.policy.window_s) + jitter
        if lost.at_once and self.count == 1:
            return self.rng.uniform(0.0, self.policy.first_s / 2)
        return jitter
