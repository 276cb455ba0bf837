"""Batches of copies in the background."""

from __future__ import annotations

import itertools
import threading
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboserve.errors import ConfigError, Conflict, InvalidRequest, Overloaded
from turboserve.runtime import native
from turboserve.runtime.copy_engine import CopyEngine, copy_now, join_pieces

TWINS = ["python", *(["native"] if native.IMPLEMENTATION == "native" else [])]


@pytest.fixture(params=TWINS)
def engine_type(request):
    return partial(CopyEngine, implementation=request.param)


def addresses(arrays):
    return [(one.ctypes.data, one.nbytes) for one in arrays]


def test_a_batch_copies_exactly_its_bytes_in_order(engine_type):
    rng = np.random.default_rng(1)
    sources = [rng.integers(0, 256, n, np.uint8) for n in (1, 5000, 0, 123457)]
    targets = [np.zeros(one.size + 8, np.uint8) for one in sources]
    with engine_type() as engine:
        pairs = zip(targets, sources, strict=True)
        ticket = engine.submit([(t.ctypes.data, s.ctypes.data, s.nbytes) for t, s in pairs], keep=(sources, targets))
        ticket.wait(10)
        assert ticket.done() and ticket.copied == 4
    for target, source in zip(targets, sources, strict=True):
        assert np.array_equal(target[: source.size], source) and not target[source.size :].any()


def test_the_first_layer_can_be_used_before_the_last_has_landed(engine_type):
    layers = 64
    source = np.ones((layers, 1 << 20), np.uint8)
    target = np.zeros_like(source)
    with engine_type() as engine:
        ticket = engine.submit([(target[i].ctypes.data, source[i].ctypes.data, 1 << 20) for i in range(layers)])
        ticket.wait(10, copies=1)
        assert target[0].all()
        seen = ticket.copied
        assert target[: min(seen, layers)].all()
        ticket.wait(10)
    assert target.all()


def test_the_queue_is_bounded_and_close_finishes_it(engine_type):
    big = np.ones(64 << 20, np.uint8)
    into = np.zeros_like(big)
    engine = engine_type(queue_max=2)
    tickets = []
    with pytest.raises(Overloaded, match="wait"):
        for _ in range(5):
            tickets.append(engine.submit([(into.ctypes.data, big.ctypes.data, big.nbytes)]))
    engine.close()
    assert 2 <= len(tickets) <= 3 and all(ticket.done() for ticket in tickets) and into.all()
    with pytest.raises(Conflict, match="closed"):
        engine.submit([])


def test_a_wait_that_is_too_short_says_so(engine_type):
    big = np.ones(256 << 20, np.uint8)
    into = np.empty_like(big)
    with engine_type() as engine:
        ticket = engine.submit([(into.ctypes.data, big.ctypes.data, big.nbytes)])
        with pytest.raises(TimeoutError, match="0 of 1"):
            ticket.wait(0.0001)
        ticket.wait(30)


def test_an_empty_batch_is_done_at_once_and_null_is_refused(engine_type):
    with engine_type() as engine:
        ticket = engine.submit([])
        ticket.wait(5)
        assert ticket.done()
        with pytest.raises(InvalidRequest):
            engine.submit([(0, 1, 5)])


def test_many_threads_submit_at_once(engine_type):
    source = np.arange(40_000, dtype=np.uint32)
    target = np.zeros((8, 40_000), np.uint32)
    with engine_type() as engine:

        def work(row: int) -> None:
            for at in range(0, 40_000, 1000):
                copy = (target[row, at:].ctypes.data, source[at:].ctypes.data, 4000)
                engine.submit([copy]).wait(10)

        threads = [threading.Thread(target=work, args=(row,)) for row in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert (target == source).all()


@given(st.lists(st.integers(0, 50), max_size=8), st.data())
def test_pieces_are_joined_byte_by_byte(sizes, data):
    total = sum(sizes)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=5)))
    bounds = [0, *cuts, total]
    source = np.arange(total, dtype=np.uint8)
    target = np.zeros(total, np.uint8)
    starts = np.cumsum([0, *sizes])[:-1]
    sources = [(source.ctypes.data + int(at), size) for at, size in zip(starts, sizes, strict=True)]
    targets = [(target.ctypes.data + a, b - a) for a, b in itertools.pairwise(bounds)]
    copy_now(join_pieces(targets, sources))
    assert np.array_equal(source, target)


def test_pieces_of_different_totals_are_refused():
    with pytest.raises(InvalidRequest, match="smaller"):
        join_pieces([(1000, 4)], [(2000, 5)])
    with pytest.raises(InvalidRequest, match="larger"):
        join_pieces([(1000, 6)], [(2000, 5)])


def test_what_owns_the_memory_is_kept_until_the_copies_have_landed(engine_type):
    """The owners are dropped at once; the bytes still arrive, and the engine lets go of them afterwards."""
    into = np.zeros(32 << 20, np.uint8)
    gone = []

    class Owner:
        def __init__(self) -> None:
            self.array = np.full(into.size, 7, np.uint8)

        def __del__(self) -> None:
            gone.append(bool(into.all()))

    with engine_type() as engine:
        owner = Owner()
        ticket = engine.submit([(into.ctypes.data, owner.array.ctypes.data, into.size)], keep=owner)
        del owner
        ticket.wait(10)
        engine.submit([]).wait(5)
    assert gone == [True] and (into == 7).all()


def test_a_device_that_is_not_there_is_said():
    with pytest.raises(ConfigError, match="copies on"):
        CopyEngine("tpu")
    if native.load_cuda()[1] == 0:
        with pytest.raises(ConfigError, match="CUDA device"):
            CopyEngine("cuda")
