"""Sessions that leave a worker as recovery points and come back elsewhere, to the bit."""

from __future__ import annotations

import json
import threading
import time

import pytest
from engine_harness import alone, prompt_of, request_of
from point_harness import SLAB_BYTES, Node, run
from tiny_model import TinyModel, session_id

from turboserve.errors import ArenaFull, Conflict, NotOffered, PoolExhausted, SessionPoisoned
from turboserve.model.interface import ChunkRequest, Control, PromptSwitch
from turboserve.runtime.background_points import AT_ONCE, frozen_bytes
from turboserve.runtime.copy_engine import CopyEngine
from turboserve.runtime.engine import Engine
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.recovery_store import RecoveryStore
from turboserve.runtime.state_copies import DeviceCopies
from turboserve.runtime.worker_books import KEPT_CHUNKS
from turboserve.runtime.worker_events import BrokenSession

COUNT = 12


@pytest.fixture
def node():
    one = Node()
    yield one
    one.close()


@pytest.fixture(scope="module")
def chain(deterministic):
    return alone("b", COUNT)


def seed_of(name):
    return sum(name.encode())


def begin(engine, name="b", epoch=1):
    engine.open(session_id(name), seed_of(name), Control(prompt_of(name, 0)), epoch)


def chunks(engine, indices, name="b"):
    """Digests of chunks made one after the other."""
    digests = []
    for index in indices:
        engine.submit(session_id(name), request_of(name, index), 1e9)
        digests += [event.digest for event in run(engine)]
    return digests


@pytest.mark.parametrize("cut", range(COUNT))
def test_a_session_goes_on_elsewhere_with_the_same_chain(node, chain, cut):
    source, target = node.engine(TinyModel()), node.engine(TinyModel())
    begin(source)
    assert chunks(source, range(cut)) == chain[:cut]
    source.save(session_id("b"))
    source.close(session_id("b"))
    assert source.pool.free_count == 4
    restored = target.restore(session_id("b"), seed_of("b"), epoch=2)
    assert target.next_chunk_index(session_id("b")) == cut
    assert [one.digest for one in restored.chunks] == chain[max(0, cut - KEPT_CHUNKS) : cut]
    assert chunks(target, range(cut, COUNT)) == chain[cut:]


def test_its_last_frames_come_with_it(node, chain):
    source, target = node.engine(TinyModel()), node.engine(TinyModel())
    begin(source)
    for index in range(6):
        source.submit(session_id("b"), request_of("b", index), 1e9)
    made = run(source)
    restored = target.restore(session_id("b"), seed_of("b"), epoch=2)
    for before, after in zip(made[-KEPT_CHUNKS:], restored.chunks, strict=True):
        assert after.frames.tobytes() == before.frames.tobytes()
        same = {"chunk_index", "digest", "digest_prev", "steps", "prompt_version"}
        assert {name: getattr(before, name) for name in same} == {name: getattr(after, name) for name in same}


def test_a_dead_workers_session_goes_on_from_its_write_through(node, chain):
    """No word of farewell: the source is simply not asked any more, in the middle of a chunk."""
    source, target = node.engine(TinyModel()), node.engine(TinyModel())
    begin(source)
    chunks(source, range(5))
    source.submit(session_id("b"), request_of("b", 5), 1e9)
    source.run_pass()
    target.restore(session_id("b"), seed_of("b"), epoch=2)
    assert target.next_chunk_index(session_id("b")) == 5
    assert chunks(target, range(5, COUNT)) == chain[5:]


