"""Our own policy: the tick that the live control loop runs, with its memory kept between calls."""

from __future__ import annotations

from turboserve.orchestrator.plan import Plan
from turboserve.orchestrator.scheduler import DEFAULT, Memory, TickConfig, tick
from turboserve.orchestrator.view import ClusterView


class TurboServe:
    """`orchestrator.scheduler.tick` as a policy of the simulator."""

    name = "turboserve"
    scales = True

    def __init__(self, config: TickConfig = DEFAULT) -> None:
        self.config = config
        self.memory = Memory()

    def decide(self, view: ClusterView, now_s: float) -> Plan:
        plan, self.memory = tick(view, self.memory, now_s, self.config)
        return plan
