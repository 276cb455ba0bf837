from __future__ import annotations

import math

import numpy as np
import pytest

from turboserve.orchestrator import autoscaling, demand, fairness, load_replay
from turboserve.orchestrator.autoscaling import Level, ScaleMemory, level_of, mean_excess, target_workers
from turboserve.orchestrator.demand import Demand, Work, follow, forecast, observe, work_factor
from turboserve.orchestrator.service import REDUCED_SHARE, SERVICE_FADE_S, Service, look
from turboserve.orchestrator.view import make_view
from turboserve.sim.profile_files import load_profile


def test_mean_excess_equals_the_integral() -> None:
    x = np.linspace(-200, 400, 600_001)
    density = np.exp(-0.5 * ((x - 50) / 9) ** 2) / (9 * math.sqrt(2 * math.pi))
    by_sum = float((np.maximum(0, x - 56) * density).sum() * (x[1] - x[0]))
    assert mean_excess(56.0, 50.0, 9.0) == pytest.approx(by_sum, rel=1e-6)
    assert mean_excess(56.0, 60.0, 0.0) == 4.0


def test_target_without_spread_is_the_load() -> None:
    assert [target_workers(n, 0.0, 4.0, 6.0, 1.0) for n in (0.0, 4.0, 4.1, 7.0)] == [1, 1, 2, 2]


def test_a_dearer_latency_never_asks_for_fewer_workers() -> None:
    targets = [target_workers(100.0, 10.0, 4.0, price, 1.0) for price in (0.1, 1.0, 3.0, 12.0, 50.0)]
    assert targets == sorted(targets) and targets[0] == 25 and targets[-1] > 28


def test_targets_equal_their_plain_twin() -> None:
    for mean in (0.0, 3.3, 57.0):
        for sigma in (0.0, 2.0, 8.0):
            arguments = (mean, sigma, 4.0, 6.0, 1.0)
            assert target_workers(*arguments) == target_workers.py_func(*arguments)


def test_levels_by_volatility() -> None:
    levels = (Level(0.0, 1.0, 1.0), Level(0.2, 2.0, 0.9))
    assert [level_of(v, levels).price for v in (0.0, 0.19, 0.2, 3.0)] == [1.0, 1.0, 2.0, 2.0]


def test_workers_of_any_capacity_leave_the_same_share_without_room() -> None:
    level = Level(0.0, 4.0, 1.5)
    left = []
    for capacity in (1.0, 2.0, 4.0, 8.0):
        fleet = target_workers(4e4, 200.0, capacity, autoscaling.price_for(level, capacity), 1.5)
        left.append(mean_excess(capacity * fleet, 4e4, 200.0))
    assert max(left) - min(left) < 0.15 * max(left)


def test_the_hold_remembers_the_largest_target() -> None:
    memory = ScaleMemory()
    for now_s, target in ((0.0, 5), (1.0, 9), (2.0, 4), (3.0, 3)):
        memory = autoscaling.remember(memory, target, now_s, 10.0)
    assert memory.recent[0] == (1.0, 9)
    assert autoscaling.remember(memory, 2, 11.5, 10.0).recent[0] == (2.0, 4)
    assert not autoscaling.may_shrink(memory, 9.0, 10.0) and autoscaling.may_shrink(memory, 10.0, 10.0)


def test_samples_fill_the_seconds_nobody_looked_at() -> None:
    d = observe(observe(Demand(), 3, 0.0), 7, 4.2)
    assert d.samples[-5:].tolist() == [3, 3, 3, 3, 7] and d.count == 5 and d.next_s == 5.0
    assert observe(d, 8, 4.9) is d


def test_chance_is_smoothed_and_a_flash_crowd_believed() -> None:
    d = Demand()
    for second in range(300):
        d = observe(d, 100, float(second))
    # Periods of 30 s: 37 % of those active now still are when the worker is ready.
    assert forecast(d, 110, 30.0, 30.0).mean == pytest.approx(100 + 10 * math.exp(-1))
    assert forecast(d, 125, 30.0, 30.0).mean < 110
    assert forecast(d, 160, 30.0, 30.0).mean > 160
    assert forecast(d, 110, 0.0, 30.0).mean == 110


