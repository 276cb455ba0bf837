"""The last minutes second by second: chunks on time and late, their latency, sessions and workers. For plots.

A server's metrics belong into Prometheus; this is the little that the operations page and `top` show without one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SECONDS_KEPT = 600
LATENCIES_PER_S = 512
"""Of more chunks in one second the first so many are looked at."""
FIELDS = (
    "time_s",
    "on_time",
    "late",
    "latency_p50_ms",
    "latency_p95_ms",
    "latency_max_ms",
    "active",
    "queued",
    "suspended",
    "workers",
)


@dataclass(slots=True)
class History:
    """Fed with every observation of the gateway's logic, closed once a second."""

    _rows: deque[tuple[float | None, ...]] = field(default_factory=lambda: deque(maxlen=SECONDS_KEPT))
    _on_time: int = 0
    _late: int = 0
    _latencies_s: list[float] = field(default_factory=list)

    def measure(self, name: str, value: float) -> None:
        if name == "chunk_on_time":
            self._on_time += 1
        elif name == "chunk_late":
            self._late += 1
        elif name == "chunk_latency" and len(self._latencies_s) < LATENCIES_PER_S:
            self._latencies_s.append(value)

    def close_second(self, unix_s: float, states: Mapping[str, int], ready_workers: int) -> None:
        """Put what came since the last call into one row."""
        ordered = sorted(self._latencies_s)
        self._rows.append(
            (
                round(unix_s, 1),
                self._on_time,
                self._late,
                _at_ms(ordered, 0.5),
                _at_ms(ordered, 0.95),
                _at_ms(ordered, 1.0),
                states.get("active", 0),
                states.get("queued", 0),
                states.get("suspended", 0),
                ready_workers,
            )
        )
        self._on_time = self._late = 0
        self._latencies_s = []

    def columns(self, seconds: int = SECONDS_KEPT) -> dict[str, list[Any]]:
        """The newest `seconds` rows as columns; a second without a chunk has None for its latencies."""
        rows = list(self._rows)[-max(0, seconds) :] if seconds > 0 else []
        return {name: [row[place] for row in rows] for place, name in enumerate(FIELDS)}

    def on_time_share(self, seconds: int) -> float | None:
        """Of the live chunks of the newest `seconds`; None when there were none."""
        rows = list(self._rows)[-seconds:]
        good, bad = sum(row[1] or 0 for row in rows), sum(row[2] or 0 for row in rows)
        return good / (good + bad) if good + bad else None


def _at_ms(ordered_s: list[float], share: float) -> float | None:
    if not ordered_s:
        return None
    return round(1e3 * ordered_s[min(len(ordered_s) - 1, int(share * len(ordered_s)))], 1)
