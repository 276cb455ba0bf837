"""From sessions with work to one packed pass: what each has ready, and which of them go together.

All lengths and offsets are counted here, on the host; nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence

from turboserve.model.interface import PackedBatch, pack
from turboserve.orchestrator.batching import CostModel, ReadySegment, choose_batch
from turboserve.runtime.session_tensors import HeldSession


def ready_segment(session: HeldSession, chunk_s: float) -> ReadySegment:
    """A session's next segment as the decision sees it.

    Until its frames are out, a chunk's deadline is its own. Its context pass is owed to the next chunk: that one's
    deadline when it is queued, else one chunk time later, so that it yields to whoever has frames due.
    """
    work = session.work
    assert work is not None
    segment = work.segment
    if not work.emitted:
        deadline_s, remaining = work.deadline_s, work.remaining_to_frames
    elif session.queue:
        following = session.queue[0]
        deadline_s, remaining = following.deadline_s, work.remaining + following.request.steps
    else:
        deadline_s, remaining = work.deadline_s + chunk_s, work.remaining
    return ReadySegment(
        session=session.session_id,
        kind=segment.kind.value,
        tokens=segment.tokens,
        deadline_s=deadline_s,
        remaining_passes=max(1, remaining),
    )


def form_batch(
    sessions: Sequence[HeldSession], now_s: float, cost: CostModel, chunk_s: float
) -> tuple[list[HeldSession], PackedBatch]:
    """The sessions that share the next pass, most urgent first, and their segments laid end to end."""
    ready = [ready_segment(session, chunk_s) for session in sessions]
    chosen = [sessions[index] for index in choose_batch(ready, now_s, cost)]
    return chosen, pack([session.work.segment for session in chosen if session.work is not None])
