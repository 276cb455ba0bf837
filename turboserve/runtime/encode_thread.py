"""Encodes chunks on a worker that shares no memory with the gateway: a thread of its own, beside the engine's.

libav works without the interpreter lock, so the engine's thread goes on meanwhile. Chunks are encoded one after the
other, in the order in which they were handed over; whoever hands them over bounds how many wait (`worker_emits.py`).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable

import av
import numpy as np

from turboserve.errors import TurboServeError, WorkerError
from turboserve.model.interface import ModelSpec
from turboserve.runtime.worker_books import Emit
from turboserve.video.encode import ChunkEncoder
from turboserve.video.encoded import Encoded

Done = Callable[[Emit, Encoded | Exception], None]


class EncodeThread:
    """`done` is called in this thread for every chunk handed over, with an error where it could not be encoded: a
    TurboServeError is about the chunk, any other about this process."""

    def __init__(self, spec: ModelSpec, done: Done) -> None:
        self._spec = spec
        self._done = done
        self._queue: queue.SimpleQueue[tuple[Emit, np.ndarray] | frozenset[str]] = queue.SimpleQueue()
        self._encoders: dict[str, ChunkEncoder] = {}
        self._seen: set[str] = set()
        threading.Thread(target=self._run, name="encode", daemon=True).start()

    def submit(self, emit: Emit, frames: np.ndarray) -> None:
        self._seen.add(emit.session_id)
        self._queue.put((emit, frames))

    def keep(self, session_ids: Iterable[str]) -> None:
        """Give back what is held for sessions that are not here any more."""
        kept = self._seen.intersection(session_ids)
        if kept != self._seen:
            self._seen = kept
            self._queue.put(frozenset(kept))

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, frozenset):
                self._encoders = {name: one for name, one in self._encoders.items() if name in item}
                continue
            emit, frames = item
            try:
                self._done(emit, self._encode(emit, frames))
            except TurboServeError as error:
                self._done(emit, error)
            except av.FFmpegError as error:
                self._done(emit, WorkerError(f"libav cannot encode it: {error}"))
            except Exception as error:
                self._done(emit, error)

    def _encode(self, emit: Emit, frames: np.ndarray) -> Encoded:
        started_s = time.perf_counter()
        if emit.format == "raw":
            return Encoded("raw", frames.tobytes())
        first_frame = self._spec.frames_before(emit.chunk_index)
        encoder = self._encoders.get(emit.session_id)
        height, width = frames.shape[1:3]
        if encoder is None or (encoder.format, encoder.height, encoder.width) != (emit.format, height, width):
            encoder = self._encoders[emit.session_id] = ChunkEncoder(
                emit.format, width, height, self._spec.fps, index=emit.chunk_index, first_frame=first_frame
            )
        data = encoder.encode(frames, emit.chunk_index, first_frame)
        return Encoded(emit.format, data, encoder.init_segment(), time.perf_counter() - started_s)
