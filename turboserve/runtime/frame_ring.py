"""Frames from a worker to the gateway through shared memory: the public face of the frame ring.

Who owns what: the launcher makes the memory (`create`) and hands its descriptor to one worker, the
only producer, and to the gateway, the only consumer. A successor of a dead worker attaches with a
higher worker epoch and goes on behind the last whole record; the launcher lets it do so only after
it has reaped the old process.

The ring has no bell: `push` and `pop` answer at once, and the worker's control message says that a
chunk lies ready. A bounded wait is there for whoever has no such message; it sleeps, so it keeps
neither the interpreter lock nor a core.

Two twins hold the same layout (csrc/frame_ring.h): `turboserve._native` in C++ and frame_ring_twin.py.
`IMPLEMENTATION` names the one in use, and the log says it once.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from turboserve.digest import next_digest
from turboserve.errors import ConfigError, CorruptState, InvalidRequest
from turboserve.runtime import frame_ring_twin as twin

log = logging.getLogger(__name__)

KIND_CHUNK = 1
SESSION_ID_BYTES = 26
_NO_DIGEST = bytes(32)
# magic, version, kind, payload_bytes, worker_epoch, session_epoch, chunk_index, frames, height, width, steps,
# prompt_version, session_id, -, flags, digest, digest_prev, position, -, header_crc
_HEADER = struct.Struct("<4sHHQQQQIIIIQ26s2xI32s32sQ20xI")
assert _HEADER.size == twin.HEADER_BYTES


def _load_native() -> tuple[ModuleType | None, str]:
    """The compiled twin, or None and why not."""
    try:
        from turboserve import _native
    except ImportError as error:
        return None, f"turboserve._native is not there ({error})"
    if twin.LAYOUT_VERSION != _native.LAYOUT_VERSION:
        return None, "turboserve._native was built from other sources; build it again"
    return _native, ""


_native, _why_not = _load_native()
IMPLEMENTATION = "native" if _native else "python"


@cache
def _say_implementation() -> None:
    if _native:
        log.info("frame ring: C++ (turboserve._native)")
    else:
        log.warning("frame ring: the slower Python twin; %s", _why_not)


def _twin(implementation: str | None) -> Any:
    """The module that does the work: the default one, or the one a test or bench names."""
    if implementation is None:
        _say_implementation()
        return _native or twin
    if implementation == "python":
        return twin
    if implementation == "native" and _native:
        return _native
    raise ConfigError(f"frame ring implementation {implementation!r}; {_why_not}", expected="native or python")


def record_bytes(payload_bytes: int) -> int:
    """Bytes that one chunk takes in a ring; the launcher sizes rings with it."""
    return twin.record_bytes(payload_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameHeader:
    """All that travels with a chunk's pixels.

    `digest_prev` is empty for chunk 0, else 32 bytes like `digest`.
    """

    session_id: str
    worker_epoch: int
    session_epoch: int
    chunk_index: int
    frames: int
    height: int
    width: int
    steps: int
    prompt_version: int
    digest: bytes
    digest_prev: bytes
    flags: int = 0

    @property
    def payload_bytes(self) -> int:
        return self.frames * self.height * self.width * 3

    def pack(self) -> bytes:
        session_id = self.session_id.encode("ascii", "replace")
        digest_bytes_prev = 32 if self.chunk_index else 0
        if len(session_id) != SESSION_ID_BYTES:
            raise InvalidRequest(f"session id {self.session_id!r}", expected="26 characters")
        if len(self.digest) != 32 or len(self.digest_prev) != digest_bytes_prev:
            raise InvalidRequest(
                f"digests of {len(self.digest)} and {len(self.digest_prev)} B for chunk {self.chunk_index}",
                expected=f"32 and {digest_bytes_prev} B",
            )
        try:
            return _HEADER.pack(
                twin.RECORD_MAGIC,
                twin.LAYOUT_VERSION,
                KIND_CHUNK,
                self.payload_bytes,
                self.worker_epoch,
                self.session_epoch,
                self.chunk_index,
                self.frames,
                self.height,
                self.width,
                self.steps,
                self.prompt_version,
                session_id,
                self.flags,
                self.digest,
                self.digest_prev or _NO_DIGEST,
                0,  # position and checksum are the ring's to fill in
                0,
            )
        except struct.error as error:
            raise InvalidRequest(f"frame header {self} does not fit its fields: {error}") from error

    @classmethod
    def unpack(cls, packed: bytes) -> FrameHeader:
        """The header of a record whose checksum the ring has verified; what it says must still make sense."""
        _, _, kind, payload_bytes, *rest, _position, _crc = _HEADER.unpack(packed)
        worker_epoch, session_epoch, chunk_index, frames, height, width, steps, prompt_version = rest[:8]
        session_id, flags, digest, digest_prev = rest[8:]
        header = cls(
            session_id=session_id.decode("ascii", "replace"),
            worker_epoch=worker_epoch,
            session_epoch=session_epoch,
            chunk_index=chunk_index,
            frames=frames,
            height=height,
            width=width,
            steps=steps,
            prompt_version=prompt_version,
            digest=digest,
            digest_prev=digest_prev if chunk_index else b"",
            flags=flags,
        )
        if kind != KIND_CHUNK or header.payload_bytes != payload_bytes:
            raise CorruptState(
                f"frame ring: kind {kind}, {frames}x{height}x{width} frames in {payload_bytes} B",
                expected=f"kind {KIND_CHUNK} and frames x height x width x 3 B",
            )
        return header


@dataclass(frozen=True, slots=True)
class FrameRecord:
    """One chunk as popped: its header and a private copy of its pixels, RGB24, row-major."""

    header: FrameHeader
    pixels: bytes

    def array(self) -> np.ndarray:
        """The pixels as uint8 (frames, height, width, 3), read-only, without another copy."""
        header = self.header
        return np.frombuffer(self.pixels, np.uint8).reshape(header.frames, header.height, header.width, 3)

    def verify(self) -> None:
        """Checks the pixels against the digest chain; CorruptState if they differ."""
        if next_digest(self.header.digest_prev.hex(), self.pixels) != self.header.digest.hex():
            raise CorruptState(
                f"frame ring: the pixels of chunk {self.header.chunk_index} of session "
                f"{self.header.session_id} do not match their digest"
            )


def create(capacity_bytes: int, *, implementation: str | None = None) -> int:
    """A new ring's descriptor, owned by the caller: a sealed memfd with its memory reserved now."""
    return _twin(implementation).create_ring(capacity_bytes)


