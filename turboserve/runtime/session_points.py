"""A held session into recovery points and back: which bytes, and how little of them each time.

What a point consists of follows from the model's `state_layout` alone:

- one *page* for each chunk that later ones can see: its slice of every APPEND_CHUNK field, written once when the chunk
  is committed, and again after a recache (`HeldSession.pages_rewritten`);
- one page for the PER_PROMPT fields, written when the prompt changes;
- one page for the frames of each of the last KEPT_CHUNKS chunks, whether delivered or not: a gateway that is restarted
  may ask for what it had already accepted;
- the tail: every OVERWRITE field, anew in each point. SCRATCH is never written.

Writing is a transaction: until the point is committed the one before it is whole, and a write that fails (no room)
gives back what it took and leaves that one in place.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import torch

from turboserve.errors import CorruptState, InvalidRequest, NotFound
from turboserve.model.interface import Control, Field, SessionTensors, Update
from turboserve.runtime.arena import ExtentId
from turboserve.runtime.failpoints import failpoint
from turboserve.runtime.point_meta import KeptChunk, PointIdentity, PointMeta, finished_chunk, shape4
from turboserve.runtime.recovery_store import PageRef, RecoveryPoint, RecoveryStore
from turboserve.runtime.session_tensors import HeldSession
from turboserve.runtime.snapshot import SnapshotShape, field_pieces, view_addresses
from turboserve.runtime.state_copies import Copies, HostCopies
from turboserve.runtime.worker_events import FinishedChunk

log = logging.getLogger(__name__)

READ_ATTEMPTS = 3
_PAGE, _PROMPT, _FRAMES = "page", "prompt", "frames"


@dataclass(slots=True)
class _Written:
    """What of one session lies in the store: the pages its latest point names."""

    pages: dict[int, PageRef] = field(default_factory=dict)
    rewrites: int = 0
    frames: dict[int, PageRef] = field(default_factory=dict)
    prompt: PageRef | None = None
    prompt_writes: int = 0
    point: RecoveryPoint | None = None
    first: bool = True
    """No point was committed by this process yet: leftovers of former owners are still to be dropped."""

    def refs(self) -> list[PageRef]:
        prompt = [] if self.prompt is None else [self.prompt]
        return [*self.pages.values(), *prompt, *self.frames.values()]


@dataclass(frozen=True, slots=True)
class Restored:
    """A session as its point has it; the tensors are in their slot already."""

    digest: str
    chunks: tuple[FinishedChunk, ...]


class SessionPoints:
    """Writes and reads the recovery points of one worker's sessions. For the thread that owns the device."""

    def __init__(self, store: RecoveryStore, shape: SnapshotShape, copies: Copies | None = None) -> None:
        """`copies` moves bytes between tensors and the arena (state_copies.py); default: the CPU's."""
        self._store = store
        self._copies = copies or HostCopies()
        self._shape = shape
        self._identity = PointIdentity(shape.spec.model_hash, shape.layout_hash, shape.numerics_id)
        self._written: dict[str, _Written] = {}

    # ------------------------------------------------------------------ write

    def write(self, session: HeldSession, epoch: int) -> RecoveryPoint:
        """Bring the session's point up to date; it stands at a chunk boundary. ArenaFull: the point before it stays.

        A session that did nothing since its last point gets that one again.
        """
        written = self._written.setdefault(session.session_id, _Written())
        if session.saved and written.point is not None:
            return written.point
        try:
            point = self._write(session, epoch, written)
        except NotFound:
            # Somebody dropped a page that the next point would have named: everything is written again.
            self._written[session.session_id] = written = _Written()
            point = self._write(session, epoch, written)
        session.saved = True
        return point

    def unwritten_pages(self, session: HeldSession) -> frozenset[int]:
        """The slot's pages that the next `write` will read."""
        before = self._written.get(session.session_id, _Written())
        chunks = self._shape.page_chunks(session.state.next_chunk_index)
        stale = before.rewrites != session.pages_rewritten
        return frozenset(self._shape.spec.slot.page_of_chunk(one) for one in chunks if stale or one not in before.pages)

    def _write(self, session: HeldSession, epoch: int, before: _Written) -> RecoveryPoint:
        state, put = session.state, list[PageRef]()
        now = _Written(rewrites=session.pages_rewritten, first=False)
        try:
            for chunk in self._shape.page_chunks(state.next_chunk_index):
                ref = before.pages.get(chunk)
                if ref is None or now.rewrites != before.rewrites:
                    ref = self._put_page(state, epoch, chunk)
                    put.append(ref)
                now.pages[chunk] = ref
            now.prompt, now.prompt_writes = before.prompt, state.prompt_writes
            if self._prompted(state) and (now.prompt is None or now.prompt_writes != before.prompt_writes):
                now.prompt = self._put_prompt(state, epoch)
                put.append(now.prompt)
            for kept in session.kept:
                ref = before.frames.get(kept.chunk_index)
                if ref is None:
                    key = f"{_FRAMES}/{kept.chunk_index}"
                    ref = self._store.put_page(state.session_id, epoch, key, kept.frames, chunk=kept.chunk_index)
                    put.append(ref)
                now.frames[kept.chunk_index] = ref
            failpoint("worker.point.pages_written")
            now.point = self._commit_point(session, epoch, now.refs())
        except BaseException:
            for ref in put:
                self._store.arena.free(ref.extent)
            raise
        failpoint("worker.point.committed")
        self._written[state.session_id] = now
        self._drop_before(before, now)
        return now.point

    def _commit_point(self, session: HeldSession, epoch: int, pages: list[PageRef]) -> RecoveryPoint:
        state = session.state
        tail = field_pieces(self._tail(state), state.tensors)
        tail_bytes = sum(one.numel() for one in tail)
        pending = self._store.begin_point(
            state.session_id,
            epoch,
            state.next_chunk_index,
            pages=pages,
            tail_bytes=tail_bytes,
            meta=self._meta(session),
        )
        try:
            self._copies.to_host(tail, pending.reservation.addresses(pending.tail_offset, tail_bytes))
            return pending.commit(bytes.fromhex(session.digest))
        except BaseException:
            pending.cancel()
            raise

    def _put_page(self, state: SessionTensors, epoch: int, chunk: int) -> PageRef:
        pieces = self._shape.page_pieces(state.tensors, chunk)
        return self._put(state, epoch, f"{_PAGE}/{chunk}", chunk, pieces)

    def _put_prompt(self, state: SessionTensors, epoch: int) -> PageRef:
        pieces = field_pieces(self._prompted(state), state.tensors)
        return self._put(state, epoch, _PROMPT, state.next_chunk_index, pieces)

    def _put(self, state: SessionTensors, epoch: int, key: str, chunk: int, pieces: list[torch.Tensor]) -> PageRef:
        bytes_ = sum(one.numel() for one in pieces)
        pending = self._store.begin_page(state.session_id, epoch, key, bytes_, chunk=chunk)
        try:
            self._copies.to_host(pieces, pending.reservation.addresses())
            return pending.commit()
        except BaseException:
            pending.cancel()
            raise

    def _prompted(self, state: SessionTensors) -> Sequence[Field]:
        return self._shape.tail_fields(state.decoder, Update.PER_PROMPT)

    def _tail(self, state: SessionTensors) -> Sequence[Field]:
        return self._shape.tail_fields(state.decoder, Update.OVERWRITE)

    def _meta(self, session: HeldSession) -> bytes:
        state = session.state
        chunks = [
            KeptChunk(one.chunk_index, shape4(one.frames), one.digest, one.digest_prev, one.steps, one.prompt_version)
            for one in session.kept
        ]
        meta = PointMeta(
            model_hash=self._identity.model_hash,
            layout_hash=self._identity.layout_hash,
            numerics_id=self._identity.numerics_id,
            seed=state.seed,
            control=None if state.control is None else (state.control.prompt, state.control.version),
            scalars=state.scalars,
            chunks=chunks,
            decoder=state.decoder,
        )
        return msgspec.msgpack.encode(meta)

    def _drop_before(self, before: _Written, now: _Written) -> None:
        assert now.point is not None
        if before.first:
            self._store.drop_older(now.point.session, now.point)
            return
        named = {ref.extent for ref in now.refs()}
        if before.point is not None:
            self._store.arena.free(before.point.extent)
        for ref in before.refs():
            if ref.extent not in named:
                self._store.arena.free(ref.extent)

    def forget(self, session_id: str) -> None:
        """The session is not this worker's any more. What lies in the store is its next owner's."""
        self._written.pop(session_id, None)

    # ------------------------------------------------------------------ read

    def read_pages(self, session_id: str, tensors: Mapping[str, torch.Tensor]) -> dict[int, ExtentId]:
        """Read ahead what pages the newest point has, into a slot; which chunk's page there is of which extent."""
        loaded: dict[int, ExtentId] = {}
        point = self._store.latest(session_id)
        for ref in point.pages if point is not None else ():
            if ref.key.startswith(_PAGE):
                try:
                    self._load_page(tensors, ref)
                except (NotFound, CorruptState):
                    continue  # its owner went on meanwhile and dropped it
                loaded[ref.chunk] = ref.extent
        return loaded

    def read(
        self, state: SessionTensors, loaded: Mapping[int, ExtentId], *, any_numerics: bool = False
    ) -> Restored | None:
        """Bring `state`, in a slot of its own, to its newest point; None when there is none that fits this worker.

        `loaded` says which pages were read ahead into the slot. With `any_numerics` the session goes on in other bits.
        """
        for _ in range(READ_ATTEMPTS):
            point = self._store.latest(state.session_id)
            if point is None:
                return None
            meta = self._fitting(state, point, any_numerics)
            if meta is None:
                return None
            try:
                return self._read(state, point, meta, loaded)
            except (NotFound, CorruptState) as error:
                log.warning("recovery point of %s ended while it was read: %s", state.session_id, error)
                loaded = {}  # what was read ahead may lie under pages of this attempt
        return None

    def _fitting(self, state: SessionTensors, point: RecoveryPoint, any_numerics: bool) -> PointMeta | None:
        try:
            meta = msgspec.msgpack.decode(point.meta, type=PointMeta)
        except msgspec.MsgspecError as error:
            log.warning("recovery point of %s does not say what it is: %s", point.session, error)
            return None
        found = PointIdentity(meta.model_hash, meta.layout_hash, meta.numerics_id)
        alike = replace(found, numerics_id=self._identity.numerics_id) if any_numerics else found
        if alike != self._identity or meta.seed != state.seed:
            log.warning("recovery point of %s is of %s, this worker is %s", point.session, found, self._identity)
            return None
        has = tuple(ref.chunk for ref in point.pages if ref.key.startswith(_PAGE))
        if has != (needs := self._shape.page_chunks(point.chunk)):
            log.warning("recovery point of %s has the pages of chunks %s, it needs %s", point.session, has, needs)
            return None
        if meta.decoder != state.decoder:
            log.warning(
                "recovery point of %s has a tail for decoder %r, not %r", point.session, meta.decoder, state.decoder
            )
            return None
        return meta

    def _read(
        self, state: SessionTensors, point: RecoveryPoint, meta: PointMeta, loaded: Mapping[int, ExtentId]
    ) -> Restored:
        written = _Written(point=point)
        frames: dict[int, bytes] = {}
        for ref in point.pages:
            kind = ref.key.split("/")[0]
            if kind == _PAGE:
                if loaded.get(ref.chunk) != ref.extent:
                    self._load_page(state.tensors, ref)
                written.pages[ref.chunk] = ref
            elif kind == _PROMPT:
                self._load(field_pieces(self._prompted(state), state.tensors), ref)
                written.prompt = ref
            else:
                frames[ref.chunk] = self._bytes(ref)
                written.frames[ref.chunk] = ref
        self._bring(self._store.read_tail(point), field_pieces(self._tail(state), state.tensors))
        if self._store.arena.get(point.extent.id) is None:
            raise NotFound("the point was dropped")
        state.next_chunk_index = point.chunk
        state.control = None if meta.control is None else Control(*meta.control)
        state.scalars = dict(meta.scalars)
        written.prompt_writes = state.prompt_writes
        self._written[state.session_id] = written
        chunks = tuple(finished_chunk(state.session_id, one, frames[one.chunk_index]) for one in meta.chunks)
        return Restored(point.digest.hex(), chunks)

    def _bytes(self, ref: PageRef) -> bytes:
        """A private copy, of an extent that was still there afterwards (its bytes were verified by `latest`)."""
        data = b"".join(self._store.read_page(ref, verify=False))
        if self._store.arena.get(ref.extent) is None:
            raise NotFound(f"page {ref.key} was dropped")
        return data

    def _load_page(self, tensors: Mapping[str, torch.Tensor], ref: PageRef) -> None:
        self._load(self._shape.page_pieces(tensors, ref.chunk), ref)

    def _load(self, pieces: list[torch.Tensor], ref: PageRef) -> None:
        """Into tensors, of an extent that was still there afterwards."""
        self._bring(self._store.read_page(ref, verify=False), pieces)
        if self._store.arena.get(ref.extent) is None:
            raise NotFound(f"page {ref.key} was dropped")

    def _bring(self, views: list[memoryview], pieces: list[torch.Tensor]) -> None:
        """CorruptState when a point's bytes are too few or too many for the tensors."""
        try:
            self._copies.to_device(view_addresses(views), pieces)
        except InvalidRequest as error:
            raise CorruptState(f"a recovery point of another size: {error}") from None
