"""A chunk in the format that its viewer receives, and its bounds. Light: libav is not imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from turboserve.errors import ConfigError

Format = Literal["h264", "jpeg", "mp4", "raw"]
"""What a chunk's bytes are; `raw` are its frames."""
FRAME_OVERHEAD_BYTES = 4096
"""Of one encoded frame, whatever its size: tables of a JPEG, parameter sets, boxes of an mp4."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """`raw` are the frames as they are. `init` is what an mp4 chunk plays behind."""

    format: Format
    data: bytes
    init: bytes = b""
    encode_s: float = 0.0


def encoded_bytes_max(format: str, frames: int, height: int, width: int) -> int:
    """No chunk of these frames is longer. Noise may come out longer than it went in; twice as long it does not."""
    raw = frames * height * width * 3
    return raw if format == "raw" else 2 * raw + frames * FRAME_OVERHEAD_BYTES


def check_encoder() -> None:
    """For a process that will encode: ConfigError, with what to install, where PyAV is missing or does not load."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"PyAV cannot be imported ({error}), and this process encodes frames",
            expected="PyAV 13 or newer",
            hint="pip install 'av>=13'",
        ) from None
