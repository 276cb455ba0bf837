"""Recent counts of active sessions -> how many there will be when a worker asked for now is ready.

One sample a second. Of the sessions active now, exp(-delay / mean period) still are after the delay; the others have
gone and been replaced at the rate that keeps the mean of the last minute and a half. So

    expected = survivors * newest count + (1 - survivors) * mean

which leans on the newest count where periods are long against the delay, and on the mean where a chance peak will be
gone before a worker could serve it. Carrying every rise on costs more than it spares, on recorded and on synthetic
windows: what rises for half a minute mostly falls again in the next. Only a rise far outside chance (three times
sqrt(mean): a flash crowd) is believed; the newest count then takes the mean's place and half of its growth goes on.

What is left over is about sqrt(expected), as for independent sessions, and grows with the delay as the level drifts;
how much more or less than that is refined by the service given (`autoscaling.refine`), and is the volatility that
chooses the headroom.

A count of active sessions is a load only while a session makes one chunk a chunk time. The first two chunks of a period
may begin at once, and the last is soon made where there is room: with periods of a few chunks a fleet that has room
sees hardly anybody, gives its workers back, is overrun, and asks for many more. So there the counts are taken times the
chunks begun for each session and chunk time (`Work`). Periods of tens of chunks differ from their counts by less than
chance does, and are left alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numba import njit

from turboserve.orchestrator.view import Floats

SAMPLES_MAX = 1800
WINDOW_S = 90  # of the mean
SURGE_SIGMAS = 3.0  # from here on a rise is believed, fully one sigma further
GROWTH_SHARE = 0.5  # of a surge's growth over the last 30 s, per 30 s of delay, that is carried on
GROWTH_S = 30
WORK_FADE_S = 90.0
SHORT_PERIOD_CHUNKS = 12.0  # mean periods below it are scaled by their work
LATELY_S = 10
# Spread of the error: SPREAD * sqrt(expected * (1 + delay / DRIFT_S)). Fitted at delays of 30 and 120 s to the headroom
# that served the shared and the synthetic windows best.
SPREAD, DRIFT_S = 0.555, 12.0


@dataclass(frozen=True, slots=True)
class Demand:
    """The last `count` samples of active sessions, newest last in `samples`; `next_s` is when the next is due."""

    samples: Floats = field(default_factory=lambda: np.zeros(SAMPLES_MAX))
    count: int = 0
    next_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Active sessions `delay_s` ahead: expected number and the spread of the error."""

    mean: float
    sigma: float


@dataclass(frozen=True, slots=True)
class Work:
    """Chunks begun and seconds of active sessions, both fading; `chunks_seen` is the view's total at the last look."""

    chunks: float = 0.0
    active_s: float = 0.0
    chunks_seen: int = 0
    look_s: float | None = None


def follow(work: Work, chunks: int, active: int, now_s: float) -> Work:
    """Look again: `chunks` begun in all until now, `active` sessions now."""
    if work.look_s is None or chunks < work.chunks_seen:
        return replace(work, chunks_seen=chunks, look_s=now_s)
    since_s = now_s - work.look_s
    kept = math.exp(-since_s / WORK_FADE_S)
    return Work(kept * work.chunks + chunks - work.chunks_seen, kept * work.active_s + since_s * active, chunks, now_s)


def work_factor(work: Work, period_s: float, chunk_s: float, most: float) -> float:
    """Sessions' worth of load for each session counted as active: 1 where the mean period is of some length. `most` is
    that of a session which is in work all the time it is there, alone: chunk target over the time of a batch of one."""
    if period_s >= SHORT_PERIOD_CHUNKS * chunk_s or work.active_s <= 0.0:
        return 1.0
    return max(1.0, min(most, work.chunks * chunk_s / work.active_s))


def largest(demand: Demand, seconds: float) -> float:
    """The largest count of the last `seconds`; 0 of none."""
    look = min(demand.count, int(seconds))
    return float(demand.samples[SAMPLES_MAX - look :].max()) if look > 0 else 0.0


def lately(demand: Demand) -> float:
    """Mean count of the last seconds: of sessions that stay for a few chunks, one count is mostly chance."""
    return float(demand.samples[SAMPLES_MAX - max(1, min(demand.count, LATELY_S)) :].mean())


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


def forecast(demand: Demand, active: float, delay_s: float, period_s: float) -> Forecast:
    """Forecast from the samples and the mean active period; with no delay the newest count is all that matters."""
    if delay_s <= 0 or demand.count == 0:
        return Forecast(float(active), 0.0)
    window = demand.samples[SAMPLES_MAX - min(demand.count, WINDOW_S) :]
    before = float(demand.samples[SAMPLES_MAX - 1 - min(demand.count - 1, GROWTH_S)])
    return Forecast(*predict(float(active), float(window.mean()), before, survivors(delay_s, period_s), delay_s))


def survivors(delay_s: float, period_s: float) -> float:
    """Share of the sessions active now that still are after `delay_s`, for periods without memory."""
    return math.exp(-delay_s / max(1.0, period_s))


@njit(cache=True)
def predict(newest: float, mean: float, before: float, surviving: float, delay_s: float) -> tuple[float, float]:
    """(expected count, its spread) from the newest count, the mean of the window, the count GROWTH_S ago and the share
    surviving."""
    chance = math.sqrt(max(mean, 1.0))
    surge = min(1.0, max(0.0, (newest - mean) / chance - SURGE_SIGMAS))
    level = mean
    if surge > 0.0:
        growth = max(0.0, newest - before - chance)
        level += surge * (newest - mean + GROWTH_SHARE * growth * delay_s / GROWTH_S)
    expected = surviving * newest + (1.0 - surviving) * level
    return expected, SPREAD * math.sqrt(max(expected, 1.0) * (1.0 + delay_s / DRIFT_S))
