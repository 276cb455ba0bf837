"""Session states, the table of moves between them, and what the public sees.

The internal states follow one session through placement, offload, migration and recovery; the connection of
its viewer is an axis of its own. Everything the table does not list is a rejected command (`IllegalTransition`),
never an assertion.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from enum import StrEnum

from turboserve.errors import IllegalTransition

ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
ID_LENGTH = 26


def new_session_id() -> str:
    """128 random bits (and two to spare) as 26 characters of [a-z2-7]."""
    return "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH))


class SessionState(StrEnum):
    QUEUED = "queued"
    LOADING = "loading"
    RUNNING = "running"
    STALLED = "stalled"  # owned by a worker, but no credit: paused, not attached, or the viewer lags
    OFFLOADING = "offloading"
    HOST = "host"
    SPILLING = "spilling"
    DISK = "disk"
    RESUMING = "resuming"
    PRECOPY = "precopy"
    HANDOVER = "handover"
    RECOVERING = "recovering"
    CLOSING = "closing"
    CLOSED = "closed"
    FAILED = "failed"


class PublicState(StrEnum):
    QUEUED = "queued"
    ACTIVE = "active"
    IDLE = "idle"
    SUSPENDED = "suspended"
    MIGRATING = "migrating"
    RECOVERING = "recovering"
    CLOSED = "closed"
    FAILED = "failed"


class Connection(StrEnum):
    DETACHED = "detached"
    ATTACHED = "attached"
    EXPIRED = "expired"


_S = SessionState

TERMINAL = frozenset({_S.CLOSED, _S.FAILED})
OWNED = frozenset({_S.LOADING, _S.RUNNING, _S.STALLED, _S.OFFLOADING, _S.RESUMING, _S.PRECOPY, _S.HANDOVER})

_MOVES: dict[SessionState, frozenset[SessionState]] = {
    _S.QUEUED: frozenset({_S.LOADING, _S.CLOSING, _S.FAILED}),
    _S.LOADING: frozenset({_S.RUNNING, _S.STALLED, _S.QUEUED, _S.RECOVERING, _S.CLOSING, _S.FAILED}),
    _S.RUNNING: frozenset({_S.STALLED, _S.OFFLOADING, _S.PRECOPY, _S.RECOVERING, _S.CLOSING, _S.FAILED}),
    _S.STALLED: frozenset({_S.RUNNING, _S.OFFLOADING, _S.PRECOPY, _S.RECOVERING, _S.CLOSING, _S.FAILED}),
    _S.OFFLOADING: frozenset({_S.HOST, _S.RUNNING, _S.STALLED, _S.RECOVERING, _S.CLOSING, _S.FAILED}),
    _S.HOST: frozenset({_S.SPILLING, _S.RESUMING, _S.RECOVERING, _S.CLOSING, _S.FAILED}),
    _S.SPILLING: frozenset({_S.DISK, _S.HOST, _S.RECOVERING, _S.CLOSING, _S.FAILED}),
    _S.DISK: frozenset({_S.HOST, _S.RESUMING, _S.RECOVERING, _S.CLOSING, _S.FAILED}),
    _S.RESUMING: frozenset({_S.RUNNING, _S.STALLED, _S.HOST, _S.DISK, _S.RECOVERING, _S.CLOSING, _S.FAILED}),
    _S.PRECOPY: frozenset({_S.HANDOVER, _S.RUNNING, _S.STALLED, _S.RECOVERING, _S.CLOSING, _S.FAILED}),
    _S.HANDOVER: frozenset({_S.RUNNING, _S.STALLED, _S.RECOVERING, _S.CLOSING, _S.FAILED}),
    _S.RECOVERING: frozenset({_S.RUNNING, _S.STALLED, _S.HOST, _S.DISK, _S.LOADING, _S.CLOSING, _S.FAILED}),
    _S.CLOSING: frozenset({_S.CLOSED}),
    _S.CLOSED: frozenset(),
    _S.FAILED: frozenset(),
}

_PUBLIC: dict[SessionState, PublicState] = {
    _S.QUEUED: PublicState.QUEUED,
    _S.LOADING: PublicState.ACTIVE,
    _S.RUNNING: PublicState.ACTIVE,
    _S.STALLED: PublicState.IDLE,
    _S.OFFLOADING: PublicState.SUSPENDED,
    _S.HOST: PublicState.SUSPENDED,
    _S.SPILLING: PublicState.SUSPENDED,
    _S.DISK: PublicState.SUSPENDED,
    _S.RESUMING: PublicState.SUSPENDED,
    _S.PRECOPY: PublicState.MIGRATING,
    _S.HANDOVER: PublicState.MIGRATING,
    _S.RECOVERING: PublicState.RECOVERING,
    _S.CLOSING: PublicState.CLOSED,
    _S.CLOSED: PublicState.CLOSED,
    _S.FAILED: PublicState.FAILED,
}


def legal_moves(state: SessionState) -> frozenset[SessionState]:
    """States that `state` may change to."""
    return _MOVES[state]


def public_state(state: SessionState) -> PublicState:
    """The one of the eight public states that stands for an internal one."""
    return _PUBLIC[state]


@dataclass(slots=True)
class SessionRecord:
    """What the directory knows of one session. Only the controller writes it.

    `epoch` grows with every change of owner and fences whoever owned the session before.
    """

    session_id: str
    tenant: str
    model: str
    seed: int
    created_s: float
    width: int
    height: int
    steps: int
    state: SessionState = SessionState.QUEUED
    epoch: int = 0
    owner: str | None = None
    reason: str = ""
    strikes: int = 0
    history: list[SessionState] = field(default_factory=list)

    def move(self, to: SessionState, reason: str = "") -> None:
        """Change the state or raise IllegalTransition; the last 32 states are kept for `explain`."""
        if to is self.state:
            return
        if to not in _MOVES[self.state]:
            raise IllegalTransition(
                f"session {self.session_id} is {self.state}; it cannot become {to}",
                expected=f"one of {sorted(_MOVES[self.state])}" if _MOVES[self.state] else "no change",
            )
        self.history.append(self.state)
        del self.history[:-32]
        self.state = to
        self.reason = reason

    def own(self, worker: str) -> int:
        """Give the session to `worker` under a new epoch; the epoch is returned."""
        self.owner = worker
        self.epoch += 1
        return self.epoch
