"""The tiny Wan model in the engine: one chain alone, in company, through recovery points, and while prompts wait."""

from __future__ import annotations

import random
import threading

import pytest
from point_harness import Node
from point_harness import run as run_all
from tiny_model import session_id

from turboserve.errors import InvalidRequest
from turboserve.model.interface import ChunkRequest, Control, PromptSwitch, Update
from turboserve.model.presets import PRESETS
from turboserve.model.wan.model import WanModel, WanParts
from turboserve.model.wan.tiny import tiny_parts
from turboserve.runtime.cost_model import MeasuredCost
from turboserve.runtime.engine import Engine
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.numerics import check_numerics
from turboserve.runtime.snapshot import SnapshotShape
from turboserve.runtime.worker_events import FinishedChunk

pytestmark = pytest.mark.usefixtures("deterministic")
CHUNKS = 6
NAMES = "bcdef"
SWITCHES = {"b": PromptSwitch.SWAP, "c": PromptSwitch.RECACHE, "d": PromptSwitch.BLEND, "e": PromptSwitch.RECACHE}
PRESET = PRESETS["wan-tiny"]


def make(parts: WanParts) -> WanModel:
    return WanModel(parts, PRESET, size=PRESET.size, name="wan-tiny", model_hash="tiny")


@pytest.fixture(scope="module")
def model():
    return make(tiny_parts("light"))


def request(name: str, index: int) -> ChunkRequest:
    prompt = f"a {'fox' if index < 4 else 'bear with a hat'} {name * (ord(name) - 96)}"
    steps = 2 if name in "be" else 4
    return ChunkRequest(index, steps, Control(prompt, 1 + (index >= 4)), SWITCHES.get(name, PromptSwitch.SWAP))


def engine_for(model, slots: int) -> Engine:
    return Engine(model, KvPool(model.state_layout(), slots), MeasuredCost(1e-2, 1e-5, segment_max=slots))


def run(engine: Engine, name: str, first: int, count: int) -> list[str]:
    digests = []
    for index in range(first, first + count):
        engine.submit(session_id(name), request(name, index), 0.0)
        while engine.has_work:
            digests += [event.digest for event in engine.run_pass()]
    return digests


def chain(model, name: str) -> list[str]:
    engine = engine_for(model, 1)
    engine.open(session_id(name), ord(name), request(name, 0).control)
    return run(engine, name, 0, CHUNKS)


def test_sessions_in_any_order_make_what_each_makes_alone(model):
    """Late joins, cancels in mid-chunk, every kind of prompt switch, packed passes of unequal segments."""
    rng = random.Random(5)
    engine = engine_for(model, len(NAMES))
    digests: dict[str, list[str]] = {}
    waiting, asked = rng.sample(NAMES, len(NAMES)), {}
    while waiting or any(len(one) < CHUNKS for one in digests.values()) or engine.has_work:
        if waiting and (rng.random() < 0.5 or not engine.has_work):
            name = waiting.pop()
            engine.open(session_id(name), ord(name), request(name, 0).control)
            digests[name], asked[name] = [], 0
        for name, made in digests.items():
            if asked[name] == len(made) < CHUNKS and rng.random() < 0.5:
                engine.submit(session_id(name), request(name, asked[name]), rng.random())
                asked[name] += 1
            elif asked[name] > len(made) and rng.random() < 0.05:
                asked[name] = engine.cancel(session_id(name))
        for event in engine.run_pass():
            assert isinstance(event, FinishedChunk), event
            digests[event.session_id[0]].append(event.digest)
    assert engine.stats.cancelled > 0 and engine.stats.segments > 1.5 * engine.stats.passes
    for name in NAMES:
        assert digests[name] == chain(model, name), name


@pytest.mark.parametrize("decoder", ["full", "light"])
def test_a_session_moved_through_a_recovery_point_goes_on_to_the_bit(decoder):
    """Suspend, migrate and recover all are this: a point here, a held session of it there."""
    model = make(tiny_parts(decoder))
    for name in "bcd":
        expected = chain(model, name)
        for moved_after in (1, 5):  # after the first frames, and in the middle of a blend
            node = Node(64 << 20, workers=2, slab_bytes=1 << 16)
            source, target = node.engine(model, slots=1), node.engine(model, slots=1)
            source.open(session_id(name), ord(name), request(name, 0).control, 1)
            digests = run(source, name, 0, moved_after)
            source.save(session_id(name))
            source.close(session_id(name))
            assert target.restore(session_id(name), ord(name), epoch=2) is not None
            assert target.next_chunk_index(session_id(name)) == moved_after
            digests += run(target, name, moved_after, CHUNKS - moved_after)
            assert digests == expected, (name, moved_after)
            node.close()


def test_text_keys_that_a_blend_changed_without_a_new_prompt_go_along(model):
    """Each chunk of a blend writes them, under one prompt; once it has ended nothing writes them again."""

    def asked(index: int) -> ChunkRequest:
        return ChunkRequest(index, 2, Control("a fox" if index < 1 else "a bear", 1 + (index >= 1)), PromptSwitch.BLEND)

    def made(engine: Engine, first: int, count: int) -> list[str]:
        digests = []
        for index in range(first, first + count):
            engine.submit(session_id("b"), asked(index), 0.0)
            digests += [event.digest for event in run_all(engine)]
        return digests

    alone, chunks = engine_for(model, 1), 1 + PRESET.blend_chunks + 4
    alone.open(session_id("b"), 7, asked(0).control)
    expected = made(alone, 0, chunks)
    for moved_after in range(1, chunks):
        node = Node(64 << 20, workers=2, slab_bytes=1 << 16)
        source, target = node.engine(model, slots=1), node.engine(model, slots=1)
        source.open(session_id("b"), 7, asked(0).control, 1)
        digests = made(source, 0, moved_after)
        assert target.restore(session_id("b"), 7, epoch=2) is not None
        assert digests + made(target, moved_after, chunks - moved_after) == expected, moved_after
        node.close()


