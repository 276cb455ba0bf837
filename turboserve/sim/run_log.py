"""What happened in a run, for its files: decisions, bills, chunks given up, actions that did not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from turboserve.sim.events import US


@dataclass(slots=True)
class Bill:
    """One worker's time, from its request to its release."""

    worker: str
    request_us: int
    release_us: int | None = None


@dataclass(frozen=True, slots=True)
class ShedChunk:
    """A chunk given up: when it was, and when it was (or would have been) released."""

    session: str
    index: int
    period: int
    time_us: int
    reason: str
    release_us: int


@dataclass(slots=True)
class Log:
    """What happened, for the files of the run."""

    decisions: list[dict[str, Any]] = field(default_factory=list)
    shed: list[ShedChunk] = field(default_factory=list)
    bills: list[Bill] = field(default_factory=list)
    worker_names: list[str] = field(default_factory=list)
    dropped_actions: dict[str, int] = field(default_factory=dict)

    def decide(self, now_us: int, event: str, reason: str, **who: Any) -> None:
        self.decisions.append({"time_s": now_us / US, "event": event, **who, "reason": reason})

    def drop(self, action: Any) -> None:
        """An action that did not fit what is."""
        name = type(action).__name__
        self.dropped_actions[name] = self.dropped_actions.get(name, 0) + 1
