"""Pass-level continuous batching: one packed pass at a time, made of whatever segments are ready and most urgent.

A session with a credit has a list of segments for that chunk: its denoise steps, then the context pass. They run
strictly in order; between two passes anything may happen, so a newcomer joins at the next pass, not at the next chunk.

    submit(chunk)  ->  pass, pass, ...  ->  last denoise step: decode, digest, frames out  ->  context pass: committed

Frames go out before the context pass: a viewer does not wait for it. Until the frames are out a chunk can be cancelled
without a trace, because denoise passes write to the scratch page alone; after that it is part of the history.

A fault belongs to one session. When a packed pass raises, its segments run again one by one (denoise and context passes
may be repeated), and whoever raises alone is broken. Values that are not finite are found by the model's decode. A
broken session keeps its slot until it is closed; its neighbours' bits do not change.

The engine has no thread and no clock of its own: a caller with both calls `run_pass` while `has_work`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from turboserve import ranges
from turboserve.digest import next_digest
from turboserve.errors import SessionPoisoned, TurboServeError
from turboserve.model.interface import (
    ChunkRequest,
    PackedBatch,
    PassKind,
    Segment,
    SessionTensors,
    StreamingModel,
    pack,
)
from turboserve.runtime.batch import form_batch
from turboserve.runtime.cost_model import MeasuredCost
from turboserve.runtime.engine_sessions import EngineSessions
from turboserve.runtime.failpoints import failpoint
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.pass_timer import PassTimer
from turboserve.runtime.session_tensors import ChunkWork, HeldSession
from turboserve.runtime.worker_events import BrokenSession, FinishedChunk, PassEvent

if TYPE_CHECKING:
    from turboserve.runtime.background_points import BackgroundPoints
    from turboserve.runtime.session_points import SessionPoints

_RANGE_OF = {PassKind.DENOISE: "denoise", PassKind.CONTEXT: "context pass", PassKind.RECACHE: "recache"}
Emit: TypeAlias = Callable[[PassEvent], None]
PREPARE_WAIT_S = 0.002
"""Pause of a pass that finds only sessions whose model still prepares their chunk."""


class Engine(EngineSessions):
    """The sessions of one worker and the passes over them. For one thread.

    With `points`, a session's recovery point is brought up to date after every `recovery_every_chunks` chunks: between
    two passes, or in the `background`.
    """

    def __init__(
        self,
        model: StreamingModel,
        pool: KvPool,
        cost: MeasuredCost | None = None,
        *,
        points: SessionPoints | None = None,
        recovery_every_chunks: int = 1,
        background: BackgroundPoints | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(model, pool, points, recovery_every_chunks, background, clock)
        self.cost = cost or MeasuredCost(segment_max=pool.slot_count)
        self._timer = PassTimer(pool.device, clock)

    # ------------------------------------------------------------------ passes

    def run_pass(self) -> list[PassEvent]:
        """Run one packed pass and return what came of it: frames that are out, sessions that broke."""
        events: list[PassEvent] = []
        self.run_pass_into(events.append)
        return events

    def run_pass_into(self, emit: Emit) -> None:
        """The same, each result at the moment it is there: a session does not wait for its neighbours' decode."""
        self.show_work([one.session_id for one in self._sessions.values() if one.work is not None or one.queue])
        for session in self._sessions.values():
            if session.work is None and session.queue and self._chunk_ready(session):
                self._begin_chunk(session, emit)
        working = [one for one in self._sessions.values() if one.work is not None]
        if not working:
            self.show_work([])
            if self.has_work:
                time.sleep(PREPARE_WAIT_S)
            return
        started_s = self._clock()
        with ranges.span("batch"):
            chosen, batch = form_batch(working, started_s, self.cost, self.model.spec.chunk_s)
        for session in chosen:
            assert session.work is not None
            session.work.batch_sizes.append(len(chosen))
            if session.work.started_s is None:
                session.work.started_s = started_s
        self.publish(started_s + self.cost.pass_s(batch.tokens))
        self.stats.passes += 1
        self.stats.segments += len(chosen)
        self.stats.tokens += batch.tokens
        with ranges.span("pass"), torch.inference_mode():
            results = self._forward(batch)
            for session, result in zip(chosen, results, strict=True):
                self._take(session, result, emit)
        self._write_through(chosen)
        self.publish()
        self.show_work(self._in_work())
        self.stats.busy_s += self._clock() - started_s

    def _chunk_ready(self, session: HeldSession) -> bool:
        """Whether a session's next chunk can begin now, not after its model has prepared it."""
        ready: Callable[[SessionTensors, ChunkRequest], bool] | None = getattr(self.model, "chunk_ready", None)
        return ready is None or ready(session.state, session.queue[0].request)

    def _begin_chunk(self, session: HeldSession, emit: Emit) -> None:
        """Ask the model for the segments of the session's next credited chunk."""
        queued = session.queue.pop(0)
        session.saved = False
        try:
            with torch.inference_mode():
                segments = self.model.next_passes(session.state, queued.request)
        except Exception as error:  # whatever a model raises for one session must not end the others
            if is_fatal(error):
                raise
            self._break(session, queued.request.chunk_index, error, emit)
            return
        if session.job is not None and any(page in session.job.pages for one in segments for page in one.pages):
            self._settle(session)
        session.work = ChunkWork(queued.request, segments, queued.deadline_s, queued.queued_s)

    def _forward(self, batch: PackedBatch) -> list[torch.Tensor | Exception]:
        """Rows of each segment, or what it raised when it ran alone."""
        try:
            with _segment_ranges(batch), self._timer.measure(len(batch.segments), batch.tokens):
                rows = self.model.forward(batch)
        except Exception as error:
            if is_fatal(error):
                raise
            if len(batch.segments) == 1:
                return [error]
            return [result for segment in batch.segments for result in self._forward(pack([segment]))]
        for measured in self._timer.finished():
            self.cost.observe(measured)
        return [rows[batch.rows(index)] for index in range(len(batch.segments))]

    def _take(self, session: HeldSession, result: torch.Tensor | Exception, emit: Emit) -> None:
        """Give a session its rows and move it on by one segment."""
        work = session.work
        assert work is not None
        if isinstance(result, Exception):
            self._break(session, work.request.chunk_index, result, emit)
            return
        segment = work.segment
        try:
            self.model.advance(segment, result)
            if segment.kind is PassKind.RECACHE:
                session.pages_rewritten += 1
            if segment.completes_latents:
                finished = self._decode(session, work)
                session.kept.append(finished)
                emit(finished)
                failpoint("worker.chunk.emitted")
            work.position += 1
            if work.position == len(work.segments):
                self._finish(session, segment, work)
        except Exception as error:
            if is_fatal(error):
                raise
            self._break(session, work.request.chunk_index, error, emit)

    def _decode(self, session: HeldSession, work: ChunkWork) -> FinishedChunk:
        """Latents to frames, once per chunk and per session: the codec sees one session at a time, at one shape."""
        before_s = self._clock()
        with ranges.span("decode", session.session_id, work.request.chunk_index):
            # Row-major from here on: the digest and the frame ring both take the bytes as they lie.
            frames = np.ascontiguousarray(self.model.decode(session.state, work.request.chunk_index))
        after_s = self._clock()
        digest_prev, session.digest = session.digest, next_digest(session.digest, frames)
        work.emitted = True
        session.decoded_s = after_s
        assert work.started_s is not None
        self.stats.chunks += 1
        self.stats.chunk_latency_s += after_s - work.queued_s
        return FinishedChunk(
            session_id=session.session_id,
            chunk_index=work.request.chunk_index,
            frames=frames,
            digest=session.digest,
            digest_prev=digest_prev,
            steps=work.request.steps,
            prompt_version=work.request.control.version,
            wait_s=work.started_s - work.queued_s,
            denoise_s=before_s - work.started_s,
            decode_s=after_s - before_s,
            batch_size=sum(work.batch_sizes) / len(work.batch_sizes),
            context_before_s=session.context_s,
        )

    def _finish(self, session: HeldSession, last: Segment, work: ChunkWork) -> None:
        """The context pass is done: the chunk is part of the history."""
        index = work.request.chunk_index
        if not (last.commits and work.emitted and session.state.next_chunk_index == index + 1):
            raise SessionPoisoned(f"the model's segments of chunk {index} did not decode and commit it")
        session.context_s = self._clock() - session.decoded_s
        session.work = None
        failpoint("worker.chunk.committed")

    def _break(self, session: HeldSession, chunk_index: int, error: Exception, emit: Emit) -> None:
        session.fault = str(error) or type(error).__name__
        session.work = None
        session.queue.clear()
        self.stats.broken += 1
        code = error.code if isinstance(error, TurboServeError) else SessionPoisoned.code
        emit(BrokenSession(session_id=session.session_id, chunk_index=chunk_index, code=code, message=session.fault))


def _segment_ranges(batch: PackedBatch) -> AbstractContextManager[Any]:
    """What the pass does for each session, on the profiler's time line."""
    if not ranges.listening():
        return ranges.span("")
    return ranges.spans((_RANGE_OF[one.kind], one.state.session_id, one.chunk_index) for one in batch.segments)


def is_fatal(error: Exception) -> bool:
    """Whether the device itself is lost (a CUDA error stays with the process): then the worker must end."""
    accelerator_error = getattr(torch, "AcceleratorError", None)
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    return accelerator_error is not None and isinstance(error, accelerator_error) and not out_of_memory
