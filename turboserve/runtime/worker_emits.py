"""Chunks on their way out of a worker: into the frame ring, or encoded and in parts over the data channel.

The message that announces a chunk follows its bytes. A full ring, or a channel that is slow, is back-pressure: the
chunks wait, in order, and the gateway's credits stop by themselves. What waits to be encoded is bounded likewise: the
last chunks of each session that are made and not accepted, each once.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from turboserve.errors import Conflict, TurboServeError
from turboserve.runtime import channel
from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.failpoints import failpoint
from turboserve.runtime.frame_parts import PartSender
from turboserve.runtime.frame_ring import FrameHeader
from turboserve.runtime.worker_books import Action, Emit, Stop
from turboserve.runtime.worker_logic import WorkerLogic
from turboserve.video.encoded import Encoded

if TYPE_CHECKING:
    import numpy as np

RING_FULL_RETRY_S = 0.002


class FrameSink(Protocol):
    """The frame ring's end."""

    def push(self, header: FrameHeader, frames: np.ndarray) -> bool:
        """False when there is no room now: the same chunk is offered again later."""
        ...


class Emitter:
    """For the thread that talks, whose loop runs. Without a `ring` chunks are encoded and go over `peer()`."""

    def __init__(
        self,
        worker_epoch: int,
        logic: WorkerLogic,
        ring: FrameSink | None,
        *,
        peer: Callable[[], channel.Channel | None],
        send: Callable[[m.Message], None],
        apply: Callable[[list[Action]], None],
        log: Any,
    ) -> None:
        self._worker_epoch = worker_epoch
        self._logic = logic
        self._ring = ring
        self._peer = peer
        self._send = send
        self._apply = apply
        self._log = log
        self._parts = PartSender(peer)
        self._ready: deque[tuple[Emit, Encoded | None]] = deque()
        self._waiting: set[Emit] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._encoders: Any = None
        if ring is None:
            # Imported where it is needed: a worker beside a ring has no use for libav.
            from turboserve.runtime.encode_thread import EncodeThread

            self._encoders = EncodeThread(logic.spec, self._encoded_soon)

    def add(self, emit: Emit) -> None:
        """A chunk is to leave. `pump` is called after it."""
        if self._encoders is None:
            self._ready.append((emit, None))
            return
        chunk = self._logic.made(emit)
        if chunk is not None and emit not in self._waiting:
            self._loop = asyncio.get_running_loop()
            self._waiting.add(emit)
            self._encoders.submit(emit, chunk.frames)

    def forget_closed(self) -> None:
        """Encoders of sessions that are gone are given back; called now and then."""
        if self._encoders is not None:
            self._encoders.keep(self._logic.sessions)

    def _encoded_soon(self, emit: Emit, encoded: Encoded | Exception) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._encoded, emit, encoded)

    def _encoded(self, emit: Emit, encoded: Encoded | Exception) -> None:
        if isinstance(encoded, Encoded):
            self._ready.append((emit, encoded))
            self.pump()
            return
        self._waiting.discard(emit)
        if not isinstance(encoded, TurboServeError):
            raise RuntimeError("the encoding thread failed") from encoded
        self._log.error(
            "chunk not encoded",
            session=emit.session_id,
            chunk=emit.chunk_index,
            format=emit.format,
            message=str(encoded),
        )
        self._apply(self._logic.cannot_encode(emit))

    def pump(self) -> None:
        """Let go what is ready, in order, until there is no room for more."""
        if self._retry is None:
            self._pump()

    def _pump(self) -> None:
        self._retry = None
        while self._ready:
            emit, encoded = self._ready[0]
            chunk = self._logic.may_emit(emit, time.monotonic())
            if chunk is not None and self._peer() is not None:
                try:
                    if not self._push(emit, chunk, encoded):
                        self._retry = asyncio.get_running_loop().call_later(RING_FULL_RETRY_S, self._pump)
                        return
                except Conflict as error:
                    self._log.error("the frame ring has a newer writer", error=str(error))
                    self._ready.clear()
                    self._apply([Stop("the frame ring has a newer writer")])
                    return
                failpoint("worker.emit.ring")
                self._send(_announcement(emit, chunk, encoded))
                self._logic.did_emit(emit)
                failpoint("worker.emit.sent")
            self._ready.popleft()
            self._waiting.discard(emit)

    def _push(self, emit: Emit, chunk: e.FinishedChunk, encoded: Encoded | None) -> bool:
        header = self._header(emit, chunk)
        if encoded is not None:
            return self._parts.push(header, encoded)
        assert self._ring is not None
        return self._ring.push(header, chunk.frames)

    def _header(self, emit: Emit, chunk: e.FinishedChunk) -> FrameHeader:
        frames, height, width, _ = chunk.frames.shape
        return FrameHeader(
            session_id=emit.session_id,
            worker_epoch=self._worker_epoch,
            session_epoch=emit.epoch,
            chunk_index=emit.chunk_index,
            frames=frames,
            height=height,
            width=width,
            steps=chunk.steps,
            prompt_version=chunk.prompt_version,
            digest=bytes.fromhex(chunk.digest),
            digest_prev=bytes.fromhex(chunk.digest_prev),
        )


def _announcement(emit: Emit, chunk: e.FinishedChunk, encoded: Encoded | None) -> m.ChunkReady:
    return m.ChunkReady(
        session_id=emit.session_id,
        epoch=emit.epoch,
        chunk_index=emit.chunk_index,
        digest=chunk.digest,
        digest_prev=chunk.digest_prev,
        frames=len(chunk.frames),
        steps=chunk.steps,
        prompt_version=chunk.prompt_version,
        wait_ms=1e3 * chunk.wait_s,
        denoise_ms=1e3 * chunk.denoise_s,
        decode_ms=1e3 * chunk.decode_s,
        batch_size=chunk.batch_size,
        context_before_ms=1e3 * chunk.context_before_s,
        format=encoded.format if encoded is not None else "raw",
        encode_ms=1e3 * encoded.encode_s if encoded is not None else 0.0,
        init=encoded.init if encoded is not None else b"",
    )
