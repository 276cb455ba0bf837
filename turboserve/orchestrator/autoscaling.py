"""How many workers to hold.

The target for the moment `provision_s` ahead is the smallest fleet that satisfies two things:

- load: forecast <= capacity * rho * fleet (`rho` = utilisation aimed at; above 1 the playout slack and, where allowed,
  fewer denoise steps carry the rest);
- price: one worker more would spare less than 1/lambda sessions without room. `lambda` is the price of latency in
  workers per session that finds its worker full; the sessions without room are the mean excess of a normal forecast.

Both depend on the volatility level. Levels, lambda and rho are profiled offline over a family of segments made by
scaling a base trace's deviation (`load_replay.profile_levels`) and refined online by replaying what was seen.

Growing is immediate. Shrinking waits until the target has stayed below for `hold_s` (a part of the provisioning delay,
for that is what starting a worker again would be billed: ski rental), and until what is left has room for everybody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from numba import njit

SIGMA_SCALE = 1.05  # spread of real demand around the forecast over sqrt(mean): median of the shared windows
HOLD_SHARE = 0.5  # of the provisioning delay
PROFILED_DELAY_S = 30.0
HOLD_MIN_S, HOLD_MAX_S = 3.0, 20.0
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
    Level(0.00, 4.0, 0.9),
    Level(0.10, 4.0, 0.9),
    Level(0.20, 8.0, 0.8),
    Level(0.35, 40.0, 0.8),
)


@dataclass(frozen=True, slots=True)
class ScaleMemory:
    """`recent`: (time, target) with falling targets, so that the first entry is the largest within the hold."""

    recent: tuple[tuple[float, int], ...] = ()
    began_s: float | None = None  # first target noted: nothing shrinks before a whole hold has been seen
    price_factor: float = 1.0  # refined online, times the level's price
    sigma_scale: float = SIGMA_SCALE
    refined_s: float = 0.0


def level_of(volatility: float, levels: tuple[Level, ...] = LEVELS) -> Level:
    """The level that holds at this volatility."""
    found = levels[0]
    for level in levels:
        if volatility >= level.above:
            found = level
    return found


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
