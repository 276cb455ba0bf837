"""Every format is decoded again by an independent decoder and held against the frames that went in."""

from __future__ import annotations

import io
import struct
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from turboserve.errors import ConfigError, InvalidRequest
from turboserve.server.video_file import VideoFile
from turboserve.video.encode import FORMATS, Encoder
from turboserve.video.fmp4 import nal_type, nal_units


def moving_picture(count: int, width: int = 96, height: int = 96, first: int = 0) -> np.ndarray:
    """A smooth disc that drifts over a gradient; frame numbers count from `first`."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    frames = []
    for number in range(first, first + count):
        centre = width * (0.3 + 0.4 * np.sin(number / 9)), height * 0.5
        disc = 1 / (1 + np.exp((np.hypot(x - centre[0], y - centre[1]) - min(width, height) * 0.2) / 2))
        background = np.stack([x / width * 120, y / height * 120, np.full_like(x, 60)], -1)
        frames.append(background * (1 - disc[..., None]) + np.array([230, 60, 40]) * disc[..., None])
    return np.clip(np.rint(np.stack(frames)), 0, 255).astype(np.uint8)


def psnr_db(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(10 * np.log10(255**2 / ((actual.astype(float) - expected.astype(float)) ** 2).mean()))


def split(message: bytes) -> list[bytes]:
    """The parts of a `jpeg` or `h264` message."""
    parts, at = [], 0
    while at < len(message):
        (length,) = struct.unpack_from("<I", message, at)
        parts.append(message[at + 4 : at + 4 + length])
        assert len(parts[-1]) == length
        at += 4 + length
    return parts


def decode_h264(units: list[bytes]) -> np.ndarray:
    codec = av.CodecContext.create("h264", "r")
    frames = [frame for unit in units for frame in codec.decode(av.Packet(unit))]
    frames += codec.decode(None)
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def decode_file(data: bytes) -> tuple[np.ndarray, list[float]]:
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
        return np.stack([f.to_ndarray(format="rgb24") for f in frames]), [f.time for f in frames]


CHUNKS = [moving_picture(1), moving_picture(4, first=1), moving_picture(4, first=5), moving_picture(4, first=9)]


def test_raw_is_the_frames():
    encoder = Encoder("raw", 96, 96, 12)
    assert encoder.encode_chunk(CHUNKS[1], 7) == CHUNKS[1].tobytes()
    assert encoder.init_segment() is None


@pytest.mark.parametrize("size", [(96, 96), (97, 61), (2, 2)], ids=str)
def test_jpeg_decodes_frame_by_frame(size):
    frames = moving_picture(4, *size)
    message = Encoder("jpeg", *size, 12).encode_chunk(frames, 0)
    pictures = [np.asarray(Image.open(io.BytesIO(part)).convert("RGB")) for part in split(message)]
    assert len(pictures) == 4
    assert psnr_db(np.stack(pictures), frames) > 38


def test_h264_chunks_are_closed_and_each_frame_is_one_access_unit():
    encoder = Encoder("h264", 96, 96, 12)
    messages = [encoder.encode_chunk(frames, index) for index, frames in enumerate(CHUNKS)]
    for frames, message in zip(CHUNKS, messages, strict=True):
        units = split(message)
        types = [[nal_type(unit) for unit in nal_units(part)] for part in units]
        assert types[0] == [7, 8, 5]  # parameter sets, then the IDR
        assert all(t == [1] for t in types[1:])
        # Alone, with a decoder that has seen nothing: the GOP is closed.
        assert psnr_db(decode_h264(units), frames) > 34
    joined = decode_h264([unit for message in messages for unit in split(message)])
    assert psnr_db(joined, np.concatenate(CHUNKS)) > 34


@pytest.mark.parametrize("format", ["h264", "mp4"])
def test_the_codec_string_is_what_the_stream_declares(format):
    small, large = Encoder(format, 96, 96, 12), Encoder(format, 832, 480, 16)
    assert small.mime.startswith(f"video/{format}; codecs=") and "avc1.42C0" in small.mime
    assert int(small.mime[-3:-1], 16) < int(large.mime[-3:-1], 16) <= 0x1E  # level 3 at 480p
    sps = nal_units(split(Encoder("h264", 96, 96, 12).encode_chunk(CHUNKS[0], 0))[0])[0]
    assert sps[1:4].hex().upper() == small.mime[-7:-1]


def boxes(data: bytes) -> list[tuple[str, bytes]]:
    found, at = [], 0
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        assert length >= 8 and at + length <= len(data)
        found.append((kind.decode(), data[at + 8 : at + length]))
        at += length
    return found


@pytest.mark.parametrize("fps", [12, 16, Fraction(24000, 1001)], ids=str)
def test_mp4_plays_and_keeps_time(fps):
    encoder = Encoder("mp4", 96, 96, fps)
    fragments = [encoder.encode_chunk(frames, index) for index, frames in enumerate(CHUNKS)]
    assert [kind for kind, _ in boxes(encoder.init_segment())] == ["ftyp", "moov"]
    assert all([kind for kind, _ in boxes(one)] == ["moof", "mdat"] for one in fragments)
    frames, times_s = decode_file(encoder.init_segment() + b"".join(fragments))
    assert psnr_db(frames, np.concatenate(CHUNKS)) > 34
    np.testing.assert_allclose(times_s, np.arange(13) / float(fps), atol=1e-5)


def test_mp4_goes_on_after_another_attach():
    """The second attach's encoder begins at chunk 2, whose first frame is number 5 of the stream."""
    first, second = Encoder("mp4", 96, 96, 12), Encoder("mp4", 96, 96, 12, first_frame=5)
    before = b"".join(first.encode_chunk(CHUNKS[index], index) for index in (0, 1))
    after = b"".join(second.encode_chunk(CHUNKS[index], index) for index in (2, 3))

    frames, times_s = decode_file(second.init_segment() + after)
    assert psnr_db(frames, np.concatenate(CHUNKS[2:])) > 34
    np.testing.assert_allclose(times_s, np.arange(5, 13) / 12, atol=1e-5)
    # And as one file, with the second init segment in its middle, the way a recorder would have stored it.
    for middle in (b"", second.init_segment()):
        frames, times_s = decode_file(first.init_segment() + before + middle + after)
        assert psnr_db(frames, np.concatenate(CHUNKS)) > 34
        np.testing.assert_allclose(times_s, np.arange(13) / 12, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_wrong_chunks_are_refused(format):
    encoder = Encoder(format, 96, 96, 12)
    for wrong in (CHUNKS[1][:, :48], CHUNKS[1].astype(np.float32), CHUNKS[1][0], CHUNKS[1][:0]):
        with pytest.raises(ValueError, match="expected uint8"):
            encoder.encode_chunk(wrong, 0)
    encoder.encode_chunk(CHUNKS[1], 3)
    with pytest.raises(ValueError, match="chunk 5 after chunk 3"):
        encoder.encode_chunk(CHUNKS[1], 5)
    mirrored = CHUNKS[1][:, :, ::-1]  # a view that is not contiguous
    assert encoder.encode_chunk(mirrored, 4)


def test_what_cannot_be_encoded_is_refused_by_name():
    for format in ("h264", "mp4"):
        for size in ((97, 96), (96, 97)):
            with pytest.raises(InvalidRequest, match="even width and height"):
                Encoder(format, *size, 12)
    with pytest.raises(InvalidRequest, match="h264 or jpeg or mp4 or raw"):
        Encoder("gif", 96, 96, 12)
    with pytest.raises(InvalidRequest, match="more than 0"):
        Encoder("raw", 96, 96, 0)


def test_encoders_of_many_attaches_work_side_by_side():
    """As in the gateway: encoders come and go in threads, and none shows in another's stream."""
    results: dict[int, float] = {}

    def attach(number: int) -> None:
        frames = moving_picture(8, first=20 * number)
        encoder = Encoder("h264", 96, 96, 12)
        messages = [encoder.encode_chunk(frames[4 * index :][:4], index) for index in range(2)]
        results[number] = psnr_db(decode_h264([u for m in messages for u in split(m)]), frames)

    threads = [threading.Thread(target=attach, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and min(results.values()) > 34


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_a_video_file_holds_every_frame(tmp_path, suffix):
    path = tmp_path / f"out.{suffix}"
    with VideoFile(path, 96, 96, 12) as file:
        for frames in CHUNKS:
            file.write(frames)
            assert not path.exists()
    frames, times_s = decode_file(path.read_bytes())
    assert psnr_db(frames, np.concatenate(CHUNKS)) > 36
    np.testing.assert_allclose(times_s, np.arange(13) / 12, atol=1e-3)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_video_file_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), VideoFile(tmp_path / "out.mp4", 96, 96, 12) as file:
        file.write(CHUNKS[1])
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())
    for path in ("out.gif", "out", "missing/out.mp4"):
        with pytest.raises(ConfigError):
            VideoFile(tmp_path / path, 96, 96, 12)
    empty = VideoFile(tmp_path / "empty.mp4", 96, 96, 12)
    empty.abort()
    assert not list(tmp_path.iterdir())
