"""Frames into an mp4 file that appears under its name only when it is whole."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from turboserve.errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np


class Mp4Writer:
    """H.264 in mp4. `close` finishes the file, `abort` leaves nothing; as a context manager it picks one.

    PyAV is imported when the first frames come.
    """

    def __init__(self, path: str | Path, *, fps: float) -> None:
        self.path = Path(path)
        self.fps = Fraction(fps).limit_denominator(1001)
        self.frame_count = 0
        self._part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._container: Any = None
        self._stream: Any = None
        check_target(self.path)

    @property
    def seconds(self) -> float:
        return float(self.frame_count / self.fps)

    def add(self, frames: np.ndarray) -> None:
        """Append uint8 frames [n, height, width, 3]; width and height must be even (H.264's 4:2:0)."""
        import av

        if self._container is None:
            self._open(frames.shape[2], frames.shape[1])
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = self.frame_count
            self._container.mux(self._stream.encode(picture))
            self.frame_count += 1

    def _open(self, width: int, height: int) -> None:
        import av

        if width % 2 or height % 2:
            raise InvalidRequest(f"frames of {width}x{height} cannot become H.264", expected="an even width and height")
        self._container = av.open(str(self._part), "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=self.fps)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = 1 / self.fps
        self._stream.options = {"crf": "16", "preset": "veryfast"}

    def close(self) -> None:
        """Finish the file and give it its name."""
        if self._container is None:
            raise InvalidRequest(f"no frames came for {self.path}", expected="at least one chunk")
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._container = None
        os.replace(self._part, self.path)

    def abort(self) -> None:
        """Leave no file behind."""
        if self._container is not None:
            self._container.close()
            self._container = None
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def check_target(path: Path) -> None:
    """Refuse a place that cannot be written before minutes are spent on the video."""
    folder = path.parent
    if path.is_dir():
        raise InvalidRequest(f"{path} is a directory", expected="a file name like out.mp4")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InvalidRequest(f"cannot write into {folder}", expected="a directory that exists and can be written")
