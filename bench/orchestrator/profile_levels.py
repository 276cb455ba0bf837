"""The autoscaler's table: (lambda, rho) per volatility level, profiled over families of ten segments.

    python -m bench.orchestrator.profile_levels TRACE.csv.gz... [--provision-s 30] [--capacity 4]

Each trace's demand, a sample a second after ten minutes, gives a family by scaling its deviation from the mean; the
cheapest (lambda, rho) whose share of session time without room stays within bounds wins its level. Prints the table
in the form that `orchestrator/autoscaling.py` holds.
"""

from __future__ import annotations

import argparse

import numpy as np

from turboserve.orchestrator.autoscaling import LEVELS
from turboserve.orchestrator.load_replay import profile_levels
from turboserve.sim.events import US
from turboserve.sim.trace import demand, periods, read_trace


def samples(path: str, skip_s: int = 600) -> np.ndarray:
    """Active sessions at each whole second."""
    trace = read_trace(path)
    found = demand(trace)
    seconds = np.arange(skip_s, trace.horizon_us // US) * US
    return found.count[np.searchsorted(found.time_us, seconds, side="right") - 1].astype(float)


def period_s(path: str) -> float:
    """Mean active period."""
    starts_s, ends_s = periods(read_trace(path))
    return float((ends_s - starts_s).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+")
    parser.add_argument("--provision-s", type=int, default=30)
    parser.add_argument("--capacity", type=float, default=4.0)
    arguments = parser.parse_args()
    bases = [(samples(path), period_s(path)) for path in arguments.traces]
    bounds = tuple(level.above for level in LEVELS)
    for level in profile_levels(bases, arguments.provision_s, arguments.capacity, bounds):
        print(f"    Level({level.above:.2f}, {level.price:.1f}, {level.rho:.1f}),")


if __name__ == "__main__":
    main()
