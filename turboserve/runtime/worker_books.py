"""What a worker's protocol keeps of each session, and the actions it answers with (`worker_logic.py`)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from turboserve.model.interface import ChunkRequest, Control, PromptSwitch
from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e

CONTROLLER = "controller"
GATEWAY = "gateway"
KEPT_CHUNKS = 4


class Phase(StrEnum):
    OPENING = "opening"
    OPEN = "open"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Send:
    """Put `message` on the channel to CONTROLLER or GATEWAY; without a channel it is dropped."""

    to: str
    message: m.Message


@dataclass(frozen=True, slots=True)
class Emit:
    """Write a chunk's frames to the ring and announce it, if `may_emit` still says so then."""

    session_id: str
    epoch: int
    chunk_index: int


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


Action: TypeAlias = Send | Emit | Beat | Drop | Stop | e.EngineCommand


@dataclass(slots=True)
class Session:
    """One session as the protocol sees it. `next_index` is the chunk whose credit comes next, `sent` the one after the
    last that left, `accepted` the one after the last that the gateway holds."""

    epoch: int
    phase: Phase = Phase.OPENING
    next_index: int = 0
    sent: int = 0
    accepted: int = 0
    requests: dict[int, ChunkRequest] = field(default_factory=dict)
    made: OrderedDict[int, e.FinishedChunk] = field(default_factory=OrderedDict)
    broken: m.SessionBroken | None = None


@dataclass(slots=True)
class Counts:
    """What happened, for metrics."""

    emitted: int = 0
    refused: int = 0
    fenced: int = 0
    withheld: int = 0


def request_of(credit: m.Credit) -> ChunkRequest:
    """A credit's bound inputs, as the model takes them."""
    return ChunkRequest(
        chunk_index=credit.chunk_index,
        steps=credit.steps,
        control=Control(credit.prompt, credit.prompt_version),
        prompt_switch=PromptSwitch(credit.prompt_switch),
    )
