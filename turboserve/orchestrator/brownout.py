"""Short overload is carried by the viewers' playout slack; only when that runs out, by fewer denoise steps.

Per worker: a chunk that is not begun yet may have to wait for the batch in work and then takes a batch itself. While
every session could bear that at full steps, nothing is reduced, however full the worker is. When one could not, the
worker's sessions go down to the floor; they go back to full steps as soon as there is slack again for a while, so that
overload comes out as alternation between full and few steps. A batch takes the time of its member with the most steps,
so the sessions of a worker share the reduction.
"""

from __future__ import annotations

import numpy as np

from turboserve.orchestrator.latency import LatencyProfile
from turboserve.orchestrator.placement import Survey
from turboserve.orchestrator.plan import SetSteps
from turboserve.orchestrator.view import HELD, MIGRATING, RESUMING, ClusterView, Ints

MARGIN_S = 0.1  # between looks; transfers take about as long
RESTORE_S = 0.5  # slack beyond the threshold at which full steps come back


def threshold_s(profile: LatencyProfile, sessions: int) -> float:
    """Slack that a worker with `sessions` active ones needs at full steps: a batch to wait for and its own."""
    return 2.0 * profile.load_latency(sessions) + MARGIN_S


def adjust(view: ClusterView, sv: Survey, any_reduced: bool) -> tuple[list[SetSteps], float | None, bool]:
    """Step changes, in how many seconds the slack of an overfull worker will need another look, and whether any
    session is reduced afterwards."""
    profile = view.profile
    floor = view.steps_floor
    if floor is None or floor >= profile.denoise_steps:
        return [], None, False
    # Most ticks have neither an overfull worker nor a reduced session.
    tight_s = threshold_s(profile, profile.capacity)
    suspects = np.flatnonzero((sv.active_on > profile.capacity) | (sv.slack_s < tight_s))
    if suspects.size == 0 and not any_reduced:
        return [], None, False
    s = view.sessions
    n = s.count
    fewer_at_all = (s.steps[:n] < s.steps_full[:n]) & (s.state[:n] > 0)
    reduced_on = np.zeros(view.workers.count, np.bool_)
    where = np.where(s.target[:n] >= 0, s.target[:n], s.worker[:n])
    reduced_on[where[fewer_at_all & (where >= 0) & s.active[:n]]] = True
    actions: list[SetSteps] = []
    look_s: float | None = None
    down = np.zeros(view.workers.count, np.bool_)
    for w in np.flatnonzero(reduced_on | _mask(suspects, view.workers.count)):
        need_s = threshold_s(profile, int(sv.active_on[w]))
        spare_s = float(sv.slack_s[w]) - need_s
        down[w] = spare_s < (RESTORE_S if reduced_on[w] else 0.0)
        if sv.active_on[w] > profile.capacity or down[w]:
            wait_s = max(0.2, spare_s) if not down[w] else 0.5
            look_s = wait_s if look_s is None else min(look_s, wait_s)
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


def _mask(rows: Ints, n: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    mask = np.zeros(n, np.bool_)
    mask[rows] = True
    return mask
