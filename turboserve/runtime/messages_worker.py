"""Between workers and controller (`messages.py`)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from turboserve.runtime.messages_base import (
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

# ---------------------------------------------------------------- worker -> controller


class WorkerHello(Message, frozen=True, kw_only=True):
    """First message of a worker process on either of its sockets."""

    version: int = PROTOCOL_VERSION
    worker_id: ShortText
    worker_epoch: Count
    pid: Count
    node: ShortText
    model: ShortText
    model_hash: ShortText
    numerics_id: ShortText
    device: ShortText
    device_class: ShortText
    gpu_count: Count = 0
    """GPUs of the model copy that this worker is; 0 on a CPU."""
    group: ShortText = ""
    """The processes that together are this worker, one a GPU; one alone is named after itself (docs/design.md)."""
    slot_count: Count
    capacity: Count
    session_bytes: Count = 0
    layout_hash: ShortText = ""
    start_s: Seconds = 0.0
    """From the launcher's decision to start it until it could serve; 0 when it does not know."""
    batch_latency_s: Annotated[tuple[Seconds, ...], msgspec.Meta(max_length=1024)] = ()
    """Seconds of a batch of 1, 2, ... whole chunks, as calibrated here; empty when it was not."""
    ring_fd: int = -1
    """The frame ring's file descriptor in the worker process; the gateway opens /proc/PID/fd/N (same node). -1: the
    worker joined from elsewhere, and its frames come over its data channel (FramePart)."""
    address: ShortText = ""
    """Under which the node of a worker that joined is reached by others (`--advertise`)."""
    arena_bytes: Count = 0
    """Of the arena that its recovery points lie in, its node's; 0: it leaves none, and takes none from other nodes."""
    own_arena: bool = False
    """Nobody else maps that arena: it ends with this worker, which says what lies there (PointsHeld)."""


class Heartbeat(Message, frozen=True, kw_only=True):
    """Sent every `heartbeat_s`; renews the lease of both sides."""

    worker_id: ShortText
    worker_epoch: Count
    active: Count
    resident: Count
    slots_free: Count
    busy_share: Annotated[float, msgspec.Meta(ge=0, le=1)]
    chunk_latency_ms: float
    batch_size_mean: float
    chunks: Count
    passes: Count
    device_bytes: Count
    rss_bytes: Count = 0
    points: Count = 0
    """Recovery points written since the start."""
    points_refused: Count = 0
    """Those that the arena had no room for."""
    point_ms: float = 0.0
    """Mean time a point took since the last heartbeat."""
    progress: dict[str, int] = msgspec.field(default_factory=dict)
    """Sessions with chunks made here, and the chunk that comes next."""


class SessionWork(msgspec.Struct, array_like=True, frozen=True):
    """One session in a WorkReport: everything before chunk `next_index` is committed under `epoch`; `begun` says that
    the first pass of that chunk has started."""

    epoch: Count
    next_index: Count
    begun: bool


class WorkReport(Message, frozen=True, kw_only=True):
    """What the worker's engine is at. Sent when that changed, at most every `work_report_s`, and with each heartbeat; a
    session that is not named has no chunk in work here."""

    worker_id: ShortText
    worker_epoch: Count
    busy_s: Seconds = 0.0
    """Until the pass in work is expected to end; 0 when none is."""
    sessions: Annotated[dict[SessionId, SessionWork], msgspec.Meta(max_length=WORK_MAX)] = msgspec.field(
        default_factory=dict
    )


class SessionOpened(Message, frozen=True, kw_only=True):
    """The worker holds the session under `epoch` and takes credits from `next_index` on. Said again at each connect."""

    session_id: SessionId
    epoch: Count
    next_index: Count = 0
    restored: bool = False
    """It went on from a recovery point; false: it begins anew and its chunks are made again from the input log."""


class SessionRefused(Message, frozen=True, kw_only=True):
    """The worker could not open it (no slot, wrong model). The controller places it elsewhere or queues it."""

    session_id: SessionId
    epoch: Count
    code: ShortText
    message: str


class SessionSuspended(Message, frozen=True, kw_only=True):
    """The session's newest state lies in a committed recovery point; the worker's slot is free."""

    session_id: SessionId
    epoch: Count
    next_index: Count
    tier: ShortText = "host"
    point_bytes: Count = 0


class SessionKept(Message, frozen=True, kw_only=True):
    """Suspend or HandOver could not be done (no room for the copy, say): the worker goes on with the session."""

    session_id: SessionId
    epoch: Count
    move_id: Count = 0
    code: ShortText
    message: str


class SessionPrepared(Message, frozen=True, kw_only=True):
    """The destination has a slot for the session and has read what immutable pages there were.

    `address` is host:port where it awaits the session's point from another node; empty when it was not asked to.
    """

    session_id: SessionId
    move_id: Count
    address: ShortText = ""


class PrepareRefused(Message, frozen=True, kw_only=True):
    session_id: SessionId
    move_id: Count
    code: ShortText
    message: str


class HandedOver(Message, frozen=True, kw_only=True):
    """The source stopped at a chunk boundary and committed its last recovery point (with what is not yet accepted).

    It makes no chunk of the session until OpenSession(adopt) or CloseSession tells; while unsure it says this again
    every `heartbeat_s`. To another node: the point has arrived there, `sent_bytes` of it after the stop, and the
    session has stood still for `stopped_ms` when this is said first.
    """

    session_id: SessionId
    epoch: Count
    move_id: Count
    next_index: Count
    point_bytes: Count = 0
    sent_bytes: Count = 0
    stopped_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class PointSent(Message, frozen=True, kw_only=True):
    """The session's newest point has arrived whole at the node it was sent to. It stays here too."""

    session_id: SessionId
    move_id: Count
    sent_bytes: Count = 0
    """Pages that were there already are not sent."""


