"""How often something may happen, per key: token buckets on a clock that is passed in."""

from __future__ import annotations

from dataclasses import dataclass, field

KEYS_MAX = 10_000


@dataclass(slots=True)
class Bucket:
    """Up to `burst` at once, `rate_per_s` in the long run."""

    rate_per_s: float
    burst: float
    level: float = -1.0
    at_s: float = 0.0

    def take(self, now_s: float) -> float:
        """0 and one token less, or how long to wait until there is one."""
        if self.level < 0:
            self.level, self.at_s = self.burst, now_s
        self.level = min(self.burst, self.level + max(0.0, now_s - self.at_s) * self.rate_per_s)
        self.at_s = now_s
        if self.level >= 1:
            self.level -= 1
            return 0.0
        return (1 - self.level) / self.rate_per_s


@dataclass(slots=True)
class Rates:
    """One bucket a key, of so many a minute. The key unused for longest goes first when there are too many."""

    _buckets: dict[str, Bucket] = field(default_factory=dict)

    def take(self, key: str, per_min: float, now_s: float) -> float:
        bucket = self._buckets.pop(key, None)
        if bucket is None:
            bucket = Bucket(per_min / 60, max(1.0, per_min))
            if len(self._buckets) >= KEYS_MAX:
                del self._buckets[next(iter(self._buckets))]
        self._buckets[key] = bucket
        return bucket.take(now_s)

    def forget(self, key: str) -> None:
        self._buckets.pop(key, None)
