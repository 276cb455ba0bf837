"""A recorded demand series replayed against the autoscaling rule: no sessions, only counts, a second at a time.

Used offline, to profile (lambda, rho) per volatility level over a family of segments. The replay knows the provisioning
delay and the hold; its answers are the bill, the share of session time without room, which is what slack and brownout
have to carry, and the spread of the forecast's error.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from turboserve.orchestrator import autoscaling
from turboserve.orchestrator.autoscaling import target_workers
from turboserve.orchestrator.demand import GROWTH_S, WINDOW_S, predict, survivors
from turboserve.orchestrator.view import Floats

# Share of session time without room that a level may show in the replay. Playout slack carries a part of it; of the
# rest a session too many costs about two chunks of fewer denoise steps for each of its own.
EXCESS_SHARE_MAX = 0.005
PRICES = (1.2, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
RHOS = (0.9, 1.0, 1.1)


@njit(cache=True)
def replay(
    samples: Floats,
    delay_s: int,
    surviving: float,
    capacity: float,
    price: float,
    rho: float,
    hold_s: int,
    sigma_scale: float,
    skip_s: int,
) -> tuple[float, float, float]:
    """(worker-seconds billed, share of session time without room, r.m.s. error over the forecast's spread).

    The first `skip_s` samples warm the rule up and count for nothing. `surviving`: `demand.survivors`.
    """
    n = len(samples)
    targets = np.zeros(n, np.int64)
    fleet = np.zeros(n, np.int64)
    expected = np.zeros(n)
    spread = np.ones(n)
    error = 0.0
    errors = 0
    bill = 0.0
    without_room = 0.0
    session_time = 0.0
    total = 0.0
    for t in range(n):
        total += samples[t]
        if t >= WINDOW_S:
            total -= samples[t - WINDOW_S]
        mean = total / min(WINDOW_S, t + 1)
        sigma = 0.0
        expected[t] = samples[t]
        if delay_s > 0:
            expected[t], sigma = predict(samples[t], mean, samples[max(0, t - GROWTH_S)], surviving, float(delay_s))
            spread[t] = sigma
        targets[t] = target_workers(expected[t], sigma * sigma_scale, capacity, price, rho)
        lowest = 0
        for u in range(max(0, t - hold_s), t + 1):
            lowest = max(lowest, targets[u])
        before = fleet[t - 1] if t > 0 else targets[0]
        fleet[t] = max(targets[t], min(before, lowest))
        ready = fleet[t]
        for u in range(max(0, t - delay_s), t):
            ready = min(ready, fleet[u])
        if t < skip_s:
            continue
        bill += fleet[t]
        session_time += samples[t]
        without_room += max(0.0, samples[t] - capacity * ready)
        if t >= delay_s:
            ahead = expected[t - delay_s]
            error += ((samples[t] - ahead) / spread[t - delay_s]) ** 2
            errors += 1
    return bill, without_room / max(1.0, session_time), math.sqrt(error / errors) if errors > 0 else 1.0


def family(
    base: Floats, scales: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
) -> list[Floats]:
    """Segments of growing volatility: the base with its deviation from the mean scaled, never below zero."""
    mean = float(base.mean())
    return [np.maximum(0.0, np.round(mean + scale * (base - mean))) for scale in scales]


def profile_levels(
    bases: list[tuple[Floats, float]], delay_s: int, capacity: float, bounds: tuple[float, ...]
) -> tuple[autoscaling.Level, ...]:
    """(lambda, rho) per level: cheapest over the family's segments that fall into it, within the excess allowed.

    `bases`: demand samples with their mean active period. Each segment is replayed with the spread that it shows, as
    the online refinement would find it. Lambda may only rise and rho only fall with volatility, so that a level with
    few segments cannot undercut.
    """
    hold = round(autoscaling.hold_s(delay_s))
    by_level: dict[int, list[tuple[Floats, float, float]]] = {i: [] for i in range(len(bounds))}
    for base, period_s in bases:
        surviving = survivors(delay_s, period_s)
        for segment in family(base):
            scale = replay(segment, delay_s, surviving, capacity, 4.0, 1.5, hold, 1.0, 120)[2]
            scale = min(autoscaling.SIGMA_SCALE_MAX, max(autoscaling.SIGMA_SCALE_MIN, scale))
            mean = float(segment.mean())
            volatility = scale * predict(mean, mean, mean, surviving, float(delay_s))[1] / max(1.0, mean)
            by_level[max(i for i, b in enumerate(bounds) if volatility >= b)].append((segment, surviving, scale))
    found: list[autoscaling.Level] = []
    price_min, rho_max = 0.0, np.inf
    for i, above in enumerate(bounds):
        best: tuple[float, float, float] | None = None
        for price in PRICES:
            for rho in RHOS:
                if price < price_min or rho > rho_max or not by_level[i]:
                    continue
                bill, excess = 0.0, 0.0
                for segment, surviving, scale in by_level[i]:
                    seconds, without_room, _ = replay(
                        segment, delay_s, surviving, capacity, price, rho, hold, scale, 120
                    )
                    bill += seconds / max(1.0, float(segment.sum()))
                    excess += without_room / len(by_level[i])
                if excess <= EXCESS_SHARE_MAX and (best is None or bill < best[0]):
                    best = (bill, price, rho)
        if best is None:
            best = (0.0, max(price_min, PRICES[-1]), min(rho_max, 1.0))
        price_min, rho_max = best[1], best[2]
        found.append(autoscaling.Level(above, best[1], best[2]))
    return tuple(found)