class PointKept(Message, frozen=True, kw_only=True):
    """The point could not be sent, or there is none; nobody else has anything of it."""

    session_id: SessionId
    move_id: Count
    code: ShortText
    message: str


class PointsHeld(Message, frozen=True, kw_only=True):
    """From a worker with an arena of its own, now and then: whose points lie there, and their bytes. The controller
    cannot look there itself; it answers ForgetPoint for sessions that have ended or live elsewhere."""

    worker_id: ShortText
    worker_epoch: Count
    sessions: Annotated[dict[SessionId, Count], msgspec.Meta(max_length=POINTS_TOLD_MAX)]


class SessionReleased(Message, frozen=True, kw_only=True):
    """All bytes of the session on this worker are free."""

    session_id: SessionId
    epoch: Count


class SessionBroken(Message, frozen=True, kw_only=True):
    """A pass of this session failed or made values that are not finite; its neighbours go on."""

    session_id: SessionId
    epoch: Count
    chunk_index: Count
    code: ShortText
    message: str


class WorkerLeaving(Message, frozen=True, kw_only=True):
    """The worker was told to end (SIGTERM) and asks to be drained. `at_once`: told twice; its sessions go to disk."""

    worker_id: ShortText
    worker_epoch: Count
    at_once: bool = False


class WorkerProfiling(Message, frozen=True, kw_only=True):
    """The worker records and will write `path`, on its own node; with a `code` it does not, and `message` says why."""

    op_id: Count
    path: str = ""
    code: ShortText = ""
    message: str = ""


# ---------------------------------------------------------------- controller -> worker


class Lease(Message, frozen=True, kw_only=True):
    """Answer to hello and to each heartbeat: the worker may emit for so long after receiving it."""

    lease_s: Seconds
    worker_epoch: Count


class GatewayAt(Message, frozen=True, kw_only=True):
    """To a worker that joined: where its data channel goes. Said at its hello and at each gateway's."""

    host: ShortText
    port: Count


class OpenSession(Message, frozen=True, kw_only=True):
    """Make room for a session and begin it at `next_index` under `epoch`."""

    session_id: SessionId
    epoch: Count
    seed: int
    width: Count
    height: Count
    prompt: Prompt
    prompt_version: Count = 1
    prompt_switch: ShortText = "swap"
    decoder: ShortText = ""
    """Of those the model offers; "": its default."""
    next_index: Count = 0
    restore: bool = False
    """Go on from the newest recovery point, if there is one for this model, layout and numerics_id; else begin anew."""
    adopt: bool = False
    """The worker holds the session under an older epoch (a move was given up): go on with that state under this one."""
    move_id: Count = 0
    """The slot prepared under this id is meant."""
    any_numerics: bool = False
    """The point may be of another numerics_id; without one of this model and layout the session is refused."""


class SuspendSession(Message, frozen=True, kw_only=True):
    """At the next chunk boundary: commit a recovery point, free the slot. Answered SessionSuspended or SessionKept."""

    session_id: SessionId
    epoch: Count
    tier: ShortText = "host"
    """"host" or "disk"."""


class PrepareSession(Message, frozen=True, kw_only=True):
    """To a move's destination: take a slot, read what pages the store has. SessionPrepared or PrepareRefused.

    `awaits`: its point comes from another node; the answer says where it is awaited. Without `slot` only the point is
    to come, for a session that nobody watches.
    """

    session_id: SessionId
    move_id: Count
    seed: int
    width: Count
    height: Count
    prompt: Prompt
    prompt_version: Count = 1
    awaits: bool = False
    slot: bool = True


class DropPrepared(Message, frozen=True, kw_only=True):
    """The move was given up: free the prepared slot. Idempotent."""

    session_id: SessionId
    move_id: Count


class SendPoint(Message, frozen=True, kw_only=True):
    """To a worker of the node where the session's point lies: send the newest one to another node, while the session
    goes on if it does. PointSent or PointKept. `epoch` is the owner's; it is not asked of a session nobody owns."""

    session_id: SessionId
    epoch: Count
    move_id: Count
    target: ShortText
    target_address: ShortText


class ForgetPoint(Message, frozen=True, kw_only=True):
    """To a worker with an arena of its own: the session has ended, or lives elsewhere. Ignored while it is here."""

    session_id: SessionId


class HandOver(Message, frozen=True, kw_only=True):
    """To a move's source, at the next chunk boundary: stop, commit the last recovery point. HandedOver or SessionKept.

    `target_address` is where the destination awaits the point when it is on another node, else empty.
    """

    session_id: SessionId
    epoch: Count
    move_id: Count
    target: ShortText
    target_address: ShortText = ""


class CloseSession(Message, frozen=True, kw_only=True):
    """Free everything the worker holds for the session, whatever it is doing. Idempotent."""

    session_id: SessionId
    epoch: Count


class DrainWorker(Message, frozen=True, kw_only=True):
    worker_id: ShortText


class StopWorker(Message, frozen=True, kw_only=True):
    """End now; nothing is owned any more."""

    worker_id: ShortText
    reason: ShortText = ""


class ProfileWorker(Message, frozen=True, kw_only=True):
    """Record the next `chunks` chunks with torch.profiler; answered by WorkerProfiling with the same `op_id`."""

    worker_id: ShortText
    op_id: Count
    chunks: Annotated[int, msgspec.Meta(ge=1, le=1000)]
