"""What a session hands out: chunks of video, and what became of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from turboserve.errors import InvalidRequest, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class PromptUpdate:
    """The server's answer to a new prompt: chunks from `from_index` on are made with it.

    `superseded` means that a still newer prompt took its place before any chunk used it.
    """

    prompt_version: int | None
    from_index: int | None
    superseded: bool = False


@dataclass(frozen=True)
class Chunk:
    """One chunk of the stream. `payload` is as the server sent it, `frames` decodes it.

    `latency_ms` is the server's time from the chunk's release to its being encoded; `digest` is the chain up to and
    including this chunk; `continuity` is "approximate" where the stream went on under other numerics.
    """

    index: int
    epoch: int
    frame_count: int
    width: int
    height: int
    prompt_version: int
    steps: int
    digest: str
    latency_ms: float
    format: str
    payload: bytes
    continuity: str = ""

    @cached_property
    def frames(self) -> np.ndarray:
        """uint8 [n, height, width, 3]; exact for `raw`, as good as the codec for `jpeg` and `h264`."""
        if self.format == "raw":
            return np.frombuffer(self.payload, np.uint8).reshape(self.frame_count, self.height, self.width, 3)
        if self.format in ("jpeg", "h264"):
            return self._decode("mjpeg" if self.format == "jpeg" else "h264")
        raise InvalidRequest(
            f"frames of one {self.format} chunk cannot be decoded alone",
            expected="a session opened with format raw, jpeg or h264",
            hint="`save` writes an mp4 stream as it is",
        )

    def units(self) -> Iterator[memoryview]:
        """The payload of `jpeg` and `h264` cut at its lengths: one JPEG or one access unit per frame."""
        data, at = memoryview(self.payload), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 4], "little")
            if at + 4 + length > len(data):
                raise ProtocolError(f"chunk {self.index} ends inside a frame of {length} bytes")
            yield data[at + 4 : at + 4 + length]
            at += 4 + length

    def _decode(self, codec: str) -> np.ndarray:
        import av

        # Every chunk is a closed group of pictures, so a fresh decoder needs nothing from its neighbours.
        decoder: Any = av.CodecContext.create(codec, "r")
        pictures = [picture for unit in self.units() for picture in decoder.decode(av.Packet(bytes(unit)))]
        pictures += decoder.decode(None)
        return np.stack([picture.to_ndarray(format="rgb24") for picture in pictures])
