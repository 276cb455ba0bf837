"""Host memory that outlives a worker: what sessions leave there can be read by whoever takes them over.

The launcher makes one arena a node (`create_arena`: a sealed memfd) and hands its descriptor to every process of that
node; each maps it. An *extent* is what somebody wrote once: reserve (before any copy), write, commit. Until the commit
it does not exist; from then on every process finds it, also when the writer is dead. arena_table.py says how that holds
when a process is killed at any instruction.

Each worker owns one partition and reserves there alone; anybody may read all extents, and drop those of a session it is
responsible for. `free + reserved + committed == total`, in bytes of whole slabs, after every step (`ledger`).

Nothing here waits. An extent's slabs are not wiped: a writer fills all that it reserved.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turboserve.errors import ConfigError, CorruptState, InvalidRequest, NotFound, PoolExhausted
from turboserve.runtime import arena_table as twin
from turboserve.runtime import native
from turboserve.runtime.arena_table import META_BYTES_MAX, SESSION_ID_BYTES, ArenaGeometry
from turboserve.runtime.checksum import checksum64

SLAB_BYTES = 256 << 10
KIND_RAW, KIND_PAGE, KIND_POINT = 0, 1, 2
NO_DIGEST = bytes(32)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create_arena(
    bytes_: int,
    *,
    name: str = "node",
    partition_count: int = 1,
    slab_bytes: int = SLAB_BYTES,
    reserve_memory: bool = True,
) -> int:
    """A new arena's descriptor, owned by the caller: at least `bytes_` of slabs in equal partitions.

    `name` shows in /proc. With `reserve_memory` shortage is an error here (PoolExhausted), not a bus error in a worker.
    """
    if bytes_ < 1:
        raise ConfigError(f"an arena of {bytes_} B", expected="at least 1")
    geometry = ArenaGeometry(partition_count, -(-bytes_ // (slab_bytes * partition_count)), slab_bytes)
    fd = os.memfd_create(f"turboserve-arena-{name}"[:240], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, geometry.total_bytes)
        if reserve_memory:
            os.posix_fallocate(fd, 0, geometry.total_bytes)
        os.pwrite(fd, geometry.pack(), 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise PoolExhausted(
                f"arena: reserving {geometry.total_bytes} B: {error}", hint="make it smaller, or free memory"
            ) from error
        raise
    return fd


@dataclass(frozen=True, slots=True)
class ExtentId:
    """Names one extent for ever: an entry is used again, with a higher generation."""

    entry: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A committed extent. `chunk` is the writer's chunk index, `meta` at most META_BYTES_MAX bytes of its own."""

    id: ExtentId
    kind: int
    session: str
    epoch: int
    chunk: int
    payload_bytes: int
    slab_bytes: int
    """Bytes of the slabs it holds."""
    checksum: int
    digest: bytes
    meta: bytes
    partition: int
    owner_epoch: int

    @property
    def age_key(self) -> tuple[int, int, int]:
        """Orders a session's extents from oldest to newest."""
        return self.epoch, self.chunk, self.id.generation


@dataclass(frozen=True, slots=True)
class Ledger:
    """Bytes of whole slabs."""

    total_bytes: int
    free_bytes: int
    reserved_bytes: int
    committed_bytes: int


class Reservation:
    """Slabs taken and not yet committed. Fill all of it, then `Arena.commit`, else `Arena.free`."""

    def __init__(self, id_: ExtentId, session: str, epoch: int, payload_bytes: int, views: list[memoryview]) -> None:
        self.id = id_
        self.session = session
        self.epoch = epoch
        self.payload_bytes = payload_bytes
        self.views = views
        """Writable pieces of memory that make up the payload, in order."""

    def write(self, offset: int, data: Any) -> None:
        """Copies a C-contiguous buffer to `offset`."""
        source = memoryview(data).cast("B")
        for target in region(self.views, offset, len(source)):
            target[:] = source[: len(target)]
            source = source[len(target) :]

    def addresses(self, offset: int = 0, bytes_: int | None = None) -> list[tuple[int, int]]:
        """(address, bytes) of the pieces, for a copy engine; valid in this process while the arena is mapped."""
        count = self.payload_bytes - offset if bytes_ is None else bytes_
        return [(address_of(view), len(view)) for view in region(self.views, offset, count)]


def address_of(view: memoryview) -> int:
    """Where a buffer lies in this process."""
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def region(views: Sequence[memoryview], offset: int, bytes_: int) -> list[memoryview]:
    """The pieces of `bytes_` bytes from `offset` on of buffers laid end to end."""
    found = []
    left = bytes_
    for view in views:
        if left == 0:
            break
        if offset >= len(view):
            offset -= len(view)
            continue
        piece = view[offset : offset + left]
        found.append(piece)
        left -= len(piece)
        offset = 0
    if left:
        raise InvalidRequest(f"{bytes_} B reach {left} B past the end of an extent")
    return found


