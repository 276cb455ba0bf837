"""Recovery points written beside the engine: it goes on with the next chunk while the last one's page is copied out.

What is copied must not change meanwhile. Pages of finished chunks do not, until a pass is about to write to one of
them; the engine then waits for the copy (`Job.pages`). Fields that change with every chunk or prompt are cloned on the
device first, in the engine's own order; memory is kept for `AT_ONCE` such clones (2 GB each with a Wan VAE), and no
more points are on their way. On CUDA the copies run on a stream of their own that begins where the engine's stood.

On a CPU the engine's own thread is as good a place: there is no second device that would copy meanwhile.
"""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch

from turboserve.model.interface import Field, SessionTensors, Tier, Update, state_bytes
from turboserve.runtime.recovery_store import RecoveryPoint
from turboserve.runtime.session_points import SessionPoints
from turboserve.runtime.session_tensors import HeldSession

AT_ONCE = 2


def frozen_bytes(layout: Sequence[Field]) -> int:
    """Device memory that the clones of all points on their way take at most."""
    changing = [one for one in layout if one.update in (Update.PER_PROMPT, Update.OVERWRITE)]
    return AT_ONCE * state_bytes(changing, Tier.DEVICE)


class Job:
    """One point on its way. `pages` are the slot's pages that must stay as they are until it is done."""

    def __init__(self, session: HeldSession, epoch: int, pages: frozenset[int]) -> None:
        self.pages = pages
        self.chunk = session.state.next_chunk_index
        self.took_s = 0.0
        self._session: HeldSession | None = session
        self._epoch = epoch
        self._ended = threading.Event()
        self._point: RecoveryPoint | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    def wait_ended(self) -> None:
        """Until nothing of it is under way, whatever came of it."""
        self._ended.wait()

    def wait(self) -> RecoveryPoint:
        """Until the point is committed; raises what kept it from being so (ArenaFull)."""
        self._ended.wait()
        if self._error is not None:
            raise self._error
        assert self._point is not None
        return self._point

    def run(self, points: SessionPoints) -> None:
        before_s = time.monotonic()
        assert self._session is not None
        try:
            self._point = points.write(self._session, self._epoch)
        except BaseException as error:  # it is the engine's to raise, in its own thread
            self._error = error
        self._session = None  # the clones go back now, not when the session's next point is begun
        self.took_s = time.monotonic() - before_s
        self._ended.set()


class BackgroundPoints:
    """One thread that writes points, in the order they were begun. `begin` is for the engine's thread."""

    def __init__(self, points: SessionPoints, layout: Sequence[Field], device: torch.device) -> None:
        self._points = points
        self._changing = [one.name for one in layout if one.update in (Update.PER_PROMPT, Update.OVERWRITE)]
        self._begun: list[Job] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Bounded by the sessions: each has one job at a time.
        self._jobs: queue.SimpleQueue[tuple[Job, torch.cuda.Event | None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="points", daemon=True).start()

    def begin(self, session: HeldSession, epoch: int) -> Job:
        """Start writing the point of a session at a chunk boundary; waits while there is no memory for its clones."""
        while len(running := [one for one in self._begun if not one.done]) >= AT_ONCE:
            running[0].wait_ended()
        self._begun = running
        job = Job(self._frozen(session), epoch, self._points.unwritten_pages(session))
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record()
        self._begun.append(job)
        self._jobs.put((job, ready))
        return job

    def close(self) -> None:
        """End the thread once what was begun is written."""
        self._jobs.put(None)

    def _frozen(self, session: HeldSession) -> HeldSession:
        """The session as it is now, whatever becomes of it."""
        state = session.state
        tensors = {name: one.clone() if name in self._changing else one for name, one in state.tensors.items()}
        frozen = SessionTensors(
            session_id=state.session_id,
            seed=state.seed,
            slot=state.slot,
            tensors=tensors,
            next_chunk_index=state.next_chunk_index,
            control=state.control,
            scalars=copy.deepcopy(state.scalars),
            decoder=state.decoder,
            prompt_writes=state.prompt_writes,
        )
        return replace(session, state=frozen, kept=deque(session.kept), saved=False, queue=[], job=None)

    def _run(self) -> None:
        while True:
            taken = self._jobs.get()
            if taken is None:
                return
            job, ready = taken
            if self._stream is None or ready is None:
                job.run(self._points)
                continue
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                job.run(self._points)
