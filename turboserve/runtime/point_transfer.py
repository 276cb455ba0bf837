"""A session's recovery point from one node's store to another's, over any transport.

Pages that the destination has already (sent ahead while the session still generated, or left by an earlier visit) are
not sent again: they are known by key, chunk, length and checksum. All memory is reserved before the first byte moves;
pages and point are committed once everything has verified, the point last.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from turboserve.errors import CorruptState, NotFound, ProtocolError
from turboserve.runtime.arena import KIND_PAGE, Extent, region
from turboserve.runtime.recovery_store import PageRef, PendingPage, PendingPoint, RecoveryPoint, RecoveryStore
from turboserve.runtime.transport import Offer, Pieces, Transport


class PointManifest(msgspec.Struct, frozen=True, array_like=True):
    """What describes a point outside its arena. Pages are (key, chunk, bytes, checksum); their buffers come first, then
    the tail, then the frames."""

    session: str
    epoch: int
    chunk: int
    digest: bytes
    meta: bytes
    pages: list[tuple[str, int, int, int]]
    tail_bytes: int
    frame_bytes: list[int]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of every buffer, in order."""
        return (*(page[2] for page in self.pages), self.tail_bytes, *self.frame_bytes)


def describe_point(store: RecoveryStore, point: RecoveryPoint) -> tuple[PointManifest, list[Pieces]]:
    """A point's manifest and its buffers where they lie, verified."""
    manifest = PointManifest(
        point.session,
        point.epoch,
        point.chunk,
        point.digest,
        point.meta,
        [(page.key, page.chunk, page.payload_bytes, page.checksum) for page in point.pages],
        point.tail_bytes,
        list(point.frame_bytes),
    )
    buffers: list[Pieces] = [store.read_page(page) for page in point.pages]
    buffers.append(store.read_tail(point))
    buffers += [[memoryview(frame)] for frame in store.read_frames(point)]
    return manifest, buffers


async def send_point(transport: Transport, store: RecoveryStore, point: RecoveryPoint, *, timeout_s: float) -> int:
    """Sends a point; the bytes that moved. It stays in this store. Errors as Transport.send."""
    manifest, buffers = describe_point(store, point)
    # Pages never change, and their checksums are in the manifest. The tail ends with the point when its owner goes on:
    # a copy that was made while the point was there is what the point says.
    tail_index = len(point.pages)
    buffers[tail_index] = [memoryview(b"".join(buffers[tail_index]))]
    if store.arena.get(point.extent.id) is None:
        raise NotFound(f"the point of {point.session} at chunk {point.chunk} has ended", hint="send the next one")
    skipped = await transport.send(msgspec.msgpack.encode(manifest), buffers, timeout_s=timeout_s)
    return sum(size for index, size in enumerate(manifest.sizes) if index not in skipped)


async def receive_point(
    transport: Transport, store: RecoveryStore, *, timeout_s: float, session: str = ""
) -> RecoveryPoint:
    """Receives one point into this store; committed when this returns. On any error nothing of it is left.

    With `session` a point of any other one is refused.
    """
    incoming = IncomingPoint(store, session)
    try:
        await transport.receive(incoming.place, timeout_s=timeout_s)
        return incoming.commit()
    except BaseException:
        incoming.cancel()
        raise


class IncomingPoint:
    """The memory of a point on its way in: `place` reserves all of it, then `commit`, else `cancel`."""

    def __init__(self, store: RecoveryStore, session: str = "") -> None:
        self._store = store
        self._session = session
        self._new: list[tuple[PendingPage, PageRef]] = []
        self._committed: list[PageRef] = []
        self._point: PendingPoint | None = None
        self._digest = b""

    def place(self, offer: Offer) -> Sequence[Pieces | None]:
        """Where each buffer goes; None for pages that are here already. ArenaFull, ProtocolError."""
        try:
            manifest = msgspec.msgpack.decode(offer.manifest, type=PointManifest)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"a recovery point that does not decode: {error}") from None
        if manifest.sizes != offer.sizes:
            raise ProtocolError("a recovery point whose manifest and buffers differ in size")
        if self._session not in ("", manifest.session):
            raise ProtocolError(f"a recovery point of session {manifest.session[:64]}", expected=self._session)
        self._digest = manifest.digest
        known = {
            (one.meta.decode("ascii"), one.chunk, one.payload_bytes, one.checksum): one
            for one in self._store.arena.find(manifest.session, kind=KIND_PAGE)
        }
        targets: list[Pieces | None] = []
        refs = []
        for key, chunk, bytes_, checksum in manifest.pages:
            here: Extent | None = known.get((key, chunk, bytes_, checksum))
            if here is not None:
                refs.append(PageRef(key, chunk, here.id, bytes_, checksum))
                targets.append(None)
                continue
            pending = self._store.begin_page(manifest.session, manifest.epoch, key, bytes_, chunk=chunk)
            refs.append(PageRef(key, chunk, pending.reservation.id, bytes_, checksum))
            self._new.append((pending, refs[-1]))
            targets.append(pending.reservation.views)
        self._point = self._store.begin_point(
            manifest.session,
            manifest.epoch,
            manifest.chunk,
            pages=refs,
            tail_bytes=manifest.tail_bytes,
            frame_bytes=manifest.frame_bytes,
            meta=manifest.meta,
            pages_pending=True,
        )
        views = self._point.reservation.views
        targets.append(region(views, self._point.tail_offset, manifest.tail_bytes))
        for at, size in zip(self._point.frame_offsets, manifest.frame_bytes, strict=True):
            targets.append(region(views, at, size))
        return targets

    def commit(self) -> RecoveryPoint:
        """Make the point exist, once its bytes are in place. CorruptState when a page is not the one named."""
        assert self._point is not None
        for pending, expected in self._new:
            self._committed.append(pending.commit())
            if self._committed[-1] != expected:
                raise CorruptState(f"page {expected.key} is not the one the manifest names")
        return self._point.commit(self._digest)

    def cancel(self) -> None:
        """Give everything back."""
        for pending, _ in self._new:
            pending.cancel()  # a committed one too: nothing names it yet
        if self._point is not None:
            self._point.cancel()
