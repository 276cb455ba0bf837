"""Chunks over the data channel, for a worker that shares no memory with the gateway: encoded there, or raw frames.

The worker cuts a chunk into parts of at most PART_BYTES, in order, then says ChunkReady; the channel's own codes
protect each part. Of raw frames the chunk's digest is checked over the whole; of encoded ones, which are no part of a
stream's identity, the gateway takes the worker's word for it. Both ends are bounded: the worker sends no part while
UNSENT_BYTES_MAX of earlier ones have not left, so that a slow network holds its chunks back as a full ring does, and
the gateway puts one chunk at a time together, of no more bytes than its model's chunks can have.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from turboserve.digest import next_digest
from turboserve.errors import CorruptState, ProtocolError
from turboserve.runtime import channel
from turboserve.runtime import messages as m
from turboserve.runtime.frame_ring import FrameHeader
from turboserve.video.encoded import Encoded, encoded_bytes_max

UNSENT_BYTES_MAX = 4 << 20


class PartSender:
    """The worker's end. `peer` is the data channel as it is now."""

    def __init__(self, peer: Callable[[], channel.Channel | None]) -> None:
        self._peer = peer
        self._sending: tuple[object, ...] = ()
        self._offset = 0

    def push(self, header: FrameHeader, chunk: Encoded) -> bool:
        """Send as many parts as may leave now; True once all have. Call again with the same chunk until then."""
        peer = self._peer()
        if peer is None:
            return False
        key = (peer, header.session_id, header.session_epoch, header.chunk_index, chunk)
        if key != self._sending:
            self._sending, self._offset = key, 0  # another chunk, or a new channel whose other end knows nothing
        data = memoryview(chunk.data)
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
                    format=chunk.format,
                    total_bytes=len(data),
                    data=bytes(part),
                )
            )
            self._offset += len(part)
        self._sending = ()
        return True


class PartAssembler:
    """The gateway's end, one for each worker's channel. `frame_bytes_max` is what the frames of a chunk may take."""

    def __init__(self, frame_bytes_max: int) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._first: m.FramePart | None = None
        self._data = bytearray()
        self._filled = 0

    @property
    def held_bytes(self) -> int:
        return len(self._data)

    def take(self, part: m.FramePart) -> None:
        """One part, the next of its chunk or the first of another. ProtocolError on any other."""
        if part.offset == 0:
            self._begin(part)
        end = self._filled + len(part.data)
        first = self._first
        if first is None or _whose(part) != _whose(first) or part.offset != self._filled or end > len(self._data):
            raise ProtocolError(f"bytes {part.offset}.., chunk {part.chunk_index}", expected=f"from {self._filled} on")
        self._data[self._filled : end] = part.data
        self._filled = end

    def _begin(self, part: m.FramePart) -> None:
        frame_bytes = part.frames * part.height * part.width * 3
        if frame_bytes > self._frame_bytes_max:
            raise ProtocolError(
                f"a chunk of {frame_bytes} bytes of frames", expected=f"at most {self._frame_bytes_max}"
            )
        most = encoded_bytes_max(part.format, part.frames, part.height, part.width)
        least = frame_bytes if part.format == "raw" else 1
        if not least <= part.total_bytes <= most:
            raise ProtocolError(
                f"a chunk of {part.total_bytes} bytes as {part.format}", expected=f"{least} to {most} bytes"
            )
        self._first, self._data, self._filled = part, bytearray(part.total_bytes), 0

    def chunk(self, ready: m.ChunkReady) -> np.ndarray | bytes:
        """The chunk that `ready` announces: frames, uint8 [n, height, width, 3], or bytes in the format that it names.

        CorruptState when it is not here whole, ProtocolError when the parts were announced as something else.
        """
        first = self._first
        if first is None or _of(ready) != _of(first) or self._filled != len(self._data):
            raise CorruptState("the chunk's frames did not come before their announcement")
        if (ready.format, ready.frames) != (first.format, first.frames):
            raise ProtocolError(
                f"{ready.frames} frames announced as {ready.format}",
                expected=f"{first.frames} as {first.format}, as the parts said",
            )
        data, self._first, self._data = self._data, None, bytearray()
        if ready.format != "raw":
            return bytes(data)
        if next_digest(ready.digest_prev, data) != ready.digest:
            raise CorruptState("the chunk's frames are not those of its digest")
        return np.frombuffer(data, np.uint8).reshape(first.frames, first.height, first.width, 3)


def _of(message: m.FramePart | m.ChunkReady) -> tuple[str, int, int]:
    return message.session_id, message.epoch, message.chunk_index


def _whose(part: m.FramePart) -> tuple[object, ...]:
    return *_of(part), part.format, part.frames, part.height, part.width, part.total_bytes
