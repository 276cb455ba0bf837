"""Static least-loaded with free re-placement: a fixed fleet; idle sessions go to host memory and resume
anywhere.

Source: TurboServe_base (arXiv 2606.19271), the paper's runtime without its two controllers: coalescing,
offload, lifecycle. What resumes alone can balance, this policy balances; nothing is ever migrated.
"""

from __future__ import annotations

from turboserve.sim.policies.fleet import FleetPolicy


class StaticLeastResume(FleetPolicy):
    """Every arrival and every resume to the worker with the fewest active sessions."""

    name = "static-least-resume"
    scales = False

    def __init__(self) -> None:
        super().__init__(scaling=False)
