"""Chunks of a worker that joined: encoded beside the engine's thread, in order, in the format that is asked for."""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import io
import logging
import struct
import threading
import time
from collections.abc import Callable

import av
import numpy as np
import pytest
import structlog
from worker_logic_harness import HELLO, LEASE_S, SID, SPEC, credit, lease, open_session

from turboserve.errors import ConfigError, WorkerError
from turboserve.runtime import encode_thread
from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.frame_parts import PartAssembler
from turboserve.runtime.worker_books import CONTROLLER, GATEWAY, Emit, Send
from turboserve.runtime.worker_emits import Emitter
from turboserve.runtime.worker_logic import WorkerLogic
from turboserve.video import encoded as encoded_module

FORMATS = ("h264", "jpeg", "mp4", "raw")


def frames_of(index: int) -> np.ndarray:
    y, x = np.mgrid[:8, :8]
    return np.stack([np.stack([x * 20, y * 20, np.full_like(x, 40 * index + n)], -1) for n in range(4)]).astype(
        np.uint8
    )


def digest_of(index: int) -> str:
    before = bytes.fromhex(digest_of(index - 1)) if index else b""
    return hashlib.sha256(before + frames_of(index).tobytes()).hexdigest()


def finished(index: int) -> e.FinishedChunk:
    return e.FinishedChunk(
        session_id=SID,
        chunk_index=index,
        frames=frames_of(index),
        digest=digest_of(index),
        digest_prev=digest_of(index - 1) if index else "",
        steps=4,
        prompt_version=1,
        wait_s=0.0,
        denoise_s=0.0,
        decode_s=0.0,
        batch_size=1.0,
    )


class Gateway:
    """The other end of the data channel: what arrives, put together by the gateway's own code."""

    unsent_bytes = 0

    def __init__(self) -> None:
        self.parts = PartAssembler(1 << 20)
        self.chunks: list[tuple[m.ChunkReady, np.ndarray | bytes]] = []
        self.refused: list[m.ChunkRefused] = []
        self.threads: set[str] = set()

    def send(self, message: m.Message) -> None:
        self.threads.add(threading.current_thread().name)
        match m.decode(m.encode(message)):
            case m.FramePart() as part:
                self.parts.take(part)
            case m.ChunkReady() as ready:
                self.chunks.append((ready, self.parts.chunk(ready)))
            case m.ChunkRefused() as refused:
                self.refused.append(refused)


class Worker:
    """The real logic and emitter of a worker that joined; its engine is the test."""

    def __init__(self) -> None:
        self.logic = WorkerLogic(HELLO, SPEC)
        self.gateway: Gateway | None = Gateway()
        self.began: list[int] = []
        self.emitter = Emitter(
            HELLO.worker_epoch,
            self.logic,
            None,
            peer=lambda: self.gateway,
            send=lambda message: self.gateway and self.gateway.send(message),
            apply=self.apply,
            log=structlog.get_logger(),
        )
        now_s = time.monotonic()
        self.apply(self.logic.on_connect(CONTROLLER, now_s))
        self.apply(self.logic.on_connect(GATEWAY, now_s))
        self.apply(self.logic.on_message(CONTROLLER, lease(), now_s))
        self.apply(self.logic.on_message(CONTROLLER, open_session(), now_s))
        self.apply(self.logic.on_engine(e.Opened(SID), 1, now_s))

    def apply(self, actions) -> None:
        for action in actions:
            if isinstance(action, Emit):
                self.emitter.add(action)
            elif isinstance(action, Send) and action.to == GATEWAY and self.gateway is not None:
                if not isinstance(action.message, m.WorkerHello):
                    self.gateway.send(action.message)
            elif isinstance(action, e.Begin):
                self.began.append(action.request.chunk_index)
        self.emitter.pump()

    def ask(self, index: int, format: str) -> None:
        """A credit; the engine answers at once where it is for a new chunk."""
        asked = m.decode(m.encode(credit(index)))
        before = len(self.began)
        fields = {name: getattr(asked, name) for name in asked.__struct_fields__} | {"format": format}
        self.apply(self.logic.on_message(GATEWAY, m.Credit(**fields), time.monotonic()))
        if len(self.began) > before:
            self.apply(self.logic.on_engine(finished(index), 1, time.monotonic()))

    def accept(self, index: int) -> None:
        accepted = m.ChunkAccepted(session_id=SID, epoch=1, chunk_index=index)
        self.apply(self.logic.on_message(GATEWAY, accepted, time.monotonic()))

    async def until(self, count: int) -> list[tuple[m.ChunkReady, np.ndarray | bytes]]:
        await until(lambda: len(self.gateway.chunks) >= count)
        return self.gateway.chunks


def decode(format: str, data: np.ndarray | bytes, init: bytes = b"") -> np.ndarray:
    if format == "raw":
        return data
    if format == "mp4":
        with av.open(io.BytesIO(init + data)) as container:
            return np.stack([one.to_ndarray(format="rgb24") for one in container.decode(video=0)])
    units, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        units.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    codec = av.CodecContext.create("h264" if format == "h264" else "mjpeg", "r")
    frames = [one for unit in units for one in codec.decode(av.Packet(unit))] + codec.decode(None)
    return np.stack([one.to_ndarray(format="rgb24") for one in frames])


def begins_at(fragment: bytes) -> int:
    return struct.unpack_from(">Q", fragment, fragment.index(b"tfdt") + 8)[0]


