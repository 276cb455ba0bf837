"""The generator: seeded, readable by the reader, and of the shape that was asked for."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboserve.errors import ConfigError
from turboserve.sim.trace import ACTIVE, read_trace, write_trace
from turboserve.sim.trace_stats import stats
from turboserve.sim.workload import CURVES, FAMILY_FACTORS, Workload, generate, rescaled, swung, volatility_family


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("time_us", "session", "event", "chunks"))


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(sorted(CURVES)),
    lengths=st.sampled_from(["lognormal", "pareto"]),
    horizon_s=st.floats(30, 900),
    mean_active=st.floats(0.5, 30),
    periods=st.floats(1, 6),
    tenants=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_workload_is_a_legal_trace(tmp_path_factory, kind, lengths, horizon_s, mean_active, periods, tenants, seed):
    workload = Workload(
        kind=kind,
        lengths=lengths,
        horizon_s=horizon_s,
        mean_active=mean_active,
        periods_mean=periods,
        tenant_loads=(1.0,) * tenants,
        seed=seed,
    )
    trace = generate(workload)
    path = tmp_path_factory.mktemp("trace") / "t.csv.gz"
    write_trace(trace, path)
    back = read_trace(path)  # the reader refuses what breaks the format
    assert same(trace, back)
    assert same(trace, generate(workload))


def test_the_asked_for_load_and_lengths_come_out():
    workload = Workload(horizon_s=20_000, mean_active=60, active_s_mean=25, idle_s_mean=40, periods_mean=3, seed=1)
    found = stats(generate(workload))
    assert found["mean_active"] == pytest.approx(60, rel=0.1)
    trace = generate(workload)
    assert trace.chunks[trace.event == ACTIVE].mean() == pytest.approx(25.5, rel=0.1)


def test_tail_stretches_the_tail_and_keeps_the_mean():
    lengths = {}
    for tail in (1.0, 4.0):
        trace = generate(Workload(horizon_s=40_000, mean_active=60, tail=tail, seed=2))
        lengths[tail] = trace.chunks[trace.event == ACTIVE]
    spread = {tail: np.percentile(n, 99) / np.percentile(n, 50) for tail, n in lengths.items()}
    assert spread[4.0] > 2.5 * spread[1.0]
    assert lengths[4.0].mean() == pytest.approx(lengths[1.0].mean(), rel=0.12)


def test_the_family_grows_in_volatility():
    base = Workload(kind="diurnal", horizon_s=7200, mean_active=80, seed=3)
    family = volatility_family(base)
    swing = [stats(trace)["active_cv_after_ramp"] for trace in family]
    assert len(family) == len(FAMILY_FACTORS) == 10
    assert swing[9] > 2 * swing[0] and np.corrcoef(FAMILY_FACTORS, swing)[0, 1] > 0.9


def test_a_large_swing_reaches_less_than_its_name_as_documented():
    rng = np.random.default_rng(0)
    reached = {}
    for kind in ("diurnal", "flash"):
        curve = CURVES[kind](3600.0, rng)
        for factor in (1.4, 1.6, 1.8, 2.0):
            reached[kind, factor] = swung(curve, factor).std() / curve.std()
    assert [round(reached["diurnal", factor], 2) for factor in (1.4, 1.6, 1.8, 2.0)] == [1.4, 1.55, 1.65, 1.72]
    assert reached["flash", 2.0] == pytest.approx(2.0)


def test_a_trace_can_be_rescaled():
    base = generate(Workload(kind="flash", horizon_s=5400, mean_active=60, seed=4))
    calm, wild = (stats(rescaled(base, factor, seed=5)) for factor in (0.2, 2.0))
    assert wild["active_cv_after_ramp"] > 1.5 * calm["active_cv_after_ramp"]
    assert calm["sessions"] == pytest.approx(wild["sessions"], rel=0.15)


def test_a_seed_changes_everything_and_a_noisy_tenant_makes_the_load():
    workload = Workload(seed=6, tenant_loads=(1.0, 1.0, 10.0))
    trace = generate(workload)
    assert not same(trace, generate(replace(workload, seed=7)))
    share = np.bincount(trace.tenant, minlength=3) / trace.tenant.size
    assert share[2] == pytest.approx(10 / 12, abs=0.08)


@pytest.mark.parametrize(
    "change", [{"kind": "lunar"}, {"lengths": "round"}, {"mean_active": 0.0}, {"periods_mean": 0.5}, {"swing": -1.0}]
)
def test_what_cannot_be_drawn_is_refused(change):
    with pytest.raises(ConfigError):
        generate(replace(Workload(), **change))
