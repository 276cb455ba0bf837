"""What a decision answers: a list of actions, each with its reason, and when it wants to be asked again.

Actions name sessions and workers by id, so that a recorded plan reads alone and a row reused meanwhile cannot be hit
by mistake. Whoever carries a plan out does so in order; an action that no longer fits (the session closed, the worker
was lost) is dropped and logged, and the next tick sees what really happened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Place:
    """A session without state anywhere starts on `worker`, at once and free of cost."""

    session: str
    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Migrate:
    """Move a held session from `source` to `worker` as soon as the chunk in work has ended."""

    session: str
    source: str
    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Suspend:
    """Move a held session from `worker` to host memory. An active one then waits for a Resume."""

    session: str
    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Resume:
    """Bring a session from host memory to `worker`."""

    session: str
    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class AddWorker:
    """Ask for `count` more workers, in whole provisioning units; billed from now, ready provision_s later."""

    count: int
    reason: str


@dataclass(frozen=True, slots=True)
class DrainWorker:
    """The worker takes nothing new from now on; it keeps running what it holds until that has been moved away."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class UndrainWorker:
    """Demand came back before the drain was over: the worker takes sessions again."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReleaseWorker:
    """Give an empty (or still starting) worker back; the bill ends. All workers of a unit must go in one plan."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class SetSteps:
    """From its next chunk on the session is made with `steps` denoise steps."""

    session: str
    steps: int
    reason: str


@dataclass(frozen=True, slots=True)
class Queue:
    """The session has to wait; said once when the wait begins."""

    session: str
    reason: str


@dataclass(frozen=True, slots=True)
class Shed:
    """Give up the `chunks` next chunks of the session's active period (all that are left when None)."""

    session: str
    reason: str
    chunks: int | None = None


Action: TypeAlias = (
    Place
    | Migrate
    | Suspend
    | Resume
    | AddWorker
    | DrainWorker
    | UndrainWorker
    | ReleaseWorker
    | SetSteps
    | Queue
    | Shed
)


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer of one tick. `wake_at_s` = ask again then, event or not; None = only at the next event."""

    actions: tuple[Action, ...] = ()
    wake_at_s: float | None = None


class Cluster(Protocol):
    """Whoever can carry out a plan: the live control loop or the simulator."""

    def apply(self, plan: Plan, now_s: float) -> None: ...
