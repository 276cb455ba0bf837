"""SlackServe-like: a fixed fleet; sessions short of playout slack are re-homed to workers that have time.

Source: "Adaptive Resource Management and Quality Control for Streaming Video Generation" (SlackServe),
arXiv 2606.15319: the signal is playout slack, the seconds of video generated but not yet played; urgent
sessions are re-homed across workers, with a cooldown for each session. No autoscaling. Its elastic sequence
parallelism and its fidelity choice per chunk have no counterpart here (all policies share one batching
rule; fewer steps are our own brownout).

A session is urgent when what its worker's batches take leaves less than `urgent_chunks` of chunk_s before
the deadline of its next chunk; it moves when another worker would give it a shorter batch. Knobs:
`urgent_chunks`, `cooldown_s`.
"""

from __future__ import annotations

import numpy as np

from turboserve.orchestrator.view import HELD
from turboserve.sim.policies.fleet import Book, FleetPolicy

MOVES_PER_DECISION = 16


class Slack(FleetPolicy):
    """Least slack first; the target is the lightest worker."""

    name = "slack"
    scales = False

    def __init__(self, *, scaling: bool = False, urgent_chunks: float = 1.0, cooldown_s: float = 10.0) -> None:
        super().__init__(scaling=False)
        self.urgent_chunks, self.cooldown_s = urgent_chunks, cooldown_s

    def rebalance(self, book: Book, now_s: float) -> None:
        s, profile = book.view.sessions, book.view.profile
        rows = np.flatnonzero(book.active & (book.state == HELD))
        if rows.size == 0:
            return
        table = np.array(profile.batch_latency_s)
        batch_s = table[np.clip(book.load[book.worker[rows]], 1, table.size) - 1]
        # The deadline looks one chunk ahead; a batch that has just begun delays it by up to one more batch.
        slack_s = s.next_deadline_s[rows] - now_s - 2 * batch_s
        urgent = (slack_s < self.urgent_chunks * profile.chunk_s) & (now_s - s.moved_s[rows] >= self.cooldown_s)
        for row in rows[urgent][np.argsort(slack_s[urgent], kind="stable")][:MOVES_PER_DECISION].tolist():
            source = int(book.worker[row])
            ready = book.ready()
            takers = ready[~book.inbound[ready] & (book.held[ready] < profile.resident_max)]
            if takers.size == 0:
                return
            target = book.lightest(takers)
            if book.load[source] - book.load[target] >= 2 and book.can_move(source, target):
                book.migrate(row, target, "little playout slack")
