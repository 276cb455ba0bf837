"""The frame ring in plain Python: csrc/frame_ring.{h,cpp} once more, for machines without a C++ compiler.

Same memory layout, same methods, same errors, so that either end can be either twin. One
difference: Python cannot order its stores, so this twin runs only where the processor keeps stores
in order (x86-64).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from turboserve.errors import ConfigError, Conflict, CorruptState, LayoutMismatch, PoolExhausted

LAYOUT_VERSION = 1
RING_MAGIC = b"TSFRING1"
RECORD_MAGIC = b"TSFR"
CONTROL_BYTES = 4096
HEADER_BYTES = 192
RECORD_ALIGN = 64
CAPACITY_MAX = 1 << 40

# magic, version, control_bytes, capacity, header_bytes, crc of the bytes before
_GEOMETRY = struct.Struct("<8sIIQII")
_HEAD, _TAIL, _PRODUCER_EPOCH = 64 // 8, 128 // 8, 192 // 8  # in words of 8 bytes
_PAYLOAD_BYTES_AT, _POSITION_AT, _CRC_AT = 8, 160, 188  # in the record header
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def record_bytes(payload_bytes: int) -> int:
    """Bytes that a record of this payload takes in the ring."""
    return -(-(HEADER_BYTES + payload_bytes) // RECORD_ALIGN) * RECORD_ALIGN


def _check_capacity(capacity: int) -> None:
    if not CONTROL_BYTES <= capacity <= CAPACITY_MAX or capacity % RECORD_ALIGN:
        raise ConfigError(f"frame ring capacity {capacity} B", expected="a multiple of 64 from 4096 B to 1 TiB")


def create_ring(capacity_bytes: int) -> int:
    """A new ring as a sealed memfd with its memory reserved; the caller owns the descriptor."""
    _check_capacity(capacity_bytes)
    fd = os.memfd_create("turboserve-frame-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, CONTROL_BYTES + capacity_bytes)
        os.posix_fallocate(fd, 0, CONTROL_BYTES + capacity_bytes)
        geometry = _GEOMETRY.pack(RING_MAGIC, LAYOUT_VERSION, CONTROL_BYTES, capacity_bytes, HEADER_BYTES, 0)
        os.pwrite(fd, geometry[:-4] + struct.pack("<I", zlib.crc32(geometry[:-4])), 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise PoolExhausted(f"frame ring: reserving memory: {error}") from error
        raise
    return fd


class _Memory:
    """The mapped memory of one ring, and the turn that keeps its end to one thread at a time."""

    def __init__(self, fd: int) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise ConfigError(
                "the Python frame ring relies on x86-64's order of stores",
                hint="install a C++ compiler and build csrc/",
            )
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        except OSError:
            sealed = 0
        if not sealed:
            raise ConfigError(f"descriptor {fd} is no frame ring", expected="a sealed memfd")
        geometry = os.pread(fd, _GEOMETRY.size, 0)
        if len(geometry) != _GEOMETRY.size:
            raise CorruptState("frame ring: no control page")
        magic, version, control_bytes, capacity, header_bytes, crc = _GEOMETRY.unpack(geometry)
        if magic != RING_MAGIC or crc != zlib.crc32(geometry[:-4]):
            raise CorruptState("frame ring: the control page does not verify")
        if (version, control_bytes, header_bytes) != (LAYOUT_VERSION, CONTROL_BYTES, HEADER_BYTES):
            raise LayoutMismatch(
                f"frame ring layout {version}",
                expected=str(LAYOUT_VERSION),
                hint="restart all processes of one version",
            )
        _check_capacity(capacity)
        if os.fstat(fd).st_size != CONTROL_BYTES + capacity:
            raise CorruptState("frame ring: the memory is not control page + capacity")
        self.capacity = capacity
        self._mmap = mmap.mmap(fd, CONTROL_BYTES + capacity, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._bytes = memoryview(self._mmap)
        # An element store into a "Q" view is one 8-byte store; struct.pack_into would write zeros first.
        self._words = self._bytes[:CONTROL_BYTES].cast("Q")
        self._data = self._bytes[CONTROL_BYTES:]
        self._turn = threading.Lock()
        self._closing = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        if self._closing:
            raise Conflict("frame ring: this end is closed")
        if not self._turn.acquire(blocking=False):
            raise Conflict("frame ring: two threads use one end at a time", expected="one")
        try:
            yield
        finally:
            self._turn.release()
            if self._closing:
                self._unmap()

    def close(self) -> None:
        """Unmaps the memory, or leaves that to the thread whose turn it is."""
        self._closing = True
        self._unmap()

    def _unmap(self) -> None:
        if self._turn.acquire(blocking=False):  # and kept: there is no turn after this one
            for view in (self._data, self._words, self._bytes):
                view.release()
            self._mmap.close()

    def used_now(self) -> int:
        """Bytes in use, for an onlooker of a ring in motion: bounded, never an error but for a closed end."""
        try:
            tail = self._words[_TAIL]  # first, so that head is not behind it
            return min(self._words[_HEAD] - tail, self.capacity)
        except ValueError:
            raise Conflict("frame ring: this end is closed") from None

    def load(self, word: int) -> int:
        return self._words[word]

    def store(self, word: int, value: int) -> None:
        self._words[word] = value

    def copy_in(self, position: int, source: bytes | memoryview) -> None:
        at = position % self.capacity
        first = min(len(source), self.capacity - at)
        self._data[at : at + first] = source[:first]
        if first < len(source):
            self._data[: len(source) - first] = source[first:]

    def copy_out(self, position: int, target: memoryview) -> None:
        at = position % self.capacity
        first = min(len(target), self.capacity - at)
        target[:first] = self._data[at : at + first]
        if first < len(target):
            target[first:] = self._data[: len(target) - first]

    def read(self, position: int, count: int) -> bytes:
        at = position % self.capacity
        first = min(count, self.capacity - at)
        if first == count:
            return bytes(self._data[at : at + count])
        return b"".join((self._data[at : at + first], self._data[: count - first]))

    def used(self, head: int, tail: int) -> int:
        if not 0 <= head - tail <= self.capacity or head % RECORD_ALIGN or tail % RECORD_ALIGN:
            raise CorruptState(f"frame ring: head {head} and tail {tail} do not fit a capacity of {self.capacity} B")
        return head - tail


class RingProducer:
    """The worker's end.

    A higher `worker_epoch` than the last producer's takes the ring over behind its last record.
    """

    def __init__(self, fd: int, worker_epoch: int) -> None:
        self._memory = memory = _Memory(fd)
        self.worker_epoch = worker_epoch
        current = memory.load(_PRODUCER_EPOCH)
        if worker_epoch <= current:
            memory.close()
            raise Conflict(
                f"frame ring belongs to worker epoch {current}", expected=f"a higher one than {worker_epoch}"
            )
        memory.store(_PRODUCER_EPOCH, worker_epoch)
        self._head = memory.load(_HEAD)
        memory.used(self._head, memory.load(_TAIL))

    @property
    def capacity_bytes(self) -> int:
        return self._memory.capacity

    @property
    def used_bytes(self) -> int:
        return self._memory.used_now()

    def _check_not_fenced(self) -> None:
        current = self._memory.load(_PRODUCER_EPOCH)
        if current != self.worker_epoch or self._memory.load(_HEAD) != self._head:
            raise Conflict(
                f"frame ring was taken over by worker epoch {current}",
                hint=f"epoch {self.worker_epoch} must stop",
            )

    def push(self, header: bytes, payload: bytes | memoryview) -> bool:
        """False when the ring has no room now.

        Position and checksum of the 192-byte header are filled in here.
        """
        body = memoryview(payload).cast("B")
        if len(header) != HEADER_BYTES:
            raise ValueError("a record header is 192 bytes")
        memory = self._memory
        with memory.turn():
            self._check_not_fenced()
            record = record_bytes(len(body))
            if record > memory.capacity:
                raise ConfigError(
                    f"a record of {len(body)} payload B never fits a ring of {memory.capacity} B",
                    hint="make the ring larger",
                )
            if record > memory.capacity - memory.used(self._head, memory.load(_TAIL)):
                return False
            filled = bytearray(header)
            struct.pack_into("<Q", filled, _PAYLOAD_BYTES_AT, len(body))
            struct.pack_into("<Q", filled, _POSITION_AT, self._head)
            struct.pack_into("<I", filled, _CRC_AT, zlib.crc32(memoryview(filled)[:_CRC_AT]))
            memory.copy_in(self._head, memoryview(filled))
            memory.copy_in(self._head + HEADER_BYTES, body)
            self._check_not_fenced()
            self._head += record
            memory.store(_HEAD, self._head)  # last: until here the record does not exist
            return True

    def close(self) -> None:
        self._memory.close()


class RingConsumer:
    """The gateway's end."""

    def __init__(self, fd: int) -> None:
        self._memory = memory = _Memory(fd)
        self._tail = memory.load(_TAIL)
        memory.used(memory.load(_HEAD), self._tail)

    @property
    def capacity_bytes(self) -> int:
        return self._memory.capacity

    @property
    def used_bytes(self) -> int:
        return self._memory.used_now()

    def _peek(self) -> tuple[bytes, int] | None:
        """The next record's checked header and its payload bytes."""
        memory, tail = self._memory, self._tail
        available = memory.used(memory.load(_HEAD), tail)
        if available == 0:
            return None
        if available < HEADER_BYTES:
            raise CorruptState("frame ring: less than a header is left before the head")
        header = memory.read(tail, HEADER_BYTES)
        (crc,) = struct.unpack_from("<I", header, _CRC_AT)
        if header[:4] != RECORD_MAGIC or crc != zlib.crc32(header[:_CRC_AT]):
            raise CorruptState(f"frame ring: the record header at {tail} does not verify")
        (version,) = struct.unpack_from("<H", header, 4)
        if version != LAYOUT_VERSION:
            raise CorruptState(f"frame ring: record version {version}")
        if struct.unpack_from("<Q", header, _POSITION_AT)[0] != tail:
            raise CorruptState(f"frame ring: the record at {tail} is of another lap")
        (payload_bytes,) = struct.unpack_from("<Q", header, _PAYLOAD_BYTES_AT)
        if record_bytes(payload_bytes) > available:
            raise CorruptState(f"frame ring: a record of {payload_bytes} B reaches past the head")
        return header, payload_bytes

    def _free(self, payload_bytes: int) -> None:
        self._tail += record_bytes(payload_bytes)
        self._memory.store(_TAIL, self._tail)

    def peek(self) -> bytes | None:
        """The next record's header, not taken; None when the ring is empty."""
        with self._memory.turn():
            found = self._peek()
            return found[0] if found else None

    def pop(self) -> tuple[bytes, bytes] | None:
        """The next record's header and a fresh copy of its payload; None when the ring is empty."""
        with self._memory.turn():
            found = self._peek()
            if found is None:
                return None
            header, payload_bytes = found
            payload = self._memory.read(self._tail + HEADER_BYTES, payload_bytes)
            self._free(payload_bytes)
            return header, payload

    def pop_into(self, target: bytearray | memoryview) -> bytes | None:
        """Like `pop`, with the payload copied to the start of a writable buffer."""
        body = memoryview(target).cast("B")
        with self._memory.turn():
            found = self._peek()
            if found is None:
                return None
            header, payload_bytes = found
            if len(body) < payload_bytes:
                raise ValueError(f"the next payload has {payload_bytes} B, the target {len(body)}")
            self._memory.copy_out(self._tail + HEADER_BYTES, body[:payload_bytes])
            self._free(payload_bytes)
            return header

    def discard(self) -> int:
        """Forgets everything unread and returns its bytes."""
        with self._memory.turn():
            head = self._memory.load(_HEAD)
            dropped = self._memory.used(head, self._tail)
            self._tail = head
            self._memory.store(_TAIL, self._tail)
            return dropped

    def close(self) -> None:
        self._memory.close()
