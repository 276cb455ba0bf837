"""Messages between launcher, gateway, controller and workers.

Every message is a msgspec struct, tagged by `type`, encoded as msgpack and checked against its schema when it is
decoded: a wrong type or a missing field is a ProtocolError, an unknown field is ignored (a newer peer may send it),
an unknown `type` is refused. Nothing here is pickled. Times that cross a socket are durations, never clock readings,
except `*_monotonic_s` fields, which only processes of one node may compare.

    gateway  <-> controller   admission, placement, what sessions do, cluster snapshots
    worker   <-> controller   hello, lease, open/close, suspend, prepare, hand over, reports
    worker   <-> gateway      credits one way, finished chunks the other (payload in the frame ring)

Who may send what is the last part of each class name's section below; a peer of the wrong role is refused by the
logic that receives it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from turboserve.errors import ProtocolError
from turboserve.video.encoded import Format

PROTOCOL_VERSION = 3
MAX_MESSAGE_BYTES = 1 << 20
POINTS_TOLD_MAX = 8192
"""Sessions in one PointsHeld: they fit in a message whatever their sizes."""
NOT_ENCODED = "not_encoded"
PART_BYTES = 512 << 10
"""Most bytes of a chunk in one FramePart."""
INIT_BYTES_MAX = 4096
"""Most bytes of an mp4's init segment; ours have about 700."""
WORK_MAX = 1024
"""Most sessions in one WorkReport."""

SessionId = Annotated[str, msgspec.Meta(pattern="^[a-z0-9]{26}$")]
ShortText = Annotated[str, msgspec.Meta(max_length=256)]
Prompt = Annotated[str, msgspec.Meta(max_length=4096)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Message(msgspec.Struct, tag_field="type", tag=True, frozen=True, kw_only=True):
    """Base of all messages; `type` on the wire is the class name."""


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
    progress: dict[str, int] = {}
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
    sessions: Annotated[dict[SessionId, SessionWork], msgspec.Meta(max_length=WORK_MAX)] = {}


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


# ---------------------------------------------------------------- gateway -> worker


class ProfileWorker(Message, frozen=True, kw_only=True):
    """Record the next `chunks` chunks with torch.profiler; answered by WorkerProfiling with the same `op_id`."""

    worker_id: ShortText
    op_id: Count
    chunks: Annotated[int, msgspec.Meta(ge=1, le=1000)]


class Credit(Message, frozen=True, kw_only=True):
    """Leave to generate one chunk, with its inputs bound. Durable in the gateway's log before it is sent. One for a
    chunk that is made already gets it once more, in the format that is asked for now.

    `deadline_s` counts from receipt: the time by which the frames should be out to be on time. `format` is what the
    viewer who is attached receives, or the one before, or else what the session was opened with. A worker that shares
    memory with the gateway has no use for it: its frames are encoded beside the ring.
    """

    session_id: SessionId
    epoch: Count
    chunk_index: Count
    steps: Annotated[int, msgspec.Meta(ge=1, le=64)]
    prompt: Prompt
    prompt_version: Count
    prompt_switch: ShortText = "swap"
    deadline_s: float
    format: Format = "raw"


class ChunkAccepted(Message, frozen=True, kw_only=True):
    """The gateway holds chunk `chunk_index` and everything before it."""

    session_id: SessionId
    epoch: Count
    chunk_index: Count


# ---------------------------------------------------------------- worker -> gateway


class ChunkReady(Message, frozen=True, kw_only=True):
    """A chunk's frames lie in the frame ring (the ring's record repeats session, epoch and index), or its parts have
    come before this.

    Times are the worker's own durations, for `explain` and metrics.
    """

    session_id: SessionId
    epoch: Count
    chunk_index: Count
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    digest_prev: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]
    frames: Count
    steps: Count
    prompt_version: Count
    wait_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    context_before_ms: float = 0.0
    """Of the chunk before this one: from its frames to the end of its context pass. 0 when not known."""
    batch_size: float = 1.0
    """Mean number of segments in the passes this chunk took part in."""
    continuity: ShortText = ""
    format: Format = "raw"
    """What its parts are; `raw` with the frame ring. The digests are over the frames in any case."""
    encode_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    init: Annotated[bytes, msgspec.Meta(max_length=INIT_BYTES_MAX)] = b""
    """The init segment that an mp4 chunk plays behind."""


class FramePart(Message, frozen=True, kw_only=True):
    """Some of a chunk, from a worker that shares no memory with the gateway: `total_bytes` in all, as `format` says.
    Parts come in order, and the chunk's ChunkReady after the last; one with offset 0 begins a chunk and gives up what
    was there of another."""

    session_id: SessionId
    epoch: Count
    chunk_index: Count
    offset: Count
    frames: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    height: Annotated[int, msgspec.Meta(ge=1, le=16384)]
    width: Annotated[int, msgspec.Meta(ge=1, le=16384)]
    format: Format
    total_bytes: Annotated[int, msgspec.Meta(ge=1)]
    data: Annotated[bytes, msgspec.Meta(min_length=1, max_length=PART_BYTES)]


class ChunkRefused(Message, frozen=True, kw_only=True):
    """A credit the worker cannot honour: wrong epoch or index; `next_index` is what it would take. With the code
    NOT_ENCODED the chunk is made and cannot be had in its format."""

    session_id: SessionId
    epoch: Count
    chunk_index: Count
    next_index: Count
    code: ShortText


# ---------------------------------------------------------------- gateway -> controller


class GatewayHello(Message, frozen=True, kw_only=True):
    version: int = PROTOCOL_VERSION
    gateway_epoch: Count
    pid: Count
    data_host: ShortText
    data_port: Count


