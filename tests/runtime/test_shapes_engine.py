"""The embedded model in the engine: one chain alone and in company, with joins, cancels and prompt switches."""

from __future__ import annotations

import random

import pytest
from tiny_model import session_id

from turboserve.model.interface import ChunkRequest, Control, PromptSwitch
from turboserve.model.shapes.model import ShapesModel
from turboserve.runtime.cost_model import MeasuredCost
from turboserve.runtime.engine import Engine
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.numerics import check_numerics
from turboserve.runtime.worker_events import FinishedChunk

pytestmark = pytest.mark.usefixtures("deterministic")
CHUNKS = 6
NAMES = "bcdefghi"
SWITCHES = {"b": PromptSwitch.SWAP, "c": PromptSwitch.RECACHE, "d": PromptSwitch.RECACHE}


@pytest.fixture(scope="module")
def model():
    return ShapesModel.random(3)


def request(name: str, index: int) -> ChunkRequest:
    """Every third session has fewer steps; prompts change at chunk 4, where a recache has a full window."""
    prompt = f"{'a red' if index < 4 else 'two blue'} circle drifting {'left' if name < 'f' else 'up'}"
    steps = 2 if name in "beh" else 4
    return ChunkRequest(index, steps, Control(prompt, 1 + (index >= 4)), SWITCHES.get(name, PromptSwitch.SWAP))


def engine_for(model, slots: int, packing: bool = True) -> Engine:
    pool = KvPool(model.state_layout(), slots)
    return Engine(model, pool, MeasuredCost(1e-2 if packing else 0.0, 1e-5, segment_max=slots))


def chain(model, name: str) -> list[str]:
    """The session alone."""
    engine = engine_for(model, 1)
    engine.open(session_id(name), ord(name), request(name, 0).control)
    digests = []
    for index in range(CHUNKS):
        engine.submit(session_id(name), request(name, index), 0.0)
        while engine.has_work:
            digests += [event.digest for event in engine.run_pass()]
    return digests


def test_the_load_time_check_finds_equal_bits(model):
    pool = KvPool(model.state_layout(), 4)
    report = check_numerics(model, pool)
    assert report.packed_equals_alone and report.model_report["packed_equals_alone"]
    assert pool.held_bytes() == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_eight_sessions_in_any_order_make_what_each_makes_alone(model, seed):
    rng = random.Random(seed)
    engine = engine_for(model, 8)
    digests: dict[str, list[str]] = {}
    waiting = rng.sample(NAMES, 8)
    asked: dict[str, int] = {}
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
                asked[name] = engine.cancel(session_id(name))  # in the middle of a chunk, recache passes included
        for event in engine.run_pass():
            assert isinstance(event, FinishedChunk), event
            digests[event.session_id[0]].append(event.digest)
    assert engine.stats.cancelled > 0 and engine.stats.segments > 2 * engine.stats.passes
    for name in rng.sample(NAMES, 4):
        assert digests[name] == chain(model, name)
