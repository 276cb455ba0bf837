"""Sessions through recovery points, to the bit: the digest chain of one that was moved is that of one that stayed."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from engine_harness import Driven, alone
from tiny_model import session_id

from turboserve.errors import ArenaFull, Conflict, CorruptState, LayoutMismatch, PoolExhausted
from turboserve.geometry import SlotGeometry
from turboserve.model.interface import ChunkRequest, Control, Field, PromptSwitch, SessionTensors, Tier, Update
from turboserve.model.shapes.model import ShapesModel
from turboserve.runtime.arena import Arena, create_arena
from turboserve.runtime.copy_engine import CopyEngine
from turboserve.runtime.engine import Engine
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.recovery_store import RecoveryStore
from turboserve.runtime.session_tensors import HeldSession
from turboserve.runtime.snapshot import SessionWriter, SnapshotShape, contiguous_pieces, decode_header, restore

pytestmark = pytest.mark.usefixtures("deterministic")
SLAB = 4096


@pytest.fixture
def stores():
    fd = create_arena(8192 * SLAB, partition_count=2, slab_bytes=SLAB)
    with Arena.map(fd, partition=0, owner_epoch=1) as first, Arena.map(fd, partition=1, owner_epoch=1) as second:
        yield RecoveryStore(first), RecoveryStore(second)
    os.close(fd)


def shape_of(driven: Driven) -> SnapshotShape:
    return SnapshotShape(driven.model.spec, driven.model.state_layout(), "numerics")


def held(driven: Driven, name: str) -> HeldSession:
    return driven.engine._sessions[session_id(name)]


def move(driven: Driven, name: str, target: Driven, stores) -> None:
    """As a migration would: a point at the source, its slot freed, the point opened at the target."""
    first, second = stores
    SessionWriter(first, shape_of(driven), held(driven, name), epoch=1).write_point()
    driven.engine.close(session_id(name))
    target.digests[name] = list(driven.digests[name])
    session = restore(second, shape_of(target), second.latest(session_id(name)), target.pool)
    target.engine._sessions[session_id(name)] = session


@pytest.mark.parametrize("moved_after", [0, 1, 2, 3, 4, 7, 11])
def test_a_moved_session_goes_on_to_the_bit(stores, moved_after):
    driven, target = Driven(slots=2), Driven(slots=2)
    driven.open("a")
    driven.chunks("a", moved_after)
    move(driven, "a", target, stores)
    assert target.chunks("a", 12 - moved_after) == alone("a", 12)


def test_a_point_every_chunk_writes_each_page_once_and_frees_the_old(stores):
    store, reader = stores
    driven = Driven(slots=2)
    driven.open("a")
    writer = SessionWriter(store, shape_of(driven), held(driven, "a"), epoch=1)
    ledgers = []
    for index in range(10):
        driven.chunks("a", 1)
        written = writer.write_pages()
        assert written == shape_of(driven).page_bytes, "one new page a chunk"
        point = writer.write_point(frames=[bytes([index]) * 100])
        assert reader.read_frames(reader.latest(session_id("a"))) == [bytes([index]) * 100]
        assert decode_header(point.meta).next_chunk_index == index + 1
        ledgers.append(store.arena.ledger(0).committed_bytes)
    assert len(set(ledgers[4:])) == 1, "a full window holds the same bytes for ever"
    store.arena.check()


def test_a_successor_goes_on_with_its_predecessors_pages(stores):
    first, second = stores
    driven, target = Driven(slots=1), Driven(slots=1)
    driven.open("a")
    driven.chunks("a", 5)
    SessionWriter(first, shape_of(driven), held(driven, "a"), epoch=1).write_point()
    point = second.latest(session_id("a"))
    session = restore(second, shape_of(target), point, target.pool)
    target.digests["a"] = list(driven.digests["a"])
    target.engine._sessions[session_id("a")] = session
    writer = SessionWriter(second, shape_of(target), session, epoch=2, resumed_from=point)
    assert writer.write_pages() == 0
    target.chunks("a", 1)
    assert writer.write_pages() == shape_of(target).page_bytes
    writer.write_point()
    target.chunks("a", 4)
    writer.write_point()
    assert first.arena.ledger(0).committed_bytes == SLAB * 2, "of the first worker's partition only the sink is needed"
    assert target.digests["a"] == alone("a", 10)


def test_copies_may_run_on_an_engine(stores):
    first, second = stores
    driven, target = Driven(slots=1), Driven(slots=1)
    driven.open("a")
    driven.chunks("a", 4)
    with CopyEngine() as engine:

        def copy(copies):
            engine.submit(copies).wait(10)

        SessionWriter(first, shape_of(driven), held(driven, "a"), 1, copy=copy).write_point()
        session = restore(second, shape_of(target), second.latest(session_id("a")), target.pool, copy=copy)
    for name, tensor in session.state.tensors.items():
        if name == "kv":  # all pages but the one that the next chunk overwrites
            scratch = driven.model.spec.slot.page_of_chunk(4)
            kept = [page for page in range(tensor.shape[0]) if page != scratch]
            assert torch.equal(tensor[kept], held(driven, "a").state.tensors[name][kept])
        elif name != "latents":
            assert torch.equal(tensor, held(driven, "a").state.tensors[name])


def test_another_kind_of_worker_is_refused_and_keeps_its_slots(stores):
    first, second = stores
    driven, target, other = Driven(slots=1), Driven(slots=1), Driven(slots=1)
    driven.open("a")
    driven.chunks("a", 1)
    other.open("b")
    point = SessionWriter(first, shape_of(driven), held(driven, "a"), epoch=1).write_point()
    foreign = SnapshotShape(target.model.spec, target.model.state_layout(), "other numerics")
    with pytest.raises(LayoutMismatch, match="numerics"):
        restore(first, foreign, point, target.pool)
    restore(first, foreign, point, target.pool, any_numerics=True)
    with pytest.raises(PoolExhausted):  # the only slot is taken by now
        restore(
            second,
            shape_of(target),
            SessionWriter(second, shape_of(other), held(other, "b"), 1).write_point(),
            target.pool,
        )
    model = replace(target.model.spec, model_hash="0" * 16)
    with pytest.raises(LayoutMismatch, match="model"):
        restore(first, SnapshotShape(model, target.model.state_layout(), "numerics"), point, Driven(slots=1).pool)
    empty = Driven(slots=1).pool
    with pytest.raises(CorruptState, match="lacks pages"):
        restore(first, shape_of(target), replace(point, pages=()), empty)
    first.arena.free(point.pages[0].extent)
    with pytest.raises(Exception, match="ended"):
        restore(first, shape_of(target), point, empty)
    assert empty.free_count == 1


def test_without_room_the_session_and_its_last_point_stay(stores):
    store, reader = stores
    driven = Driven(slots=1)
    driven.open("a")
    driven.chunks("a", 2)
    writer = SessionWriter(store, shape_of(driven), held(driven, "a"), epoch=1)
    point = writer.write_point()
    driven.chunks("a", 1)
    store.arena.reserve(session_id("b"), 1, store.arena.ledger(0).free_bytes)
    before = store.arena.ledger(0)
    with pytest.raises(ArenaFull):
        writer.write_point()
    assert store.arena.ledger(0) == before and reader.latest(session_id("a")) == point
    assert driven.chunks("a", 2) == alone("a", 5)


def test_no_point_in_mid_chunk(stores):
    driven = Driven(slots=1)
    driven.open("a")
    driven.credit("a", 0)
    driven.run_pass()
    writer = SessionWriter(stores[0], shape_of(driven), held(driven, "a"), epoch=1)
    with pytest.raises(Conflict, match="in work"):
        writer.write_point()


def test_a_recache_writes_its_pages_anew(stores):
    driven = Driven(slots=1)
    driven.open("a")
    driven.chunks("a", 4)
    writer = SessionWriter(stores[0], shape_of(driven), held(driven, "a"), epoch=1)
    writer.write_point()
    assert writer.write_pages() == 0
    session = held(driven, "a")
    session.state.tensors["kv"][0] += 1  # what a recache does to a finished page
    session.pages_rewritten += 1
    point = writer.write_point()
    target = Driven(slots=1)
    moved = restore(stores[1], shape_of(target), point, target.pool)
    assert torch.equal(moved.state.tensors["kv"][0], session.state.tensors["kv"][0])


def test_every_shape_of_page_and_tail_comes_back():
    """Pages on any axis, small dtypes, host fields: what the pieces cover is the page, byte for byte."""
    generator = torch.Generator().manual_seed(3)
    for shape, axis in [((3, 4, 5), 0), ((3, 4, 5), 1), ((2, 3, 4, 5), 2), ((3, 4, 6), 2)]:
        whole = torch.randint(0, 100, shape, generator=generator, dtype=torch.int32).to(torch.bfloat16)
        for page in range(shape[axis]):
            pieces = contiguous_pieces(whole.select(axis, page))
            expected = whole.select(axis, page).contiguous().reshape(-1).view(torch.uint8)
            assert torch.equal(torch.cat(pieces), expected)
            assert all(piece.data_ptr() >= whole.data_ptr() for piece in pieces)


def test_a_layout_without_pages_is_all_tail():
    layout = (
        Field("x", (7,), "uint8", Tier.HOST, Update.OVERWRITE),
        Field("s", (9,), "int8", Tier.DEVICE, Update.SCRATCH),
    )
    spec = replace(ShapesModel.random(0).spec, slot=SlotGeometry(1, 4, 1, 3))
    shape = SnapshotShape(spec, layout, "n")
    assert (shape.page_bytes, shape.tail_bytes, shape.page_chunks(9)) == (0, 7, ())
    state = SessionTensors("a" * 26, 0, 0, {"x": torch.arange(7, dtype=torch.uint8), "s": torch.zeros(9)})
    assert torch.cat(shape.tail_pieces(state.tensors)).tolist() == list(range(7))


def test_the_embedded_model_moves_to_the_bit_right_after_a_recache(stores):
    """Its pages lie on axis 2 of the cache, so each is many pieces; a recache changes all but the sink's."""
    model = ShapesModel.random(1)
    shape = SnapshotShape(model.spec, model.state_layout(), "numerics")
    name = session_id("r")

    def request(index: int) -> ChunkRequest:
        control = Control("a red ball", 1) if index < 9 else Control("a blue cube", 2)
        return ChunkRequest(index, 2, control, PromptSwitch.RECACHE)

    def run(engine: Engine, first: int, count: int) -> str:
        for index in range(first, first + count):
            engine.submit(name, request(index), 1e9)
            while engine.has_work:
                for event in engine.run_pass():
                    digest = event.digest
        return digest

    stayed, source, target = (Engine(model, KvPool(model.state_layout(), 1)) for _ in range(3))
    for engine in (stayed, source):
        engine.open(name, 5, Control("a red ball", 1))
    run(stayed, 0, 9)
    run(source, 0, 9)
    writer = SessionWriter(stores[0], shape, source._sessions[name], epoch=1)
    writer.write_point()
    run(stayed, 9, 1)
    run(source, 9, 1)
    assert source._sessions[name].pages_rewritten > 0
    point = writer.write_point()
    assert [page.chunk for page in point.pages] == list(shape.page_chunks(10))
    target._sessions[name] = restore(stores[1], shape, stores[1].latest(name), target.pool)
    assert run(target, 10, 3) == run(stayed, 10, 3)
