"""P7: one tenant at ten times its load does not push another's on-time share down by more than half a point."""

from __future__ import annotations

import pytest

from turboserve.sim.policies import make_policy
from turboserve.sim.profile_files import load_profile
from turboserve.sim.replay import Settings, simulate
from turboserve.sim.report import report
from turboserve.sim.workload import Workload, generate


@pytest.mark.parametrize("steps_floor", [2, None])
def test_a_tenant_at_ten_times_its_load_leaves_the_other_alone(steps_floor: int | None) -> None:
    shares = []
    for load in (1.0, 10.0):
        workload = Workload(horizon_s=300, mean_active=8 * (load + 1), tenant_loads=(load, 1.0), seed=5)
        policy = make_policy("turboserve", scaling=False)
        settings = Settings(workers=5, steps_floor=steps_floor, warmup_s=60)
        found = report(simulate(generate(workload), load_profile("k4"), policy, settings))
        shares.append(found["tenants"]["t1"]["on_time_share"])
    assert shares[0] - shares[1] <= 0.005
