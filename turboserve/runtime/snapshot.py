"""One session as bytes, and back to the bit.

A model's `state_layout` says what there is to move. Per session that is

- *pages*: for each finished chunk that later ones can see, its slice of every APPEND_CHUNK field;
- the *tail*: every PER_PROMPT and OVERWRITE field, whole, in the order of the layout;
- the *header*: which model, layout and numerics made it, seed, next chunk, prompt, scalars, digest chain.

SCRATCH never moves, and neither does the page that the next chunk overwrites before it reads. Bytes lie as in memory,
row-major; both ends have equal layout hashes, so no shapes travel.

`SessionWriter` keeps a session's recovery points in a RecoveryStore (each page written once); `restore` makes a held
session of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from turboserve.errors import Conflict, CorruptState, LayoutMismatch
from turboserve.model.interface import Control, Field, ModelSpec, SessionTensors, Update, layout_hash
from turboserve.runtime.arena import address_of
from turboserve.runtime.copy_engine import Copy, copy_now, join_pieces
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.recovery_store import PageRef, RecoveryPoint, RecoveryStore
from turboserve.runtime.session_tensors import HeldSession

SNAPSHOT_VERSION = 1


class SnapshotHeader(msgspec.Struct, frozen=True, kw_only=True):
    """All of a session but its tensors. `scalars` holds JSON-able values."""

    version: int = SNAPSHOT_VERSION
    model: str
    model_hash: str
    layout_hash: str
    numerics_id: str
    session_id: str
    seed: int
    next_chunk_index: int
    prompt: str | None
    prompt_version: int
    digest: str
    scalars: dict[str, Any]
    page_bytes: int
    tail_bytes: int


def decode_header(packed: bytes) -> SnapshotHeader:
    """CorruptState when the bytes are no header of this version."""
    try:
        header = msgspec.msgpack.decode(packed, type=SnapshotHeader)
    except msgspec.MsgspecError as error:
        raise CorruptState(f"snapshot header: {error}") from None
    if header.version != SNAPSHOT_VERSION:
        raise LayoutMismatch(f"snapshot version {header.version}", expected=str(SNAPSHOT_VERSION))
    return header


def contiguous_pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Flat uint8 views that together are the tensor, row-major; one when it is contiguous."""
    if tensor.numel() == 0:
        return []
    if tensor.is_contiguous():
        return [tensor.reshape(-1).view(torch.uint8)]
    return [piece for row in tensor.unbind(0) for piece in contiguous_pieces(row)]


