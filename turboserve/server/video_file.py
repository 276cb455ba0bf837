"""A video file from frames: what `generate -o out.mp4` and the SDK's `save` write."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from turboserve.errors import ConfigError
from turboserve.video.encode import check_h264_size, frame_rate

SUFFIXES = (".mp4", ".mov", ".mkv")


class VideoFile:
    """Writes frames to `path` as H.264, chunk by chunk.

    The file appears under its name when it is whole (`close`, or the end of a `with` block); a block that fails
    leaves nothing behind.
    """

    def __init__(self, path: str | Path, width: int, height: int, fps: float | Fraction) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"cannot write {self.path.name!r}", expected="a name ending in " + ", ".join(SUFFIXES))
        check_h264_size(width, height)
        if not self.path.parent.is_dir():
            raise ConfigError(f"no folder {str(self.path.parent)!r}", hint="make it, or choose another path")
        self._shape = (height, width, 3)
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        kind = {".mkv": "matroska"}.get(self.path.suffix.lower(), self.path.suffix.lower()[1:])
        # The index goes in front, so that a browser can play the file while it loads.
        options = {} if kind == "matroska" else {"movflags": "+faststart"}
        self._container = av.open(str(self._partial), "w", format=kind, options=options)
        self._stream = self._container.add_stream("libx264", rate=frame_rate(fps))
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        # A file is made once and looked at often: more effort than a live stream's encoder takes.
        self._stream.options = {"preset": "medium", "crf": "16"}
        self._stream.codec_context.thread_count = 1
        self.frame_count = 0

    def write(self, frames: np.ndarray) -> None:
        """Adds frames, uint8 (n, height, width, 3)."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self._shape:
            raise ValueError(f"frames of {frames.dtype} {frames.shape}; expected uint8 (n, {self._shape})")
        for pixels in np.ascontiguousarray(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = self.frame_count
            frame.time_base = 1 / self._stream.codec_context.framerate
            self._container.mux(self._stream.encode(frame))
            self.frame_count += 1

    def close(self) -> None:
        """Finishes the file and gives it its name."""
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            os.replace(self._partial, self.path)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Gives up; no file stays."""
        self._container.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