async def until(check: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not check():  # noqa: ASYNC110 - what is awaited happens in a thread that knows no events
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("format", FORMATS)
async def test_chunks_leave_in_order_and_decode(format):
    worker = Worker()
    for index in range(6):
        worker.ask(index, format)
        await worker.until(index + 1)
        worker.accept(index)
    chunks = worker.gateway.chunks
    assert [ready.chunk_index for ready, _ in chunks] == list(range(6))
    assert [ready.digest for ready, _ in chunks] == [digest_of(index) for index in range(6)]
    assert {ready.format for ready, _ in chunks} == {format}
    for index, (ready, data) in enumerate(chunks):
        error = np.abs(decode(format, data, ready.init).astype(int) - frames_of(index))
        assert error.mean() < (1 if format == "raw" else 12)
        assert (ready.encode_ms > 0) == (format != "raw")
        assert bool(ready.init) == (format == "mp4")
    assert worker.gateway.threads == {threading.current_thread().name}  # encoded elsewhere, sent from here


async def test_what_was_made_comes_again_in_another_format_and_on_the_same_time_line():
    worker = Worker()
    for index in range(4):
        worker.ask(index, "h264")
        await worker.until(index + 1)
    for at, (index, format) in enumerate([(1, "mp4"), (2, "mp4"), (3, "mp4"), (1, "jpeg"), (0, "raw"), (3, "mp4")]):
        worker.ask(index, format)
        await worker.until(5 + at)
    again = worker.gateway.chunks[4:]
    assert [(ready.chunk_index, ready.format) for ready, _ in again] == [
        (1, "mp4"), (2, "mp4"), (3, "mp4"), (1, "jpeg"), (0, "raw"), (3, "mp4"),
    ]  # fmt: skip
    assert worker.began == [0, 1, 2, 3]  # nothing was made twice
    assert np.array_equal(again[4][1], frames_of(0))
    # An mp4 counts its time from the stream's beginning, whoever encoded what when: a thousand ticks a frame.
    fragments = [data for ready, data in again if ready.format == "mp4"]
    assert [begins_at(one) for one in fragments] == [4000, 8000, 12000, 12000]


async def test_a_credit_that_is_repeated_while_its_chunk_waits_sends_it_once(monkeypatch):
    go = threading.Event()
    encode = encode_thread.EncodeThread._encode
    monkeypatch.setattr(encode_thread.EncodeThread, "_encode", lambda *args: go.wait(20) and encode(*args))
    worker = Worker()
    for _ in range(50):
        worker.ask(0, "h264")
    assert worker.emitter._encoders._queue.qsize() <= 1  # bounded by what is made, not by what is asked
    go.set()
    await worker.until(1)
    await asyncio.sleep(0.05)
    assert len(worker.gateway.chunks) == 1
    worker.ask(0, "h264")  # and once it has left, once more
    await worker.until(2)


async def test_encoding_does_not_hold_up_the_thread_that_talks(monkeypatch):
    go = threading.Event()
    encode = encode_thread.EncodeThread._encode
    monkeypatch.setattr(encode_thread.EncodeThread, "_encode", lambda *args: go.wait(20) and encode(*args))
    worker = Worker()
    started_s = time.monotonic()
    worker.ask(0, "mp4")
    assert time.monotonic() - started_s < 1.0 and not worker.gateway.chunks
    go.set()
    await worker.until(1)


async def test_without_a_channel_or_a_lease_nothing_leaves_and_afterwards_all_does():
    worker = Worker()
    gateway, worker.gateway = worker.gateway, None
    worker.ask(0, "h264")
    worker.apply(worker.logic.on_disconnect(GATEWAY, time.monotonic()))
    await asyncio.sleep(0.2)
    assert not gateway.chunks and not worker.emitter._waiting
    worker.gateway = gateway
    worker.apply(worker.logic.on_connect(GATEWAY, time.monotonic()))
    await worker.until(1)
    late_s = time.monotonic() + 2 * LEASE_S
    assert worker.logic.may_emit(Emit(SID, 1, 0, "h264"), late_s) is None


async def test_what_cannot_be_encoded_is_refused_by_name(monkeypatch, caplog):
    def fails(*args):
        raise WorkerError("H.264 cannot hold 7x7")

    monkeypatch.setattr(encode_thread.EncodeThread, "_encode", fails)
    worker = Worker()
    with caplog.at_level(logging.ERROR):
        worker.ask(0, "h264")
        await until(lambda: worker.gateway.refused)
    [refused] = worker.gateway.refused
    assert (refused.code, refused.chunk_index, refused.next_index) == (m.NOT_ENCODED, 0, 1)


async def test_a_fault_of_the_thread_itself_is_not_the_sessions(monkeypatch):
    failed = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failed.set_result(context["exception"]))

    def fails(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(encode_thread.EncodeThread, "_encode", fails)
    worker = Worker()
    worker.ask(0, "h264")
    error = await asyncio.wait_for(failed, 10)  # worker_io ends the process on it
    assert isinstance(error, RuntimeError) and isinstance(error.__cause__, ZeroDivisionError)
    assert not worker.gateway.refused


async def test_encoders_of_closed_sessions_are_given_back():
    worker = Worker()
    worker.ask(0, "h264")
    await worker.until(1)
    encoders = worker.emitter._encoders
    worker.emitter.forget_closed()
    assert set(encoders._encoders) == {SID}
    closed = m.CloseSession(session_id=SID, epoch=1)
    worker.apply(worker.logic.on_message(CONTROLLER, closed, time.monotonic()))
    worker.emitter.forget_closed()
    await until(lambda: not encoders._encoders)


def test_a_process_without_pyav_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="PyAV cannot be imported") as failed:
        encoded_module.check_encoder()
    assert "pip install" in failed.value.hint