DECODER_OF = {"b": "full", "c": "light", "d": "light", "e": "full", "f": ""}


def test_sessions_with_different_decoders_share_passes_and_go_on_elsewhere_to_the_bit():
    """Each chain is that of a model with its decoder alone; in mid-stream every session is suspended in one worker and
    goes on in another from its recovery point, where the pages had been read ahead for some."""
    both, node = make(tiny_parts()), Node(64 << 20, slab_bytes=1 << 16)
    expected = {name: chain(make(tiny_parts(DECODER_OF[name] or "full")), name) for name in NAMES}
    cost = MeasuredCost(1e-2, 1e-5, segment_max=len(NAMES))
    engine = node.engine(both, slots=len(NAMES), cost=cost)
    for name in NAMES:
        engine.open(session_id(name), ord(name), request(name, 0).control, epoch=1, decoder=DECODER_OF[name])
    digests = {name: [] for name in NAMES}
    shape, moved = SnapshotShape(both.spec, both.state_layout(), "n"), 3
    for index in range(CHUNKS):
        if index == moved:
            for name in NAMES:
                engine.save(session_id(name))
                point = node.store.latest(session_id(name))
                fields = shape.tail_fields(DECODER_OF[name] or "full", Update.OVERWRITE)
                assert point.tail_bytes == sum(one.nbytes for one in fields)
                engine.close(session_id(name))
            assert engine.pool.held_bytes() == 0
            engine = node.engine(both, slots=len(NAMES), cost=cost)
            for name in NAMES:
                if name in "bc":
                    engine.prepare(session_id(name))
                assert engine.restore(session_id(name), ord(name), 2, DECODER_OF[name]) is not None
        for name in NAMES:
            engine.submit(session_id(name), request(name, index), 0.0)
        for event in run_all(engine):
            digests[event.session_id[0]].append(event.digest)
    assert engine.stats.segments > 1.5 * engine.stats.passes  # prompts that are encoded late cost some sharing
    assert digests == expected
    assert len({chain[0] for chain in expected.values()}) == len(NAMES)
    node.close()


def test_a_point_made_with_another_decoder_is_no_session_s(caplog):
    both, node = make(tiny_parts()), Node(64 << 20, slab_bytes=1 << 16)
    source, target = node.engine(both), node.engine(both)
    source.open(session_id("b"), 1, request("b", 0).control, decoder="light")
    run(source, "b", 0, 1)
    assert target.restore(session_id("b"), 1, decoder="full") is None and target.pool.held_bytes() == 0
    assert "tail for decoder 'light', not 'full'" in caplog.text
    assert target.restore(session_id("b"), 1, decoder="light") is not None
    node.close()


def test_a_decoder_that_is_not_offered_is_refused_and_nothing_is_held(model):
    engine = engine_for(model, 1)
    with pytest.raises(InvalidRequest, match=r"'full' is not offered.*expected one of light"):
        engine.open(session_id("b"), 1, request("b", 0).control, decoder="full")
    assert engine.pool.held_bytes() == 0


def test_the_load_time_check_finds_equal_bits(model):
    pool = KvPool(model.state_layout(), 4)
    report = check_numerics(model, pool)
    assert report.packed_equals_alone and report.model_report["one_by_one"] is False
    assert pool.held_bytes() == 0


def test_a_prompt_is_encoded_while_the_chunk_before_it_is_made():
    parts = tiny_parts("light")
    asked = []

    class Noted:
        def encode(self, prompt):
            asked.append(prompt)
            return parts.text.encode(prompt)

    engine = engine_for(make(WanParts(parts.transformer, parts.decoders, Noted())), 1)
    engine.open(session_id("b"), 1, request("b", 0).control)
    run(engine, "b", 0, 3)
    engine.submit(session_id("b"), request("b", 3), 0.0)
    engine.run_pass()  # chunk 3 is in work
    new = request("b", 4)
    engine.submit(session_id("b"), new, 1.0)
    engine.model.prompts.get(new.control.prompt)  # waits for what was begun; no pass has run since
    assert asked.count(new.control.prompt) == 1
    while engine.has_work:
        engine.run_pass()
    assert asked.count(new.control.prompt) == 1


def test_a_session_that_waits_for_its_prompt_holds_up_nobody():
    """The text stage is stuck on one prompt; another session makes its chunks meanwhile."""
    parts = tiny_parts("light")
    go = threading.Event()

    class Slow:
        def encode(self, prompt):
            assert "bear" not in prompt or go.wait(30)
            return parts.text.encode(prompt)

    model = make(WanParts(parts.transformer, parts.decoders, Slow()))
    engine = engine_for(model, 2)
    for name in "bc":
        engine.open(session_id(name), ord(name), request(name, 0).control)
    run(engine, "b", 0, 4)
    run(engine, "c", 0, 3)
    engine.submit(session_id("b"), request("b", 4), 0.0)  # a new prompt: it will wait
    engine.submit(session_id("c"), request("c", 3), 1.0)
    made = []
    for _ in range(40):
        made += [event.session_id[0] for event in engine.run_pass()]
    assert made == ["c"] and engine.has_work
    go.set()
    while engine.has_work:
        made += [event.session_id[0] for event in engine.run_pass()]
    assert made == ["c", "b"]
