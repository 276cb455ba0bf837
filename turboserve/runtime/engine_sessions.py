"""The sessions an engine holds: opened, restored, adopted, stopped, prepared for, closed. For the engine's thread.

A session stands at a chunk boundary when its last chunk is committed and none has begun. Only there is its recovery
point written: after each chunk as it goes (write-through), and before it leaves. A full arena stops no stream: it is
counted, the older point stays, and recovery then starts from that one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turboserve.errors import ArenaFull, Conflict, NotFound, NotOffered, SessionPoisoned
from turboserve.model.interface import ChunkRequest, Control, SessionTensors, StreamingModel
from turboserve.ranges import span
from turboserve.runtime.failpoints import failpoint
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.session_tensors import HeldSession, QueuedChunk, hold_session
from turboserve.runtime.worker_events import AtWork

if TYPE_CHECKING:
    from turboserve.runtime.arena import ExtentId
    from turboserve.runtime.background_points import BackgroundPoints
    from turboserve.runtime.session_points import Restored, SessionPoints

log = logging.getLogger(__name__)

FULL_RETRY_CHUNKS = 8
"""Chunks that a session makes before it asks a full arena again."""
FULL_LOG_S = 10.0


@dataclass(slots=True)
class EngineStats:
    """Totals since the start; whoever reports takes differences."""

    passes: int = 0
    segments: int = 0
    tokens: int = 0
    chunks: int = 0
    broken: int = 0
    cancelled: int = 0
    busy_s: float = 0.0
    chunk_latency_s: float = 0.0
    """Sum over chunks of credit received to frames out."""
    points: int = 0
    points_refused: int = 0
    """Recovery points that the arena had no room for."""
    point_s: float = 0.0
    """Time spent on writing points; part of `busy_s` where a chunk's commit caused it."""
    restored: int = 0


