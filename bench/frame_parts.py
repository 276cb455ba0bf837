"""A chunk's way from a worker of another machine to its viewer's format: encoded there, against raw parts encoded here.

CPU time of both ends together, of one chunk of a stream: encoder, parts, messages, the channel's codes at either end,
and for raw frames the digest's check; no socket and no wait. The picture is a disc over a gradient that moves a little
each frame: bytes of real video differ. `shape` names the bytes that cross the network for the last chunk.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import numpy as np

from turboserve.bench import timing
from turboserve.bench.command import bench_command
from turboserve.bench.report import Row, cpu_name, make_row, versions
from turboserve.digest import next_digest
from turboserve.runtime import messages as m
from turboserve.runtime.frame_parts import PartAssembler, PartSender
from turboserve.runtime.frame_ring import FrameHeader
from turboserve.video.encode import ChunkEncoder
from turboserve.video.encoded import Encoded, Format

SHAPES = [(4, 96, 96), (12, 480, 832)]  # a chunk of `shapes`, and one at 480p
FORMATS: tuple[Format, ...] = ("h264", "jpeg", "mp4")
FPS = 16
SID = "a" * 26


def moving_picture(shape: tuple[int, int, int], first: int) -> np.ndarray:
    count, height, width = shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    frames = []
    for number in range(first, first + count):
        distance = np.hypot(x - width * (0.5 + 0.3 * np.sin(number / 9)), y - height / 2)
        inside = (1 / (1 + np.exp((distance - min(height, width) * 0.2) / 2)))[..., None]
        frames.append(np.stack([x / width * 120, y / height * 120, np.full_like(x, 60)], -1) * (1 - inside))
        frames[-1] += np.array([230, 60, 40]) * inside
    return np.clip(np.rint(np.stack(frames)), 0, 255).astype(np.uint8)


class Wire:
    """The channel without its socket: what `Channel` does to a message at its two ends."""

    unsent_bytes = 0

    def __init__(self, parts: PartAssembler) -> None:
        self.parts = parts
        self.crossed_bytes = 0

    def send(self, message: m.Message) -> None:
        payload = m.encode(message)
        codes = [hmac.digest(b"k" * 32, payload, hashlib.sha256) for _ in range(2)]  # made there, checked here
        assert hmac.compare_digest(*codes)
        self.crossed_bytes += len(payload) + len(codes[0])
        part = m.decode(payload)
        assert isinstance(part, m.FramePart)
        self.parts.take(part)


class Way:
    """One stream's chunks, one a call, encoded at the worker's end (`far`) or at the gateway's."""

    def __init__(self, format: Format, shape: tuple[int, int, int], far: bool) -> None:
        self._chunks = [moving_picture(shape, first) for first in range(0, 4 * shape[0], shape[0])]
        self._encoder = ChunkEncoder(format, shape[2], shape[1], FPS)
        self._format, self._shape, self._far = format, shape, far
        self._index = 0
        self.wire = Wire(PartAssembler(self._chunks[0].nbytes))
        self._sender = PartSender(lambda: self.wire)  # type: ignore[arg-type, return-value]
        self.bytes_each = 0

    def __call__(self) -> bytes:
        index, pixels = self._index, self._chunks[self._index % 4]
        self._index += 1
        before = self.wire.crossed_bytes
        digest = next_digest("", pixels)
        sent = Encoded(self._format, self._encode(pixels, index)) if self._far else Encoded("raw", pixels.tobytes())
        assert self._sender.push(header(self._shape, index, digest), sent)
        taken: Any = self.wire.parts.chunk(ready(self._shape, index, digest, sent.format))
        self.bytes_each = self.wire.crossed_bytes - before
        return taken if self._far else self._encode(taken, index)

    def _encode(self, pixels: np.ndarray, index: int) -> bytes:
        return self._encoder.encode(pixels, index, index * len(pixels))


def header(shape: tuple[int, int, int], index: int, digest: str) -> FrameHeader:
    return FrameHeader(
        session_id=SID,
        worker_epoch=1,
        session_epoch=1,
        chunk_index=index,
        frames=shape[0],
        height=shape[1],
        width=shape[2],
        steps=4,
        prompt_version=1,
        digest=bytes.fromhex(digest),
        digest_prev=b"",
    )


def ready(shape: tuple[int, int, int], index: int, digest: str, format: Format) -> m.ChunkReady:
    return m.ChunkReady(
        session_id=SID,
        epoch=1,
        chunk_index=index,
        digest=digest,
        digest_prev="",
        frames=shape[0],
        steps=4,
        prompt_version=1,
        format=format,
    )


@bench_command
@click.option("--rounds", default=60, type=click.IntRange(3), help="Measurements of each contender.")
def command(wanted: Callable[[str], bool], rounds: int) -> Iterator[Row]:
    """Chunks from a worker of another machine: encoded there, against raw frames encoded by the gateway."""
    for shape in SHAPES:
        for format in FORMATS:
            if not wanted(f"frame-parts/{format}"):
                continue
            far, near = Way(format, shape, far=True), Way(format, shape, far=False)
            assert [far(), far()] == [near(), near()], "the same encoder makes the same bytes at either end"
            alone = ChunkEncoder(format, shape[2], shape[1], FPS)
            pixels, count = moving_picture(shape, 0), iter(range(1 << 30))

            def encode(alone: ChunkEncoder = alone, pixels: np.ndarray = pixels, count: Iterator[int] = count) -> bytes:
                index = next(count)
                return alone.encode(pixels, index, index * len(pixels))

            times = timing.alternate(
                {"far": far, "near": near, "encode": encode}, rounds=rounds, clock=time.process_time
            )
            yield make_row(
                case=f"frame-parts/{format}",
                shape=f"{'x'.join(map(str, (*shape, 3)))}, {far.bytes_each} B cross instead of {near.bytes_each}",
                dtype="uint8",
                device=cpu_name(),
                versions=versions("numpy", "av"),
                timing=times["far"],
                floor="the encoder alone, in this run",
                floor_ms=times["encode"].median_ms,
                baseline="raw parts, encoded by the gateway",
                baseline_ms=times["near"].median_ms,
                max_rel_err=0.0,
            )
