"""What a pass may and may not do: order, cancel, faults, and equal bits in every company."""

import random

import pytest
import torch
from engine_harness import Driven, alone, request_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import session_id

from turboserve.errors import Conflict, NotFound, PoolExhausted, SessionPoisoned
from turboserve.model.interface import Control
from turboserve.runtime.cost_model import MeasuredCost

pytestmark = pytest.mark.usefixtures("deterministic")
NAMES = tuple("bcdefghi")
CHUNKS = 8
ALONE: dict[str, list[str]] = {}


def reference(name: str) -> list[str]:
    if name not in ALONE:
        ALONE[name] = alone(name, CHUNKS)
    return ALONE[name]


def test_a_chunk_is_four_denoise_steps_decode_and_a_context_pass():
    driven = Driven()
    driven.open("b")
    driven.credit("b", 0)
    for _ in range(3):
        driven.run_pass()
    assert driven.finished == []
    driven.run_pass()
    assert len(driven.finished) == 1  # the frames are out before the context pass
    assert driven.engine.next_chunk_index(session_id("b")) == 0
    driven.run_pass()
    assert driven.engine.next_chunk_index(session_id("b")) == 1
    assert not driven.engine.has_work


def test_what_is_at_work_is_told_from_the_first_pass_to_the_end_of_the_context_pass():
    driven = Driven()
    driven.open("b")
    driven.open("c")
    driven.credit("b", 0)
    assert driven.engine.at_work.sessions == {}
    b, c = session_id("b"), session_id("c")
    seen = []
    forward = driven.model.forward
    driven.model.forward = lambda batch: (seen.append(driven.engine.at_work), forward(batch))[1]
    driven.run_pass()
    assert seen[0].sessions == {b: (0, 0, True), c: (0, 0, False)}
    assert seen[0].until_s == pytest.approx(driven.now_s + 1e-2, rel=0.1)
    assert driven.engine.at_work.until_s == 0.0 and driven.engine.at_work.sessions[b] == (0, 0, True)
    driven.run_until_idle()
    assert driven.engine.at_work.sessions == {b: (0, 1, False), c: (0, 0, False)}


def test_a_newcomer_joins_at_the_next_pass():
    driven = Driven()
    driven.open("b")
    driven.open("c")
    driven.credit("b", 0)
    driven.run_pass()
    driven.credit("c", 0)
    driven.run_pass()
    b, c = session_id("b"), session_id("c")
    assert sorted(driven.model.passes[-1]) == [(b, 0, 1), (c, 0, 0)]
    driven.run_until_idle()
    assert driven.finished[0].batch_size == pytest.approx(7 / 4)


def test_where_packing_saves_nothing_the_earliest_deadline_goes_first():
    driven = Driven(cost=MeasuredCost(0.0, 1e-3, segment_max=8))
    for name, deadline_s in (("b", 3.0), ("c", 1.0), ("d", 2.0)):
        driven.open(name)
        driven.credit(name, 0, deadline_s=deadline_s)
    driven.run_until_idle()
    assert all(len(one) == 1 for one in driven.model.passes)
    assert [one.session_id[0] for one in driven.finished] == ["c", "d", "b"]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    names=st.lists(st.sampled_from(NAMES), unique=True, min_size=1, max_size=8),
    packing=st.booleans(),
)
def test_digests_are_the_same_alone_and_in_any_company(seed, names, packing):
    """Random schedules: opens at any time, credits ahead, pauses, joins in mid-chunk, closes of others."""
    rng = random.Random(seed)
    driven = Driven(cost=MeasuredCost(1e-2 if packing else 0.0, 1e-5, segment_max=rng.randint(1, 8)))
    targets = {name: rng.randint(1, CHUNKS) for name in names}
    credited = dict.fromkeys(names, 0)
    waiting = list(names)
    while waiting or driven.engine.has_work or any(credited[n] < targets[n] for n in names):
        if waiting and rng.random() < 0.3:
            driven.open(waiting.pop())
        for name in driven.digests:
            ahead = credited[name] - len(driven.digests[name])
            if credited[name] < targets[name] and ahead < 3 and rng.random() < 0.4:
                driven.credit(name, credited[name], deadline_s=driven.now_s + rng.random())
                credited[name] += 1
        for _ in range(rng.randint(0, 3)):
            driven.run_pass()
    for name in names:
        assert driven.digests[name] == reference(name)[: targets[name]]


