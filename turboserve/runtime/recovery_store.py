"""Recovery points in the arena: what a successor needs to go on with a session as if nothing had happened.

A recovery point says "this is the session when chunk `chunk` is about to begin". It consists of

- *pages*: state that never changes again (the keys and values of one finished chunk), each an extent of its own,
  written once and named by every point that needs it;
- the *point*: one extent with a manifest (which pages, with their checksums), the tail (everything that is overwritten
  with each chunk), the frames not yet delivered, and the caller's digest and meta.

The point's commit is one store, and it comes last: either the whole new point exists or the one before is the latest.

    ref = store.put_page(session, epoch, "kv/17", page, chunk=17)
    store.commit_point(session, epoch, 18, pages=[*kept, ref], tail=tail, frames=frames, digest=digest, meta=meta)
    store.drop_older(session)

Whoever owns the session (the directory says who) writes and drops. Everybody on the node may read.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from turboserve.errors import CorruptState, InvalidRequest, NotFound
from turboserve.runtime.arena import KIND_PAGE, KIND_POINT, Arena, Extent, ExtentId, Reservation, region

log = logging.getLogger(__name__)

_ALIGN = 64
_PREFIX = struct.Struct("<4sI")
_MAGIC = b"TSRP"


@dataclass(frozen=True, slots=True)
class PageRef:
    """One immutable page. `key` is the caller's name for it (ASCII, at most 320 characters), `chunk` the chunk that
    made it."""

    key: str
    chunk: int
    extent: ExtentId
    payload_bytes: int
    checksum: int


class _Manifest(msgspec.Struct, array_like=True, frozen=True):
    """What stands in front of a point's bytes. Pages are (key, chunk, entry, generation, bytes, checksum)."""

    pages: list[tuple[str, int, int, int, int, int]]
    tail_bytes: int
    frame_bytes: list[int]
    meta: bytes


@dataclass(frozen=True, slots=True)
class RecoveryPoint:
    """A committed point; its bytes stay in the arena (`RecoveryStore.read_*`).

    `chunk` is the chunk that comes next; `digest` the stream's digest chain up to it (empty: none yet).
    """

    session: str
    epoch: int
    chunk: int
    digest: bytes
    meta: bytes
    pages: tuple[PageRef, ...]
    tail_bytes: int
    frame_bytes: tuple[int, ...]
    extent: Extent
    tail_offset: int

    @property
    def total_bytes(self) -> int:
        """Of the payloads: pages, tail and frames."""
        return sum(page.payload_bytes for page in self.pages) + self.tail_bytes + sum(self.frame_bytes)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def _offsets(start: int, sizes: Sequence[int]) -> list[int]:
    """Where each part begins when every one starts on a 64-byte line; the last entry is where they end."""
    offsets = [_aligned(start)]
    for size in sizes:
        offsets.append(_aligned(offsets[-1] + size))
    return offsets


class PendingPage:
    """A page whose memory is reserved: copy into `reservation`, then `commit`, else `cancel`."""

    def __init__(self, arena: Arena, reservation: Reservation, key: str, chunk: int) -> None:
        self._arena = arena
        self._key = key
        self._chunk = chunk
        self.reservation = reservation

    def commit(self) -> PageRef:
        extent = self._arena.commit(self.reservation, self._chunk, meta=self._key.encode("ascii"), kind=KIND_PAGE)
        return PageRef(self._key, self._chunk, extent.id, extent.payload_bytes, extent.checksum)

    def cancel(self) -> None:
        self._arena.free(self.reservation)


class PendingPoint:
    """A point whose memory is reserved and whose manifest is written; the tail and the frames are the caller's to
    copy, then `commit`, else `cancel`."""

    def __init__(
        self, store: RecoveryStore, reservation: Reservation, chunk: int, tail_at: int, frames_at: list[int]
    ) -> None:
        self._store = store
        self._chunk = chunk
        self.frame_offsets = frames_at
        self.tail_offset = tail_at
        self.reservation = reservation

    def write_tail(self, offset: int, data: Any) -> None:
        """Copies a buffer to `offset` of the tail."""
        self.reservation.write(self.tail_offset + offset, data)

    def write_frames(self, index: int, data: Any) -> None:
        """Copies the `index`-th of the undelivered frames' buffers."""
        self.reservation.write(self.frame_offsets[index], data)

    def commit(self, digest: bytes) -> RecoveryPoint:
        """The one step that makes the point the session's latest."""
        extent = self._store.arena.commit(self.reservation, self._chunk, digest, bytes([len(digest)]), kind=KIND_POINT)
        return self._store.open_point(extent, verify=False)

    def cancel(self) -> None:
        self._store.arena.free(self.reservation)


