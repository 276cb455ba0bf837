"""Recent counts of active sessions -> how many there will be when a worker asked for now is ready.

One sample a second. The forecast for `delay_s` ahead leans on the mean of the last minutes, not on the newest count:
periods are short against the window, so a chance peak is gone before a worker could serve it (over thirteen windows of
real activity, half a minute ahead, a quarter of the newest count and three quarters of the mean has 10 to 20 % less
error than the newest count alone). A rise far outside chance is believed: the weight then moves to the newest count,
and its growth is carried on (a flash crowd). What is left over is about sqrt(mean), as for independent sessions; how
much more than that is measured (`load_replay`), and is the volatility that chooses the headroom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numba import njit

from turboserve.orchestrator.view import Floats

SAMPLES_MAX = 1800
WINDOW_S = 180  # of the mean
NEWEST_SHARE = 0.25  # weight of the newest count while it lies within chance
SURGE_SIGMAS = 1.5  # from here on a rise is believed, fully one sigma further
GROWTH_SHARE = 0.5  # of a surge's growth over the last 30 s, per 30 s of delay, that is carried on
GROWTH_S = 30


@dataclass(frozen=True, slots=True)
class Demand:
    """The last `count` samples of active sessions, newest last in `samples`; `next_s` is when the next is due."""

    samples: Floats = field(default_factory=lambda: np.zeros(SAMPLES_MAX))
    count: int = 0
    next_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Active sessions `delay_s` ahead: expected number and the spread that chance alone gives."""

    mean: float
    sigma: float
    surge: float  # 0: within chance, 1: a rise that is fully believed


def observe(demand: Demand, active: int, now_s: float) -> Demand:
    """Take the samples due until now; seconds that nobody looked at had the count of the last look."""
    if now_s < demand.next_s:
        return demand
    due = 1 if demand.count == 0 else min(SAMPLES_MAX, int(now_s - demand.next_s) + 1)
    samples = np.empty(SAMPLES_MAX)
    samples[:-due] = demand.samples[due:]
    samples[-due:] = demand.samples[-1]
    samples[-1] = active
    return replace(
        demand,
        samples=samples,
        count=min(SAMPLES_MAX, demand.count + due),
        next_s=math.floor(now_s) + 1.0,
    )


def forecast(demand: Demand, active: int, delay_s: float) -> Forecast:
    """Forecast from the samples; with no delay the newest count is all that matters."""
    if delay_s <= 0 or demand.count == 0:
        return Forecast(float(active), 0.0, 0.0)
    window = demand.samples[SAMPLES_MAX - min(demand.count, WINDOW_S) :]
    before = demand.samples[SAMPLES_MAX - 1 - min(demand.count - 1, GROWTH_S)]
    mean, sigma, surge = predict(float(active), float(window.mean()), float(before), delay_s)
    return Forecast(mean, sigma, surge)


@njit(cache=True)
def predict(newest: float, mean: float, before: float, delay_s: float) -> tuple[float, float, float]:
    """(expected count, its spread by chance, how much of a surge) from the newest count, the mean of the window and the
    count GROWTH_S ago."""
    chance = math.sqrt(max(mean, 1.0))
    surge = min(1.0, max(0.0, (newest - mean) / chance - SURGE_SIGMAS))
    weight = NEWEST_SHARE + (1.0 - NEWEST_SHARE) * surge
    expected = weight * newest + (1.0 - weight) * mean
    if surge > 0.0:
        growth = newest - before - chance
        expected += surge * GROWTH_SHARE * max(0.0, growth) * delay_s / GROWTH_S
    return expected, math.sqrt(max(expected, 1.0)), surge
