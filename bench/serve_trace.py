"""From a trace to what a load generator does: a window of it, faster, thinner, as one plan for each session.

Faster by `speed` means: every time is divided by it, and so is every period's length (rounded to whole seconds of
video, one at least), so that demand keeps its shape and a ten-minute window fits into one. The scaled trace is a trace
again; the simulator runs on the same file.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from turboserve.errors import ConfigError
from turboserve.sim.events import US
from turboserve.sim.trace import ACTIVE, ARRIVE, DEPART, IDLE, Trace


@dataclass(frozen=True, slots=True)
class PeriodPlan:
    """From `start_s` on, `chunks` chunks are wanted."""

    start_s: float
    chunks: int


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """What one viewer does; times are seconds from the start of the load."""

    session_id: str
    arrive_s: float
    periods: tuple[PeriodPlan, ...]
    depart_s: float


def scaled(
    trace: Trace,
    *,
    speed: float = 1.0,
    from_s: float = 0.0,
    length_s: float | None = None,
    keep: float = 1.0,
    active_max: int | None = None,
    seed: int = 0,
) -> Trace:
    """The sessions that arrive in [from_s, from_s + length_s) of the trace, `keep` of them, `speed` times as fast.

    `active_max` leaves out sessions with which more than so many would nominally be active at once. Whoever is not
    gone at the end of the window departs there.
    """
    end_s = trace.horizon_us / US if length_s is None else from_s + length_s
    rng = random.Random(seed)
    rows: list[tuple[int, int, int, int]] = []  # time_us, session, event, chunks
    names: list[str] = []
    load = np.zeros(max(1, int((end_s - from_s) / speed) + 2), np.int64)
    for number in _in_order_of_arrival(trace):
        events = np.flatnonzero(trace.session == number)
        arrive_s = trace.time_us[events[0]] / US
        if not from_s <= arrive_s < end_s or rng.random() >= keep:
            continue
        mine = []
        busy = []
        for at in events.tolist():
            time_s = min(trace.time_us[at] / US, end_s)
            if trace.time_us[at] / US >= end_s and trace.event[at] == ACTIVE:
                break
            chunks = max(1, round(int(trace.chunks[at]) / speed)) if trace.event[at] == ACTIVE else 0
            start_s = (time_s - from_s) / speed
            mine.append((round(start_s * 1000) * 1000, len(names), int(trace.event[at]), chunks))
            if chunks:
                busy.append((int(start_s), int(start_s + chunks) + 1))
        if not any(event == ACTIVE for _, _, event, _ in mine):
            continue
        if active_max is not None:
            with_it = load.copy()
            for first, last in busy:
                with_it[first:last] += 1
            if with_it.max() > active_max:
                continue
            load = with_it
        if mine[-1][2] != DEPART:
            mine.append((round((end_s - from_s) / speed * 1000) * 1000, len(names), DEPART, 0))
        rows += mine
        names.append(trace.session_ids[number])
    if not rows:
        raise ConfigError(f"no session of {trace.name} is left", hint="take a longer window, or keep more of it")
    rows.sort(key=lambda row: row[0])
    times, sessions, events_, chunks_ = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    return Trace(
        name=f"{trace.name}-x{speed:g}",
        time_us=times,
        session=sessions,
        event=events_.astype(np.int8),
        chunks=chunks_,
        session_ids=tuple(names),
        tenant=np.zeros(len(names), np.int64),
    )


def _in_order_of_arrival(trace: Trace) -> list[int]:
    return [int(number) for number, event in zip(trace.session, trace.event, strict=True) if event == ARRIVE]


def plans(trace: Trace, chunk_s: float) -> list[SessionPlan]:
    """One plan a session, by arrival; `chunk_s` is the wall-clock length of a chunk."""
    counts = trace.chunk_counts(chunk_s)
    arrive: dict[int, float] = {}
    depart: dict[int, float] = {}
    periods: dict[int, list[PeriodPlan]] = {}
    for at, (time_us, session, event) in enumerate(
        zip(trace.time_us.tolist(), trace.session.tolist(), trace.event.tolist(), strict=True)
    ):
        time_s = time_us / US
        if event == ARRIVE:
            arrive[session] = time_s
        elif event == ACTIVE:
            periods.setdefault(session, []).append(PeriodPlan(time_s, int(counts[at])))
        elif event != IDLE:
            depart[session] = time_s
    return [
        SessionPlan(
            trace.session_ids[session],
            arrive[session],
            tuple(periods.get(session, ())),
            depart.get(session, trace.horizon_us / US),
        )
        for session in sorted(arrive, key=lambda one: (arrive[one], one))
    ]
