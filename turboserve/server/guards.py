"""What one connection may do in a while: floods are dropped and told, then closed; so are too many bad messages."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto

from turboserve.server.gateway_config import Limits
from turboserve.server.rates import Bucket

DROP_WINDOW_S = 10.0


class Verdict(Enum):
    TAKE = auto()
    DROP = auto()
    """Too fast: the message is not read."""
    CLOSE = auto()


@dataclass(slots=True)
class MessageGuard:
    """One socket's budget. An ack that moved the stream costs nothing: a chunk has paid for it."""

    limits: Limits
    _bucket: Bucket = field(init=False)
    _bad_s: deque[float] = field(default_factory=deque)
    _dropped_s: deque[float] = field(default_factory=deque)
    warned_s: float = -1e9

    def __post_init__(self) -> None:
        self._bucket = Bucket(self.limits.messages_per_s, self.limits.messages_burst)

    def message(self, now_s: float) -> Verdict:
        """Before a message is read."""
        if self._bucket.take(now_s) == 0:
            return Verdict.TAKE
        self._dropped_s.append(now_s)
        while self._dropped_s and self._dropped_s[0] < now_s - DROP_WINDOW_S:
            self._dropped_s.popleft()
        return Verdict.CLOSE if len(self._dropped_s) > self.limits.flood_drops else Verdict.DROP

    def refund(self) -> None:
        self._bucket.level = min(self._bucket.burst, self._bucket.level + 1)

    def warn(self, now_s: float) -> bool:
        """Whether to tell the viewer that messages are dropped: once a second at most."""
        if now_s - self.warned_s < 1.0:
            return False
        self.warned_s = now_s
        return True

    def bad(self, now_s: float) -> bool:
        """A message was wrong; True when that was one too many."""
        self._bad_s.append(now_s)
        while self._bad_s and self._bad_s[0] < now_s - 60:
            self._bad_s.popleft()
        return len(self._bad_s) >= self.limits.bad_messages_per_min
