"""The compiled part of the simulator: from one instant to the next without Python.

Its state is integer columns (whole microseconds), named here. `run` stops at the end of an instant at which something
happened that a decision has to see: a period delivered its last chunk, or a session with a waiting transfer came to
the end of its chunk. Order within an instant: batches end; then the caller (trace events, timers, decision); then free
workers start. Which chunks share a batch is `orchestrator.batching.pick`, compiled from the engine's own source.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from turboserve.orchestrator.batching import pick
from turboserve.sim.events import NEVER_US, US

# Per-session integers, columns of `session`.
WORKER, RUNNING, HOLD, INDEX, PERIOD, DONE, WANTED, ACTIVE_US, RELEASE_US, READY_US, PASSES, STARTED_US, TRACE_ID = (
    range(13)
)
STEPS_BOUND, READY_SINCE = 13, 14
SESSION_FIELDS = 15
# Per-worker integers, columns of `worker`.
NEXT_US, BUSY, MEMBERS, BATCH_N, BATCH, START_US, HEAP_AT, NUMBER = range(8)
WORKER_FIELDS = 8
# Rows of the delivered chunks.
R_SESSION, R_INDEX, R_PERIOD, R_WORKER, R_BATCH, R_N, R_STEPS, R_RELEASE, R_START, R_FINISH, R_READY, R_DEADLINE = (
    range(12)
)
ROW_FIELDS = 12
# Totals.
T_ROWS, T_BATCHES, T_NOTES, T_REDUCED, T_LATE, T_HEAP = range(6)
# Settings.
S_CHUNK, S_START_SLACK, S_TARGET, S_CLOSED, S_PASS, S_STEPS_FULL, S_SEGMENTS, S_BASE, S_SEGMENT, S_CONTEXT_PERMILLE = (
    range(10)
)

PERIOD_OVER, CHUNK_OVER = 0, 1
NEVER = NEVER_US
pick_compiled = njit(cache=True)(pick)


@njit(cache=True)
def _before(worker, a, b):  # type: ignore[no-untyped-def]
    """Whether worker `a` comes first: by time, ends of batches before starts, then by row."""
    ka = 2 * worker[a, NEXT_US] + 1 - worker[a, BUSY]
    kb = 2 * worker[b, NEXT_US] + 1 - worker[b, BUSY]
    return ka < kb or (ka == kb and a < b)


@njit(cache=True)
def sift(heap, worker, size, at):  # type: ignore[no-untyped-def]
    """Restore the heap order around position `at` after that worker's time or state changed."""
    row = heap[at]
    while at > 0:
        up = (at - 1) // 2
        other = heap[up]
        if _before(worker, other, row):
            break
        heap[at] = other
        worker[other, HEAP_AT] = at
        at = up
    while True:
        down = 2 * at + 1
        if down >= size:
            break
        if down + 1 < size and _before(worker, heap[down + 1], heap[down]):
            down += 1
        other = heap[down]
        if _before(worker, row, other):
            break
        heap[at] = other
        worker[other, HEAP_AT] = at
        at = down
    heap[at] = row
    worker[row, HEAP_AT] = at


@njit(cache=True)
def _finish(  # type: ignore[no-untyped-def]
    w, now, session, worker, in_batch, rows, totals, notes, settings, deadline_s, in_chunk
):
    """The batch of worker `w` ends: chunks are delivered, the next ones released."""
    n = worker[w, BATCH_N]
    for k in range(n):
        r = in_batch[w, k]
        s = session[r]
        s[RUNNING] = 0
        if settings[S_PASS]:
            s[PASSES] -= 1
            if s[PASSES] > 0:
                s[READY_US] = now
                continue
        row = rows[totals[T_ROWS]]
        totals[T_ROWS] += 1
        row[R_SESSION] = s[TRACE_ID]
        row[R_INDEX] = s[INDEX]
        row[R_PERIOD] = s[PERIOD]
        row[R_WORKER] = worker[w, NUMBER]
        row[R_BATCH] = worker[w, BATCH]
        row[R_N] = n
        row[R_STEPS] = s[STEPS_BOUND]
        row[R_RELEASE] = s[RELEASE_US]
        row[R_START] = s[STARTED_US]
        row[R_FINISH] = now
        row[R_READY] = s[READY_SINCE]
        if settings[S_CLOSED]:
            due = s[STARTED_US] + settings[S_TARGET]
        else:
            due = s[ACTIVE_US] + settings[S_START_SLACK] + s[DONE] * settings[S_CHUNK]
        row[R_DEADLINE] = due
        if now > due + 2:
            totals[T_LATE] += 1
        if s[STEPS_BOUND] < settings[S_STEPS_FULL]:
            totals[T_REDUCED] += 1
        in_chunk[r] = False
        s[INDEX] += 1
        s[DONE] += 1
        over = s[DONE] == s[WANTED]
        if over:
            s[READY_US] = NEVER
            deadline_s[r] = np.inf
        elif settings[S_CLOSED]:
            s[RELEASE_US] = now
            s[READY_US] = now
            deadline_s[r] = (now + settings[S_TARGET]) / US
        else:
            s[RELEASE_US] = s[ACTIVE_US] + max(0, s[DONE] - 1) * settings[S_CHUNK]
            s[READY_US] = max(s[RELEASE_US], now)
            deadline_s[r] = (due + settings[S_CHUNK]) / US
        if over or s[HOLD]:
            notes[totals[T_NOTES], 0] = r
            notes[totals[T_NOTES], 1] = PERIOD_OVER if over else CHUNK_OVER
            totals[T_NOTES] += 1
    worker[w, BUSY] = 0
    worker[w, BATCH_N] = 0
    worker[w, NEXT_US] = now