class Arena:
    """One process's mapping of an arena. Its methods may be called from any thread."""

    def __init__(self, fd: int, partition: int | None, owner_epoch: int, implementation: str | None) -> None:
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        except OSError:
            sealed = 0
        if not sealed:
            raise ConfigError(f"descriptor {fd} is no arena", expected="a sealed memfd")
        self.geometry = geometry = ArenaGeometry.unpack(os.pread(fd, twin.CONTROL_READ_BYTES, 0))
        if os.fstat(fd).st_size != geometry.total_bytes:
            raise CorruptState("arena: the memory is not control page, table and slabs")
        self._mmap = mmap.mmap(fd, geometry.total_bytes, flags=mmap.MAP_SHARED)
        self._memory = memoryview(self._mmap)
        self._slabs = self._memory[geometry.data_at :]
        self._lock = threading.Lock()
        self.partition = partition
        self.owner_epoch = owner_epoch
        compiled = native.choose(implementation)
        self._table: Any = (compiled or twin).ArenaTable(self._memory, partition, owner_epoch)
        self._pinned = False

    @classmethod
    def map(
        cls, fd: int, *, partition: int | None = None, owner_epoch: int = 0, implementation: str | None = None
    ) -> Arena:
        """Map the arena behind `fd` (inherited, or opened from /proc/<pid>/fd/<n>); the descriptor stays the caller's.

        A worker names its partition and a higher `owner_epoch` than the last owner's (its worker epoch): what that one
        committed stays, what it only reserved is free. The launcher lets a successor in only after it has reaped the
        old process. Without a partition the mapping can read and free, not reserve.
        """
        return cls(fd, partition, owner_epoch, implementation)

    # ------------------------------------------------------------------ write

    def reserve(self, session: str, epoch: int, bytes_: int) -> Reservation:
        """Take slabs for `bytes_` in the own partition. ArenaFull says how much is free."""
        if bytes_ < 0 or epoch < 0:
            raise InvalidRequest(f"an extent of {bytes_} B at epoch {epoch}", expected="neither below 0")
        with self._lock:
            entry, generation = self._table.reserve(_session_bytes(session), epoch, bytes_)
            slabs = self._table.slabs(entry, generation)
        return Reservation(ExtentId(entry, generation), session, epoch, bytes_, self._views(slabs, bytes_))

    def commit(
        self,
        reservation: Reservation,
        chunk: int,
        digest: bytes = NO_DIGEST,
        meta: bytes = b"",
        *,
        kind: int = KIND_RAW,
    ) -> Extent:
        """Make what was written exist, by one store at the end. Conflict when the reservation has ended."""
        if len(digest) > 32 or len(meta) > META_BYTES_MAX:
            raise InvalidRequest(
                f"a digest of {len(digest)} B and {len(meta)} B of meta", expected=f"at most 32 and {META_BYTES_MAX}"
            )
        checksum = checksum64(reservation.views)  # outside the lock: it reads every byte
        id_ = reservation.id
        with self._lock:
            self._table.commit(id_.entry, id_.generation, kind, chunk, digest, meta, checksum)
            header = self._table.header(id_.entry, id_.generation)
        if header is None:
            raise NotFound(f"arena extent {id_} was dropped as it was committed")
        return self._extent(header)

    # ------------------------------------------------------------------ read

    def find(self, session: str | None = None, *, kind: int | None = None) -> list[Extent]:
        """Committed extents of a session, or of all, newest first: by epoch, then chunk."""
        wanted = None if session is None else _session_bytes(session)
        with self._lock:
            headers = self._table.headers(wanted)
        extents = [self._extent(header) for header in headers]
        found = [one for one in extents if kind is None or one.kind == kind]
        return sorted(found, key=lambda one: one.age_key, reverse=True)

    def get(self, id_: ExtentId) -> Extent | None:
        """The committed extent of that name; None when it has ended."""
        with self._lock:
            header = self._table.header(id_.entry, id_.generation)
        return None if header is None else self._extent(header)

    def read(self, extent: Extent, *, verify: bool = True) -> list[memoryview]:
        """The payload where it lies, read-only, in pieces: one where the slabs are neighbours.

        NotFound when the extent has ended, CorruptState when its checksum does not fit. The views show whatever is
        written there later, should somebody free the extent meanwhile: then `get` answers None.
        """
        with self._lock:
            slabs = self._table.slabs(extent.id.entry, extent.id.generation)
        views = [view.toreadonly() for view in self._views(slabs, extent.payload_bytes)]
        if verify:
            matches = checksum64(views) == extent.checksum
            if self.get(extent.id) is None:
                raise NotFound(f"arena extent {extent.id} ended while it was read")
            if not matches:
                raise CorruptState(f"arena: the bytes of {extent.session} at chunk {extent.chunk} do not verify")
        return views

    def read_bytes(self, extent: Extent) -> bytes:
        """A verified private copy of the payload."""
        copied = b"".join(self.read(extent, verify=False))
        if self.get(extent.id) is None:
            raise NotFound(f"arena extent {extent.id} ended while it was read")
        if checksum64([copied]) != extent.checksum:
            raise CorruptState(f"arena: the bytes of {extent.session} at chunk {extent.chunk} do not verify")
        return copied

    # ------------------------------------------------------------------ end

    def free(self, extent: Extent | Reservation | ExtentId) -> bool:
        """End an extent or a reservation, of whatever partition; False when it had ended already."""
        id_ = extent if isinstance(extent, ExtentId) else extent.id
        with self._lock:
            return bool(self._table.free(id_.entry, id_.generation))

    def sweep(self, partition: int) -> int:
        """Free what a dead owner had reserved and not committed; the bytes. Only after it was reaped."""
        with self._lock:
            return int(self._table.sweep(partition)) * self.geometry.slab_bytes

    def ledger(self, partition: int | None = None) -> Ledger:
        """Bytes by state, of one partition or of all."""
        with self._lock:
            total, reserved, committed = self._table.slab_counts(partition)
        slab_bytes = self.geometry.slab_bytes
        return Ledger(
            total * slab_bytes,
            (total - reserved - committed) * slab_bytes,
            reserved * slab_bytes,
            committed * slab_bytes,
        )

    def check(self) -> None:
        """Walks every chain; CorruptState when a slab is in two extents or lost. For tests and after a recovery."""
        with self._lock:
            self._table.check()

    def touch(self, threads: int = 4) -> None:
        """Brings every page of the memory in now, changing nothing, so that no copy waits for one later."""
        compiled = native.choose(None)
        if compiled is not None:
            compiled.touch_pages(self._memory, threads)
        else:
            for at in range(0, len(self._memory), mmap.PAGESIZE):
                self._memory[at]

    def pin(self, threads: int = 8) -> None:
        """Page-locks this process's mapping for its CUDA devices, after touching it; ConfigError where there is none.

        Every process registers its own mapping. Until then copies from and to a device go through a staging buffer.
        """
        found, device_count = native.load_cuda()
        if device_count == 0:
            raise ConfigError(f"no CUDA device to page-lock the arena for: {found}")
        self.touch(threads)
        compiled = native.choose("native")
        assert compiled is not None
        compiled.cuda_register(self._memory)
        self._pinned = True

    def close(self) -> None:
        """Unmaps the memory, or leaves that to the last view of it that is still about."""
        with self._lock:
            if self._pinned:
                self._pinned = False
                compiled = native.choose("native")
                assert compiled is not None
                compiled.cuda_unregister(self._memory)
            self._table.close()
        with contextlib.suppress(BufferError):
            self._slabs.release()
            self._memory.release()
            self._mmap.close()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    def _views(self, slabs: Sequence[int], payload_bytes: int) -> list[memoryview]:
        """Pieces of the payload; neighbouring slabs make one."""
        slab_bytes = self.geometry.slab_bytes
        views: list[memoryview] = []
        left = payload_bytes
        at = 0
        while left > 0:
            run = 1
            while at + run < len(slabs) and slabs[at + run] == slabs[at] + run:
                run += 1
            size = min(left, run * slab_bytes)
            start = slabs[at] * slab_bytes
            views.append(self._slabs[start : start + size])
            left -= size
            at += run
        return views

    def _extent(self, header: bytes) -> Extent:
        fields = twin.HEADER.unpack(header)
        _, _, kind, generation, session, epoch, chunk, payload_bytes, checksum, entry, slab_count = fields[:11]
        meta_bytes, _, digest, owner_epoch, meta, _ = fields[11:]
        return Extent(
            id=ExtentId(entry, generation),
            kind=kind,
            session=session.decode("ascii", "replace"),
            epoch=epoch,
            chunk=chunk,
            payload_bytes=payload_bytes,
            slab_bytes=slab_count * self.geometry.slab_bytes,
            checksum=checksum,
            digest=digest,
            meta=meta[:meta_bytes],
            partition=entry // self.geometry.slabs_per_partition,
            owner_epoch=owner_epoch,
        )


def _session_bytes(session: str) -> bytes:
    encoded = session.encode("ascii", "replace")
    if len(encoded) != SESSION_ID_BYTES or b"\0" in encoded:
        raise InvalidRequest(f"session id {session!r}", expected=f"{SESSION_ID_BYTES} characters")
    return encoded
