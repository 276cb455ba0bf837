"""Where the arena's extents are: its memory layout, and the allocation table in plain Python.

The memory is a control page, then per slab a state word, a dropped word, a link and a 512-byte header, then the slabs.
An *extent* is a chain of slabs of one partition; its *entry* is its first slab's number, so two extents never share
one. Whether an extent exists is one 8-byte word:

    state[entry] = generation << 2 | FREE, RESERVED or COMMITTED         generation grows with every reservation

Everything else is written before the word that makes it count, so a process that is killed between any two stores has
either done the step or not begun it. Only a partition's owner moves state words; there is no lock that a killed or
stopped process could keep. Anybody may drop an extent by storing its generation in dropped[entry]: from then on nobody
finds it, and the owner takes the slabs back when it needs room. A generation that is over makes a late drop harmless.
The owner's free map is not in the memory: a successor rebuilds it from the entries.

csrc/pinned_arena.{h,cpp} works on the same memory; change both or neither.
"""

from __future__ import annotations

import platform
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from turboserve.errors import ArenaFull, ConfigError, Conflict, CorruptState, LayoutMismatch, NotFound

LAYOUT_VERSION = 1
ARENA_MAGIC = b"TSARENA1"
HEADER_MAGIC = b"TSEX"
CONTROL_BYTES = 4096
HEADER_BYTES = 512
META_BYTES_MAX = 320
SESSION_ID_BYTES = 26
PARTITIONS_MAX = 256
SLABS_MAX = 1 << 30
SLAB_BYTES_MIN = 4096

FREE, RESERVED, COMMITTED = 0, 1, 2
_STATE_BITS = 2
_STATE_MASK = (1 << _STATE_BITS) - 1

# magic, version, control_bytes, partition_count, slabs_per_partition, slab_bytes, header_bytes, crc of the bytes before
_GEOMETRY = struct.Struct("<8sIIIIQII")
_OWNER_EPOCHS_AT = 1024
# magic, version, kind, generation, session, epoch, chunk, payload_bytes, checksum, first_slab, slab_count, meta_bytes,
# -, digest, owner_epoch, meta, -, crc of the bytes before
HEADER = struct.Struct("<4sHHQ26s6xQqQQIIII32sQ320s52xI")
assert HEADER.size == HEADER_BYTES
_CRC_AT = HEADER_BYTES - 4
_SCAN = np.dtype(
    {
        "names": ["session", "first_slab", "slab_count"],
        "formats": ["S26", "<u4", "<u4"],
        "offsets": [16, 80, 84],
        "itemsize": HEADER_BYTES,
    }
)