def test_long_periods_lean_on_the_newest_count_and_a_longer_delay_is_less_certain() -> None:
    d = Demand()
    for second in range(300):
        d = observe(d, 100, float(second))
    assert forecast(d, 120, 30.0, 300.0).mean > forecast(d, 120, 30.0, 20.0).mean
    assert forecast(d, 120, 30.0, math.inf).mean == 120
    assert forecast(d, 100, 120.0, 30.0).sigma > 1.5 * forecast(d, 100, 30.0, 30.0).sigma


def test_replay_bills_the_fleet_and_sees_who_has_no_room() -> None:
    samples = np.full(1200, 40.0)
    surviving = demand.survivors(30.0, 30.0)
    bill, excess, spread = load_replay.replay(samples, 30, surviving, 4.0, 0.01, 1.0, 15, 1.0, 300)
    assert bill == 900 * 10 and excess == 0.0 and spread == 0.0
    samples[600:] = 80.0
    assert load_replay.replay(samples, 30, surviving, 4.0, 0.01, 1.0, 15, 1.0, 300)[1] > 0.01
    arguments = (samples[:200], 20, 0.4, 4.0, 6.0, 1.0, 10, 1.0, 50)
    assert load_replay.replay(*arguments) == pytest.approx(load_replay.replay.py_func(*arguments))


def test_the_spread_follows_the_service_within_bounds() -> None:
    calm = autoscaling.refine(ScaleMemory(), 0.0, 900.0)
    assert calm.sigma_scale < 1.0 and calm.refined_s == 900.0
    assert autoscaling.refine(ScaleMemory(), 1.0, 900.0).sigma_scale == 1.0
    over = autoscaling.refine(ScaleMemory(), 3.0, 900.0)
    assert over.sigma_scale > 1.0
    assert over.sigma_scale == autoscaling.refine(ScaleMemory(), 30.0, 900.0).sigma_scale  # one burst is one step
    for pressure, bound in ((0.0, autoscaling.SIGMA_SCALE_MIN), (9.0, autoscaling.SIGMA_SCALE_MAX)):
        memory = ScaleMemory()
        for number in range(200):
            memory = autoscaling.refine(memory, pressure, 60.0 * number)
        assert memory.sigma_scale == bound


def test_the_service_is_what_was_begun_since_the_last_look() -> None:
    view = make_view((load_profile("k4"),), workers_max=4, workers_min=1)
    service = Service()
    for now_s, chunks, reduced in ((0.0, 0, 0), (200.0, 5000, 4000), (400.0, 10_000, 4000), (401.0, 10_100, 4100)):
        view.observed.chunks, view.observed.reduced_chunks = chunks, reduced
        service = look(service, view, now_s)
        if now_s == 200.0:
            assert service.reduced_share == REDUCED_SHARE  # the first minutes do not count
        if now_s == 400.0:
            calm = service.reduced_share
            assert 0.8 * REDUCED_SHARE < calm < REDUCED_SHARE
    assert service.reduced_share - calm == pytest.approx((1.0 - calm) / SERVICE_FADE_S, rel=0.01)


def test_the_family_scales_the_deviation_and_keeps_the_mean() -> None:
    rng = np.random.default_rng(3)
    base = rng.poisson(60, 1200).astype(float)
    segments = load_replay.family(base)
    assert len(segments) == 10
    spreads = [float(s.std()) for s in segments]
    assert spreads == sorted(spreads)
    assert all(abs(s.mean() - base.mean()) < 0.5 for s in segments)


def test_profiled_levels_are_monotone() -> None:
    rng = np.random.default_rng(5)
    bases = [np.repeat(rng.poisson(40, 60), 20).astype(float)]
    levels = load_replay.profile_levels([(base, 20.0) for base in bases], 30, 4.0, (0.0, 0.1, 0.2))
    assert [x.price for x in levels] == sorted(x.price for x in levels)
    assert [x.rho for x in levels] == sorted((x.rho for x in levels), reverse=True)