@pytest.mark.parametrize("passes_before", [0, 1, 2, 3])
def test_a_cancelled_chunk_leaves_no_trace(passes_before):
    driven = Driven()
    driven.open("b")
    driven.open("c")
    for index in range(6):
        driven.credit("b", index, steps=3)  # other inputs than the chunk will have in the end
        driven.credit("c", index)
        for _ in range(min(passes_before, 2)):
            driven.run_pass()
        assert driven.engine.cancel(session_id("b")) == index
        driven.credit("b", index)
        driven.run_until_idle()
    assert driven.digests["b"] == reference("b")[:6]
    assert driven.digests["c"] == reference("c")[:6]


def test_a_chunk_whose_frames_are_out_cannot_be_cancelled():
    driven = Driven()
    driven.open("b")
    driven.credit("b", 0)
    driven.credit("b", 1)
    for _ in range(4):
        driven.run_pass()
    assert driven.engine.cancel(session_id("b")) == 1
    driven.run_until_idle()
    assert len(driven.finished) == 1
    assert driven.chunks("b", 4) == reference("b")[:5]


@pytest.mark.parametrize("fault", ["raise", "nan", "decode", "begin"])
@pytest.mark.parametrize("at", [0, 4])
def test_a_fault_breaks_one_session_and_changes_no_other(fault, at):
    driven = Driven()
    for name in NAMES[:4]:
        driven.open(name)
    driven.model.faults[(session_id("c"), at)] = fault
    for index in range(6):
        for name in NAMES[:4]:
            if name not in driven.broken:
                driven.credit(name, index)
        driven.run_until_idle()
    assert set(driven.broken) == {"c"}
    assert driven.broken["c"].code == "session_poisoned" and driven.broken["c"].chunk_index == at
    assert driven.digests["c"] == reference("c")[:at]
    for name in "bde":
        assert driven.digests[name] == reference(name)[:6]
    with pytest.raises(SessionPoisoned):
        driven.credit("c", at)
    driven.engine.close(session_id("c"))  # its slot comes back and the next one finds it clean
    driven.open("f")
    assert driven.chunks("f", 3) == reference("f")[:3]


def test_close_in_mid_chunk_frees_all_and_neighbours_go_on():
    driven = Driven(slots=2)
    driven.open("b")
    driven.open("c")
    with pytest.raises(PoolExhausted):
        driven.open("d")
    driven.credit("b", 0)
    driven.credit("c", 0)
    driven.run_pass()
    driven.engine.close(session_id("b"))
    driven.engine.close(session_id("b"))
    driven.open("d")
    driven.credit("d", 0)
    driven.run_until_idle()
    assert driven.digests["c"] == reference("c")[:1] and driven.digests["d"] == reference("d")[:1]
    for name in "cd":
        driven.engine.close(session_id(name))
    assert driven.pool.held_bytes() == 0


def test_credits_out_of_order_are_refused():
    driven = Driven()
    driven.open("b")
    with pytest.raises(Conflict):
        driven.credit("b", 1)
    driven.credit("b", 0)
    driven.credit("b", 1)
    with pytest.raises(Conflict):
        driven.credit("b", 1)
    with pytest.raises(NotFound):
        driven.engine.submit(session_id("x"), request_of("x", 0), 0.0)


def test_begin_that_raises_gives_the_slot_back():
    driven = Driven()

    def refuse(state, control):
        raise ValueError("no")

    driven.model.begin = refuse
    with pytest.raises(ValueError):
        driven.engine.open(session_id("b"), 1, Control("p"))
    assert driven.pool.held_bytes() == 0 and driven.engine.session_count == 0


def test_an_engine_without_work_does_nothing():
    driven = Driven()
    driven.open("b")
    driven.run_pass()
    assert driven.model.passes == [] and driven.engine.stats.passes == 0


@pytest.mark.gpu
def test_the_same_engine_on_cuda():
    driven = Driven(device="cuda")
    for name in "bc":
        driven.open(name)
        driven.credit(name, 0)
    driven.run_until_idle()
    assert len(driven.finished) == 2
    torch.cuda.synchronize()
    driven.open("d")
    driven.chunks("d", 2)
    assert driven.engine.cost.by_count_s
