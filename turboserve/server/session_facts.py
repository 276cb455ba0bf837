"""All that the gateway knows of one session, and what it tells controller and viewer of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from turboserve.runtime import messages
from turboserve.server.attach_tokens import AttachTokens
from turboserve.server.chunk_times import ChunkTimes
from turboserve.server.effects import ToController, ToViewer
from turboserve.server.outbox import Outbox
from turboserve.server.pacing import Pace, Period, StreamClock
from turboserve.server.prompt_line import PromptLine
from turboserve.server.stream_shape import Begun, Counts, DigestChain, Pause, StoredChunk, StreamShape, Viewer
from turboserve.session import PublicState

RING_CHUNKS = 4
"""Chunks that may stand unacked; generation waits for an ack when all of them do."""
IDLE_REPORT_S = 1.0
"""A viewer that lags shorter than this is still active to the controller."""


@dataclass(slots=True, kw_only=True)
class SessionFacts:
    """Fields of a session. `wish` is what it was opened with; effects go to `outbox`."""

    sid: str
    tenant: str
    shape: StreamShape
    clock: StreamClock
    seed: int
    format: str
    prompt_switch: str
    max_chunks: int | None
    tokens: AttachTokens
    prompts: PromptLine
    outbox: Outbox
    created_s: float
    steps: int
    grace_s: float
    slow_close_s: float
    session_s: float
    wish: Any = None
    decoder: str = ""

    bound: int = 0
    durable: int = 0
    sent: int = 0
    next_index: int = 0
    delivered: int = 0
    restored: int = 0
    """After a gateway restart: chunks up to here were begun before it and may be in the viewer's hands."""
    digest: str = ""
    digests: DigestChain = field(default_factory=DigestChain)
    ring: deque[StoredChunk] = field(default_factory=deque)
    begun: Begun | None = None

    in_flight: bool = False
    """A credit is out that was not answered; it is for chunk `credited`."""
    credited: int = -1
    viewed_as: str = ""
    """Format of the newest attach; empty before the first."""
    misfits: int = 0
    """Chunks that came in another format than they were asked for, one after the other."""
    credit_due_s: float = 0.0
    """When the credit that is out is sent again."""
    resends: int = 0

    state: str = PublicState.QUEUED.value
    owned: bool = False
    epoch: int = 0
    worker_id: str = ""
    numerics_id: str = ""
    continuity: str = ""
    """"approximate": the next chunk accepted from `continuity_from` on goes on in other bits."""
    continuity_from: int = 0
    queue_position: int = -1
    device_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0

    viewer: Viewer | None = None
    detached_s: float = 0.0
    period: Period | None = None
    pace: Pace = Pace.LIVE
    paused: bool = False
    full_s: float | None = None
    """Since when the viewer has as many unacked chunks as it may."""
    refusals: int = 0
    refused_epoch: int = 0
    """The epoch whose owner takes no credit any more; a newer one is awaited."""
    reported: tuple[bool, bool, Period | None, StreamClock] | None = None
    """(active, attached, the period while active, its clock), as the controller was told last."""
    shown: tuple[Any, ...] | None = None
    scheduled_s: float | None = None
    first_attach_s: float | None = None
    ended_s: float | None = None
    end_code: int = 1000
    end_reason: str = ""
    counts: Counts = field(default_factory=Counts)
    times: ChunkTimes = field(default_factory=ChunkTimes)
    pause_of_stream: Pause | None = None
    asked: dict[int, float] = field(default_factory=dict)
    """When prompts came that no chunk shows yet, by version."""

    def public(self) -> str:
        """One of the eight public states."""
        if self.state in (PublicState.ACTIVE, PublicState.IDLE):
            # Which of the two is known here first: the controller's word is as old as our last report to it.
            return (PublicState.ACTIVE if self._wants() else PublicState.IDLE).value
        return self.state

    def _wants(self) -> bool:
        """Whether chunks are asked for: attached or still within its credits, not paused, not done."""
        if self.period is None or self.paused or self._complete():
            return False
        return self.viewer is not None or self.bound - self.delivered < RING_CHUNKS

    def _misfit(self) -> int | None:
        """The first chunk in the ring that the viewer needs and that is here in another format only."""
        viewer = self.viewer
        if viewer is None:
            return None
        waiting = (one for one in self.ring if one.index >= viewer.next_index and not one.fits(viewer.format))
        return next((one.index for one in waiting), None)

    def _full(self) -> bool:
        return self.next_index - self.delivered >= RING_CHUNKS

    def _stands_full(self) -> bool:
        """The viewer was given as much as may stand unacked: from now on it is slow, nobody else."""
        return self.viewer is not None and self._full() and self._misfit() is None

    def _complete(self) -> bool:
        return self.max_chunks is not None and self.next_index >= self.max_chunks

    def _report(self, now_s: float) -> None:
        lagging = self.full_s is not None and now_s - self.full_s >= IDLE_REPORT_S
        # What is here in the wrong format only an owner can give anew, even of a session that is paused or complete.
        wants = self._wants() or self._misfit() is not None
        active, attached = wants and not lagging, self.viewer is not None
        period = self.period if active else None
        report = (active, attached, period, self.clock)
        if report == self.reported:
            return
        self.reported = report
        activity = messages.SessionActivity(
            session_id=self.sid,
            active=active,
            attached=attached,
            due_index=self.next_index,
            due_s=None if period is None else period.due_s(self.next_index, self.clock, now_s) - now_s,
            every_s=self.clock.chunk_s if period is not None and period.pace is Pace.LIVE else 0.0,
        )
        self.outbox.put(ToController(activity))

    def _show(self) -> None:
        """Tell the viewer the state when it is another than it was told last."""
        if self.viewer is None or not self.viewer.ready:
            return
        shown = (self.public(), self.paused, self.queue_position)
        if shown == self.shown:
            return
        self.shown = shown
        message: dict[str, Any] = {"type": "state", "state": shown[0], "epoch": self.epoch}
        if self.paused:
            message["reason"] = "paused"
        if self.queue_position >= 0:
            message["queue_position"] = self.queue_position
        self.outbox.put(ToViewer(self.viewer.connection, message))
