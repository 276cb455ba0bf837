"""Frames into files, decoded back; formats other than raw; waits between attempts."""

from __future__ import annotations

import asyncio
import os
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import FRAMES, HEIGHT, WIDTH, Scripted, cut, say

from turboserve import errors
from turboserve.client import AsyncSession, Chunk
from turboserve.client.failures import Resumable
from turboserve.client.retry import Retries, RetryPolicy


def read_back(path: Path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate is not None
        return np.stack(frames), float(stream.average_rate)


def picture(index: int, size: int = 64) -> np.ndarray:
    """A flat colour with a square that moves: what a codec should keep."""
    frame = np.full((size, size, 3), (20, 40, 160), np.uint8)
    frame[16:32, 4 * index : 4 * index + 16] = (220, 30, 30)
    return frame


async def test_save_for_so_many_seconds_across_a_lost_connection(tmp_path: Path) -> None:
    async with Scripted(script=[cut(3)]) as server:
        async with AsyncSession("x", base_url=server.base_url) as session:
            assert await session.save(tmp_path / "out.mp4", seconds=23 / 12) == 23
        back, rate = read_back(tmp_path / "out.mp4")
        assert (back.shape, rate) == ((23, HEIGHT, WIDTH, 3), 12.0)


async def test_save_to_the_end(tmp_path: Path) -> None:
    async with (
        Scripted() as server,
        await AsyncSession.open("x", base_url=server.base_url, max_duration_s=3) as session,
    ):
        assert await session.save(tmp_path / "out.mp4") == 12 * FRAMES


async def test_save_needs_an_end(tmp_path: Path) -> None:
    async with Scripted() as server, AsyncSession("x", base_url=server.base_url) as session:
        with pytest.raises(errors.InvalidRequest, match="no end"):
            await session.save(tmp_path / "out.mp4")


async def test_a_stream_without_a_frame_leaves_no_file(tmp_path: Path) -> None:
    script = [cut(0, 1000)]
    async with Scripted(script=script) as server, AsyncSession("x", base_url=server.base_url) as session:
        with pytest.raises(errors.InvalidRequest, match="no frames"):
            await session.save(tmp_path / "out.mp4", seconds=1)
    assert os.listdir(tmp_path) == []


async def test_an_mp4_stream_is_written_as_it_comes_with_one_beginning(tmp_path: Path) -> None:
    def fragments(first: int, upto: int, code: int) -> Any:
        async def behave(server: Scripted, socket: Any) -> None:
            await server.attach(socket)
            await say(socket, "chunk", index=-1, init=True, format="mp4", bytes=4)
            await socket.send(b"init")
            for index in range(first, upto):
                await server.chunk(socket, index, payload=f"<{index}>".encode())
            await asyncio.sleep(0.2)
            await socket.close(code)

        return behave

    script = [fragments(0, 2, 1001), fragments(2, 3, 1000)]
    async with Scripted(format="mp4", script=script) as server:
        session = await AsyncSession.open("x", base_url=server.base_url, format="mp4", max_duration_s=1)
        await session.save(tmp_path / "out.mp4")
        await session.close()
    assert (tmp_path / "out.mp4").read_bytes() == b"init<0><1><2>"


@pytest.mark.parametrize("format", ["jpeg", "h264"])
def test_encoded_chunks_decode_to_frames(format: str) -> None:
    frames = np.stack([picture(index) for index in range(4)])
    encoder: Any = av.CodecContext.create({"jpeg": "mjpeg", "h264": "libx264"}[format], "w")
    encoder.width = encoder.height = 64
    encoder.pix_fmt = {"jpeg": "yuvj420p", "h264": "yuv420p"}[format]
    encoder.time_base = Fraction(1, 12)
    encoder.options = {"tune": "zerolatency"} if format == "h264" else {}
    if format == "jpeg":
        encoder.flags |= 2  # qscale
        encoder.global_quality = 2 * 118
    units = [bytes(p) for frame in frames for p in encoder.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))]
    units += [bytes(packet) for packet in encoder.encode(None)]
    payload = b"".join(len(one).to_bytes(4, "little") + one for one in units)
    chunk = make(payload, format)
    assert chunk.frames.shape == frames.shape
    assert np.abs(chunk.frames.astype(int) - frames).mean() < 8
    with pytest.raises(errors.ProtocolError, match="ends inside"):
        _ = make(payload[:-3], format).frames
    with pytest.raises(errors.InvalidRequest, match="decoded alone"):
        _ = make(payload, "mp4").frames


def make(payload: bytes, format: str) -> Chunk:
    return Chunk(
        index=0,
        epoch=1,
        frame_count=4,
        width=64,
        height=64,
        prompt_version=1,
        steps=4,
        digest="",
        latency_ms=0.0,
        format=format,
        payload=payload,
    )


@given(st.integers(0), st.lists(st.booleans(), max_size=40))
def test_waits_are_bounded_in_number_and_length(seed: int, at_once: list[bool]) -> None:
    policy = RetryPolicy(attempts=6, window_s=60, first_s=0.2, longest_s=2.0)
    retries = Retries(policy, random.Random(seed))
    now_s, waits = 0.0, []
    for one in at_once:
        wait_s = retries.next_wait_s(Resumable("lost", at_once=one), now_s)
        if wait_s is None:
            break
        assert 0 <= wait_s <= 2.0
        assert not (one and not waits and wait_s > 0.1), "told to come back at once"
        waits.append(wait_s)
        now_s += wait_s
    assert len(waits) <= 6


def test_waits_end_with_the_window_and_follow_a_hint() -> None:
    retries = Retries(RetryPolicy(attempts=100, window_s=10))
    assert retries.next_wait_s(Resumable("busy", wait_s=3.0), 0.0) >= 3.0  # type: ignore[operator]
    assert retries.next_wait_s(Resumable("busy"), 11.0) is None
    retries.progress()
    assert retries.next_wait_s(Resumable("busy"), 12.0) is not None