class RecoveryStore:
    """Recovery points of all sessions of a node, in its arena."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    # ------------------------------------------------------------------ write

    def begin_page(self, session: str, epoch: int, key: str, bytes_: int, *, chunk: int) -> PendingPage:
        """Reserve a page's memory. ArenaFull when there is none."""
        return PendingPage(self.arena, self.arena.reserve(session, epoch, bytes_), key, chunk)

    def put_page(self, session: str, epoch: int, key: str, data: Any, *, chunk: int) -> PageRef:
        """Write one page from a C-contiguous buffer."""
        view = memoryview(data).cast("B")
        pending = self.begin_page(session, epoch, key, len(view), chunk=chunk)
        try:
            pending.reservation.write(0, view)
            return pending.commit()
        except BaseException:
            pending.cancel()
            raise

    def begin_point(
        self,
        session: str,
        epoch: int,
        chunk: int,
        *,
        pages: Sequence[PageRef],
        tail_bytes: int,
        frame_bytes: Sequence[int] = (),
        meta: bytes = b"",
        pages_pending: bool = False,
    ) -> PendingPoint:
        """Reserve a point's memory and write its manifest. ArenaFull, or NotFound when a page has ended.

        With `pages_pending` the pages may still be reservations; the caller commits them before the point.
        """
        for page in pages:
            if not pages_pending and self.arena.get(page.extent) is None:
                raise NotFound(f"page {page.key} of session {session} has ended", hint="write it again")
        listed = [
            (page.key, page.chunk, page.extent.entry, page.extent.generation, page.payload_bytes, page.checksum)
            for page in pages
        ]
        manifest = msgspec.msgpack.encode(_Manifest(listed, tail_bytes, list(frame_bytes), meta))
        tail_at, *frames_at, end = _offsets(_PREFIX.size + len(manifest), [tail_bytes, *frame_bytes])
        reservation = self.arena.reserve(session, epoch, end)
        head = _PREFIX.pack(_MAGIC, len(manifest)) + manifest
        # The gaps between the parts too: nothing of an earlier session may stay in an extent.
        reservation.write(0, head + bytes(tail_at - len(head)))
        sizes = [tail_bytes, *frame_bytes]
        for at, size, following in zip([tail_at, *frames_at], sizes, [*frames_at, end], strict=True):
            reservation.write(at + size, bytes(following - at - size))
        return PendingPoint(self, reservation, chunk, tail_at, frames_at)

    def commit_point(
        self,
        session: str,
        epoch: int,
        chunk: int,
        *,
        pages: Sequence[PageRef],
        tail: Any,
        frames: Sequence[Any] = (),
        digest: bytes,
        meta: bytes = b"",
    ) -> RecoveryPoint:
        """Write a whole point from C-contiguous buffers; it is the session's latest when this returns.

        `digest` is at most 32 bytes. `chunk` is the chunk that comes next. Every page must be alive.
        """
        if len(digest) > 32:
            raise InvalidRequest(f"a digest of {len(digest)} B", expected="at most 32")
        tail_view = memoryview(tail).cast("B")
        frame_views = [memoryview(one).cast("B") for one in frames]
        pending = self.begin_point(
            session,
            epoch,
            chunk,
            pages=pages,
            tail_bytes=len(tail_view),
            frame_bytes=[len(one) for one in frame_views],
            meta=meta,
        )
        try:
            pending.write_tail(0, tail_view)
            for index, view in enumerate(frame_views):
                pending.write_frames(index, view)
            return pending.commit(digest)
        except BaseException:
            pending.cancel()
            raise

    # ------------------------------------------------------------------ read

    def latest(self, session: str) -> RecoveryPoint | None:
        """The newest point whose every byte verifies, pages included; None when there is none.

        A point that does not verify is left where it is, said in the log, and passed over for the one before.
        """
        for extent in self.arena.find(session, kind=KIND_POINT):
            try:
                point = self.open_point(extent)
                for page in point.pages:
                    self.read_page(page)
            except (CorruptState, NotFound) as error:
                log.warning("recovery point of %s at chunk %d: %s", session, extent.chunk, error)
                continue
            return point
        return None

    def open_point(self, extent: Extent, *, verify: bool = True) -> RecoveryPoint:
        """The point in an extent; its own bytes are verified, its pages not. CorruptState, NotFound."""
        views = self.arena.read(extent, verify=verify)
        try:
            magic, manifest_bytes = _PREFIX.unpack(b"".join(region(views, 0, _PREFIX.size)))
            packed = b"".join(region(views, _PREFIX.size, manifest_bytes))
            manifest = msgspec.msgpack.decode(packed, type=_Manifest)
            sizes = [manifest.tail_bytes, *manifest.frame_bytes]
            tail_at, *_, end = _offsets(_PREFIX.size + manifest_bytes, sizes)
        except (InvalidRequest, msgspec.MsgspecError) as error:
            raise CorruptState(f"recovery point of {extent.session} at chunk {extent.chunk}: {error}") from None
        if magic != _MAGIC or min(sizes) < 0 or end != extent.payload_bytes:
            raise CorruptState(f"recovery point of {extent.session} at chunk {extent.chunk}: no manifest")
        pages = tuple(
            PageRef(key, chunk, ExtentId(entry, generation), bytes_, checksum)
            for key, chunk, entry, generation, bytes_, checksum in manifest.pages
        )
        return RecoveryPoint(
            session=extent.session,
            epoch=extent.epoch,
            chunk=extent.chunk,
            digest=extent.digest[: extent.meta[0]],
            meta=manifest.meta,
            pages=pages,
            tail_bytes=manifest.tail_bytes,
            frame_bytes=tuple(manifest.frame_bytes),
            extent=extent,
            tail_offset=tail_at,
        )

    def read_page(self, page: PageRef, *, verify: bool = True) -> list[memoryview]:
        """A page's bytes where they lie. NotFound when it has ended, CorruptState when it is not the page meant."""
        extent = self.arena.get(page.extent)
        if extent is None:
            raise NotFound(f"page {page.key} has ended")
        if (extent.payload_bytes, extent.checksum) != (page.payload_bytes, page.checksum):
            raise CorruptState(f"page {page.key} is not the one the manifest names")
        return self.arena.read(extent, verify=verify)

    def read_tail(self, point: RecoveryPoint) -> list[memoryview]:
        """The tail's bytes where they lie (verified when the point was opened)."""
        views = self.arena.read(point.extent, verify=False)
        return region(views, point.tail_offset, point.tail_bytes)

    def read_frames(self, point: RecoveryPoint) -> list[bytes]:
        """Private copies of the undelivered frames' buffers, in order."""
        views = self.arena.read(point.extent, verify=False)
        offsets = _offsets(point.tail_offset, [point.tail_bytes, *point.frame_bytes])[1:-1]
        return [b"".join(region(views, at, size)) for at, size in zip(offsets, point.frame_bytes, strict=True)]

    def check_pages(self, point: RecoveryPoint) -> bool:
        """Whether every page still exists; the bytes are not read."""
        return all(self.arena.get(page.extent) is not None for page in point.pages)

    # ------------------------------------------------------------------ end

    def drop(self, session: str) -> int:
        """End all of a session's extents, reserved ones of live owners excepted; the bytes."""
        return sum(one.slab_bytes for one in self.arena.find(session) if self.arena.free(one))

    def drop_older(self, session: str, point: RecoveryPoint | None = None) -> int:
        """Keep `point` (None: the latest), its pages, and pages written since; the bytes that were freed.

        "Since" is: of the point's epoch or a later one, made by its `chunk` or a later one. Pages of an older epoch
        that the point does not name are leftovers of a former owner. Pass the point that `commit_point` returned:
        finding the latest one reads all of its bytes.
        """
        point = point or self.latest(session)
        if point is None:
            return 0
        kept = {point.extent.id, *(page.extent for page in point.pages)}
        freed = 0
        for extent in self.arena.find(session):
            pending = extent.kind == KIND_PAGE and extent.epoch >= point.epoch and extent.chunk >= point.chunk
            if extent.id not in kept and not pending and self.arena.free(extent):
                freed += extent.slab_bytes
        return freed

    def sessions(self) -> dict[str, int]:
        """Committed bytes of every session that has any, for reconciling with the directory."""
        found: dict[str, int] = {}
        for extent in self.arena.find():
            found[extent.session] = found.get(extent.session, 0) + extent.slab_bytes
        return found

    def shares(self) -> dict[str, dict[int, int]]:
        """Committed bytes of every session in each partition."""
        found: dict[str, dict[int, int]] = {}
        for extent in self.arena.find():
            share = found.setdefault(extent.session, {})
            share[extent.partition] = share.get(extent.partition, 0) + extent.slab_bytes
        return found
