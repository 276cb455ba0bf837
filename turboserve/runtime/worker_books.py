"""What a worker's protocol keeps of each session, and the actions it answers with (`worker_logic.py`)."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from turboserve.model.interface import ChunkRequest, Control, PromptSwitch
from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_events import KEPT_CHUNKS as KEPT_CHUNKS
from turboserve.video.encoded import Format

CONTROLLER = "controller"
GATEWAY = "gateway"
EARLY_CREDITS_MAX = 2 * KEPT_CHUNKS
"""Credits that may wait for an opening or a stop to be done."""
_FENCES_KEPT = 65536
_SUSPENDED_KEPT = 1024


class Phase(StrEnum):
    OPENING = "opening"  # the engine was told to open, restore or adopt it
    OPEN = "open"
    STOPPING = "stopping"  # it was told to stop at the next chunk boundary, for a suspend or a move
    HANDED_OVER = "handed_over"  # stopped, its point committed; it waits for a word on who goes on
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Send:
    """Put `message` on the channel to CONTROLLER or GATEWAY; without a channel it is dropped."""

    to: str
    message: m.Message


@dataclass(frozen=True, slots=True)
class Emit:
    """Write a chunk's frames to the ring and announce it, if `may_emit` still says so then. A worker that shares no
    memory with the gateway sends it as `format`."""

    session_id: str
    epoch: int
    chunk_index: int
    format: Format = "raw"


@dataclass(frozen=True, slots=True)
class Beat:
    """Send a Heartbeat; whoever does fills in the figures."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the channel to a peer that broke the rules."""

    to: str
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process; an exit code other than 0 asks the launcher for another one."""

    reason: str
    code: int = 0


@dataclass(frozen=True, slots=True)
class AwaitPoint:
    """Take the session's point from another node when it comes; answered by PointAwaited or PointNotAwaited."""

    session_id: str
    move_id: int


@dataclass(frozen=True, slots=True)
class RefusePoint:
    """Nothing of the session is awaited any more; what is half here goes."""

    session_id: str


@dataclass(frozen=True, slots=True)
class SendPoint:
    """Send the session's newest point to another node; answered by PointSent or PointNotSent. `ahead`: it may become
    old meanwhile, because the session goes on. A new one takes the place of what is under way for the session."""

    session_id: str
    move_id: int
    address: str
    ahead: bool


@dataclass(frozen=True, slots=True)
class ForgetPoint:
    """Drop what the arena has of a session that is not here."""

    session_id: str


@dataclass(frozen=True, slots=True)
class TellPoints:
    """Say PointsHeld; whoever does fills in which."""


PointAction: TypeAlias = AwaitPoint | RefusePoint | SendPoint | ForgetPoint | TellPoints
Action: TypeAlias = Send | Emit | Beat | Drop | Stop | PointAction | e.EngineCommand


@dataclass(frozen=True, slots=True)
class PointAwaited:
    """The session's point may come to `address`."""

    session_id: str
    move_id: int
    address: str


@dataclass(frozen=True, slots=True)
class PointNotAwaited:
    session_id: str
    move_id: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class PointSent:
    """It has arrived whole. `sent_bytes` without what was there already."""

    session_id: str
    move_id: int
    ahead: bool
    sent_bytes: int


@dataclass(frozen=True, slots=True)
class PointNotSent:
    session_id: str
    move_id: int
    ahead: bool
    code: str
    message: str


PointEvent: TypeAlias = PointAwaited | PointNotAwaited | PointSent | PointNotSent


@dataclass(slots=True)
class Session:
    """One session as the protocol sees it. `next_index` is the chunk whose credit comes next, `sent` the one after the
    last that left, `accepted` the one after the last that the gateway holds; after an opening or an adoption both begin
    at `next_index`, because what is made by then leaves only when a credit asks for it. `format` is what the newest
    credit asked for: every chunk leaves in it.

    `since_epoch` is the epoch it was opened under: older than `epoch` when it was adopted since. What the engine says
    of any epoch from there on is about this session. `move_id` is 0 in a stop that is a suspend. `target_address` is
    where its point goes when it moves to another node; `stopped` and `stopped_s` say where and since when it stands
    still while that is under way.
    """

    epoch: int
    since_epoch: int
    phase: Phase = Phase.OPENING
    next_index: int = 0
    sent: int = 0
    accepted: int = 0
    restored: bool = False
    move_id: int = 0
    format: Format = "raw"
    requests: dict[int, ChunkRequest] = field(default_factory=dict)
    made: OrderedDict[int, e.FinishedChunk] = field(default_factory=OrderedDict)
    early: list[m.Credit] = field(default_factory=list)
    handed_over: m.HandedOver | None = None
    target_address: str = ""
    stopped: e.Stopped | None = None
    stopped_s: float = 0.0
    broken: m.SessionBroken | None = None


