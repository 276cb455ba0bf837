"""Fragmented MP4 for one H.264 track: an init segment, then one moof + mdat a chunk, as soon as it is encoded.

libavformat would hold a fragment back until the next one begins and numbers its time from zero; a live stream wants
neither, and the boxes are few. ISO/IEC 14496-12 names every field that is written here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from fractions import Fraction

_START_CODE = re.compile(rb"\x00\x00\x00?\x01")
SEI, _SPS, _PPS = 6, 7, 8
_UNITY_MATRIX = struct.pack(">9I", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
# Sample flags: an IDR depends on nothing; any other depends on another and is no place to start.
_SYNC_SAMPLE, _OTHER_SAMPLE = 0x02000000, 0x01010000
_TRUN_FLAGS = 0x1 | 0x200 | 0x400  # data offset; size and flags of each sample


def nal_units(annex_b: bytes) -> list[bytes]:
    """The NAL units between start codes."""
    return [unit for unit in _START_CODE.split(annex_b) if unit]


def nal_type(unit: bytes) -> int:
    return unit[0] & 0x1F


def parameter_sets(annex_b: bytes) -> tuple[bytes, bytes]:
    """The sequence and the picture parameter set in an access unit or in an encoder's extradata."""
    units = nal_units(annex_b)
    return next(u for u in units if nal_type(u) == _SPS), next(u for u in units if nal_type(u) == _PPS)


def codec_string(sps: bytes) -> str:
    """What WebCodecs and MIME types call this stream, like avc1.42C00A: profile, constraints, level."""
    return f"avc1.{sps[1]:02X}{sps[2]:02X}{sps[3]:02X}"


def _box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def _full_box(kind: bytes, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags), *parts)


class FragmentedMp4:
    """Writes the segments of one stream. `first_frame` is the number of the first frame on the stream's time line."""

    def __init__(self, sps: bytes, pps: bytes, width: int, height: int, fps: Fraction, first_frame: int = 0) -> None:
        self._sps, self._pps = sps, pps
        self._width, self._height = width, height
        # A thousand ticks a frame: exact for any frame rate.
        self._timescale, self._frame_ticks = fps.numerator * 1000, fps.denominator * 1000
        self._next_frame = first_frame

    def init_segment(self) -> bytes:
        """ftyp and a moov that declares the track and no samples."""
        size = struct.pack(">HH", self._width, self._height)
        avc_config = _box(
            b"avcC",
            bytes((1, *self._sps[1:4], 0xFF, 0xE1)),  # 4-byte lengths, one sequence parameter set
            struct.pack(">H", len(self._sps)) + self._sps,
            b"\x01" + struct.pack(">H", len(self._pps)) + self._pps,
        )
        # reserved, data reference 1, 16 reserved, size, 72 dpi twice, one frame a sample, no name, depth 24
        entry = struct.pack(">6xH16x", 1) + size + struct.pack(">IIIH32xHh", 0x480000, 0x480000, 0, 1, 24, -1)
        sample_table = _box(
            b"stbl",
            _full_box(b"stsd", struct.pack(">I", 1), _box(b"avc1", entry, avc_config)),
            _full_box(b"stts", bytes(4)),
            _full_box(b"stsc", bytes(4)),
            _full_box(b"stsz", bytes(8)),
            _full_box(b"stco", bytes(4)),
        )
        track = _box(
            b"trak",
            # enabled and in the movie; track 1; shown in its own size
            _full_box(
                b"tkhd",
                struct.pack(">8xI4xI8x4h", 1, 0, 0, 0, 0, 0) + _UNITY_MATRIX,
                struct.pack(">II", self._width << 16, self._height << 16),
                flags=3,
            ),
            _box(
                b"mdia",
                _full_box(b"mdhd", struct.pack(">8xIIHH", self._timescale, 0, 0x55C4, 0)),  # language "und"
                _full_box(b"hdlr", struct.pack(">4x4s12x", b"vide"), b"TurboServe\0"),
                _box(
                    b"minf",
                    _full_box(b"vmhd", bytes(8), flags=1),
                    _box(b"dinf", _full_box(b"dref", struct.pack(">I", 1), _full_box(b"url ", flags=1))),
                    sample_table,
                ),
            ),
        )
        movie = _full_box(
            b"mvhd",
            struct.pack(">8xIIIH10x", self._timescale, 0, 1 << 16, 1 << 8) + _UNITY_MATRIX + struct.pack(">24xI", 2),
        )
        # every sample lasts one frame unless a fragment says otherwise
        extends = _box(b"mvex", _full_box(b"trex", struct.pack(">5I", 1, 1, self._frame_ticks, 0, _OTHER_SAMPLE)))
        return _box(b"ftyp", b"iso5", struct.pack(">I", 0x200), b"iso5iso6avc1mp41") + _box(
            b"moov", movie, track, extends
        )

    def fragment(self, access_units: Sequence[bytes], sequence_number: int) -> bytes:
        """moof + mdat of one chunk's Annex B access units; the first one must be an IDR. Time goes on by itself."""
        samples = []
        for access_unit in access_units:
            # The parameter sets stand in the init segment, where "avc1" wants them.
            units = [unit for unit in nal_units(access_unit) if nal_type(unit) not in (_SPS, _PPS)]
            samples.append(b"".join(struct.pack(">I", len(unit)) + unit for unit in units))
        table = b"".join(
            struct.pack(">II", len(sample), _OTHER_SAMPLE if number else _SYNC_SAMPLE)
            for number, sample in enumerate(samples)
        )

        def moof(data_offset: int) -> bytes:
            return _box(
                b"moof",
                _full_box(b"mfhd", struct.pack(">I", sequence_number)),
                _box(
                    b"traf",
                    _full_box(b"tfhd", struct.pack(">I", 1), flags=0x020000),  # offsets count from this moof
                    _full_box(b"tfdt", struct.pack(">Q", self._next_frame * self._frame_ticks), version=1),
                    _full_box(b"trun", struct.pack(">Ii", len(samples), data_offset), table, flags=_TRUN_FLAGS),
                ),
            )

        header = moof(len(moof(0)) + 8)
        self._next_frame += len(samples)
        return header + _box(b"mdat", *samples)
