"""Balancing: exact against brute force, compiled loops equal to their plain twins."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.orchestrator.stories import K4
from turboserve.orchestrator.placement import _survey, best_cap, lightest, movable
from turboserve.orchestrator.unequal import search

TABLE = np.array(K4.batch_latency_s)


def brute_cap(counts: list[int], horizon: float, eta_move_s: float) -> float:
    """Best value of latency of the fullest * horizon + moves * eta over every target vector of loads."""
    total, best = sum(counts), np.inf
    for after in itertools.product(range(total + 1), repeat=len(counts)):
        if sum(after) == total:
            moves = sum(max(0, a - b) for a, b in zip(counts, after, strict=True))
            best = min(best, TABLE[min(max(after), 16) - 1] * horizon + eta_move_s * moves if total else 0.0)
    return best


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.floats(0.1, 50), st.floats(0, 3))
@settings(max_examples=150, deadline=None)
def test_best_cap_is_the_optimum_over_all_placements(counts: list[int], horizon: float, eta_move_s: float) -> None:
    active_on = np.array(counts, np.int64)
    cap, moves = best_cap(active_on, np.arange(len(counts)), TABLE, horizon, eta_move_s, 0.0)
    if sum(counts) == 0:
        assert moves == 0
        return
    ours = TABLE[max(cap, 1) - 1] * horizon + eta_move_s * moves
    assert ours == pytest.approx(brute_cap(counts, horizon, eta_move_s))
    assert moves == sum(max(0, n - cap) for n in counts)


def test_ties_do_not_stall_it() -> None:
    cap, moves = best_cap(np.array([4, 4, 1, 1]), np.arange(4), TABLE, 20.0, 0.03, 0.005)
    assert (cap, moves) == (3, 2)


def test_a_move_dearer_than_its_gain_is_left() -> None:
    assert best_cap(np.array([3, 1]), np.arange(2), TABLE, 1.0, 0.3, 0.0)[1] == 0
    assert best_cap(np.array([3, 1]), np.arange(2), TABLE, 1.0, 0.1, 0.0)[1] == 1


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_compiled_loops_equal_their_plain_twins(seed: int, workers: int, sessions: int) -> None:
    rng = np.random.default_rng(seed)
    state = rng.integers(0, 7, sessions).astype(np.int8)
    active, in_chunk = rng.random(sessions) < 0.6, rng.random(sessions) < 0.5
    worker = rng.integers(-1, workers, sessions)
    target = np.where(rng.random(sessions) < 0.2, rng.integers(0, workers, sessions), -1)
    load = rng.choice([1.0, 2.0], sessions)
    deadline_s, moved_s = rng.random(sessions) * 10, rng.random(sessions) * 10
    arguments = (state, active, in_chunk, worker, target, load, deadline_s, 1.0, 5.0, workers)
    for a, b in zip(_survey(*arguments), _survey.py_func(*arguments), strict=True):
        np.testing.assert_array_equal(a, b)
    wanted = rng.random(workers) < 0.7
    moving = (state, active, in_chunk, worker, deadline_s, moved_s, wanted, 8.0, 3.0)
    np.testing.assert_array_equal(movable(*moving), movable.py_func(*moving))
    counts = rng.integers(0, 8, workers)
    ready = np.flatnonzero(rng.random(workers) < 0.8)
    if ready.size:
        capping = (counts, ready, TABLE, 12.0, 0.03, 0.005)
        assert best_cap(*capping) == best_cap.py_func(*capping)
    light = (ready, counts * 1.0, counts, counts + 2, wanted, 1.0, 6, 9, True)
    assert lightest(*light) == lightest.py_func(*light)
    home = rng.integers(0, workers, sessions)
    load_on = np.bincount(home, weights=load, minlength=workers)
    open_ = np.ones(workers, np.bool_)
    searching = (home, load, in_chunk.astype(np.int8), load_on, open_, open_, load * 0.03, TABLE, 20.0, 1.0, 6)
    np.testing.assert_array_equal(search(*searching), search.py_func(*searching))