def _wait(attempt: Callable[[], Any], timeout_s: float) -> Any:
    """Calls `attempt` until it gives something true or the time is over; sleeps 20 us to 1 ms between."""
    found = attempt()
    if found or timeout_s <= 0:
        return found
    deadline_s = time.monotonic() + timeout_s
    pause_s = 20e-6
    while not found and time.monotonic() < deadline_s:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1e-3)
        found = attempt()
    return found


class _End:
    """What both ends share. Each is for one thread at a time; a second one gets Conflict."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.capacity_bytes: int = raw.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of records that are committed and not yet popped, headers and padding included."""
        return self._raw.used_bytes

    @property
    def free_bytes(self) -> int:
        """Room for new records; `record_bytes` says what one takes."""
        return self.capacity_bytes - self._raw.used_bytes

    def close(self) -> None:
        """Unmaps the memory. The descriptor is the caller's."""
        self._raw.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FrameProducer(_End):
    """The worker's end of a ring."""

    def __init__(self, fd: int, *, worker_epoch: int, implementation: str | None = None) -> None:
        super().__init__(_twin(implementation).RingProducer(fd, worker_epoch))
        self.worker_epoch = worker_epoch

    def push(self, header: FrameHeader, pixels: Any, *, timeout_s: float = 0.0) -> bool:
        """Copies one chunk in; False when there was no room within `timeout_s`.

        `pixels` is any C-contiguous buffer of header.payload_bytes; it must not change during the
        call. ConfigError when the chunk is larger than the whole ring, Conflict when a newer worker
        has taken the ring over.
        """
        if header.worker_epoch != self.worker_epoch:
            raise InvalidRequest(f"worker epoch {header.worker_epoch}", expected=str(self.worker_epoch))
        if memoryview(pixels).nbytes != header.payload_bytes:
            raise InvalidRequest(
                f"{memoryview(pixels).nbytes} B of pixels",
                expected=f"{header.payload_bytes} B for {header.frames}x{header.height}x{header.width}",
            )
        packed = header.pack()
        return bool(_wait(lambda: self._raw.push(packed, pixels), timeout_s))


class FrameConsumer(_End):
    """The gateway's end of a ring.

    CorruptState never repeats for the same bytes: a record whose pixels are wrong is taken all the same, and behind a
    header that cannot be believed nothing can be found, so all that is unread is dropped, which the log says.
    """

    def __init__(self, fd: int, *, implementation: str | None = None) -> None:
        super().__init__(_twin(implementation).RingConsumer(fd))

    def _checked(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except CorruptState as error:
            with suppress(CorruptState):  # counters that cannot be true: only a new ring helps
                log.warning("%s; dropping %d unread bytes", error, self._raw.discard())
            raise

    def peek(self) -> FrameHeader | None:
        """The next chunk's header, not taken; None when the ring is empty."""

        def read() -> FrameHeader | None:
            packed = self._raw.peek()
            return None if packed is None else FrameHeader.unpack(packed)

        return self._checked(read)

    def pop(self, *, timeout_s: float = 0.0, verify: bool = True) -> FrameRecord | None:
        """Takes the next chunk; None when none came within `timeout_s`.

        With `verify` its pixels are checked against the digest chain, which costs more than the copy itself.
        """
        found = _wait(lambda: self._checked(self._raw.pop), timeout_s)
        if found is None:
            return None
        record = FrameRecord(FrameHeader.unpack(found[0]), found[1])
        if verify:
            record.verify()
        return record

    def pop_into(self, target: Any) -> FrameHeader | None:
        """Takes the next chunk, its pixels to the start of the writable buffer `target`. They are not verified."""
        packed = self._checked(lambda: self._raw.pop_into(target))
        return None if packed is None else FrameHeader.unpack(packed)

    def discard(self) -> int:
        """Drops every unread chunk and returns the bytes they took."""
        return self._raw.discard()


def attach_producer(fd: int, *, worker_epoch: int, implementation: str | None = None) -> FrameProducer:
    """The producing end of the ring behind `fd` (inherited, or opened from /proc/<pid>/fd/<n>)."""
    return FrameProducer(fd, worker_epoch=worker_epoch, implementation=implementation)


def attach_consumer(fd: int, *, implementation: str | None = None) -> FrameConsumer:
    """The consuming end of the ring behind `fd`; a new gateway goes on at the first chunk not popped."""
    return FrameConsumer(fd, implementation=implementation)
