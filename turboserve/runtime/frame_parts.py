"""A chunk's frames over the data channel, for a worker that shares no memory with the gateway.

The worker cuts them into parts of at most PART_BYTES, in order, then says ChunkReady; the channel's own codes protect
each part, and the chunk's digest is checked over the whole. Both ends are bounded: the worker sends no part while
UNSENT_BYTES_MAX of earlier ones have not left, so that a slow network holds its chunks back as a full ring does, and
the gateway puts one chunk at a time together, of no more bytes than its model's chunks have.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from turboserve.digest import next_digest
from turboserve.errors import CorruptState, ProtocolError
from turboserve.runtime import channel
from turboserve.runtime import messages as m
from turboserve.runtime.frame_ring import FrameHeader

UNSENT_BYTES_MAX = 4 << 20


class PartSender:
    """The worker's end: takes chunks as a FrameProducer does. `peer` is the data channel as it is now."""

    def __init__(self, peer: Callable[[], channel.Channel | None]) -> None:
        self._peer = peer
        self._sending: tuple[object, ...] = ()
        self._offset = 0

    def push(self, header: FrameHeader, frames: np.ndarray) -> bool:
        """Send as many parts as may leave now; True once all have. Call again with the same chunk until then."""
        peer = self._peer()
        if peer is None:
            return False
        key = (id(peer), header.session_id, header.session_epoch, header.chunk_index)
        if key != self._sending:
            self._sending, self._offset = key, 0  # another chunk, or a new channel whose other end knows nothing
        data = np.ascontiguousarray(frames).data.cast("B")
        while self._offset < len(data):
            if peer.unsent_bytes > UNSENT_BYTES_MAX:
                return False
            part = data[self._offset : self._offset + m.PART_BYTES]
            peer.send(
                m.FramePart(
                    session_id=header.session_id,
                    epoch=header.session_epoch,
                    chunk_index=header.chunk_index,
                    offset=self._offset,
                    frames=header.frames,
                    height=header.height,
                    width=header.width,
                    data=bytes(part),
                )
            )
            self._offset += len(part)
        self._sending = ()
        return True


class PartAssembler:
    """The gateway's end, one for each worker's channel."""

    def __init__(self, chunk_bytes_max: int) -> None:
        self._chunk_bytes_max = chunk_bytes_max
        self._of: tuple[str, int, int] | None = None
        self._shape = (0, 0, 0, 3)
        self._data = bytearray()
        self._filled = 0

    @property
    def held_bytes(self) -> int:
        return len(self._data)

    def take(self, part: m.FramePart) -> None:
        """One part, the next of its chunk or the first of another. ProtocolError on any other."""
        of = (part.session_id, part.epoch, part.chunk_index)
        if part.offset == 0:
            shape = (part.frames, part.height, part.width, 3)
            size = part.frames * part.height * part.width * 3
            if not 0 < size <= self._chunk_bytes_max:
                raise ProtocolError(f"a chunk of {size} bytes", expected=f"1 to {self._chunk_bytes_max}")
            self._of, self._shape, self._data, self._filled = of, shape, bytearray(size), 0
        end = self._filled + len(part.data)
        if of != self._of or part.offset != self._filled or end > len(self._data) or not part.data:
            raise ProtocolError(f"bytes {part.offset}.., chunk {part.chunk_index}", expected=f"from {self._filled} on")
        self._data[self._filled : end] = part.data
        self._filled = end

    def frames(self, ready: m.ChunkReady) -> np.ndarray:
        """The frames that `ready` announces, uint8 [n, height, width, 3]. CorruptState when they are not here whole."""
        of = (ready.session_id, ready.epoch, ready.chunk_index)
        if of != self._of or self._filled != len(self._data):
            raise CorruptState("the chunk's frames did not come before their announcement")
        data, self._of, self._data = self._data, None, bytearray()
        if next_digest(ready.digest_prev, data) != ready.digest:
            raise CorruptState("the chunk's frames are not those of its digest")
        return np.frombuffer(data, np.uint8).reshape(self._shape)
