"""How many workers to hold.

The target for the moment `provision_s` ahead is the smallest fleet that satisfies two things:

- load: forecast <= capacity * rho * fleet (`rho` = utilisation aimed at; above 1 the playout slack and, where allowed,
  fewer denoise steps carry the rest);
- price: one worker more would spare less than 1/lambda sessions without room. `lambda` is the price of latency in
  workers per session that finds its worker full; the sessions without room are the mean excess of a normal forecast.

Both depend on the volatility level. Levels, lambda and rho are profiled offline over a family of segments made by
scaling a base trace's deviation (`load_replay.profile_levels`). Online the spread is refined by the service that was
given: the share of chunks with fewer denoise steps is led to an aim (`refine`). Replaying what was seen and taking the
price or the spread that would have served it best was tried first and costs more at equal service: a burst in the last
quarter of an hour says little about the next.

Growing is immediate. Shrinking waits until the target has stayed below for `hold_s` (a part of the provisioning delay,
for that is what starting a worker again would be billed: ski rental), and until what is left has room for everybody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from numba import njit

from turboserve.orchestrator.service import LATE_SHARE

SIGMA_SCALE_MIN, SIGMA_SCALE_MAX = 0.6, 3.2
REFINE_EVERY_S = 60.0
GROW_GAIN, SHRINK_GAIN = 0.03, 0.025  # a refinement, as powers of e, at twice the share aimed at and at none
HOLD_SHARE = 0.5  # of the provisioning delay
PROFILED_DELAY_S, PROFILED_CAPACITY = 30.0, 4.0
HOLD_MIN_S, HOLD_MAX_S = 3.0, 20.0
LATE_HOLD_S, LATE_HOLD_MAX_S = 300.0, 1800.0  # the first at twice LATE_SHARE; HPA keeps as long whatever comes
INV_SQRT_TWO_PI = 1.0 / math.sqrt(2.0 * math.pi)


@dataclass(frozen=True, slots=True)
class Level:
    """What is used from volatility `above` upwards (spread of the forecast error over the forecast)."""

    above: float
    price: float  # lambda
    rho: float


# Profiled by bench/orchestrator/profile_levels.py over five of the shared windows (mooncake_chat_q25, gentd_stack3,
# azure_conv_p15, gentd_surge, hyb_r1_trough) at a delay of 30 s and capacity 4.
LEVELS = (
    Level(0.00, 1.2, 1.0),
    Level(0.10, 2.5, 1.0),
    Level(0.20, 5.0, 0.9),
    Level(0.35, 6.0, 0.9),
)


@dataclass(frozen=True, slots=True)
class ScaleMemory:
    """`recent`: (time, target) with falling targets, so that the first entry is the largest within the hold."""

    recent: tuple[tuple[float, int], ...] = ()
    began_s: float | None = None  # first target noted: nothing shrinks before a whole hold has been seen
    sigma_scale: float = 1.0  # times the forecast's spread; refined online
    refined_s: float = 0.0


def level_of(volatility: float, levels: tuple[Level, ...] = LEVELS) -> Level:
    """The level that holds at this volatility."""
    found = levels[0]
    for level in levels:
        if volatility >= level.above:
            found = level
    return found


def price_for(level: Level, capacity: float) -> float:
    """The level's lambda for workers of another capacity: what a session's room costs is 1/capacity of a worker, so the
    same share of sessions is left without room."""
    return level.price * PROFILED_CAPACITY / capacity


def rho_for(level: Level, provision_s: float) -> float:
    """The level's rho holds from the delay it was profiled at; with no delay there is nothing to keep room for."""
    return 1.0 - (1.0 - level.rho) * min(1.0, max(0.0, provision_s) / PROFILED_DELAY_S)


def remember(memory: ScaleMemory, target: int, now_s: float, hold_s: float) -> ScaleMemory:
    """Note a target; the largest of the last `hold_s` then is `memory.recent[0]`."""
    kept = [(t, n) for t, n in memory.recent if t > now_s - hold_s and n > target]
    return replace(memory, recent=(*kept, (now_s, target)), began_s=now_s if memory.began_s is None else memory.began_s)


def may_shrink(memory: ScaleMemory, now_s: float, hold_s: float) -> bool:
    """Whether targets have been watched for a whole hold."""
    return memory.began_s is not None and now_s - memory.began_s >= hold_s


def hold_s(provision_s: float) -> float:
    """How long a lower target must last before the fleet shrinks."""
    return min(HOLD_MAX_S, max(HOLD_MIN_S, HOLD_SHARE * provision_s))


def crowd_hold_s(late_share: float, crowds: int) -> float:
    """How long the room that a crowd took is kept for the next one: not at all, unless viewers were late lately, as
    they are where crowds come again and again and the workers were given back each time. Twice as long with each crowd
    that still came too late for it."""
    if late_share <= LATE_SHARE:
        return 0.0
    kept_s = LATE_HOLD_S * min(1.0, late_share / LATE_SHARE - 1.0)
    return min(LATE_HOLD_MAX_S, kept_s * 2.0 ** min(10, max(0, crowds - 1)))


def refine(memory: ScaleMemory, pressure: float, now_s: float) -> ScaleMemory:
    """The spread to reckon with follows the service that was given.

    `pressure`: share of chunks lately reduced (or late) over the share aimed at. Above 1 the spread grows, below it
    shrinks, slowly: what one burst did to the service is no reason to pay for the next half hour.
    """
    over = pressure - 1.0
    step = GROW_GAIN * min(1.0, over) if over > 0.0 else SHRINK_GAIN * max(-1.0, over)
    scale = min(SIGMA_SCALE_MAX, max(SIGMA_SCALE_MIN, memory.sigma_scale * math.exp(step)))
    return replace(memory, sigma_scale=scale, refined_s=now_s)


@njit(cache=True)
def mean_excess(room: float, mean: float, sigma: float) -> float:
    """Expected sessions beyond `room` when the count is normal."""
    if sigma <= 0.0:
        return max(0.0, mean - room)
    z = (room - mean) / sigma
    tail = 0.5 * math.erfc(z / math.sqrt(2.0))
    return sigma * (math.exp(-0.5 * z * z) * INV_SQRT_TWO_PI - z * tail)


@njit(cache=True)
def target_workers(mean: float, sigma: float, capacity: float, price: float, rho: float) -> int:
    """Smallest fleet by load and price; at least one."""
    fleet = max(1, math.ceil(mean / (capacity * rho) - 1e-9))
    spare = mean_excess(capacity * fleet, mean, sigma)
    while True:
        more = mean_excess(capacity * (fleet + 1), mean, sigma)
        if price * (spare - more) <= 1.0:
            return fleet
        fleet += 1
        spare = more
