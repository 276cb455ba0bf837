"""The measured cost model: what it fits, how it corrects itself, what it leaves behind."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import TinyModel

from turboserve.orchestrator.batching import ReadySegment
from turboserve.runtime.cost_model import MeasuredCost, PassTime, calibrate, fit_line, isotonic
from turboserve.runtime.kv_pool import KvPool


@pytest.mark.parametrize(("base", "slope"), [(2e-3, 1e-4), (0.0, 3e-4), (5e-3, 0.0)])
def test_a_straight_line_is_found(base, slope):
    points = [(16 * n, base + slope * 16 * n) for n in (1, 2, 4, 8)]
    assert fit_line(points) == pytest.approx((base, slope), abs=1e-9)


def test_no_negative_cost_is_fitted():
    assert fit_line([(16, 1e-3), (32, 4e-3)])[0] == 0.0
    assert fit_line([(16, 4e-3), (32, 1e-3)])[1] == 0.0
    assert fit_line([(16, 1.6e-3)]) == pytest.approx((0.0, 1e-4))


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_isotonic_never_falls_and_keeps_the_mean(values):
    smooth = isotonic(values)
    assert len(smooth) == len(values)
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(smooth))
    assert sum(smooth) == pytest.approx(sum(values), abs=1e-6)


def test_observation_follows_a_machine_that_slowed_down():
    cost = MeasuredCost(1e-3, 1e-4)
    before_s = cost.pass_s(16)
    for _ in range(200):
        cost.observe(PassTime(1, 16, 3 * before_s))
    assert cost.pass_s(16) == pytest.approx(3 * before_s, rel=0.05)
    cost.observe(PassTime(1, 16, 1000.0))
    assert cost.pass_s(16) < 3.3 * before_s


def test_calibration_measures_and_gives_all_back():
    model = TinyModel()
    pool = KvPool(model.state_layout(), 8)
    cost = calibrate(model, pool, segment_max=8, budget_s=60)
    assert pool.held_bytes() == 0
    assert sorted(cost.by_count_s) == [1, 2, 4, 8]
    assert cost.base_s >= 0 and cost.fitted_token_s >= 0 and cost.pass_s(16) > 0
    assert [count for count, _ in cost.table_s()] == [1, 2, 4, 8]
    segment = ReadySegment("s", "denoise", 16, 1.0)
    assert cost.frozen().segment_s(segment) == pytest.approx(cost.segment_s(segment))