class EngineSessions:
    """Who is resident, and how each came and goes."""

    def __init__(
        self,
        model: StreamingModel,
        pool: KvPool,
        points: SessionPoints | None,
        recovery_every_chunks: int,
        background: BackgroundPoints | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.pool = pool
        self.points = points
        self.stats = EngineStats()
        self.at_work = AtWork()
        """As of the last pass that began or ended; may be read from any thread."""
        self.show_work: Callable[[list[str]], None] = lambda names: None
        """Told which sessions are being worked on before anything is done for them (`work_board.py`)."""
        self._clock = clock
        self._every_chunks = recovery_every_chunks
        self._background = background
        self._sessions: dict[str, HeldSession] = {}
        self._prepared: dict[str, dict[int, ExtentId]] = {}
        self._logged_full_s = float("-inf")

    # ------------------------------------------------------------------ coming

    def open(self, session_id: str, seed: int, control: Control, epoch: int = 0, decoder: str = "") -> None:
        """Take a slot and begin. PoolExhausted or what the model raises; then nothing is held."""
        if session_id in self._prepared:
            self.drop_prepared(session_id)  # it must begin in a slot that was wiped
        self.show_work([session_id, *self._in_work()])
        session = hold_session(self.pool, self.model, session_id, seed, control, epoch, decoder)
        failpoint("worker.open.begun")
        session.point_every = self._every_chunks
        self._sessions[session_id] = session
        self.show_work(self._in_work())

    def restore(
        self, session_id: str, seed: int, epoch: int = 0, decoder: str = "", *, any_numerics: bool = False
    ) -> Restored | None:
        """Go on from the session's newest recovery point; None when there is none that fits, and nothing is held then.
        `any_numerics`: one that was made in other bits fits too.

        PoolExhausted when no slot is free. A slot that was prepared is used.
        """
        if self.points is None:
            return None
        self.show_work([session_id, *self._in_work()])
        loaded = self._prepared.pop(session_id, None)
        if loaded is None:
            self.pool.acquire(session_id)
            loaded = {}
        failpoint("worker.open.begun")
        try:
            slot, decoder = self.pool.held[session_id], self.model.spec.decoder(decoder)
            tensors = self.pool.tensors(session_id, decoder)
            state = SessionTensors(session_id=session_id, seed=seed, slot=slot, tensors=tensors, decoder=decoder)
            with span("restore", session_id):
                restored = self.points.read(state, loaded, any_numerics=any_numerics)
        except BaseException:
            self.pool.release(session_id)
            raise
        if restored is None:
            self.pool.release(session_id)
            return None
        session = HeldSession(
            state,
            epoch,
            digest=restored.digest,
            saved=True,
            point_chunk=state.next_chunk_index,
            point_every=self._every_chunks,
        )
        session.kept.extend(restored.chunks)
        self._sessions[session_id] = session
        self.stats.restored += 1
        self.show_work(self._in_work())
        failpoint("worker.open.read")
        return restored

    def adopt(self, session_id: str, epoch: int) -> int:
        """Go on with what is held, under a newer epoch; the chunk that may be submitted next. A chunk whose frames are
        not out is given up without a trace, and so is what was queued."""
        session = self._session(session_id)
        if session.fault is not None:
            raise SessionPoisoned(f"session {session_id} is broken: {session.fault}")
        failpoint("worker.adopt")
        session.epoch = epoch
        return self.cancel(session_id)

    def prepare(self, session_id: str) -> None:
        """Hold a slot for a session that will be restored here, and read ahead the pages its newest point has."""
        if session_id in self._prepared:
            return
        self.pool.acquire(session_id)
        failpoint("worker.prepare.slot")
        try:
            tensors = self.pool.tensors(session_id)
            with span("migrate", session_id):
                loaded = {} if self.points is None else self.points.read_pages(session_id, tensors)
        except BaseException:
            self.pool.release(session_id)
            raise
        self._prepared[session_id] = loaded
        failpoint("worker.prepare.read")

    # ------------------------------------------------------------------ going

    def close(self, session_id: str) -> None:
        """Free all that the session holds, whatever it is doing. Unknown sessions are no error."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._settle(session)
            self.pool.release(session_id)
            if self.points is not None:
                self.points.forget(session_id)

    def drop_prepared(self, session_id: str) -> None:
        """Free a prepared slot. Unknown ones are no error."""
        if self._prepared.pop(session_id, None) is not None:
            self.pool.release(session_id)

    def save(self, session_id: str) -> int:
        """Write the session's recovery point at the boundary where it stands; its bytes.

        ArenaFull, SessionPoisoned, Conflict while a chunk is in work, or NotOffered on a worker without an arena; the
        session goes on as it was.
        """
        session = self._session(session_id)
        if session.work is not None:
            raise Conflict(f"chunk {session.work.request.chunk_index} of session {session_id} is in work")
        if session.fault is not None:
            raise SessionPoisoned(f"session {session_id} is broken: {session.fault}")
        if self.points is None:
            raise NotOffered("this worker has no arena to put the session's state in", hint="start it by the launcher")
        return self._save(session, self.points)

    def _save(self, session: HeldSession, points: SessionPoints) -> int:
        self._settle(session)
        started_s = self._clock()
        with span("offload", session.session_id, session.state.next_chunk_index):
            point = points.write(session, session.epoch)
        self._note_point(session, point.chunk, self._clock() - started_s)
        return point.total_bytes

    def _note_point(self, session: HeldSession, chunk: int, took_s: float) -> None:
        session.point_chunk = chunk
        session.point_every = self._every_chunks
        self.stats.points += 1
        self.stats.point_s += took_s

    def _settle(self, session: HeldSession) -> None:
        """Wait for the point that is being written of the session, if one is."""
        job, session.job = session.job, None
        if job is None:
            return
        try:
            job.wait()
        except ArenaFull as error:
            session.saved = False
            self._refused(session, job.chunk, error)
            return
        self._note_point(session, job.chunk, job.took_s)

    def _write_through(self, sessions: Iterable[HeldSession]) -> None:
        """Points of those that have just committed a chunk and are due one."""
        if self.points is None:
            return
        for session in sessions:
            behind = session.state.next_chunk_index - session.point_chunk
            if session.work is not None or session.fault is not None or session.saved or behind < session.point_every:
                continue
            if self._background is not None:
                self._write_beside(session, self._background)
                continue
            try:
                self._save(session, self.points)
            except ArenaFull as error:
                self._refused(session, session.state.next_chunk_index, error)

    def _write_beside(self, session: HeldSession, background: BackgroundPoints) -> None:
        if session.job is not None:
            if not session.job.done:
                return  # copies are slower than chunks just now: a later boundary will do
            self._settle(session)
            if session.state.next_chunk_index - session.point_chunk < session.point_every:
                return
        session.job = background.begin(session, session.epoch)
        session.saved = True  # until the next chunk begins

    def _refused(self, session: HeldSession, chunk: int, error: ArenaFull) -> None:
        """The arena had no room for the point of `chunk`."""
        session.point_every = chunk - session.point_chunk + FULL_RETRY_CHUNKS
        self.stats.points_refused += 1
        now_s = self._clock()
        if now_s - self._logged_full_s >= FULL_LOG_S:
            self._logged_full_s = now_s
            log.warning(
                "no recovery point of %s at chunk %d (%d refused so far): %s",
                session.session_id,
                session.state.next_chunk_index,
                self.stats.points_refused,
                error,
            )

    # ------------------------------------------------------------------ work

    def submit(
        self, session_id: str, request: ChunkRequest, deadline_s: float, received_s: float | None = None
    ) -> None:
        """Queue one chunk; its index must be the next. Both times are of the engine's clock; `received_s` is when the
        credit came to this process, which may be up to a pass ago (None: now)."""
        session = self._session(session_id)
        if session.fault is not None:
            raise SessionPoisoned(f"session {session_id} is broken: {session.fault}")
        if request.chunk_index != session.next_unqueued_index:
            raise Conflict(
                f"chunk {request.chunk_index} of session {session_id}", expected=str(session.next_unqueued_index)
            )
        session.queue.append(QueuedChunk(request, deadline_s, self._clock() if received_s is None else received_s))
        # What the chunk needs first, such as its prompt's embedding, is begun while the one before is still made.
        begin_to_prepare = getattr(self.model, "chunk_ready", None)
        if begin_to_prepare is not None:
            begin_to_prepare(session.state, request)

    def cancel(self, session_id: str) -> int:
        """Drop every chunk whose frames are not out; the index of the first chunk that may be submitted again.

        A chunk whose frames are out goes on to its context pass: it is part of the history already.
        """
        session = self._session(session_id)
        dropped = self._forget_queue(session)
        if session.work is not None and not session.work.emitted:
            session.work = None
            dropped += 1
        self.stats.cancelled += dropped
        return session.next_unqueued_index

    def forget_queue(self, session_id: str) -> None:
        """Drop what was submitted and not begun; the chunk in work goes on."""
        self.stats.cancelled += self._forget_queue(self._session(session_id))

    @staticmethod
    def _forget_queue(session: HeldSession) -> int:
        dropped = len(session.queue)
        session.queue.clear()
        return dropped

    # ------------------------------------------------------------------ what is held

    @property
    def session_count(self) -> int:
        """Sessions that hold a slot, those that are only prepared for included."""
        return len(self._sessions) + len(self._prepared)

    @property
    def has_work(self) -> bool:
        """Whether `run_pass` would do something; when not, the caller should block, not spin."""
        return any(one.work is not None or one.queue for one in self._sessions.values())

    @property
    def active_count(self) -> int:
        """Sessions with a chunk in work or queued. May be read from another thread: the copy is one step."""
        return sum(one.work is not None or bool(one.queue) for one in list(self._sessions.values()))

    def _in_work(self) -> list[str]:
        """Sessions with a chunk that has begun and is not committed."""
        return [one.session_id for one in self._sessions.values() if one.work is not None]

    def publish(self, until_s: float = 0.0) -> None:
        """Bring `at_work` up to date."""
        self.at_work = AtWork(
            until_s,
            {
                one.session_id: (
                    one.epoch,
                    one.state.next_chunk_index,
                    one.work is not None and one.work.started_s is not None,
                )
                for one in self._sessions.values()
                if one.fault is None
            },
        )

    def at_boundary(self, session_id: str) -> bool:
        return self._session(session_id).at_boundary

    def next_chunk_index(self, session_id: str) -> int:
        """The chunk that comes after the last committed one."""
        return self._session(session_id).state.next_chunk_index

    def _session(self, session_id: str) -> HeldSession:
        session = self._sessions.get(session_id)
        if session is None:
            raise NotFound(f"session {session_id} is not on this worker")
        return session
