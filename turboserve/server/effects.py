"""What the gateway's logic asks the process around it to do. The logic itself touches no socket, file or clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turboserve.errors import TurboServeError
from turboserve.runtime.messages import Message
from turboserve.server.log_records import Record

if TYPE_CHECKING:
    from turboserve.server.session_stream import StoredChunk


@dataclass(frozen=True, slots=True)
class Append:
    """Write a record; `GatewayLogic.durable` is called with the count of records that are on disk."""

    record: Record


@dataclass(frozen=True, slots=True)
class ToWorker:
    worker_id: str
    message: Message


@dataclass(frozen=True, slots=True)
class ToController:
    message: Message


@dataclass(frozen=True, slots=True)
class ToViewer:
    """One JSON message to one connection."""

    connection: int
    message: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Deliver:
    """One chunk to one connection: encode it, then header and payload."""

    connection: int
    chunk: StoredChunk


@dataclass(frozen=True, slots=True)
class CloseViewer:
    connection: int
    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Resolve:
    """An operation of the HTTP side has its answer: a value or a typed error."""

    op_id: int
    answer: Any | TurboServeError


@dataclass(frozen=True, slots=True)
class Measure:
    """One observation for the metrics; `name` is a method's name there."""

    name: str
    value: float = 1.0


Effect = Append | ToWorker | ToController | ToViewer | Deliver | CloseViewer | Resolve | Measure
