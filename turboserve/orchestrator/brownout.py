"""Short overload is carried by the viewers' playout slack; only when that runs out, by fewer denoise steps.

Per worker: a chunk that is not begun yet may have to wait for the batch in work and then takes a batch itself. While
every session could bear that at full steps, nothing is reduced, however full the worker is. When one could not, the
worker's sessions go down to the floor; they go back to full steps as soon as there is slack again for a while, so that
overload comes out as alternation between full and few steps. A batch takes the time of its member with the most steps,
so the sessions of a worker share the reduction.
"""

from __future__ import annotations

import numpy as np

from turboserve.orchestrator.placement import Survey
from turboserve.orchestrator.plan import SetSteps
from turboserve.orchestrator.view import HELD, MIGRATING, RESUMING, ClusterView

MARGIN_S = 0.05  # between looks; about what a transfer takes
RESTORE_S = 0.5  # slack beyond the need at which an overfull worker goes back to full steps


def adjust(view: ClusterView, sv: Survey, now_s: float, any_reduced: bool) -> tuple[list[SetSteps], float | None, bool]:
    """Step changes, in how many seconds an overfull worker needs another look, and whether any session is reduced
    afterwards."""
    profile = view.profile
    floor = view.steps_floor
    if floor is None or floor >= profile.denoise_steps:
        return [], None, False
    # Most ticks have neither an overfull worker, nor one that is behind, nor a reduced session.
    rest_s = np.maximum(0.0, view.workers.busy_until_s[: view.workers.count] - now_s)
    behind = sv.slack_s - rest_s < profile.load_latency(profile.capacity) + MARGIN_S
    suspects = behind | (sv.active_on > profile.capacity)
    s = view.sessions
    n = s.count
    fewer_at_all = (s.steps[:n] < s.steps_full[:n]) & (s.state[:n] > 0)
    # Sessions may be reduced that no tick of ours reduced: a controller before this one did.
    if not any_reduced and not suspects.any() and not fewer_at_all.any():
        return [], None, False
    where = np.where(s.target[:n] >= 0, s.target[:n], s.worker[:n])
    reduced_on = np.zeros(view.workers.count, np.bool_)
    reduced_on[where[fewer_at_all & (where >= 0) & s.active[:n]]] = True
    look_s: float | None = None
    down = np.zeros(view.workers.count, np.bool_)
    for w in np.flatnonzero(reduced_on | suspects):
        sessions = int(sv.active_on[w])
        if sessions == 0:
            continue
        full_s = profile.load_latency(sessions)
        # A chunk not begun yet waits for the batch in work, then takes a batch at full steps.
        spare_s = float(sv.slack_s[w] - rest_s[w]) - full_s - MARGIN_S
        overfull = sessions > profile.capacity
        down[w] = spare_s < (RESTORE_S if reduced_on[w] and overfull else 0.0)
        if overfull or down[w]:
            # Each batch at full steps costs the slack what it takes beyond the pace; look again before it runs out.
            loss_s = max(full_s - profile.chunk_s, 1e-3)
            batches = 0 if down[w] else int(min(3.0, spare_s / loss_s))
            wait_s = max(0.05, float(rest_s[w]) + 0.01 + batches * full_s)
            look_s = wait_s if look_s is None else min(look_s, wait_s)
    actions: list[SetSteps] = []
    present = (s.state[:n] == HELD) | (s.state[:n] == MIGRATING) | (s.state[:n] == RESUMING)
    on_down = np.zeros(n, np.bool_)
    placed = present & (where >= 0)
    on_down[placed] = down[where[placed]]
    reduce = on_down & s.active[:n] & s.may_reduce[:n] & (s.steps[:n] > floor)
    restore = fewer_at_all & ~(on_down & s.active[:n])
    for r in np.flatnonzero(reduce):
        slack_ms = 1000 * float(sv.slack_s[where[r]])
        reason = f"{int(sv.active_on[where[r]])} active, slack {slack_ms:.0f} ms"
        actions.append(SetSteps(s.ids[r], floor, reason))
    for r in np.flatnonzero(restore):
        actions.append(SetSteps(s.ids[r], int(s.steps_full[r]), "slack is back" if s.active[r] else "idle"))
    return actions, look_s, bool(down.any())