def test_shares_are_max_min_fair_by_weight() -> None:
    def given(asked: list[float], weights: list[float], room: float) -> list[float]:
        return fairness.shares(np.array(asked), np.array(weights), room).tolist()

    assert given([10, 2], [1, 1], 8) == [6, 2]
    assert given([10, 10], [3, 1], 8) == [6, 2]
    assert given([1, 1], [1, 1], 8) == [1, 1]
    assert given([0, 5], [1, 1], 4) == [0, 4]


def test_demand_uses_whole_seconds_of_the_callers_clock() -> None:
    assert observe(Demand(), 1, 100.7).next_s == 101.0
    assert demand.SAMPLES_MAX > demand.WINDOW_S


def test_a_load_of_short_periods_is_reckoned_from_their_chunks() -> None:
    """Five sessions a second of one and a half chunks, each gone after 0.6 s: three are seen, there is work for 7.5."""
    work, chunks = Work(), 0.0
    for second in range(300):
        work = follow(work, int(chunks), 3, float(second))
        chunks += 7.5
    assert work_factor(work, 0.6, 1.0, 4.0) == pytest.approx(2.5, rel=0.02)
    assert work_factor(work, 0.6, 1.0, 2.0) == 2.0, "one in work all the time is no more load than a whole worker"
    assert work_factor(work, 12.0, 1.0, 4.0) == 1.0, "periods of some length: their count is their load"
    assert follow(work, 0, 3, 300.0).chunks_seen == 0, "a new count begins anew"
    overrun = Work()
    for second in range(300):
        overrun = follow(overrun, 4 * second, 30, float(second))
    assert work_factor(overrun, 5.0, 1.0, 4.0) == 1.0, "a backlog is no reason to reckon with less than there is"


def test_the_room_of_a_crowd_is_kept_only_where_viewers_were_late() -> None:
    assert [autoscaling.crowd_hold_s(share, 1) for share in (0.0, 0.003, 0.0045, 0.006, 0.5)] == pytest.approx(
        [0, 0, 150, 300, 300]
    )
    assert [autoscaling.crowd_hold_s(0.5, crowds) for crowds in (0, 1, 2, 3, 4, 5000)] == [
        300,
        300,
        600,
        1200,
        1800,
        1800,
    ]
    seen = Demand()
    for second in range(100):
        seen = observe(seen, 50 if second < 20 else 3, float(second))
    assert [demand.largest(seen, seconds) for seconds in (0.0, 60.0, 90.0, 300.0)] == [0, 3, 50, 50]


def test_late_chunks_are_followed_after_the_first_minutes() -> None:
    view, service = make_view((load_profile("k4"),), workers_max=4, workers_min=1), Service()
    shares = []
    for now_s, chunks, late in ((0.0, 0, 0), (100.0, 100, 80), (400.0, 400, 80), (460.0, 500, 180), (2260.0, 900, 180)):
        view.observed.chunks, view.observed.late_chunks = chunks, late
        service = look(service, view, now_s)
        shares.append(service.late_share)
    assert shares[:3] == [0.0, 0.0, 0.0] and shares[3] == pytest.approx(1 - math.exp(-60 / SERVICE_FADE_S))
    assert shares[4] == pytest.approx(shares[3] / math.e)


def test_crowds_that_lacked_room_are_counted_until_they_are_forgotten() -> None:
    view, service = make_view((load_profile("k4"),), workers_max=4, workers_min=1), Service()
    service = look(service, view, 0.0)
    crowds = []
    for second in range(1, 4000):
        lacking = 400 <= second < 420 or 440 <= second < 450 or 700 <= second < 720
        view.observed.chunks += 10
        view.observed.late_chunks += 5 if lacking else 0
        service = look(service, view, float(second))
        crowds.append(service.crowds)
    assert crowds[398] == 0 and crowds[410] == 1
    assert crowds[460] == 1, "the same one still: it was never a minute without"
    assert crowds[720] == 2 and crowds[-1] == 0
