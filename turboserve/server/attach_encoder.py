"""What one attach is sent of each chunk: encoded here where its frames came, else as the worker encoded it."""

from __future__ import annotations

from typing import cast

from turboserve.server.stream_shape import StoredChunk, StreamShape
from turboserve.video.encode import ChunkEncoder
from turboserve.video.encoded import Encoded, Format


class AttachEncoder:
    """One for each attach, at whose first chunk it is made; for one thread at a time.

    The init segment that was given last is remembered: should a chunk come from another encoder whose parameters are
    others (a session that moved between nodes with different libraries), the viewer gets that one's first.
    """

    def __init__(self, format: str, shape: StreamShape, next_index: int) -> None:
        self.format = cast(Format, format)  # checked where it came in
        self._shape = shape
        first_frame = shape.frames_before(next_index)
        self._encoder = ChunkEncoder(
            format, shape.width, shape.height, shape.fps, index=next_index, first_frame=first_frame
        )
        self.mime = self._encoder.mime
        self.init = self._encoder.init_segment()

    def encode(self, chunk: StoredChunk) -> Encoded:
        """The chunk's binary message. `init` is set when that must go before it; `encode_s` is for the caller."""
        if chunk.format == "raw":
            data = self._encoder.encode(chunk.data, chunk.index, self._shape.frames_before(chunk.index))
            init = self._encoder.init_segment()
        elif chunk.format == self.format:
            data, init = chunk.data, chunk.init
        else:
            raise AssertionError(f"a chunk as {chunk.format} for a viewer of {self.format}")
        changed = init != self.init
        self.init = init
        return Encoded(self.format, data, init if changed else b"")
