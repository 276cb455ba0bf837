"""The clairvoyant fleet against an exact integer programme, and against cases worked by hand."""

import numpy as np
import pytest

from turboserve.errors import ConfigError
from turboserve.sim.clairvoyant import active_steps, cheapest_fleet, peak_active, static_fleet
from turboserve.sim.clairvoyant_milp import cheapest_slots


def fleet_hours(periods, **settings):
    starts, ends = np.array([p[0] for p in periods], float), np.array([p[1] for p in periods], float)
    options = {"capacity": 1, "provision_s": 30.0, "warmup_s": 0.0, "end_s": 3600.0} | settings
    return cheapest_fleet(starts, ends, **options)


def test_a_short_gap_is_bridged_and_a_long_one_is_not():
    # Up 100..200 and 210..300: 10 s of gap are cheaper than a start. Then 1000..1100 costs a new start of
    # 30 s.
    fleet = fleet_hours([(100, 200), (210, 300), (1000, 1100)])
    assert fleet.worker_hours * 3600 == pytest.approx(30 + 100 + 10 + 90 + 30 + 100)
    assert fleet.starts == 2


def test_one_leaves_as_another_comes_is_no_peak():
    starts, ends = np.array([0.0, 10.0]), np.array([10.0, 20.0])
    assert peak_active(starts, ends) == 1
    times, active = active_steps(starts, ends)
    assert times.tolist() == [0.0, 10.0, 20.0] and active.tolist() == [1, 1, 0]
    assert static_fleet(starts, ends, capacity=4) == 1


def test_without_delay_the_bill_is_the_need():
    fleet = fleet_hours([(0, 50), (25, 75), (30, 40)], provision_s=0.0, capacity=2)
    assert fleet.worker_hours * 3600 == pytest.approx(75 + 10)


def test_the_warm_up_is_free_and_its_fleet_may_be_kept():
    fleet = fleet_hours([(0, 610), (605, 700)], warmup_s=600.0)
    # Layer 1 is up 600..700. Layer 2 comes 5 s after the warm-up: standing by for it costs those 5 s, no
    # start.
    assert fleet.worker_hours * 3600 == pytest.approx(100 + 5 + 5)
    assert fleet.starts == 0


def test_nodes_come_whole():
    assert fleet_hours([(0, 100)], unit_workers=8, provision_s=0.0).worker_hours * 3600 == pytest.approx(800)


def test_the_curve_integrates_to_the_bill():
    rng = np.random.default_rng(3)
    starts = np.sort(rng.uniform(0, 3000, 200))
    ends = np.minimum(starts + rng.exponential(60, 200), 3600)
    fleet = cheapest_fleet(starts, ends, capacity=2, provision_s=45.0, warmup_s=600.0, end_s=3600.0)
    widths = np.diff(np.append(fleet.billed_time_s, 3600.0))
    assert (fleet.billed_workers * widths).sum() / 3600 == pytest.approx(fleet.worker_hours)
    grid = np.linspace(600, 3599, 5000)
    need_index = np.searchsorted(fleet.need_time_s, grid, side="right") - 1
    assert np.all(fleet.billed_at(grid) >= fleet.need_workers[need_index])


def test_nobody_active_costs_nothing():
    assert fleet_hours([]).worker_hours == 0.0
    with pytest.raises(ConfigError, match="capacity 0"):
        fleet_hours([(0, 1)], capacity=0)


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_integer_programme(seed):
    pytest.importorskip("highspy")
    rng = np.random.default_rng(seed)
    slots, delay = 60, int(rng.integers(0, 9))
    free = int(rng.integers(delay + 1, 15))  # the warm-up outlasts the delay, as in our settings
    sessions = int(rng.integers(1, 25))
    starts = rng.integers(0, slots - 1, sessions)
    ends = np.minimum(starts + rng.integers(1, 15, sessions), slots)
    active = np.array([np.sum((starts <= t) & (ends > t)) for t in range(slots)])
    fleet = cheapest_fleet(
        starts.astype(float), ends.astype(float), capacity=2, provision_s=delay, warmup_s=free, end_s=slots
    )
    exact = cheapest_slots(-(-active // 2), delay_slots=delay, free_slots=free)
    assert fleet.worker_hours * 3600 == pytest.approx(exact)
