"""A recorded demand series replayed against the autoscaling rule: no sessions, only counts, a second at a time.

Used offline, to profile (lambda, rho) per volatility level over a family of segments, and online, to refine lambda on
what was seen last. The replay knows the provisioning delay and the hold; its two answers are the bill and the share of
session time without room, which is what slack and brownout have to carry.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numba import njit

from turboserve.orchestrator import autoscaling
from turboserve.orchestrator.autoscaling import ScaleMemory, target_workers
from turboserve.orchestrator.demand import GROWTH_S, SAMPLES_MAX, WINDOW_S, Demand, predict
from turboserve.orchestrator.view import Floats

# Share of session time without room that the replay may show. Playout slack carries a good part of it; of the rest a
# session too many costs about two chunks of two denoise steps for each of its own. 2 % of chunks may be reduced.
EXCESS_SHARE_MAX = 0.01
REDUCED_SHARE_MAX = 0.01  # of chunks, as it really was lately
REFINE_EVERY_S = 60.0
REFINE_AFTER_S = 300.0
REFINE_SAMPLES = 900
SIGMA_SCALE_MAX = 3.0
OVER_WEIGHT_S = 30.0
PRICE_STEPS = (0.7, 1.0, 1.4)  # tried around the factor in use
PRICE_FACTOR_MIN, PRICE_FACTOR_MAX = 0.4, 12.0


@njit(cache=True)
def replay(
    samples: Floats,
    delay_s: int,
    capacity: float,
    price: float,
    rho: float,
    hold_s: int,
    sigma_scale: float,
    skip_s: int,
) -> tuple[float, float, float]:
    """(worker-seconds billed, share of session time without room, spread of the forecast error over sqrt(forecast)).

    The first `skip_s` samples warm the rule up and count for nothing.
    """
    n = len(samples)
    targets = np.zeros(n, np.int64)
    fleet = np.zeros(n, np.int64)
    expected = np.zeros(n)
    bill = 0.0
    without_room = 0.0
    session_time = 0.0
    error = 0.0
    errors = 0
    total = 0.0
    for t in range(n):
        total += samples[t]
        if t >= WINDOW_S:
            total -= samples[t - WINDOW_S]
        mean = total / min(WINDOW_S, t + 1)
        sigma = 0.0
        expected[t] = samples[t]
        if delay_s > 0:
            expected[t], sigma, _ = predict(samples[t], mean, samples[max(0, t - GROWTH_S)], float(delay_s))
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
            gap = samples[t] - expected[t - delay_s]
            # Too much expected: it shows that demand is wild, but says less the further ahead one looks.
            weight = 1.0 if gap > 0.0 else min(1.0, OVER_WEIGHT_S / max(1, delay_s))
            error += weight * gap * gap / max(1.0, expected[t - delay_s])
            errors += 1
    spread = np.sqrt(error / errors) if errors > 0 else 1.0
    return bill, without_room / max(1.0, session_time), spread


def refine(
    memory: ScaleMemory, demand: Demand, delay_s: float, capacity: float, reduced_share: float | None, now_s: float
) -> ScaleMemory:
    """Replay the samples with several prices; the cheapest that keeps the excess in bounds replaces the one in use.

    `reduced_share` is what really happened (share of chunks with fewer denoise steps); a factor that looks cheap in
    the replay is not taken while reality is over its budget. The change takes effect with the next decision.
    """
    if demand.count < REFINE_AFTER_S or delay_s <= 0:
        return replace(memory, refined_s=now_s)
    samples = demand.samples[SAMPLES_MAX - min(demand.count, REFINE_SAMPLES) :]
    skip = min(120, len(samples) // 4)
    delay, hold = round(delay_s), round(autoscaling.hold_s(delay_s))
    level = autoscaling.level_of(memory.sigma_scale / max(1.0, float(samples[-WINDOW_S:].mean())) ** 0.5)
    rho = autoscaling.rho_for(level, delay_s)
    factors = [min(PRICE_FACTOR_MAX, max(PRICE_FACTOR_MIN, memory.price_factor * step)) for step in PRICE_STEPS]
    best, best_bill, spread = factors[-1], np.inf, memory.sigma_scale
    for factor in factors:
        bill, excess, spread = replay(
            samples, delay, capacity, level.price * factor, rho, hold, memory.sigma_scale, skip
        )
        if excess <= EXCESS_SHARE_MAX and bill < best_bill:
            best, best_bill = factor, bill
    if reduced_share is not None and reduced_share > REDUCED_SHARE_MAX:
        best = factors[-1]
    scale = 0.7 * memory.sigma_scale + 0.3 * min(SIGMA_SCALE_MAX, max(0.7, float(spread)))
    return replace(memory, price_factor=best, sigma_scale=scale, refined_s=now_s)


def family(
    base: Floats, scales: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
) -> list[Floats]:
    """Segments of growing volatility: the base with its deviation from the mean scaled, never below zero."""
    mean = float(base.mean())
    return [np.maximum(0.0, np.round(mean + scale * (base - mean))) for scale in scales]


def profile_levels(
    bases: list[Floats], delay_s: int, capacity: float, bounds: tuple[float, ...]
) -> tuple[autoscaling.Level, ...]:
    """(lambda, rho) per level: cheapest over the family's segments that fall into it, within the excess allowed.

    Lambda may only rise and rho only fall with volatility, so that a level with few segments cannot undercut.
    """
    grid = [(price, rho) for price in (4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 40.0) for rho in (0.8, 0.9, 1.0, 1.1, 1.5)]
    by_level: dict[int, list[Floats]] = {i: [] for i in range(len(bounds))}
    hold = round(autoscaling.hold_s(delay_s))
    for base in bases:
        for segment in family(base):
            spread = replay(segment, delay_s, capacity, 12.0, 1.0, hold, autoscaling.SIGMA_SCALE, 120)[2]
            volatility = spread / max(1.0, float(segment.mean())) ** 0.5
            by_level[max(i for i, b in enumerate(bounds) if volatility >= b)].append(segment)
    found: list[autoscaling.Level] = []
    price_min, rho_max = 0.0, np.inf
    for i, above in enumerate(bounds):
        best: tuple[float, float, float] | None = None
        for price, rho in grid:
            if price < price_min or rho > rho_max or not by_level[i]:
                continue
            results = [
                (replay(s, delay_s, capacity, price, rho, hold, autoscaling.SIGMA_SCALE, 120), float(s.sum()))
                for s in by_level[i]
            ]
            bill = sum(r[0][0] / max(1.0, r[1]) for r in results)
            excess = float(np.mean([r[0][1] for r in results]))
            if excess <= EXCESS_SHARE_MAX and (best is None or bill < best[0]):
                best = (bill, price, rho)
        if best is None:
            best = (0.0, max(price_min, grid[-1][0]), min(rho_max, 1.0))
        price_min, rho_max = best[1], best[2]
        found.append(autoscaling.Level(above, best[1], best[2]))
    return tuple(found)