@dataclass(slots=True)
class Prepared:
    """A slot held for a session that will move here, until `until_s` at the latest. `move_id` is the newest name of
    the move, `asked_id` the one the engine knows the slot by. Without `slot` there is only a point to come; `awaits`
    says that one is, to `address` once that is known."""

    move_id: int
    asked_id: int
    until_s: float
    ready: bool = False
    slot: bool = True
    awaits: bool = False
    address: str = ""

    @property
    def stands(self) -> bool:
        """Whether all that was asked for is there."""
        return self.ready and bool(self.address or not self.awaits)


@dataclass(slots=True)
class Counts:
    """What happened, for metrics."""

    emitted: int = 0
    refused: int = 0
    fenced: int = 0
    withheld: int = 0
    suspended: int = 0
    handed_over: int = 0
    kept: int = 0
    prepared: int = 0


class WorkerBooks:
    """What the worker holds, what it has given up, and what it is about to say. No decision is made here."""

    def __init__(self, hello: m.WorkerHello) -> None:
        self.hello = hello
        self.sessions: dict[str, Session] = {}
        self.prepared: dict[str, Prepared] = {}
        self.closing: dict[str, deque[int]] = {}
        self.suspended: OrderedDict[str, m.SessionSuspended] = OrderedDict()
        """The last word on sessions that were suspended here, for a controller that missed it."""
        self.counts = Counts()
        self.draining = False
        self._connected: set[str] = set()
        self._fences: OrderedDict[str, int] = OrderedDict()
        self._out: list[Action] = []

    def _flush(self) -> list[Action]:
        out, self._out = self._out, []
        return out

    def _tell(self, message: m.Message) -> None:
        if CONTROLLER in self._connected:
            self._out.append(Send(CONTROLLER, message))

    def _tell_opened(self, session_id: str, session: Session) -> None:
        self._tell(
            m.SessionOpened(
                session_id=session_id,
                epoch=session.epoch,
                next_index=session.next_index,
                restored=session.restored,
            )
        )

    def _refuse_credit(self, credit: m.Credit, next_index: int, code: str) -> None:
        self._refuse_chunk(credit.session_id, credit.epoch, credit.chunk_index, next_index, code)

    def _refuse_chunk(self, session_id: str, epoch: int, chunk_index: int, next_index: int, code: str) -> None:
        self.counts.refused += 1
        refusal = m.ChunkRefused(
            session_id=session_id, epoch=epoch, chunk_index=chunk_index, next_index=next_index, code=code
        )
        self._out.append(Send(GATEWAY, refusal))

    def _forget_from(self, session: Session, next_index: int) -> None:
        """The engine makes `next_index` next: credits from there on were never begun."""
        session.next_index = next_index
        for index in [one for one in session.requests if one >= next_index]:
            del session.requests[index]

    def _fence(self, session_id: str, epoch: int) -> None:
        """Nothing of this epoch or an older one comes back."""
        self._fences[session_id] = max(epoch, self._fences.get(session_id, -1))
        self._fences.move_to_end(session_id)
        while len(self._fences) > _FENCES_KEPT:
            self._fences.popitem(last=False)

    def _close(self, session_id: str, session: Session) -> None:
        """Give a session up: the engine frees it, SessionReleased follows."""
        del self.sessions[session_id]
        self._fence(session_id, session.epoch)
        self.closing.setdefault(session_id, deque()).append(session.epoch)
        self._out.append(e.Close(session_id, session.epoch))

    def _remember_suspended(self, message: m.SessionSuspended) -> None:
        self.suspended[message.session_id] = message
        self.suspended.move_to_end(message.session_id)
        while len(self.suspended) > _SUSPENDED_KEPT:
            self.suspended.popitem(last=False)


def request_of(credit: m.Credit) -> ChunkRequest:
    """A credit's bound inputs, as the model takes them."""
    return ChunkRequest(
        chunk_index=credit.chunk_index,
        steps=credit.steps,
        control=Control(credit.prompt, credit.prompt_version),
        prompt_switch=PromptSwitch(credit.prompt_switch),
    )


def open_command(asked: m.OpenSession, adopt_epoch: int | None = None) -> e.Open:
    """What the engine is told of an order to hold a session."""
    return e.Open(
        asked.session_id,
        asked.epoch,
        asked.seed,
        Control(asked.prompt, asked.prompt_version),
        restore=asked.restore,
        adopt_epoch=adopt_epoch,
        decoder=asked.decoder,
        any_numerics=asked.any_numerics,
    )
