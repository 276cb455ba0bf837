"""Messages between launcher, gateway, controller and workers.

Every message is a msgspec struct, tagged by `type`, encoded as msgpack and checked against its schema when it is
decoded: a wrong type or a missing field is a ProtocolError, an unknown field is ignored (a newer peer may send it),
an unknown `type` is refused. Nothing here is pickled. Times that cross a socket are durations, never clock readings,
except `*_monotonic_s` fields, which only processes of one node may compare.

    gateway  <-> controller   admission, placement, what sessions do, cluster snapshots
    worker   <-> controller   hello, lease, open/close, suspend, prepare, hand over, reports
    worker   <-> gateway      credits one way, finished chunks the other (payload in the frame ring)

The classes stand by who sends them to whom in `messages_worker.py`, `messages_chunks.py` and `messages_control.py`; a
peer of the wrong role is refused by the logic that receives it.
"""

from __future__ import annotations

import msgspec

from turboserve.errors import ProtocolError
from turboserve.runtime.messages_base import (
    INIT_BYTES_MAX,
    MAX_MESSAGE_BYTES,
    NOT_ENCODED,
    PART_BYTES,
    POINTS_TOLD_MAX,
    PROTOCOL_VERSION,
    WORK_MAX,
    Count,
    Message,
    Prompt,
    Seconds,
    SessionId,
    ShortText,
)
from turboserve.runtime.messages_chunks import (
    ChunkAccepted,
    ChunkReady,
    ChunkRefused,
    Credit,
    FramePart,
)
from turboserve.runtime.messages_control import (
    AdminCommand,
    ChunksDelivered,
    ClusterSnapshot,
    CreateSession,
    EndSession,
    Failure,
    FleetEvent,
    FleetWish,
    GatewayHello,
    OpDone,
    SessionActivity,
    SessionPlaced,
    SessionState,
    SessionStuck,
    SetSteps,
    WorkerChanged,
)
from turboserve.runtime.messages_worker import (
    CloseSession,
    DrainWorker,
    DropPrepared,
    ForgetPoint,
    GatewayAt,
    HandedOver,
    HandOver,
    Heartbeat,
    Lease,
    OpenSession,
    PointKept,
    PointSent,
    PointsHeld,
    PrepareRefused,
    PrepareSession,
    ProfileWorker,
    SendPoint,
    SessionBroken,
    SessionKept,
    SessionOpened,
    SessionPrepared,
    SessionRefused,
    SessionReleased,
    SessionSuspended,
    SessionWork,
    StopWorker,
    SuspendSession,
    WorkerHello,
    WorkerLeaving,
    WorkerProfiling,
    WorkReport,
)

AnyMessage = (
    WorkerHello
    | Heartbeat
    | WorkReport
    | SessionOpened
    | SessionRefused
    | SessionSuspended
    | SessionKept
    | SessionPrepared
    | PrepareRefused
    | HandedOver
    | PointSent
    | PointKept
    | PointsHeld
    | SessionReleased
    | SessionBroken
    | WorkerLeaving
    | WorkerProfiling
    | Lease
    | GatewayAt
    | OpenSession
    | SuspendSession
    | PrepareSession
    | DropPrepared
    | SendPoint
    | ForgetPoint
    | HandOver
    | CloseSession
    | DrainWorker
    | StopWorker
    | ProfileWorker
    | Credit
    | ChunkAccepted
    | ChunkReady
    | FramePart
    | ChunkRefused
    | GatewayHello
    | CreateSession
    | EndSession
    | SessionStuck
    | SessionActivity
    | ChunksDelivered
    | AdminCommand
    | OpDone
    | WorkerChanged
    | SessionPlaced
    | SessionState
    | SetSteps
    | ClusterSnapshot
    | FleetWish
    | FleetEvent
    | Failure
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """One message as msgpack bytes; ProtocolError above MAX_MESSAGE_BYTES."""
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"a {type(message).__name__} of {len(data)} bytes", expected=f"at most {MAX_MESSAGE_BYTES} bytes"
        )
    return data


def decode(data: bytes) -> AnyMessage:
    """Bytes to a checked message; ProtocolError says which field was wrong."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(data)} bytes", expected=f"at most {MAX_MESSAGE_BYTES} bytes")
    try:
        message: AnyMessage = _decoder.decode(data)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ProtocolError(f"a message that does not fit its schema: {error}") from None
    return message


__all__ = [
    "INIT_BYTES_MAX",
    "MAX_MESSAGE_BYTES",
    "NOT_ENCODED",
    "PART_BYTES",
    "POINTS_TOLD_MAX",
    "PROTOCOL_VERSION",
    "WORK_MAX",
    "AdminCommand",
    "AnyMessage",
    "ChunkAccepted",
    "ChunkReady",
    "ChunkRefused",
    "ChunksDelivered",
    "CloseSession",
    "ClusterSnapshot",
    "Count",
    "CreateSession",
    "Credit",
    "DrainWorker",
    "DropPrepared",
    "EndSession",
    "Failure",
    "FleetEvent",
    "FleetWish",
    "ForgetPoint",
    "FramePart",
    "GatewayAt",
    "GatewayHello",
    "HandOver",
    "HandedOver",
    "Heartbeat",
    "Lease",
    "Message",
    "OpDone",
    "OpenSession",
    "PointKept",
    "PointSent",
    "PointsHeld",
    "PrepareRefused",
    "PrepareSession",
    "ProfileWorker",
    "Prompt",
    "Seconds",
    "SendPoint",
    "SessionActivity",
    "SessionBroken",
    "SessionId",
    "SessionKept",
    "SessionOpened",
    "SessionPlaced",
    "SessionPrepared",
    "SessionRefused",
    "SessionReleased",
    "SessionState",
    "SessionStuck",
    "SessionSuspended",
    "SessionWork",
    "SetSteps",
    "ShortText",
    "StopWorker",
    "SuspendSession",
    "WorkReport",
    "WorkerChanged",
    "WorkerHello",
    "WorkerLeaving",
    "WorkerProfiling",
    "decode",
    "encode",
]
