"""Synthetic traces from a seed: sessions that alternate active and idle periods, under a chosen arrival
curve.

Nothing here was recorded anywhere. Shapes follow what public traces of interactive services show (lognormal
bodies, heavy tails, arrivals that swing), so that policies can be tried where real windows say nothing.

Arrival curves, all with the same mean rate:
  steady     a Poisson process
  modulated  a Poisson process whose rate jumps between two levels (MMPP), about every 5 minutes
  diurnal    one day's sine squeezed into the window
  flash      a crowd: the rate jumps to six times within half a minute and decays over ten minutes
`swing` scales the curve's deviation from its mean, which makes the volatility family of `volatility_family`. Rates are
cut at 0 and the mean is kept, so a large swing deviates by less than it is called: at 2.0, in an hour's window, diurnal
(cut above 1.43) deviates by 1.72 times, modulated by 1.37 to 2.0 times with the seed, flash by 2.0 (less in a shorter
window); steady has no deviation to scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from turboserve.errors import ConfigError, TraceError
from turboserve.sim.events import US
from turboserve.sim.trace import ACTIVE, ARRIVE, CHUNKS_IN_ALL_MAX, DEPART, IDLE, TIME_MAX_S, Trace

RATE_STEP_S = 1.0
FAMILY_FACTORS = tuple(round(0.2 * k, 1) for k in range(1, 11))
LONGEST_PERIOD_S = 3600.0
PARETO_ALPHA = 1.6
"""Tail exponent of heavy-tailed periods: finite mean, infinite variance (before the cut at an hour)."""
LOGNORMAL_SIGMA = 0.9
"""Of period lengths at tail 1; p99 / p50 is then about 8."""
Z99 = 2.326

MOST = {
    "horizon_s": float(TIME_MAX_S),
    "mean_active": 1e6,
    "active_s_mean": float(TIME_MAX_S),
    "idle_s_mean": float(TIME_MAX_S),
    "tail": 1e6,
}
"""Largest values of a workload; beyond them nothing sensible is drawn, or memory ends."""
PERIODS_MAX = 10_000
SWING_MAX = 1000
LOAD_MAX = 1e9
DRAWN_PERIODS_MAX = 3_000_000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Workload:
    """What to draw. Means are in seconds of video (active) or of waiting (idle)."""

    kind: str = "steady"
    horizon_s: float = 3600.0
    mean_active: float = 40.0
    """Sessions active at once, on average, once the window has filled."""
    active_s_mean: float = 30.0
    idle_s_mean: float = 60.0
    periods_mean: float = 3.5
    lengths: str = "lognormal"  # or pareto
    tail: float = 1.0
    """Factor on p99 / p50 of the period lengths; the mean stays (lognormal only)."""
    swing: float = 1.0
    tenant_loads: tuple[float, ...] = (1.0,)
    """Relative load of each tenant; more than one gives the trace a tenant column."""
    seed: int = 0


def generate(workload: Workload) -> Trace:
    """The trace of a workload; equal workloads give equal traces."""
    check(workload)
    # A generator each: more arrivals must not shift the lengths that sessions draw.
    arrivals_rng, lengths_rng, tenant_rng, curve_rng = (
        np.random.default_rng([workload.seed, stream]) for stream in range(4)
    )
    rate = workload.mean_active / (workload.periods_mean * workload.active_s_mean)
    curve = CURVES[workload.kind](workload.horizon_s, curve_rng)
    arrive_s = draw_arrivals(rate * swung(curve, workload.swing), arrivals_rng)

    def life() -> tuple[Floats, Floats]:
        periods = int(lengths_rng.geometric(1 / workload.periods_mean))
        active = draw_lengths(workload, workload.active_s_mean, periods, lengths_rng)
        return active, draw_lengths(workload, workload.idle_s_mean, periods - 1, lengths_rng)

    lives = [life() for _ in range(arrive_s.size)]
    loads = np.array(workload.tenant_loads)
    tenants = tenant_rng.choice(loads.size, size=arrive_s.size, p=loads / loads.sum())
    name = f"synthetic_{workload.kind}_s{workload.seed}"
    return assemble(name, arrive_s, lives, workload.horizon_s, tenants, loads.size)


def volatility_family(base: Workload, factors: tuple[float, ...] = FAMILY_FACTORS) -> list[Trace]:
    """Ten traces of growing volatility: the deviation of the base's arrival curve scaled by 0.2 to 2.0, before rates
    are cut at 0 (see above: the last ones reach less)."""
    return [generate(replace(base, swing=base.swing * factor)) for factor in factors]


def rescaled(base: Trace, factor: float, seed: int, *, bin_s: float = 60.0) -> Trace:
    """A trace like `base` with `factor` times its deviation (less where rates are cut at 0): arrivals drawn anew,
    lives drawn from its sessions.

    The arrival curve is the base's count of arrivals per bin. Correlation between load and life is lost.
    """
    lives = session_lives(base)
    if not lives or base.horizon_us < US:
        raise TraceError(
            f"{base.name} has {len(lives)} sessions with an active period in {base.horizon_us / US:g} s",
            expected="a base of at least one active period and one second",
        )
    arrivals_rng, lives_rng = (np.random.default_rng([seed, stream]) for stream in range(2))
    horizon_s = base.horizon_us / US
    arrive_s = base.time_us[base.event == ARRIVE] / US
    bins = max(1, math.ceil(horizon_s / bin_s))
    per_second = np.histogram(arrive_s, bins=bins, range=(0, bins * bin_s))[0] / bin_s
    per_step = np.repeat(per_second, round(bin_s / RATE_STEP_S))[: math.ceil(horizon_s / RATE_STEP_S)]
    mean = per_step.mean()
    drawn_s = draw_arrivals(mean * swung(per_step / mean, factor), arrivals_rng)
    picked = lives_rng.integers(0, len(lives), drawn_s.size)
    return assemble(
        f"{base.name}_x{factor:g}", drawn_s, [lives[i] for i in picked], horizon_s, np.zeros(drawn_s.size, np.int64), 1
    )


def check(workload: Workload) -> None:
    """Refuse what cannot be drawn."""
    if workload.kind not in CURVES:
        raise ConfigError(f"no arrival curve {workload.kind!r}", expected=" | ".join(CURVES))
    if workload.lengths not in ("lognormal", "pareto"):
        raise ConfigError(f"no length law {workload.lengths!r}", expected="lognormal | pareto")
    # Not a number fails every comparison, so each asks for what is right.
    for name, most in MOST.items():
        if not 0 < getattr(workload, name) <= most:
            raise ConfigError(f"{name} is {getattr(workload, name)}", expected=f"a number above 0, at most {most:g}")
    if not 1 <= workload.periods_mean <= PERIODS_MAX:
        raise ConfigError(
            f"periods_mean is {workload.periods_mean}", expected=f"at least 1 period a session, at most {PERIODS_MAX}"
        )
    if not 0 <= workload.swing <= SWING_MAX:
        raise ConfigError(f"swing is {workload.swing}", expected=f"a number from 0 to {SWING_MAX}")
    if not workload.tenant_loads or not all(0 < load <= LOAD_MAX for load in workload.tenant_loads):
        loads = ",".join(f"{load:g}" for load in workload.tenant_loads)
        raise ConfigError(f"tenant loads {loads}", expected=f"numbers above 0, at most {LOAD_MAX:g}")
    chunks = workload.mean_active * workload.horizon_s
    for what, count, most in (
        ("chunks", chunks, CHUNKS_IN_ALL_MAX),
        ("active periods", chunks / workload.active_s_mean, DRAWN_PERIODS_MAX),
    ):
        if count > most:
            raise ConfigError(
                f"about {count:.3g} {what} would be drawn",
                expected=f"at most {most}",
                hint="ask for fewer sessions at once, longer periods or a shorter window",
            )


# Arrival curves: one value a second, mean 1.


def _steady(horizon_s: float, rng: np.random.Generator) -> Floats:
    return np.ones(math.ceil(horizon_s / RATE_STEP_S))


def _modulated(horizon_s: float, rng: np.random.Generator) -> Floats:
    levels: list[Floats] = []
    total, high = 0, bool(rng.integers(2))
    while total < horizon_s:
        steps = max(1, int(rng.exponential(300.0)))
        levels.append(np.full(steps, 1.6 if high else 0.4))
        total, high = total + steps, not high
    return _mean_one(np.concatenate(levels)[: math.ceil(horizon_s)])


def _diurnal(horizon_s: float, rng: np.random.Generator) -> Floats:
    time = np.arange(math.ceil(horizon_s / RATE_STEP_S)) / horizon_s
    return 1 - 0.7 * np.cos(2 * np.pi * time)


def _flash(horizon_s: float, rng: np.random.Generator) -> Floats:
    time_s = np.arange(math.ceil(horizon_s / RATE_STEP_S)) * RATE_STEP_S
    begin_s = rng.uniform(0.4, 0.6) * horizon_s
    since_s = time_s - begin_s
    crowd = np.where(since_s < 0, 0.0, np.minimum(since_s / 30.0, 1.0) * np.exp(-np.maximum(since_s - 30.0, 0) / 600.0))
    return _mean_one(1 + 5 * crowd)


def _mean_one(curve: Floats) -> Floats:
    return curve / curve.mean()


CURVES: dict[str, Callable[[float, np.random.Generator], Floats]] = {
    "steady": _steady,
    "modulated": _modulated,
    "diurnal": _diurnal,
    "flash": _flash,
}


def swung(curve: Floats, swing: float) -> Floats:
    """The curve with `swing` times its deviation from 1; rates stay at 0 or above and the mean stays."""
    return _mean_one(np.maximum(0.0, 1 + swing * (curve - 1)))


def draw_arrivals(rate_per_s: Floats, rng: np.random.Generator) -> Floats:
    """Arrival times of a Poisson process with one rate a second."""
    counts = rng.poisson(rate_per_s * RATE_STEP_S)
    return np.sort(
        np.repeat(np.arange(rate_per_s.size) * RATE_STEP_S, counts) + rng.uniform(0, RATE_STEP_S, counts.sum())
    )


def draw_lengths(workload: Workload, mean_s: float, count: int, rng: np.random.Generator) -> Floats:
    """Lengths in seconds with the given mean (before the cut at LONGEST_PERIOD_S)."""
    if workload.lengths == "pareto":
        scale = mean_s * (PARETO_ALPHA - 1)
        return np.minimum(scale * rng.pareto(PARETO_ALPHA, count), LONGEST_PERIOD_S)
    sigma = max(0.0, LOGNORMAL_SIGMA + math.log(workload.tail) / Z99)
    return np.minimum(rng.lognormal(math.log(mean_s) - sigma**2 / 2, sigma, count), LONGEST_PERIOD_S)


def session_lives(trace: Trace) -> list[tuple[Floats, Floats]]:
    """Per session of a trace: lengths of its active periods and of the pauses between them, in seconds."""
    active: list[list[float]] = [[] for _ in trace.session_ids]
    idle: list[list[float]] = [[] for _ in trace.session_ids]
    ended_us: dict[int, int] = {}
    columns = zip(
        trace.session.tolist(), trace.event.tolist(), trace.time_us.tolist(), trace.chunks.tolist(), strict=True
    )
    for session, event, time_us, chunks in columns:
        if event == ACTIVE:
            if session in ended_us:
                idle[session].append((time_us - ended_us.pop(session)) / US)
            active[session].append(float(chunks))
        elif event == IDLE:
            ended_us[session] = time_us
    return [(np.array(a), np.array(i)) for a, i in zip(active, idle, strict=True) if a]


def assemble(
    name: str,
    arrive_s: Floats,
    lives: list[tuple[Floats, Floats]],
    horizon_s: float,
    tenants: npt.NDArray[np.int64],
    tenant_count: int,
) -> Trace:
    """Sessions as a trace: whole chunks of a second, milliseconds, everything open at the horizon closed
    there."""
    end_us = round(horizon_s * 1000) * (US // 1000)
    events: list[tuple[int, int, int, int]] = []  # time, session, event, chunks
    for session, (begin_s, (active_s, idle_s)) in enumerate(zip(arrive_s.tolist(), lives, strict=True)):
        now_us = min(round(begin_s * 1000) * (US // 1000), end_us - US // 1000)
        events.append((now_us, session, ARRIVE, 0))
        for number, length_s in enumerate(active_s.tolist()):
            chunks = min(max(1, math.ceil(length_s)), -(-(end_us - now_us) // US))
            events.append((now_us, session, ACTIVE, chunks))
            now_us = min(now_us + chunks * US, end_us)
            if now_us >= end_us or number == len(active_s) - 1:
                break
            pause_us = max(1, round(idle_s[number] * 1000)) * (US // 1000)
            events.append((now_us, session, IDLE, 0))
            now_us = min(now_us + pause_us, end_us)
            if now_us >= end_us:
                break
        events.append((now_us, session, DEPART, 0))
    # Stable by time: a session's own events keep their order.
    order = sorted(range(len(events)), key=lambda i: events[i][0])
    columns = np.array([events[i] for i in order], np.int64).reshape(-1, 4)
    return Trace(
        name=name,
        time_us=columns[:, 0],
        session=columns[:, 1],
        event=columns[:, 2].astype(np.int8),
        chunks=columns[:, 3],
        session_ids=tuple(f"s{i:05d}" for i in range(len(lives))),
        tenant=tenants.astype(np.int64),
        tenants=tuple(f"t{i}" for i in range(tenant_count)) if tenant_count > 1 else ("default",),
    )
