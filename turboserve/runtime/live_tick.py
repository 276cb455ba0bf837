"""What a live fleet decides with: the scheduler's tick, and a latency profile until its workers have measured one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from turboserve.orchestrator.latency import LatencyProfile, profile_from_dict
from turboserve.orchestrator.plan import Plan
from turboserve.orchestrator.scheduler import Memory, TickConfig, tick
from turboserve.orchestrator.view import ClusterView
from turboserve.ranges import span
from turboserve.runtime.controller_config import ControllerConfig


def live_profile(config: ControllerConfig) -> LatencyProfile:
    """The latency profile a live fleet is planned with until its workers say what they measured at their start.

    Straight line through (capacity, chunk_target_s): what `capacity` means, and no more than that. With a profile that
    the workers are paced to it is that one, with what of it is an operator's to say.
    """
    if config.paced_profile:
        paced = profile_from_dict(json.loads(Path(config.paced_profile).read_text()), config.paced_profile)
        capacity = min(config.capacity, paced.batch_max)
        return replace(
            paced,
            capacity=capacity,
            resident_max=max(capacity, config.slots),
            chunk_s=config.chunk_s,
            chunk_target_s=config.chunk_target_s,
            denoise_steps_floor=config.steps_floor or paced.denoise_steps,
        )
    return LatencyProfile(
        name=f"{config.model}-live",
        about="line through (capacity, chunk target) until a worker has measured",
        chunk_s=config.chunk_s,
        chunk_target_s=config.chunk_target_s,
        batch_latency_s=tuple(config.chunk_target_s * n / config.capacity for n in range(1, config.slots + 1)),
        capacity=config.capacity,
        resident_max=config.slots,
        denoise_steps=config.denoise_steps,
        denoise_steps_floor=config.steps_floor or config.denoise_steps,
        step_latency_share=0.8,
    )


LIVE_TICK = TickConfig()
"""All of it. A fixed fleet is one whose bounds are equal; a fleet without an arena says so to the logic."""


def decide(view: ClusterView, memory: Memory, now_s: float) -> tuple[Plan, Memory]:
    """The simulator's tick."""
    with span("tick"):
        return tick(view, memory, now_s, LIVE_TICK)
