"""What the scheduler's view has of chunks: which are in work, when the next ones are due, what viewers got.

The simulator fills these columns from what it simulates; here they come from what is heard. Workers say which sessions
have a chunk in work and until when their pass lasts (WorkReport), the gateway when a session's next chunk is due
(SessionActivity) and how many chunks viewers got (ChunksDelivered). What a worker says of an epoch that is over is
left out, and a session that changes its owner has no chunk in work.

    in_chunk           from a chunk's first pass to the end of its context pass
    next_deadline_s    of the first chunk that is not finished; infinite while nobody wants chunks
    busy_until_s       the expected end of the pass in work; a time that is past when there is none
    observed           totals of this controller's life: periods from SessionActivity, chunks from ChunksDelivered
"""

from __future__ import annotations

import math

from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import ControllerBooks
from turboserve.runtime.controller_records import Due, Live


class ControllerView(ControllerBooks):
    """Columns that follow chunks, not sessions."""

    _delivered: m.ChunksDelivered | None = None
    """What the gateway said last; None until the one that is connected now has said something."""

    def _on_WorkReport(self, source: str, report: m.WorkReport, now_s: float) -> None:
        worker = self.workers.get(source)
        if worker is None or worker.hello.worker_epoch != report.worker_epoch:
            return
        if report.busy_s > 0:
            self.view.workers.busy_until_s[worker.row] = now_s + report.busy_s
        else:
            self.view.workers.busy_until_s[worker.row] = min(now_s, self.view.workers.busy_until_s[worker.row])
        in_chunk = self.view.sessions.in_chunk
        for session_id in worker.at_work:
            if (live := self.sessions.get(session_id)) is not None and live.record.owner == source:
                in_chunk[live.row] = False
        worker.at_work.clear()
        for session_id, work in report.sessions.items():
            live = self._owned(source, session_id, work.epoch)
            if live is None:
                continue
            if work.begun:
                in_chunk[live.row] = True
                worker.at_work.add(session_id)
            self._made(live, work.next_index)
            self._due_next(live, work.next_index, now_s)

    def _due_next(self, live: Live, next_index: int, now_s: float) -> None:
        """Chunks before `next_index` are finished. One made again after a loss was due when it was made first."""
        due = live.due
        if due is None or next_index <= due.index:
            return
        if due.every_s > 0:
            due.at_s += due.every_s * (next_index - due.index)
        else:
            due.at_s = now_s + due.after_s
        due.index = next_index
        self.view.sessions.next_deadline_s[live.row] = due.at_s

    def _take_deadline(self, live: Live, seen: m.SessionActivity, now_s: float) -> None:
        """The gateway's word on when the session's next chunk is due."""
        if not seen.active or seen.due_s is None:
            live.due = None
            self.view.sessions.next_deadline_s[live.row] = math.inf
            return
        live.due = Due(seen.due_index, now_s + seen.due_s, seen.every_s, seen.due_s)
        self.view.sessions.next_deadline_s[live.row] = live.due.at_s

    def _count_period(self, live: Live, active: bool, now_s: float) -> None:
        """What the scheduler knows of how long sessions are active. The first period begins when the gateway says so,
        not with the session."""
        if live.in_period == active:
            return
        live.in_period = active
        columns, observed = self.view.sessions, self.view.observed
        if active:
            columns.active_since_s[live.row] = now_s
            observed.periods_started += 1
        else:
            observed.periods_ended += 1
            observed.period_seconds += max(0.0, now_s - float(columns.active_since_s[live.row]))
            columns.idle_since_s[live.row] = now_s

    def _on_ChunksDelivered(self, source: str, told: m.ChunksDelivered, now_s: float) -> None:
        """Totals of the gateway's life. Of a gateway that was there before us, what came before is not counted."""
        before, self._delivered = self._delivered, told
        if before is None:
            return
        observed = self.view.observed
        observed.chunks += max(0, told.chunks - before.chunks)
        observed.reduced_chunks += max(0, told.reduced - before.reduced)
        observed.late_chunks += max(0, told.late - before.late)

    def _made(self, live: Live, next_index: int) -> None:
        raise NotImplementedError

    def _owned(self, source: str, session_id: str, epoch: int) -> Live | None:
        raise NotImplementedError