@pytest.mark.parametrize("every", [2, 3, 5])
def test_points_every_few_chunks_cost_a_few_chunks_again(node, chain, every):
    source, target = node.engine(TinyModel(), every=every), node.engine(TinyModel(), every=every)
    begin(source)
    chunks(source, range(7))
    assert source.stats.points == 7 // every
    target.restore(session_id("b"), seed_of("b"), epoch=2)
    assert target.next_chunk_index(session_id("b")) == 7 // every * every
    assert chunks(target, range(7 // every * every, COUNT)) == chain[7 // every * every :]


def test_the_arena_holds_one_point_a_session_however_long_it_streams(node):
    engine = node.engine(TinyModel())
    begin(engine)
    held = []
    for index in range(30):
        chunks(engine, [index])
        held.append(node.committed_bytes())
    assert len(set(held[6:])) == 1
    assert node.store.drop(session_id("b")) == held[-1]
    assert node.committed_bytes() == 0


def page_extents(node, name="b"):
    """chunk -> the extent that holds its page, of the session's newest point."""
    point = node.store.latest(session_id(name))
    return {ref.chunk: ref.extent for ref in point.pages if ref.key.startswith("page/")}


def test_each_page_is_written_once(node):
    engine = node.engine(TinyModel())
    begin(engine)
    before = {}
    for index in range(10):
        chunks(engine, [index])
        now = page_extents(node)
        assert set(now) - set(before) <= {index}
        assert all(before[chunk] == extent for chunk, extent in now.items() if chunk in before)
        before = now


def test_a_successor_goes_on_with_its_predecessors_pages(node, chain):
    source, target = node.engine(TinyModel()), node.engine(TinyModel())
    begin(source)
    chunks(source, range(5))
    source.save(session_id("b"))
    before = page_extents(node)
    target.restore(session_id("b"), seed_of("b"), epoch=2)
    assert chunks(target, range(5, 6)) == chain[5:6]
    after = page_extents(node)
    assert set(after) - set(before) == {5} and all(before[one] == after[one] for one in after if one in before)
    assert chunks(target, range(6, COUNT)) == chain[6:]
    mine = node.arenas[0].find(session_id("b"))
    ours = {one.id for one in mine if one.partition == 0}
    sink, prompt = (
        next(ref.extent for ref in node.store.latest(session_id("b")).pages if ref.key == key)
        for key in ("page/0", "prompt")
    )
    assert ours == {sink, prompt}, "of the first worker's partition only what never changes is needed"


def test_a_recache_writes_its_pages_anew(node):
    source, target = node.engine(TinyModel()), node.engine(TinyModel())
    begin(source)
    chunks(source, range(4))
    before = page_extents(node)
    session = source._sessions[session_id("b")]
    session.state.tensors["kv"][0] += 1  # what a recache does to a finished page
    session.pages_rewritten += 1
    session.saved = False
    source.save(session_id("b"))
    assert not set(page_extents(node).values()) & set(before.values())
    target.restore(session_id("b"), seed_of("b"), epoch=2)
    kv = target._sessions[session_id("b")].state.tensors["kv"]
    assert kv[0].equal(session.state.tensors["kv"][0]) and kv[0].any()


def test_no_point_in_mid_chunk(node, chain):
    engine = node.engine(TinyModel())
    begin(engine)
    engine.submit(session_id("b"), request_of("b", 0), 1e9)
    engine.run_pass()
    with pytest.raises(Conflict, match=r"chunk 0 of session .* is in work"):
        engine.save(session_id("b"))
    assert [event.digest for event in run(engine)] == chain[:1]


def test_a_point_that_lacks_a_page_is_not_gone_on_with(node):
    """Neither one whose manifest names too few, nor one of which a page was dropped; no slot is lost."""
    source, target = node.engine(TinyModel()), node.engine(TinyModel())
    begin(source)
    chunks(source, range(3))
    point = node.store.latest(session_id("b"))
    tail = b"".join(node.store.read_tail(point))
    RecoveryStore(node.arenas[0]).commit_point(
        session_id("b"), 2, 3, pages=point.pages[1:], tail=tail, digest=point.digest, meta=point.meta
    )
    assert target.restore(session_id("b"), seed_of("b"), epoch=3) is None
    assert target.pool.free_count == 4
    node.reader.free(node.store.latest(session_id("b")).extent)
    node.reader.free(point.pages[0].extent)
    assert target.restore(session_id("b"), seed_of("b"), epoch=3) is None
    assert target.pool.free_count == 4


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_the_copies_may_run_on_an_engine(node, chain, cut):
    """As on a GPU, but with the CPU's copy engine: the same bytes, whoever moves them."""
    source, target = node.engine(TinyModel()), node.engine(TinyModel())
    with CopyEngine() as copies:
        for engine in (source, target):
            engine.points._copies = DeviceCopies(copies, engine.pool.device, None, pack_below_bytes=0)
        begin(source)
        assert chunks(source, range(cut)) == chain[:cut]
        target.restore(session_id("b"), seed_of("b"), epoch=2)
        assert chunks(target, range(cut, COUNT)) == chain[cut:]


def test_a_new_owner_drops_what_the_one_before_left(node, chain):
    source, target = node.engine(TinyModel()), node.engine(TinyModel())
    begin(source)
    chunks(source, range(6))
    before = node.committed_bytes()
    target.restore(session_id("b"), seed_of("b"), epoch=2)
    assert chunks(target, range(6, COUNT)) == chain[6:]
    assert node.committed_bytes() == before
    assert {one.epoch for one in node.arenas[0].find(session_id("b"))} <= {1, 2}  # the sink's page is the first owner's


def test_a_zombie_that_goes_on_writing_does_no_harm(node, chain):
    zombie, owner, third = (node.engine(TinyModel()) for _ in range(3))
    begin(zombie)
    chunks(zombie, range(5))
    owner.restore(session_id("b"), seed_of("b"), epoch=2)
    assert chunks(owner, range(5, 7)) == chain[5:7]
    assert chunks(zombie, range(5, 9)) == chain[5:9]  # it drops pages that the owner's point names
    assert third.restore(session_id("b"), seed_of("b"), epoch=3) is not None
    next_index = third.next_chunk_index(session_id("b"))
    assert chunks(third, range(next_index, COUNT)) == chain[next_index:]
    assert chunks(owner, range(7, COUNT)) == chain[7:]  # and the owner writes again what it misses


def test_a_prepared_slot_is_read_ahead_and_only_the_rest_is_read_later(node, chain):
    source, target = node.engine(TinyModel(), slots=1), node.engine(TinyModel(), slots=1)
    begin(source)
    chunks(source, range(5))
    target.prepare(session_id("b"))
    assert (target.pool.free_count, target.session_count) == (0, 1)
    assert chunks(source, range(5, 8)) == chain[5:8]  # it generates on meanwhile
    source.save(session_id("b"))
    target.restore(session_id("b"), seed_of("b"), epoch=2)
    assert target.session_count == 1
    assert chunks(target, range(8, COUNT)) == chain[8:]


def test_a_prepared_slot_that_is_dropped_or_opened_anew_is_wiped(node, chain):
    source, target = node.engine(TinyModel()), node.engine(TinyModel(), slots=1)
    begin(source)
    chunks(source, range(3))
    target.prepare(session_id("b"))
    target.prepare(session_id("b"))
    with pytest.raises(PoolExhausted):
        target.prepare(session_id("c"))
    target.drop_prepared(session_id("b"))
    assert target.pool.free_count == 1
    target.prepare(session_id("b"))
    begin(target, epoch=2)  # the model itself checks that its slot is wiped
    assert chunks(target, range(4)) == chain[:4]


def test_what_was_made_by_another_class_of_machine_is_not_gone_on_with(node):
    source = node.engine(TinyModel())
    begin(source)
    chunks(source, range(3))
    other, weights = node.engine(TinyModel(), numerics_id="m"), node.engine(TinyModel(seed=1))
    for engine in (other, weights):
        assert engine.restore(session_id("b"), seed_of("b"), epoch=2) is None
        assert engine.pool.free_count == 4
    assert source.restore(session_id("c"), 1, epoch=2) is None


def test_when_told_so_it_goes_on_in_other_bits_but_never_with_another_model(node, chain):
    source = node.engine(TinyModel())
    begin(source)
    chunks(source, range(3))
    source.close(session_id("b"))
    other, weights = node.engine(TinyModel(), numerics_id="m"), node.engine(TinyModel(seed=1), numerics_id="m")
    assert weights.restore(session_id("b"), seed_of("b"), epoch=2, any_numerics=True) is None
    assert weights.pool.free_count == 4
    restored = other.restore(session_id("b"), seed_of("b"), epoch=2, any_numerics=True)
    assert restored.digest == chain[2]
    assert chunks(other, range(3, COUNT)) == chain[3:]  # the same bits after all, in a test
    assert source.restore(session_id("b"), seed_of("b"), epoch=3) is None, "its points are the new worker's kind now"


def test_a_full_arena_stops_no_stream_and_the_older_point_stays(chain):
    # Room for a point of the first chunks only: pages, frames, prompt and point take a slab or more each.
    node = Node(22 * SLAB_BYTES, workers=2)
    engine = node.engine(TinyModel())
    begin(engine)
    assert chunks(engine, range(COUNT)) == chain
    assert engine.stats.points_refused > 0
    node.committed_bytes()
    point = node.store.latest(session_id("b"))
    assert 0 < point.chunk < COUNT
    before = node.reader.ledger()
    with pytest.raises(ArenaFull):
        engine.save(session_id("b"))
    assert node.reader.ledger() == before and node.store.latest(session_id("b")) == point
    other = Node.engine(node, TinyModel())
    other.restore(session_id("b"), seed_of("b"), epoch=2)
    assert chunks(other, range(point.chunk, COUNT)) == chain[point.chunk :]
    node.close()


def test_a_session_that_did_nothing_is_not_written_again(node):
    engine = node.engine(TinyModel())
    begin(engine)
    chunks(engine, range(3))
    before = [one.id for one in node.arenas[0].find(session_id("b"))]
    engine.save(session_id("b"))
    assert [one.id for one in node.arenas[0].find(session_id("b"))] == before


def test_adopting_gives_up_what_is_not_out_and_keeps_what_is(node, chain):
    engine = node.engine(TinyModel())
    begin(engine)
    chunks(engine, range(3))
    for index in (3, 4):
        engine.submit(session_id("b"), request_of("b", index), 1e9)
    engine.run_pass()
    assert engine.adopt(session_id("b"), epoch=2) == 3
    assert chunks(engine, range(3, 5)) == chain[3:5]
    engine.submit(session_id("b"), request_of("b", 5), 1e9)
    while not any(event.digest == chain[5] for event in engine.run_pass()):
        pass
    assert not engine.at_boundary(session_id("b"))
    assert engine.adopt(session_id("b"), epoch=3) == 6
    run(engine)
    assert node.store.latest(session_id("b")).epoch == 3
    assert chunks(engine, range(6, COUNT)) == chain[6:]


def test_a_broken_session_leaves_its_last_good_point(node, chain):
    model = TinyModel()
    source, target = node.engine(model), node.engine(TinyModel())
    model.faults[session_id("b"), 4] = "nan"
    begin(source)
    chunks(source, range(4))
    source.submit(session_id("b"), request_of("b", 4), 1e9)
    assert isinstance(run(source)[-1], BrokenSession)
    with pytest.raises(SessionPoisoned):
        source.save(session_id("b"))
    target.restore(session_id("b"), seed_of("b"), epoch=2)
    assert chunks(target, range(4, COUNT)) == chain[4:]


def test_without_an_arena_nothing_can_leave():
    model = TinyModel()
    engine = Engine(model, KvPool(model.state_layout(), 1))
    begin(engine)
    with pytest.raises(NotOffered):
        engine.save(session_id("b"))


@pytest.mark.parametrize(("cut", "switch"), [(1, 4), (4, 4), (5, 4), (6, 4), (10, 9)])
def test_shapes_moves_with_a_recache_before_or_after(deterministic, cut, switch):
    """A recache rewrites pages of finished chunks: the points after it must have the new ones."""
    from turboserve.model.shapes.model import ShapesModel

    model = ShapesModel.random()

    def request(index: int) -> ChunkRequest:
        prompt = "a red ball bounces" if index < switch else "a blue square spins"
        return ChunkRequest(index, 2, Control(prompt, 1 if index < switch else 2), PromptSwitch.RECACHE)

    def stream(engine, indices):
        digests = []
        for index in indices:
            engine.submit(session_id("s"), request(index), 1e9)
            digests += [event.digest for event in run(engine)]
        return digests

    node = Node(32 << 20, slab_bytes=64 << 10)
    source, target = node.engine(model, slots=1), node.engine(model, slots=1)
    undisturbed = Engine(model, KvPool(model.state_layout(), 1))
    for engine in (undisturbed, source):
        engine.open(session_id("s"), 7, request(0).control)
    expected = stream(undisturbed, range(switch + 5))
    assert stream(source, range(cut)) == expected[:cut]
    assert (source._sessions[session_id("s")].pages_rewritten > 0) == (cut > switch)
    target.restore(session_id("s"), 7, epoch=2)
    a, b = source._sessions[session_id("s")].state, target._sessions[session_id("s")].state
    assert (a.seed, a.control, a.next_chunk_index) == (b.seed, b.control, b.next_chunk_index)
    assert json.dumps(a.scalars) == json.dumps(b.scalars)
    scratch = model.spec.slot.page_of_chunk(cut)  # what the next chunk overwrites before it reads does not move
    for page in {page for page, _ in model.spec.slot.resident_chunks(cut)} - {scratch}:
        assert a.tensors["kv_cache"][:, :, page].equal(b.tensors["kv_cache"][:, :, page])
    assert stream(target, range(cut, switch + 5)) == expected[cut:]
    node.close()


@pytest.mark.parametrize("delay_s", [0.0, 0.003, 0.03])
@pytest.mark.parametrize("cut", [1, 2, 5, 9])
def test_points_written_beside_the_engine_are_the_same(node, chain, cut, delay_s, monkeypatch):
    """However late the copies run: what they read must not have changed since."""
    source, target = node.engine(TinyModel(), background=True), node.engine(TinyModel(), background=True)
    write = source.points.write

    def late(session, epoch):
        time.sleep(delay_s)
        return write(session, epoch)

    monkeypatch.setattr(source.points, "write", late)
    begin(source)
    for index in range(cut):
        source.submit(session_id("b"), request_of("b", index), 1e9)
    run(source)
    source._settle(source._sessions[session_id("b")])
    point = node.store.latest(session_id("b"))
    assert 0 < point.chunk <= cut
    target.restore(session_id("b"), seed_of("b"), epoch=2)
    assert chunks(target, range(point.chunk, COUNT)) == chain[point.chunk :]
    source.close(session_id("b"))
    target.close(session_id("b"))
    node.store.drop(session_id("b"))
    assert node.committed_bytes() == 0


def test_a_pass_that_writes_to_a_page_on_its_way_out_waits_for_it(node, chain, monkeypatch):
    engine = node.engine(TinyModel(), background=True)
    gate = threading.Event()
    write = engine.points.write
    monkeypatch.setattr(engine.points, "write", lambda session, epoch: gate.wait(10) and write(session, epoch))
    begin(engine)
    chunks(engine, range(3))
    job = engine._sessions[session_id("b")].job
    assert job.chunk == 1 and not job.done  # the point of the first chunk; later ones were not begun
    window = TinyModel().spec.slot.window_pages
    sink_page = TinyModel().spec.slot.page_of_chunk(0)
    assert job.pages == {sink_page}
    engine._settle, settle = lambda session: (gate.set(), settle(session))[1], engine._settle
    chunks(engine, range(3, 3 + window))
    assert not gate.is_set()  # nothing ever writes to the sink's page again
    engine.save(session_id("b"))
    assert gate.is_set()
    gate.clear()
    chunks(engine, [3 + window])
    job = engine._sessions[session_id("b")].job
    for index in range(4 + window, 4 + 2 * window):
        if not gate.is_set():
            chunks(engine, [index])
    assert gate.is_set() and job.done  # the ring came round to it
    assert all(one.digest == chain[one.chunk_index] for one in engine._sessions[session_id("b")].kept)


def test_no_more_points_are_on_their_way_than_memory_is_kept_for(node, monkeypatch):
    """Five sessions commit together and the copies are slow; a clone that is still held counts as on its way."""
    engine, names, jobs, held = node.engine(TinyModel(), slots=5, background=True), "bcdef", [], []
    write, begin_job = engine.points.write, engine._background.begin

    def slow(session, epoch):
        time.sleep(0.1)
        return write(session, epoch)

    def noted(session, epoch):
        jobs.append(begin_job(session, epoch))
        held.append(sum(one._session is not None for one in jobs))
        return jobs[-1]

    monkeypatch.setattr(engine.points, "write", slow)
    monkeypatch.setattr(engine._background, "begin", noted)
    for name in names:
        engine.open(session_id(name), seed_of(name), Control(prompt_of(name, 0)), 1)
        engine.submit(session_id(name), request_of(name, 0), 1e9)
    run(engine)
    for session in engine._sessions.values():
        engine._settle(session)
        assert session.point_chunk == 1
    assert len(jobs) == len(names) and max(held) == AT_ONCE and all(one._session is None for one in jobs)
    layout = engine.model.state_layout()
    changing = sum(one.nbytes for one in layout if one.name in ("text", "carried"))
    assert frozen_bytes(layout) == AT_ONCE * changing  # "counts" changes too, in host memory
    for name in names:
        engine.close(session_id(name))
        node.store.drop(session_id(name))


def test_a_full_arena_is_no_worse_in_the_background(chain):
    node = Node(22 * SLAB_BYTES, workers=2)
    engine = node.engine(TinyModel(), background=True)
    begin(engine)
    assert chunks(engine, range(COUNT)) == chain
    engine._settle(engine._sessions[session_id("b")])
    assert engine.stats.points_refused > 0 and node.store.latest(session_id("b")) is not None
    with pytest.raises(ArenaFull):
        engine.save(session_id("b"))
    engine.close(session_id("b"))
    node.committed_bytes()
    node.close()
