"""Where the logic puts its effects, and what waits for the log."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from turboserve.server.delivered import Delivered
from turboserve.server.effects import Append, Effect
from turboserve.server.log_records import Record

Continuation = Callable[[float], None]


class Outbox:
    """Effects of one event, in order. Records are counted as they are appended; `durable` runs what waited for them."""

    def __init__(self) -> None:
        self._effects: list[Effect] = []
        self._appended = 0
        self._waiting: deque[tuple[int, Continuation]] = deque()
        self.ended_sessions: list[tuple[str, str]] = []
        self._waking: list[Any] = []
        self.delivered = Delivered()

    def put(self, effect: Effect) -> None:
        self._effects.append(effect)

    def append(self, record: Record, then: Continuation | None = None) -> None:
        """Write a record; `then(now_s)` runs once it, and so everything before it, is on disk."""
        self._appended += 1
        self._effects.append(Append(record))
        if then is not None:
            self._waiting.append((self._appended, then))

    def durable(self, count: int, now_s: float) -> None:
        """The first `count` records are on disk."""
        while self._waiting and self._waiting[0][0] <= count:
            self._waiting.popleft()[1](now_s)

    def wakes(self, session: Any) -> None:
        """Something of the session is due at another time than before."""
        self._waking.append(session)

    def take_waiting(self) -> list[Any]:
        """Sessions whose next time to wake is to be looked up."""
        waking, self._waking = self._waking, []
        return waking

    def ended(self, sid: str, reason: str) -> None:
        self.ended_sessions.append((sid, reason))

    def take(self) -> list[Effect]:
        """All effects since the last call."""
        effects, self._effects = self._effects, []
        return effects