@njit(cache=True)
def _start(  # type: ignore[no-untyped-def]
    w, now, session, worker, members, in_batch, totals, duration_us, settings, steps, deadline_s, in_chunk, busy_until_s
):
    """Worker `w` is free: one batch of what is ready, else sleep until the next release."""
    count = worker[w, MEMBERS]
    ready = np.empty(count, np.int64)
    due = np.empty(count)
    n_ready = 0
    nearest = NEVER
    for k in range(count):
        r = members[w, k]
        s = session[r]
        if s[HOLD] and s[PASSES] == 0:
            continue
        if s[READY_US] <= now:
            at = n_ready  # insertion by (deadline, session number)
            while at > 0 and (due[at - 1], session[ready[at - 1], TRACE_ID]) > (deadline_s[r], s[TRACE_ID]):
                due[at] = due[at - 1]
                ready[at] = ready[at - 1]
                at -= 1
            due[at] = deadline_s[r]
            ready[at] = r
            n_ready += 1
        elif s[READY_US] < nearest:
            nearest = s[READY_US]
    if n_ready == 0:
        worker[w, NEXT_US] = nearest
        return
    segment_s = np.empty(n_ready)
    remaining = np.ones(n_ready, np.int64)
    chosen = np.zeros(n_ready, np.bool_)
    for k in range(n_ready):
        s = session[ready[k]]
        if settings[S_PASS] and s[PASSES] == 0:
            s[PASSES] = steps[ready[k]] + 1
            s[STEPS_BOUND] = steps[ready[k]]
            s[STARTED_US] = -1
        remaining[k] = max(1, s[PASSES])
        segment_s[k] = settings[S_SEGMENT] * _pass_share(s[PASSES], settings) / US
    base_s = settings[S_BASE] * _pass_share(2, settings) / US
    n = pick_compiled(
        due[:n_ready],
        segment_s,
        remaining,
        np.ones(n_ready, np.bool_),
        now / US,
        base_s,
        settings[S_SEGMENTS],
        not settings[S_PASS],
        chosen,
    )
    most_steps = 0
    share = 0.0
    slot = 0
    for k in range(n_ready):
        if not chosen[k]:
            continue
        r = ready[k]
        s = session[r]
        in_batch[w, slot] = r
        slot += 1
        s[RUNNING] = 1
        in_chunk[r] = True
        if settings[S_PASS]:
            share += _pass_share(s[PASSES], settings)
            if s[STARTED_US] < 0:
                s[STARTED_US] = now
                s[READY_SINCE] = s[READY_US]
        else:
            s[STARTED_US] = now
            s[READY_SINCE] = s[READY_US]
            s[STEPS_BOUND] = steps[r]
        most_steps = max(most_steps, s[STEPS_BOUND])
    if settings[S_PASS]:
        length = np.int64(np.ceil(duration_us[settings[S_STEPS_FULL], n - 1] * share / n))
    else:
        length = duration_us[most_steps, n - 1]
    worker[w, BATCH] = totals[T_BATCHES]
    totals[T_BATCHES] += 1
    worker[w, START_US] = now
    worker[w, BATCH_N] = n
    worker[w, BUSY] = 1
    worker[w, NEXT_US] = now + length
    busy_until_s[w] = (now + length) / US


@njit(cache=True)
def _pass_share(passes, settings):  # type: ignore[no-untyped-def]
    """Share of a full chunk's time that the next pass takes: the last one is the context pass."""
    if not settings[S_PASS]:
        return 1.0
    context = settings[S_CONTEXT_PERMILLE] / 1000
    return context if passes == 1 else (1.0 - context) / settings[S_STEPS_FULL]


@njit(cache=True)
def run(  # type: ignore[no-untyped-def]
    now,
    limit,
    session,
    worker,
    members,
    in_batch,
    heap,
    rows,
    totals,
    notes,
    duration_us,
    settings,
    steps,
    deadline_s,
    in_chunk,
    busy_until_s,
):
    while totals[T_HEAP] > 0:
        top = heap[0]
        if worker[top, NEXT_US] <= now and not worker[top, BUSY]:
            _start(
                top,
                now,
                session,
                worker,
                members,
                in_batch,
                totals,
                duration_us,
                settings,
                steps,
                deadline_s,
                in_chunk,
                busy_until_s,
            )
            sift(heap, worker, totals[T_HEAP], 0)
            continue
        # Every start of the instant `now` is done; on to the next instant, its ends first.
        if worker[top, NEXT_US] > limit:
            return limit
        now = worker[top, NEXT_US]
        while worker[heap[0], NEXT_US] == now and worker[heap[0], BUSY]:
            _finish(heap[0], now, session, worker, in_batch, rows, totals, notes, settings, deadline_s, in_chunk)
            sift(heap, worker, totals[T_HEAP], 0)
        if totals[T_NOTES] > 0 or now == limit:
            return now
    return limit
