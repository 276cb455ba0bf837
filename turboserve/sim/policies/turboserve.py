"""Our own policy: the tick that the live control loop runs, with its memory kept between calls."""

from __future__ import annotations

from turboserve.orchestrator.plan import Plan
from turboserve.orchestrator.scheduler import DEFAULT, Memory, TickConfig, tick
from turboserve.orchestrator.view import ClusterView


class TurboServe:
    """`orchestrator.scheduler.tick` as a policy of the simulator. The knobs are those of `TickConfig`: switches for
    ablations (0 = off) and weights."""

    name = "turboserve"
    scales = True

    def __init__(
        self,
        *,
        migrate: float = 1,
        scale: float = 1,
        forecast: float = 1,
        volatility: float = 1,
        slack: float = 1,
        brownout: float = 1,
        eta: float = DEFAULT.eta,
        cooldown_s: float = DEFAULT.cooldown_s,
    ) -> None:
        self.config = TickConfig(
            migrate=bool(migrate),
            scale=bool(scale),
            forecast=bool(forecast),
            volatility=bool(volatility),
            slack=bool(slack),
            brownout=bool(brownout),
            eta=eta,
            cooldown_s=cooldown_s,
        )
        self.memory = Memory()

    def decide(self, view: ClusterView, now_s: float) -> Plan:
        plan, self.memory = tick(view, self.memory, now_s, self.config)
        return plan
