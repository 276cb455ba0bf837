"""Between controller, gateway and launcher (`messages.py`)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from turboserve.runtime.messages_base import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    WORK_MAX,
    Count,
    Message,
    Prompt,
    Seconds,
    SessionId,
    ShortText,
)

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
    """Chunks of live pace accepted for viewers since this gateway started: all, those with fewer denoise steps than
    their session was opened with, and those that came late. At most every DELIVERED_S, and first at each connect."""

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