@dataclass(frozen=True, slots=True)
class ArenaGeometry:
    """Sizes of one arena, fixed when it is made."""

    partition_count: int
    slabs_per_partition: int
    slab_bytes: int

    def __post_init__(self) -> None:
        if not 1 <= self.partition_count <= PARTITIONS_MAX:
            raise ConfigError(f"an arena of {self.partition_count} partitions", expected=f"1 to {PARTITIONS_MAX}")
        if self.slab_bytes < SLAB_BYTES_MIN or self.slab_bytes % SLAB_BYTES_MIN:
            raise ConfigError(f"slabs of {self.slab_bytes} B", expected=f"a multiple of {SLAB_BYTES_MIN}")
        if not 1 <= self.slabs_per_partition * self.partition_count <= SLABS_MAX or self.slabs_per_partition < 1:
            raise ConfigError(f"{self.slabs_per_partition} slabs a partition", expected=f"1 to {SLABS_MAX} in all")

    @property
    def slab_count(self) -> int:
        return self.partition_count * self.slabs_per_partition

    @property
    def dropped_at(self) -> int:
        return CONTROL_BYTES + 8 * self.slab_count

    @property
    def links_at(self) -> int:
        return self.dropped_at + 8 * self.slab_count

    @property
    def headers_at(self) -> int:
        return -(-(self.links_at + 4 * self.slab_count) // HEADER_BYTES) * HEADER_BYTES

    @property
    def data_at(self) -> int:
        """Where the slabs begin, page-aligned."""
        return -(-(self.headers_at + HEADER_BYTES * self.slab_count) // 4096) * 4096

    @property
    def data_bytes(self) -> int:
        return self.slab_count * self.slab_bytes

    @property
    def total_bytes(self) -> int:
        """Of the whole memory: control page, table and slabs."""
        return self.data_at + self.data_bytes

    def pack(self) -> bytes:
        """The start of the control page."""
        sizes = (CONTROL_BYTES, self.partition_count, self.slabs_per_partition, self.slab_bytes, HEADER_BYTES)
        packed = _GEOMETRY.pack(ARENA_MAGIC, LAYOUT_VERSION, *sizes, 0)[:-4]
        return packed + struct.pack("<I", zlib.crc32(packed))

    @classmethod
    def unpack(cls, packed: bytes) -> ArenaGeometry:
        """The geometry that a control page names; CorruptState or LayoutMismatch when it is not one of ours."""
        if len(packed) < _GEOMETRY.size:
            raise CorruptState("arena: no control page")
        magic, version, control_bytes, *sizes, header_bytes, crc = _GEOMETRY.unpack_from(packed)
        if magic != ARENA_MAGIC or crc != zlib.crc32(packed[: _GEOMETRY.size - 4]):
            raise CorruptState("arena: the control page does not verify")
        if (version, control_bytes, header_bytes) != (LAYOUT_VERSION, CONTROL_BYTES, HEADER_BYTES):
            raise LayoutMismatch(
                f"arena layout {version}", expected=str(LAYOUT_VERSION), hint="restart all processes of one version"
            )
        return cls(*sizes)


CONTROL_READ_BYTES = _GEOMETRY.size


class ArenaTable:
    """The table of one arena, over its mapped memory. For one thread at a time.

    With `partition` the caller becomes that partition's owner: `owner_epoch` must be higher than the last owner's, and
    what that one had reserved but not committed is free again. Without it the caller reads, and may drop.
    """

    def __init__(self, memory: memoryview, partition: int | None, owner_epoch: int) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise ConfigError(
                "the Python arena relies on x86-64's order of stores", hint="install a C++ compiler and build csrc/"
            )
        self.geometry = geometry = ArenaGeometry.unpack(bytes(memory[:CONTROL_READ_BYTES]))
        if len(memory) != geometry.total_bytes:
            raise CorruptState(f"arena: {len(memory)} B mapped", expected=f"{geometry.total_bytes} B")
        # An element store into a "Q" view is one 8-byte store; struct.pack_into would write zeros first.
        self._epochs = memory[_OWNER_EPOCHS_AT : _OWNER_EPOCHS_AT + 8 * PARTITIONS_MAX].cast("Q")
        self._state = memory[CONTROL_BYTES : geometry.dropped_at].cast("Q")
        self._dropped = memory[geometry.dropped_at : geometry.links_at].cast("Q")
        links = memory[geometry.links_at : geometry.links_at + 4 * geometry.slab_count]
        self._links = links.cast("I")
        self._headers = memory[geometry.headers_at : geometry.headers_at + HEADER_BYTES * geometry.slab_count]
        self._states = np.frombuffer(self._state, np.uint64)
        self._drops = np.frombuffer(self._dropped, np.uint64)
        self._scan = np.frombuffer(self._headers, _SCAN)
        self.partition = partition
        self.owner_epoch = owner_epoch
        self._free = np.ones(0, bool)
        if partition is not None:
            self._attach(partition, owner_epoch)

    # ------------------------------------------------------------------ owner

    def _attach(self, partition: int, owner_epoch: int) -> None:
        if not 0 <= partition < self.geometry.partition_count:
            raise ConfigError(f"arena partition {partition}", expected=f"below {self.geometry.partition_count}")
        current = self._epochs[partition]
        if owner_epoch <= current:
            raise Conflict(f"arena partition {partition} belongs to epoch {current}", expected="a higher one")
        self._epochs[partition] = owner_epoch
        self._free = np.ones(self.geometry.slabs_per_partition, bool)
        for entry in self._live(partition):
            word = self._state[entry]
            chain = self._intact_chain(entry) if word & _STATE_MASK == COMMITTED else None
            if chain is None or self._dropped[entry] == word >> _STATE_BITS or not self._free[chain].all():
                self._state[entry] = word & ~_STATE_MASK
            else:
                self._free[chain] = False

    def _intact_chain(self, entry: int) -> np.ndarray | None:
        """The extent's slabs, numbered within the partition, or None when its header or chain does not verify."""
        try:
            self._verified(entry, self._state[entry] >> _STATE_BITS)
            return np.array(self._chain(entry)) - self._start
        except CorruptState:
            return None

    @property
    def _start(self) -> int:
        """First slab of the own partition."""
        assert self.partition is not None
        return self.partition * self.geometry.slabs_per_partition

    def _check_owner(self) -> None:
        if self.partition is None:
            raise Conflict("arena: this process owns no partition", hint="map the arena with one to reserve")
        current = self._epochs[self.partition]
        if current != self.owner_epoch:
            raise Conflict(
                f"arena partition {self.partition} was taken over by epoch {current}",
                hint=f"epoch {self.owner_epoch} must stop",
            )

    def reserve(self, session: bytes, epoch: int, payload_bytes: int) -> tuple[int, int]:
        """Take slabs for an extent; its (entry, generation). ArenaFull when there are too few."""
        self._check_owner()
        needed = max(1, -(-payload_bytes // self.geometry.slab_bytes))
        if np.count_nonzero(self._free) < needed:
            self._reclaim()
        free_count = int(np.count_nonzero(self._free))
        if free_count < needed:
            slab_bytes = self.geometry.slab_bytes
            raise ArenaFull(
                f"{payload_bytes} B need {needed} slabs of {slab_bytes} B; {free_count} of "
                f"{self.geometry.slabs_per_partition} are free",
                hint="drop or spill a session, or make the arena larger",
            )
        chain = self._choose(needed) + self._start
        entry = int(chain[0])
        generation = (self._state[entry] >> _STATE_BITS) + 1
        for slab, successor in zip(chain[:-1].tolist(), chain[1:].tolist(), strict=True):
            self._links[slab] = successor
        self._write_header(
            entry, 0, generation, session, epoch, -1, payload_bytes, 0, entry, needed, b"", b"", self.owner_epoch
        )
        self._state[entry] = generation << _STATE_BITS | RESERVED
        self._free[chain - self._start] = False
        return entry, generation

    def _choose(self, needed: int) -> np.ndarray:
        """The first run that is long enough, else the lowest slabs: few pieces make few copies."""
        free = np.flatnonzero(self._free)
        runs = np.flatnonzero(free[needed - 1 :] - free[: len(free) - needed + 1] == needed - 1)
        at = int(runs[0]) if len(runs) else 0
        return free[at : at + needed]

    def commit(
        self, entry: int, generation: int, kind: int, chunk: int, digest: bytes, meta: bytes, checksum: int
    ) -> None:
        """Make a reserved extent exist. Conflict when it is not reserved (any more)."""
        self._check_owner()
        self._check_reserved(entry, generation)
        at = entry * HEADER_BYTES
        fields = HEADER.unpack(self._headers[at : at + HEADER_BYTES])
        session, epoch, payload_bytes = fields[4], fields[5], fields[7]
        first_slab, slab_count = fields[9], fields[10]
        self._write_header(
            entry,
            kind,
            generation,
            session,
            epoch,
            chunk,
            payload_bytes,
            checksum,
            first_slab,
            slab_count,
            digest,
            meta,
            self.owner_epoch,
        )
        self._check_owner()
        self._state[entry] = generation << _STATE_BITS | COMMITTED  # last: until here the extent does not exist

    def _check_reserved(self, entry: int, generation: int) -> None:
        if self._state[entry] != generation << _STATE_BITS | RESERVED or self._dropped[entry] == generation:
            raise Conflict(f"arena extent {entry}.{generation} is not reserved", hint="reserve anew")

    def _write_header(
        self,
        entry: int,
        kind: int,
        generation: int,
        session: bytes,
        epoch: int,
        chunk: int,
        payload_bytes: int,
        checksum: int,
        first_slab: int,
        slab_count: int,
        digest: bytes,
        meta: bytes,
        owner_epoch: int,
    ) -> None:
        packed = HEADER.pack(
            HEADER_MAGIC,
            LAYOUT_VERSION,
            kind,
            generation,
            session,
            epoch,
            chunk,
            payload_bytes,
            checksum,
            first_slab,
            slab_count,
            len(meta),
            0,
            digest,
            owner_epoch,
            meta,
            0,
        )[:_CRC_AT]
        at = entry * HEADER_BYTES
        self._headers[at : at + HEADER_BYTES] = packed + struct.pack("<I", zlib.crc32(packed))

    def _reclaim(self) -> None:
        """Take back what others dropped."""
        for entry in self._live(self.partition):
            word = self._state[entry]
            if self._dropped[entry] == word >> _STATE_BITS:
                self._release(entry, word)

    def _release(self, entry: int, word: int) -> None:
        chain = self._chain(entry)
        self._state[entry] = word & ~_STATE_MASK
        self._free[np.array(chain) - self._start] = True

    # ------------------------------------------------------------------ anybody

    def free(self, entry: int, generation: int) -> bool:
        """End an extent, reserved or committed; False when it had ended already."""
        self._check_entry(entry)
        word = self._state[entry]
        if word >> _STATE_BITS != generation or word & _STATE_MASK == FREE:
            return False
        if self.partition is not None and entry // self.geometry.slabs_per_partition == self.partition:
            self._check_owner()
            self._release(entry, word)
            return True
        if self._dropped[entry] >= generation:
            return False
        self._dropped[entry] = generation
        return True

    def sweep(self, partition: int) -> int:
        """Drop all that a dead owner had reserved and not committed; the slabs that became free."""
        if partition == self.partition:
            raise Conflict(f"arena partition {partition} is this process's own", expected="a dead owner's")
        swept = 0
        for entry in self._live(partition):
            word = self._state[entry]
            if word & _STATE_MASK == RESERVED and self.free(entry, word >> _STATE_BITS):
                swept += int(self._scan["slab_count"][entry])
        return swept

    def headers(self, session: bytes | None = None) -> list[bytes]:
        """Verified headers of the committed extents, of one session or of all."""
        found = np.flatnonzero(self._visible(COMMITTED))
        if session is not None:
            found = found[self._scan["session"][found] == session]
        packed = []
        for entry in found.tolist():
            header = self.header(entry, self._state[entry] >> _STATE_BITS)
            if header is not None:
                packed.append(header)
        return packed

    def header(self, entry: int, generation: int) -> bytes | None:
        """A committed extent's header; None when it has ended. CorruptState when it does not verify."""
        self._check_entry(entry)
        expected = generation << _STATE_BITS | COMMITTED
        if self._state[entry] != expected or self._dropped[entry] == generation:
            return None
        try:
            header = self._verified(entry, generation)
        except CorruptState:
            if self._state[entry] != expected:
                return None  # it ended while it was read
            raise
        return header if self._state[entry] == expected else None

    def slabs(self, entry: int, generation: int) -> list[int]:
        """Numbers of the slabs of a live extent, in order. NotFound when it has ended."""
        self._check_entry(entry)
        if self._state[entry] >> _STATE_BITS == generation and self._state[entry] & _STATE_MASK != FREE:
            chain = self._chain(entry)
            if self._state[entry] >> _STATE_BITS == generation and self._state[entry] & _STATE_MASK != FREE:
                return chain
        raise NotFound(f"arena extent {entry}.{generation} has ended")

    def _check_entry(self, entry: int) -> None:
        if not 0 <= entry < self.geometry.slab_count:
            raise NotFound(f"arena extent {entry}", expected=f"below {self.geometry.slab_count}")

    def _live(self, partition: int | None) -> Iterator[int]:
        """Entries of a partition that are not free, dropped ones included."""
        if partition is None:
            return iter(())
        start = partition * self.geometry.slabs_per_partition
        states = self._states[start : start + self.geometry.slabs_per_partition]
        return iter((np.flatnonzero(states & np.uint64(_STATE_MASK)) + start).tolist())

    def _visible(self, state: int) -> np.ndarray:
        states = self._states
        dropped = self._drops == states >> np.uint64(_STATE_BITS)
        return (states & np.uint64(_STATE_MASK) == state) & ~dropped

    def _verified(self, entry: int, generation: int) -> bytes:
        at = entry * HEADER_BYTES
        header = bytes(self._headers[at : at + HEADER_BYTES])
        (crc,) = struct.unpack_from("<I", header, _CRC_AT)
        fields = HEADER.unpack(header)
        if crc != zlib.crc32(header[:_CRC_AT]) or fields[:2] != (HEADER_MAGIC, LAYOUT_VERSION):
            raise CorruptState(f"arena: the header of extent {entry} does not verify")
        fits = -(-fields[7] // self.geometry.slab_bytes) <= fields[10] and fields[11] <= META_BYTES_MAX
        if fields[3] != generation or fields[9] != entry or not fits:
            raise CorruptState(f"arena: the header of extent {entry} belongs to another")
        return header

    def _chain(self, entry: int) -> list[int]:
        per_partition = self.geometry.slabs_per_partition
        start = entry // per_partition * per_partition
        count = int(self._scan["slab_count"][entry])
        chain = [entry]
        if 1 <= count <= per_partition:
            while len(chain) < count and start <= (slab := self._links[chain[-1]]) < start + per_partition:
                chain.append(slab)
        if len(chain) != count:
            raise CorruptState(f"arena: the chain of extent {entry} leaves its partition")
        return chain

    def slab_counts(self, partition: int | None = None) -> tuple[int, int, int]:
        """(total, reserved, committed) slabs of one partition or of all; the rest is free."""
        per_partition = self.geometry.slabs_per_partition
        some = slice(None) if partition is None else slice(partition * per_partition, (partition + 1) * per_partition)
        counts = self._scan["slab_count"][some]
        reserved = int(counts[self._visible(RESERVED)[some]].sum())
        committed = int(counts[self._visible(COMMITTED)[some]].sum())
        return len(counts), reserved, committed

    def check(self) -> None:
        """That no slab is in two extents, and that the own free map is what the entries say; CorruptState if not."""
        for partition in range(self.geometry.partition_count):
            start = partition * self.geometry.slabs_per_partition
            free = np.ones(self.geometry.slabs_per_partition, bool)
            for entry in self._live(partition):
                word = self._state[entry]
                if word & _STATE_MASK == COMMITTED:  # a reserved one's header may be torn: its owner may be dead
                    self._verified(entry, word >> _STATE_BITS)
                chain = np.array(self._chain(entry)) - start
                if not free[chain].all() or len(set(chain.tolist())) != len(chain):
                    raise CorruptState(f"arena: extent {entry} holds a slab of another")
                free[chain] = False
            if partition == self.partition and not np.array_equal(free, self._free):
                raise CorruptState(f"arena: the free map of partition {partition} differs from its entries")

    def close(self) -> None:
        """Let go of the memory, so that it can be unmapped."""
        self._states = self._drops = np.ones(0, np.uint64)
        self._scan = np.ones(0, _SCAN)
        for view in (self._epochs, self._state, self._dropped, self._links, self._headers):
            view.release()