class CreateSession(Message, frozen=True, kw_only=True):
    op_id: Count
    session_id: SessionId
    tenant: ShortText
    tenant_weight: float = 1.0
    model: ShortText
    seed: int
    width: Count
    height: Count
    steps: Count
    steps_now: Count = 0
    """What its next chunk is made with, where that is not `steps`: it was reduced (SetSteps). 0: nothing was said."""
    prompt: Prompt
    prompt_switch: ShortText = "swap"
    decoder: ShortText = ""
    allow_reduced_steps: bool = True
    next_index: Count = 0
    prompt_version: Count = 1
    adopt: bool = False
    """Said at every connect: a session the controller knows is kept as it is, not a conflict; one it does not know is
    opened anew, and the gateway gives the credits of its log again."""
    epoch: Count = 0
    """The newest epoch the gateway has seen; a record that is made anew begins above it."""


class EndSession(Message, frozen=True, kw_only=True):
    op_id: Count
    session_id: SessionId
    reason: ShortText


class SessionStuck(Message, frozen=True, kw_only=True):
    """The owner cannot give chunk `next_index`: "silent", its credit was sent often and is not answered; or "ahead",
    the owner is past it and has not kept it. The controller gives the session to an owner under a new epoch that goes
    on from the recovery point ("silent") or begins anew ("ahead")."""

    session_id: SessionId
    epoch: Count
    next_index: Count
    code: ShortText


class SessionActivity(Message, frozen=True, kw_only=True):
    """Whether a session wants chunks now: attached, not paused, credits not exhausted by the viewer. Said again when
    its period, and so its deadlines, became another one."""

    session_id: SessionId
    active: bool
    attached: bool
    due_index: Count = 0
    due_s: float | None = None
    """Until chunk `due_index`, its next one, is late; negative when it is already. None: it is not active."""
    every_s: Seconds = 0.0
    """The chunk after that is due so much later; 0 for free pace: `due_s` after the chunk before it was made."""


class ChunksDelivered(Message, frozen=True, kw_only=True):
    """Chunks accepted for viewers since this gateway started: all, those with fewer denoise steps than their session
    was opened with, and those of live pace that came late. At most every DELIVERED_S, and first at each connect."""

    chunks: Count
    reduced: Count
    late: Count


class AdminCommand(Message, frozen=True, kw_only=True):
    """An operator's wish. `kind`: drain, add_workers, migrate, suspend, resume, kill_worker, profile."""

    op_id: Count
    kind: ShortText
    worker_id: ShortText = ""
    session_id: str = ""
    count: Count = 0
    allow_approximate: bool = False


# ---------------------------------------------------------------- controller -> gateway


class OpDone(Message, frozen=True, kw_only=True):
    """Answer to a gateway's op_id; repeated for a repeated op_id. `code` is empty when it went well."""

    op_id: Count
    code: ShortText = ""
    message: str = ""
    state: ShortText = ""
    queue_position: int = -1
    retry_after_s: Seconds = 0.0


class WorkerChanged(Message, frozen=True, kw_only=True):
    """A worker is ready, draining or lost. The gateway drops the data socket of a lost one."""

    worker_id: ShortText
    worker_epoch: Count
    state: ShortText
    numerics_id: ShortText = ""
    reason: ShortText = ""


class SessionPlaced(Message, frozen=True, kw_only=True):
    """From now on credits of the session go to this worker under this epoch, from `next_index` on."""

    session_id: SessionId
    epoch: Count
    worker_id: ShortText
    numerics_id: ShortText
    next_index: Count = 0
    continuity: ShortText = ""


class SessionState(Message, frozen=True, kw_only=True):
    """A session's public state changed. `owned` false: send no credit until SessionPlaced."""

    session_id: SessionId
    state: ShortText
    epoch: Count
    owned: bool
    reason: ShortText = ""
    code: ShortText = ""
    queue_position: int = -1
    next_index: int = -1
    device_bytes: Count = 0
    host_bytes: Count = 0
    disk_bytes: Count = 0


class SetSteps(Message, frozen=True, kw_only=True):
    """From its next unbound chunk on the session is made with `steps` denoise steps."""

    session_id: SessionId
    steps: Annotated[int, msgspec.Meta(ge=1, le=64)]


class ClusterSnapshot(Message, frozen=True, kw_only=True):
    """What GET /v1/cluster shows, as JSON text; at most four a second."""

    body: Annotated[str, msgspec.Meta(max_length=MAX_MESSAGE_BYTES)]


# ---------------------------------------------------------------- controller <-> launcher


class FleetWish(Message, frozen=True, kw_only=True):
    """Start worker `worker_id`, or see to it that it is gone. Idempotent by `request_id`."""

    request_id: ShortText
    kind: ShortText
    """"add", "remove", or "kill": SIGKILL, to try what happens then; it is started again."""
    worker_id: ShortText
    model: ShortText = ""


class FleetEvent(Message, frozen=True, kw_only=True):
    """What became of a worker process: started, exited for good (with its code), backing_off before it is started
    again, failed. `stopping`, without a worker: the server ends; `stopping_now`: it was told so twice."""

    worker_id: ShortText
    kind: ShortText
    pid: Count = 0
    exit_code: int = 0
    """Of the process `pid`; below 0: the number of the signal that ended it."""
    request_id: ShortText = ""
    reason: str = ""
    at_work: Annotated[tuple[SessionId, ...], msgspec.Meta(max_length=WORK_MAX)] = ()
    """Sessions that the process was working on when it died."""


# ---------------------------------------------------------------- launcher <-> all


class Failure(Message, frozen=True, kw_only=True):
    """A typed refusal on the wire: the peer closes after sending it."""

    code: ShortText
    message: str


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
