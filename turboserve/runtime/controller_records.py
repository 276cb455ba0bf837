"""What the controller keeps of workers and sessions, and what it asks of those around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from turboserve.runtime import messages as m
from turboserve.session import SessionRecord, SessionState

GATEWAY = "gateway"
LAUNCHER = "launcher"
OWNED_BY_GATEWAY = frozenset({SessionState.RUNNING, SessionState.STALLED, SessionState.PRECOPY})
"""In these the gateway may send credits to the owner."""


@dataclass(frozen=True, slots=True)
class Send:
    """Put `message` on the channel to `to`: a worker id, or GATEWAY."""

    to: str
    message: m.Message


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the channel to `to`."""

    to: str
    reason: str


@dataclass(frozen=True, slots=True)
class DropPoints:
    """The session has ended: what it left in the arena and on disk may go. Repeating it does no harm."""

    session_id: str
    to: str = ""


@dataclass(frozen=True, slots=True)
class Spill:
    """Put the session's newest recovery point on disk; `ControllerLogic.spilled` answers. The arena keeps it."""

    session_id: str
    to: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """Bring the session's recovery point from disk into the arena; `ControllerLogic.loaded` answers."""

    session_id: str
    to: str = ""


@dataclass(frozen=True, slots=True)
class DropHost:
    """The directory says that the session's point is on disk: the copy in the arena may go, if it is not newer."""

    session_id: str
    to: str = ""


@dataclass(frozen=True, slots=True)
class DropFile:
    """The session's point on disk is old, or there is no room for it."""

    session_id: str
    to: str = ""


Touch: TypeAlias = DropPoints | DropHost | DropFile | Spill | Load
Effect: TypeAlias = Send | Drop | Touch


@dataclass(slots=True)
class Worker:
    hello: m.WorkerHello
    row: int
    state: str
    lease_until_s: float
    stats: m.Heartbeat | None = None
    blamed: bool = True
    """If it goes now, one of its sessions may have done it; false once it was told to end."""
    closing: set[tuple[str, int]] = field(default_factory=set)
    """(session, epoch) that it was told to close and has not said to have released."""
    at_once: bool = False
    """It was told twice to end: what it suspends goes to disk."""
    suspend_at_s: float | None = None
    """Draining: what is still there then goes to host memory."""
    at_work: set[str] = field(default_factory=set)
    """Sessions that had a chunk in work here when it said so last."""


class Kind(StrEnum):
    """What a session's move is for."""

    PLACE = "place"
    RESUME = "resume"
    RECOVER = "recover"
    MIGRATE = "migrate"
    SUSPEND = "suspend"
    ABORT = "abort"
    KEEP = "keep"
    """Only its point is brought to another node: nobody watches it, and the node where the point lies goes."""


class Phase(StrEnum):
    """Whose answer a move waits for."""

    PREPARE = "prepare"  # the target's SessionPrepared
    AHEAD = "ahead"  # to another node: the source's PointSent
    HANDOVER = "handover"  # the source's HandedOver
    SUSPEND = "suspend"  # the owner's SessionSuspended
    OPEN = "open"  # the owner's SessionOpened


@dataclass(slots=True)
class Move:
    """A session between two states of rest. `source` holds its state now, `target` is to have it; "" where none."""

    kind: Kind
    phase: Phase
    id: int
    source: str
    target: str
    began_s: float
    deadline_s: float
    source_epoch: int = 0
    reason: str = ""
    tier: str = "host"
    carried: bool = False
    """Its point goes from the source's node to the target's."""
    address: str = ""
    """Where the target awaits it."""
    sent_bytes: int = 0
    """Of the point, ahead of the stop."""


@dataclass(slots=True)
class Suspected:
    """Who was on a process that was lost, and the chunk that came next of each; of those that are `idle` nobody wanted
    one, or they were still on their way there. `struck` got strikes for it."""

    pid: int
    epoch: int
    sessions: dict[str, int]
    idle: frozenset[str] = frozenset()
    struck: list[str] = field(default_factory=list)

    def at_work(self, doing: Sequence[str] = ()) -> list[str]:
        """Those that wanted chunks, or were in one (`doing`)."""
        return [one for one in self.sessions if one not in self.idle or one in doing]


@dataclass(slots=True)
class Due:
    """Chunk `index` of a session is late after `at_s`; those that follow `every_s` apart, or, where that is 0 (free
    pace), `after_s` after the one before was made."""

    index: int
    at_s: float
    every_s: float
    after_s: float


@dataclass(slots=True)
class Live:
    """A session that has not ended, with what the gateway asked for."""

    record: SessionRecord
    request: m.CreateSession
    row: int
    attached: bool = False
    queued_since_s: float = 0.0
    move: Move | None = None
    began: bool = False
    """A worker has had it: from now on it is restored, never placed as new."""
    wanted: bool = True
    """A viewer wants chunks, as far as the gateway has said."""
    in_period: bool = False
    """The gateway has said that it is active; `wanted` may be so before."""
    steps_known: bool = False
    """Whether the view has the steps that its next chunk is made with; of an earlier controller the gateway says it."""
    next_index: int = 0
    due: Due | None = None
    """None while nobody wants chunks, and until the gateway has said."""
    point_node: str = ""
    """The node where its newest recovery point lies, or will; "" before it has had a worker."""
    brings_failed: int = 0
    """Times that its point could not be brought from the node where it lies."""
    point_bytes: int = 0
    disk_bytes: int = 0
    loading: bool = False
    """Its point is on the way from disk to the arena."""
    stays_until_s: float = 0.0
    """Its worker had no room to write its point: until then it is not asked to leave."""
    spill_tried: bool = False
    """While the server stops: its point was put on disk, or could not be."""
    spill_again: bool = False
    """Its point found no room on disk, others were dropped for it, and it is written once more."""
    spill_after_s: float = 0.0
    """Its point could not be written to disk: not tried again before."""
    load_tries: int = 0
    """How often its point on disk found no room in the arena."""
    refusals: int = 0
    retry_at_s: float | None = None
    """Until then no worker is looked for."""
    adopt_by_s: float | None = None
    """Of an earlier controller: until then the owner that the directory names may say that it has it."""
    avoid: str = ""
    numerics_id: str = ""
    """Of the worker that had it last: only there the same bits come out."""
    allowed_numerics: str = ""
    """Others that an operator lets it go on under; forgotten with the move, or when its worker is lost."""
    told_other_bits: bool = False
    """Its viewer and the log have heard that no worker fits."""
    approximate_from: int = -1
    """The chunk from which on it goes on in other bits than it began with; -1: it does not."""
    anew: bool = False
    """Its recovery point is of no use: the next owner begins at chunk 0."""
    own_by_s: float | None = None
    """Until then it waits for a worker of its own, or without a grave suspect; None: it has not begun to wait."""
    broken_index: int = -1
    strike_index: int = -1
    """The chunk that comes next after the last worker death it was in; strikes go when it is well past."""
    struck_with: Counter[str] = field(default_factory=Counter)
    """Other sessions, and for how many of its strikes they were struck too."""
