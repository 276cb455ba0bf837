"""What one tenant at ten times its load does to another one's on-time share, simulated.

    python -m bench.orchestrator.fairness [--out FILE.json]

Two tenants of equal weight; then the first asks for ten times as much. The second always stays within what is its own:
the fleet is the least one whose half has room for its peak at full steps. Each workload is made by a seed (synthetic,
profile k4, twenty minutes of which the first two do not count). The fleet stays, or follows the load up to that size.
`lost` is the second tenant's on-time share at its neighbour's own load less that at ten times the load, in points.
Static least-loaded, which knows no tenants, stands beside it.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from turboserve.sim.policies import make_policy
from turboserve.sim.profile_files import load_profile
from turboserve.sim.replay import Settings, simulate
from turboserve.sim.report import report
from turboserve.sim.trace import Trace, demand
from turboserve.sim.workload import Workload, generate

PROFILE = "k4"
MEAN_ACTIVE = 6.0
SEEDS = range(1, 11)
HORIZON_S = 1200
SETTINGS: tuple[tuple[str, bool, int | None], ...] = (  # policy, whether the fleet follows, fewest steps
    ("turboserve", False, None),
    ("turboserve", False, 2),
    ("turboserve", True, 2),
    ("static-least", False, None),
)


def together(first: Trace, second: Trace) -> Trace:
    """Both traces at once, each a tenant."""
    time_us = np.concatenate([first.time_us, second.time_us])
    session = np.concatenate([first.session, second.session + len(first.session_ids)])
    order = np.argsort(time_us, kind="stable")
    return replace(
        first,
        name="two tenants",
        session_ids=(*(f"a{one}" for one in first.session_ids), *(f"b{one}" for one in second.session_ids)),
        time_us=time_us[order],
        session=session[order],
        event=np.concatenate([first.event, second.event])[order],
        chunks=np.concatenate([first.chunks, second.chunks])[order],
        tenant=np.concatenate([np.zeros_like(first.tenant), np.ones_like(second.tenant)]),
        tenants=("t0", "t1"),
    )


def traces(seed: int) -> tuple[Trace, Trace, int]:
    """Both tenants at their own load; the first one at ten times it; and the workers. The second tenant's
    sessions are the same in both."""
    quiet = generate(Workload(horizon_s=HORIZON_S, mean_active=MEAN_ACTIVE, seed=seed))
    own, tenfold = (
        generate(Workload(horizon_s=HORIZON_S, mean_active=MEAN_ACTIVE * load, seed=seed + 1000)) for load in (1, 10)
    )
    profile = load_profile(PROFILE)
    workers = 2 * math.ceil(demand(quiet).peak_in(0, quiet.horizon_us) / profile.capacity)
    return together(own, quiet), together(tenfold, quiet), workers


def on_time_share(policy: str, scaling: bool, steps_floor: int | None, trace: Trace, workers: int) -> float:
    """The second tenant's."""
    settings = Settings(
        workers=None if scaling else workers,
        workers_max=workers,
        steps_floor=steps_floor,
        provision_s=30.0,
        warmup_s=120,
    )
    made = make_policy(policy, scaling=scaling, provision_s=30.0)
    found = report(simulate(trace, load_profile(PROFILE), made, settings))
    return float(found["tenants"]["t1"]["on_time_share"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out: Path | None = parser.parse_args().out
    drawn = [traces(seed) for seed in SEEDS]
    rows: list[dict[str, Any]] = []
    for policy, scaling, floor in SETTINGS:
        shares = [
            [on_time_share(policy, scaling, floor, trace, workers) for trace in (own, tenfold)]
            for own, tenfold, workers in drawn
        ]
        lost = [100 * (own - tenfold) for own, tenfold in shares]
        rows.append(
            {
                "policy": policy,
                "fleet": "follows the load" if scaling else "stays",
                "workers": [workers for _, _, workers in drawn],
                "steps_floor": floor,
                "seeds": len(lost),
                "on_time_share_at_own_load": round(sum(own for own, _ in shares) / len(shares), 5),
                "on_time_share_at_ten_times": round(sum(tenfold for _, tenfold in shares) / len(shares), 5),
                "lost_points_mean": round(sum(lost) / len(lost), 3),
                "lost_points_worst": round(max(lost), 3),
            }
        )
        print(rows[-1], flush=True)
    if out:
        out.write_text(json.dumps({"case": "one tenant at ten times its load", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