def field_pieces(fields: Sequence[Field], tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The memory of whole fields, in their order."""
    return [piece for one in fields for piece in contiguous_pieces(tensors[one.name])]


class SnapshotShape:
    """What a worker's sessions look like as bytes: from its model, whose runtime numerics have an id."""

    def __init__(self, spec: ModelSpec, layout: Sequence[Field], numerics_id: str) -> None:
        self.spec = spec
        self.numerics_id = numerics_id
        self.layout_hash = layout_hash(layout)
        self.page_fields = tuple(one for one in layout if one.update is Update.APPEND_CHUNK)
        self.tail_fields = tuple(one for one in layout if one.update in (Update.PER_PROMPT, Update.OVERWRITE))
        self.page_bytes = sum(one.page_bytes for one in self.page_fields)
        self.tail_bytes = sum(one.nbytes for one in self.tail_fields)

    def page_chunks(self, next_chunk_index: int) -> tuple[int, ...]:
        """The chunks whose pages a session needs when `next_chunk_index` comes next, oldest first."""
        if not self.page_fields:
            return ()
        slot = self.spec.slot
        scratch = slot.page_of_chunk(next_chunk_index)
        return tuple(chunk for page, chunk in slot.resident_chunks(next_chunk_index) if page != scratch)

    def page_pieces(self, tensors: Mapping[str, torch.Tensor], chunk: int) -> list[torch.Tensor]:
        """The session's memory of one chunk's page, in the order of its bytes: field by field, layer by layer."""
        page = self.spec.slot.page_of_chunk(chunk)
        pieces = []
        for one in self.page_fields:
            assert one.page_axis is not None
            pieces += contiguous_pieces(tensors[one.name].select(one.page_axis, page))
        return pieces

    def tail_pieces(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The session's memory of the tail, in the order of its bytes."""
        return field_pieces(self.tail_fields, tensors)

    def header(self, session: HeldSession) -> bytes:
        """The packed header of a session at a chunk boundary."""
        state = session.state
        return msgspec.msgpack.encode(
            SnapshotHeader(
                model=self.spec.name,
                model_hash=self.spec.model_hash,
                layout_hash=self.layout_hash,
                numerics_id=self.numerics_id,
                session_id=state.session_id,
                seed=state.seed,
                next_chunk_index=state.next_chunk_index,
                prompt=None if state.control is None else state.control.prompt,
                prompt_version=0 if state.control is None else state.control.version,
                digest=session.digest,
                scalars=state.scalars,
                page_bytes=self.page_bytes,
                tail_bytes=self.tail_bytes,
            )
        )

    def check(self, header: SnapshotHeader, *, any_numerics: bool = False) -> None:
        """LayoutMismatch unless a session with this header can go on here to the bit.

        `any_numerics` lets one from another numerics class in: its stream then goes on, in other bits.
        """
        for name, theirs, ours in (
            ("model", header.model_hash, self.spec.model_hash),
            ("layout", header.layout_hash, self.layout_hash),
            ("page bytes", header.page_bytes, self.page_bytes),
            ("tail bytes", header.tail_bytes, self.tail_bytes),
            ("numerics", header.numerics_id, self.numerics_id),
        ):
            if theirs != ours and not (name == "numerics" and any_numerics):
                raise LayoutMismatch(
                    f"session {header.session_id}: {name} {theirs}",
                    expected=str(ours),
                    hint="use a worker like its own",
                )


def tensor_addresses(pieces: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """(address, bytes) of flat uint8 tensors."""
    return [(piece.data_ptr(), piece.numel()) for piece in pieces]


def view_addresses(views: Sequence[memoryview]) -> list[tuple[int, int]]:
    """(address, bytes) of buffers."""
    return [(address_of(view), len(view)) for view in views if len(view)]


@dataclass(slots=True)
class _Page:
    ref: PageRef
    rewrites: int


class SessionWriter:
    """Keeps the recovery points of one session that this process owns. For one thread.

    `copy` runs a list of copies and returns when they have landed; the default runs them in this thread.
    """

    def __init__(
        self,
        store: RecoveryStore,
        shape: SnapshotShape,
        session: HeldSession,
        epoch: int,
        *,
        resumed_from: RecoveryPoint | None = None,
        copy: Any = copy_now,
    ) -> None:
        self.epoch = epoch
        self._store = store
        self._shape = shape
        self._session = session
        self._copy = copy
        self._pages: dict[int, _Page] = {}
        if resumed_from is not None:
            self._pages = {ref.chunk: _Page(ref, session.pages_rewritten) for ref in resumed_from.pages}

    def write_pages(self) -> int:
        """Write-through: every finished page that is not in the store yet; the bytes written. ArenaFull.

        A recache rewrites finished pages (`HeldSession.pages_rewritten`), so they are written anew.
        """
        session, state = self._session, self._session.state
        needed = self._shape.page_chunks(state.next_chunk_index)
        for chunk in [known for known in self._pages if known not in needed]:
            del self._pages[chunk]
        written = 0
        for chunk in needed:
            known = self._pages.get(chunk)
            if known is not None and known.rewrites == session.pages_rewritten:
                continue
            pending = self._store.begin_page(
                state.session_id, self.epoch, f"kv/{chunk}", self._shape.page_bytes, chunk=chunk
            )
            try:
                sources = tensor_addresses(self._shape.page_pieces(state.tensors, chunk))
                self._copy(join_pieces(pending.reservation.addresses(), sources))
                ref = pending.commit()
            except BaseException:
                pending.cancel()
                raise
            self._pages[chunk] = _Page(ref, session.pages_rewritten)
            written += ref.payload_bytes
        return written

    def write_point(self, frames: Sequence[Any] = ()) -> RecoveryPoint:
        """A new recovery point at this chunk boundary; older ones are dropped after it is committed.

        `frames` are the buffers of the chunks that nobody has accepted yet. ArenaFull when there is no room: the last
        point stays as it is. Conflict while a chunk is in work.
        """
        session, state = self._session, self._session.state
        if session.work is not None:
            raise Conflict(f"chunk {session.work.request.chunk_index} of session {session.session_id} is in work")
        self.write_pages()
        pages = [self._pages[chunk].ref for chunk in self._shape.page_chunks(state.next_chunk_index)]
        views = [memoryview(one).cast("B") for one in frames]
        pending = self._store.begin_point(
            state.session_id,
            self.epoch,
            state.next_chunk_index,
            pages=pages,
            tail_bytes=self._shape.tail_bytes,
            frame_bytes=[len(view) for view in views],
            meta=self._shape.header(session),
        )
        try:
            targets = pending.reservation.addresses(pending.tail_offset, self._shape.tail_bytes)
            self._copy(join_pieces(targets, tensor_addresses(self._shape.tail_pieces(state.tensors))))
            for index, view in enumerate(views):
                pending.write_frames(index, view)
            point = pending.commit(bytes.fromhex(session.digest))
        except BaseException:
            pending.cancel()
            raise
        self._store.drop_older(state.session_id, point)
        return point


def read_copies(store: RecoveryStore, shape: SnapshotShape, point: RecoveryPoint, state: SessionTensors) -> list[Copy]:
    """The copies that bring a point's bytes into a session's tensors, pages (oldest first) before the tail."""
    copies: list[Copy] = []
    for page in point.pages:
        targets = tensor_addresses(shape.page_pieces(state.tensors, page.chunk))
        copies += join_pieces(targets, view_addresses(store.read_page(page)))
    tail = view_addresses(store.read_tail(point))
    return copies + join_pieces(tensor_addresses(shape.tail_pieces(state.tensors)), tail)


def restore(
    store: RecoveryStore,
    shape: SnapshotShape,
    point: RecoveryPoint,
    pool: KvPool,
    *,
    any_numerics: bool = False,
    copy: Any = copy_now,
) -> HeldSession:
    """A session as it was at the point, in a fresh slot of the pool; on any failure the slot goes back.

    LayoutMismatch for a point of another kind of worker, CorruptState for bytes that do not verify, PoolExhausted.
    """
    header = decode_header(point.meta)
    shape.check(header, any_numerics=any_numerics)
    if (header.session_id, header.next_chunk_index) != (point.session, point.chunk):
        raise CorruptState(f"the header of {header.session_id} stands in a point of {point.session}")
    if tuple(page.chunk for page in point.pages) != shape.page_chunks(point.chunk):
        raise CorruptState(f"the point of {point.session} at chunk {point.chunk} lacks pages")
    slot = pool.acquire(point.session)
    try:
        state = SessionTensors(
            session_id=point.session,
            seed=header.seed,
            slot=slot,
            tensors=pool.tensors(point.session),
            next_chunk_index=header.next_chunk_index,
            control=None if header.prompt is None else Control(header.prompt, header.prompt_version),
            scalars=dict(header.scalars),
        )
        copy(read_copies(store, shape, point, state))
        if not store.check_pages(point) or store.arena.get(point.extent.id) is None:
            raise CorruptState(f"the point of {point.session} was dropped while it was read")
    except BaseException:
        pool.release(point.session)
        raise
    return HeldSession(state=state, digest=header.digest)
