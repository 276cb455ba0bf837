"""The workers' batches between two decisions: the arrays that the compiled part runs on, and how they are changed.

A decision changes which sessions a worker holds; everything between two decisions (batches start and end, chunks are
released and delivered) follows from the profile alone, so it runs without Python (`batch_steps.run`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from turboserve.errors import TraceError
from turboserve.orchestrator.batching import linear_cost
from turboserve.orchestrator.latency import LatencyProfile
from turboserve.orchestrator.view import ClusterView
from turboserve.sim.batch_steps import (
    ACTIVE_US,
    BATCH_N,
    BUSY,
    DONE,
    HEAP_AT,
    HOLD,
    INDEX,
    MEMBERS,
    NEVER,
    NEXT_US,
    NUMBER,
    PASSES,
    PERIOD,
    READY_US,
    RELEASE_US,
    ROW_FIELDS,
    RUNNING,
    S_BASE,
    S_CHUNK,
    S_CLOSED,
    S_CONTEXT_PERMILLE,
    S_PASS,
    S_SEGMENT,
    S_SEGMENTS,
    S_START_SLACK,
    S_STEPS_FULL,
    S_TARGET,
    SESSION_FIELDS,
    T_HEAP,
    T_NOTES,
    TRACE_ID,
    WANTED,
    WORKER,
    WORKER_FIELDS,
    run,
    sift,
)
from turboserve.sim.events import US, to_us, up_us


class Batches:
    """Arrays of the compiled part, and how the simulated cluster changes them between two runs of it."""

    def __init__(
        self, view: ClusterView, profile: LatencyProfile, chunks_total: int, *, closed: bool, by_pass: bool
    ) -> None:
        self.view = view
        self.profile = profile
        full = profile.denoise_steps
        self.session = np.zeros((view.sessions.capacity, SESSION_FIELDS), np.int64)
        self.worker = np.zeros((view.workers.capacity, WORKER_FIELDS), np.int64)
        self.members = np.zeros((view.workers.capacity, profile.resident_max + 2), np.int64)
        self.in_batch = np.zeros((view.workers.capacity, profile.batch_max), np.int64)
        self.heap = np.zeros(view.workers.capacity, np.int64)
        try:
            self.rows = np.zeros((chunks_total, ROW_FIELDS), np.int64)
        except (MemoryError, ValueError) as e:
            raise TraceError(
                f"no memory for the {chunks_total} chunks of this trace",
                expected=f"{chunks_total * ROW_FIELDS * 8 / 2**30:.1f} GiB free",
                hint="cut the trace into shorter windows",
            ) from e
        self.totals = np.zeros(6, np.int64)
        self.notes = np.zeros((view.sessions.capacity, 2), np.int64)
        # duration_us[steps, n - 1]; the batch takes the time of its member with the most steps.
        self.duration_us = np.array(
            [[up_us(t * profile.step_factor(steps)) for t in profile.batch_latency_s] for steps in range(full + 1)],
            np.int64,
        )
        base_s, segment_s = linear_cost(profile)
        # A chunk of s steps in pass mode: s denoise passes sharing step_latency_share, one context pass with the rest.
        self.settings = np.zeros(10, np.int64)
        self.settings[S_CHUNK] = to_us(profile.chunk_s)
        self.settings[S_START_SLACK] = to_us(2.5 * profile.chunk_target_s)
        self.settings[S_TARGET] = to_us(profile.chunk_target_s)
        self.settings[S_CLOSED] = closed
        self.settings[S_PASS] = by_pass
        self.settings[S_STEPS_FULL] = full
        self.settings[S_SEGMENTS] = profile.batch_max
        self.settings[S_BASE] = to_us(base_s)
        self.settings[S_SEGMENT] = to_us(segment_s)
        self.settings[S_CONTEXT_PERMILLE] = round(1000 * (1 - profile.step_latency_share))

    def grow(self) -> None:
        """Follow the view's columns, which double when a row is needed."""
        for name, n in (("session", self.view.sessions.capacity), ("notes", self.view.sessions.capacity)):
            setattr(self, name, _grown(getattr(self, name), n))
        for name in ("worker", "members", "in_batch", "heap"):
            setattr(self, name, _grown(getattr(self, name), self.view.workers.capacity))

    def add_worker(self, row: int, number: int) -> None:
        """Worker `number` (unique in the run) takes part from now on, in `row` (reused)."""
        self.worker[row] = 0
        self.worker[row, NUMBER] = number
        self.worker[row, NEXT_US] = NEVER
        self.heap[self.totals[T_HEAP]] = row
        self.worker[row, HEAP_AT] = self.totals[T_HEAP]
        self.totals[T_HEAP] += 1

    def remove_worker(self, row: int) -> None:
        """The worker is gone at once; the chunks in work with it (their sessions no longer run)."""
        for r in self.in_batch[row, : self.worker[row, BATCH_N]]:
            self.session[r, RUNNING] = 0
            self.session[r, PASSES] = 0
            self.view.sessions.in_chunk[r] = False
        for r in self.members[row, : self.worker[row, MEMBERS]].copy():
            self.session[r, WORKER] = -1
            self.session[r, PASSES] = 0
        at, last = int(self.worker[row, HEAP_AT]), int(self.totals[T_HEAP]) - 1
        moved = int(self.heap[last])
        self.heap[at] = moved
        self.worker[moved, HEAP_AT] = at
        self.totals[T_HEAP] = last
        self.worker[row] = 0
        self.worker[row, NEXT_US] = NEVER
        if moved != row:
            sift(self.heap, self.worker, last, at)

    def add_session(self, row: int, trace_id: int) -> None:
        self.session[row] = 0
        self.session[row, WORKER] = -1
        self.session[row, READY_US] = NEVER
        self.session[row, TRACE_ID] = trace_id
        self.session[row, PERIOD] = -1

    def begin_period(self, row: int, active_us: int, chunks: int, now_us: int) -> None:
        s = self.session[row]
        s[PERIOD] += 1
        s[DONE] = 0
        s[WANTED] = chunks
        s[ACTIVE_US] = active_us
        s[RELEASE_US] = active_us
        s[READY_US] = max(active_us, now_us)
        slack = self.settings[S_TARGET] if self.settings[S_CLOSED] else self.settings[S_START_SLACK]
        self.view.sessions.next_deadline_s[row] = (active_us + slack) / US
        self._touch(int(s[WORKER]), now_us)

    def drop_chunks(self, row: int, count: int, now_us: int) -> int:
        """Give up the next `count` chunks of the period (none is in work); returns how many there were."""
        s = self.session[row]
        count = int(min(count, s[WANTED] - s[DONE]))
        s[DONE] += count
        s[INDEX] += count
        if s[DONE] == s[WANTED]:
            s[READY_US] = NEVER
            self.view.sessions.next_deadline_s[row] = np.inf
        elif not self.settings[S_CLOSED]:
            s[RELEASE_US] = s[ACTIVE_US] + max(0, s[DONE] - 1) * self.settings[S_CHUNK]
            s[READY_US] = max(s[RELEASE_US], now_us)
            self.view.sessions.next_deadline_s[row] += count * self.profile.chunk_s
        return count

    def release_of(self, row: int, ordinal: int) -> int:
        """When chunk `ordinal` of the session's present period is released; in closed pace, for a chunk that never
        begins, the period's start."""
        active_us = int(self.session[row, ACTIVE_US])
        if self.settings[S_CLOSED]:
            return active_us
        return active_us + max(0, ordinal - 1) * int(self.settings[S_CHUNK])

    def attach(self, row: int, worker: int, now_us: int) -> None:
        """The session can run on `worker` from now on."""
        s = self.session[row]
        s[WORKER] = worker
        s[HOLD] = 0
        n = int(self.worker[worker, MEMBERS])
        self.members[worker, n] = row
        self.worker[worker, MEMBERS] = n + 1
        if s[READY_US] != NEVER:
            self._touch(worker, now_us)

    def detach(self, row: int) -> None:
        """The session leaves its worker; it must not be in a batch."""
        worker = int(self.session[row, WORKER])
        if worker < 0:
            return
        n = int(self.worker[worker, MEMBERS])
        at = int(np.flatnonzero(self.members[worker, :n] == row)[0])
        self.members[worker, at : n - 1] = self.members[worker, at + 1 : n]
        self.worker[worker, MEMBERS] = n - 1
        self.session[row, WORKER] = -1

    def _touch(self, worker: int, now_us: int) -> None:
        """A free worker looks again, at the end of this instant, for what it can start."""
        if worker >= 0 and not self.worker[worker, BUSY] and self.worker[worker, NEXT_US] > now_us:
            self.worker[worker, NEXT_US] = now_us
            sift(self.heap, self.worker, int(self.totals[T_HEAP]), int(self.worker[worker, HEAP_AT]))

    def run_until(self, now_us: int, limit_us: int) -> int:
        """Start what can start at `now_us`, go on to `limit_us` or the first instant with a note; its time is returned.

        Batches that end at the returned instant have ended; none has started at it.
        """
        self.totals[T_NOTES] = 0
        s = self.view.sessions
        return int(
            run(
                now_us,
                limit_us,
                self.session,
                self.worker,
                self.members,
                self.in_batch,
                self.heap,
                self.rows,
                self.totals,
                self.notes,
                self.duration_us,
                self.settings,
                s.steps,
                s.next_deadline_s,
                s.in_chunk,
                self.view.workers.busy_until_s,
            )
        )

    @property
    def taken_notes(self) -> list[tuple[int, int]]:
        return [(int(r), int(k)) for r, k in self.notes[: self.totals[T_NOTES]]]


def _grown(array: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
    if array.shape[0] >= n:
        return array
    fresh = np.zeros((n, *array.shape[1:]), array.dtype)
    fresh[: array.shape[0]] = array
    return fresh
