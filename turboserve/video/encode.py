"""Frames as a viewer receives them: `raw`, `jpeg`, `h264` and `mp4`, one encoder for each attach.

Encoded bytes are no part of a stream's identity: two attaches may differ in every bit. What holds for all formats:
each chunk decodes on its own (closed GOP), nothing is held back for the next one, and an encoder is used by one
thread at a time. libav works without the interpreter lock, so a thread pool of them leaves the event loop alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange

from turboserve.errors import InvalidRequest
from turboserve.video.fmp4 import SEI, FragmentedMp4, codec_string, nal_type, nal_units, parameter_sets

FORMATS = ("h264", "jpeg", "mp4", "raw")

# BT.601 at TV range is what libswscale makes; saying so keeps players from guessing by picture size.
_COLOURS = "colorprim=smpte170m:transfer=smpte170m:colormatrix=smpte170m:range=tv"
_X264_OPTIONS = {
    "preset": "ultrafast",
    "tune": "zerolatency",
    "profile": "baseline",
    "crf": "18",
    "forced-idr": "1",
    # Key frames only where a chunk begins, each with its parameter sets; access units as WebCodecs takes them.
    "x264-params": f"keyint=infinite:scenecut=0:repeat-headers=1:annexb=1:{_COLOURS}",
}
_JPEG_QUANTISER = "3"  # about quality 90


def frame_rate(fps: float | Fraction) -> Fraction:
    """`fps` as a small fraction: 12 is 12/1, 23.976 is 24000/1001."""
    near = Fraction(fps).limit_denominator(1001)
    if near <= 0:
        raise InvalidRequest(f"{fps} frames a second", expected="more than 0")
    return near


def check_h264_size(width: int, height: int) -> None:
    """H.264 as browsers take it halves the colour planes, so both sides must be even."""
    if width % 2 or height % 2 or width < 2 or height < 2:
        raise InvalidRequest(
            f"H.264 cannot hold {width}x{height}", expected="even width and height", hint="use jpeg or raw"
        )


def _length_prefixed(parts: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


class _H264Track:
    """libx264 at its lowest delay: one frame in, its access unit out."""

    def __init__(self, width: int, height: int, fps: Fraction) -> None:
        check_h264_size(width, height)
        self._codec = codec = av.CodecContext.create("libx264", "w")
        codec.width, codec.height, codec.pix_fmt = width, height, "yuv420p"
        codec.framerate, codec.time_base = fps, 1 / fps
        codec.thread_count = 1
        codec.max_b_frames = 0
        codec.options = dict(_X264_OPTIONS)
        codec.flags |= av.codec.context.Flags.global_header  # parameter sets are known before the first frame
        codec.open()
        assert codec.extradata, "libx264 gives its parameter sets when it opens"
        self.sps, self.pps = parameter_sets(bytes(codec.extradata))
        self._frame_number = 0

    def access_units(self, frames: np.ndarray) -> list[bytes]:
        """One Annex B access unit a frame; the first is an IDR behind its parameter sets."""
        units = []
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pict_type = PictureType.NONE if number else PictureType.I
            frame.pts, frame.time_base = self._frame_number, self._codec.time_base
            self._frame_number += 1
            unit = b"".join(bytes(packet) for packet in self._codec.encode(frame))
            if number == 0:
                # libav puts x264's banner in front of the very first parameter sets, where decoders look for them.
                kept = (part for part in nal_units(unit) if nal_type(part) != SEI)
                unit = b"".join(b"\0\0\0\1" + part for part in kept)
            units.append(unit)
        return units


class _JpegPictures:
    """Baseline JPEG with whole colour planes: half ones would blur small pictures that are shown enlarged."""

    def __init__(self, width: int, height: int, fps: Fraction) -> None:
        self._codec = codec = av.CodecContext.create("mjpeg", "w")
        codec.width, codec.height, codec.pix_fmt = width, height, "yuv444p"
        codec.color_range = ColorRange.JPEG
        codec.time_base = 1 / fps
        codec.thread_count = 1
        codec.options = {"qmin": _JPEG_QUANTISER, "qmax": _JPEG_QUANTISER}
        self._frame_number = 0

    def pictures(self, frames: np.ndarray) -> list[bytes]:
        made = []
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv444p", dst_color_range=ColorRange.JPEG)
            frame.pts, frame.time_base = self._frame_number, self._codec.time_base
            self._frame_number += 1
            made.append(b"".join(bytes(packet) for packet in self._codec.encode(frame)))
        return made


class Encoder:
    """Encodes one attach's chunks, in order.

    `first_frame` is the number, on the stream's time line, of the first frame this encoder will get: with it an `mp4`
    goes on where the attach before ended. The other formats carry no time.
    """

    def __init__(self, format: str, width: int, height: int, fps: float | Fraction, *, first_frame: int = 0) -> None:
        rate = frame_rate(fps)
        self.format, self.width, self.height = format, width, height
        self._shape = (height, width, 3)
        self._next_index: int | None = None
        self._init_segment: bytes | None = None
        self._encode: Callable[[np.ndarray, int], bytes]
        if format == "raw":
            self.mime = "application/octet-stream"
            self._encode = lambda frames, _: frames.tobytes()
        elif format == "jpeg":
            self.mime = "image/jpeg"
            pictures = _JpegPictures(width, height, rate)
            self._encode = lambda frames, _: _length_prefixed(pictures.pictures(frames))
        elif format == "h264":
            track = _H264Track(width, height, rate)
            self.mime = f'video/h264; codecs="{codec_string(track.sps)}"'
            self._encode = lambda frames, _: _length_prefixed(track.access_units(frames))
        elif format == "mp4":
            track = _H264Track(width, height, rate)
            self.mime = f'video/mp4; codecs="{codec_string(track.sps)}"'
            film = FragmentedMp4(track.sps, track.pps, width, height, rate, first_frame)
            self._init_segment = film.init_segment()
            # Fragments are numbered from 1.
            self._encode = lambda frames, index: film.fragment(track.access_units(frames), index + 1)
        else:
            raise InvalidRequest(f"format {format!r}", expected=" or ".join(FORMATS))

    def init_segment(self) -> bytes | None:
        """What a viewer needs before the first chunk; None where a format needs nothing."""
        return self._init_segment

    def encode_chunk(self, frames: np.ndarray, index: int) -> bytes:
        """One chunk, uint8 (frames, height, width, 3), as its binary message. Indices must follow each other."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self._shape or not len(frames):
            raise ValueError(f"a chunk of {frames.dtype} {frames.shape}; expected uint8 (n, {self._shape})")
        if self._next_index is not None and index != self._next_index:
            raise ValueError(f"chunk {index} after chunk {self._next_index - 1}")
        self._next_index = index + 1
        return self._encode(np.ascontiguousarray(frames), index)


class ChunkEncoder:
    """An `Encoder` for chunks that need not follow each other: where some were encoded elsewhere, or are asked for
    again, it begins anew on the same time line.

    `index` and `first_frame` name the chunk that comes next, as far as is known, and the number of its first frame.
    """

    def __init__(
        self, format: str, width: int, height: int, fps: float | Fraction, *, index: int = 0, first_frame: int = 0
    ) -> None:
        self.format, self.width, self.height, self._fps = format, width, height, fps
        self._index = index
        self._encoder = Encoder(format, width, height, fps, first_frame=first_frame)

    @property
    def mime(self) -> str:
        return self._encoder.mime

    def init_segment(self) -> bytes:
        """What a viewer needs before the next chunk; empty where a format needs nothing."""
        return self._encoder.init_segment() or b""

    def encode(self, frames: np.ndarray, index: int, first_frame: int) -> bytes:
        """One chunk, uint8 (frames, height, width, 3), as its binary message; one thread at a time."""
        if index != self._index:
            self._encoder = Encoder(self.format, self.width, self.height, self._fps, first_frame=first_frame)
        self._index = -1  # until it is done: after a failure the next one begins anew
        data = self._encoder.encode_chunk(frames, index)
        self._index = index + 1
        return data
