"""Time of one tick, warm, at growing cluster sizes.

    python -m bench.orchestrator.decision_times [--out FILE.json]

Each tick sees a few activity changes, new deadlines for everybody and now and then a new session; moves are carried out
at once. Processor time of the thread, so that neighbours on the machine do not count. Synthetic cluster, k4 profile,
93 % of the capacity active, brownout allowed.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from turboserve.orchestrator.plan import Migrate, Place, Resume
from turboserve.orchestrator.scheduler import Memory, tick
from turboserve.orchestrator.view import HELD, READY, ClusterView, add_session, add_worker, make_view
from turboserve.sim.profile_files import load_profile

SIZES = ((64, 1_000, 1), (256, 4_000, 2), (1_000, 20_000, 10), (10_000, 200_000, 100))  # workers, sessions, changes
GOALS_MS = {64: 5.0, 256: 15.0, 10_000: 250.0}  # p99, issue 3
WARM_TICKS = 20


def cluster(workers: int, sessions: int) -> ClusterView:
    """Sessions dealt out evenly; the first 93 % of capacity are active."""
    profile = load_profile("k4")
    view = make_view(
        (profile,),
        session_capacity=sessions + 1000,
        worker_capacity=workers,
        workers_max=workers + 50,
        provision_s=30.0,
        steps_floor=2,
    )
    for i in range(workers):
        add_worker(view, f"w{i}", state=READY, request_s=0.0, ready_at_s=0.0)
    active = int(workers * profile.capacity * 0.93)
    for i in range(sessions):
        row = add_session(view, f"s{i}", now_s=0.0)
        view.sessions.state[row], view.sessions.worker[row] = HELD, i % workers
        view.sessions.active[row] = i < active
    return view


def measure(workers: int, sessions: int, changes: int, ticks: int) -> list[float]:
    """Seconds of each tick."""
    rng = np.random.default_rng(0)
    view = cluster(workers, sessions)
    s = view.sessions
    worker_row = {name: i for i, name in enumerate(view.workers.ids)}
    session_row = {name: i for i, name in enumerate(s.ids)}
    memory, now_s, taken = Memory(), 0.0, []
    for k in range(ticks + WARM_TICKS):
        now_s += 0.05
        active, idle = np.flatnonzero(s.active[: s.count]), np.flatnonzero(~s.active[: s.count])
        stop, go = rng.choice(active, changes, replace=False), rng.choice(idle, changes, replace=False)
        s.active[stop], s.idle_since_s[stop] = False, now_s
        s.active[go], s.active_since_s[go] = True, now_s
        if k % 10 == 0:
            row = add_session(view, f"n{k}", now_s=now_s)
            session_row[f"n{k}"] = row
            s.active[row], s.active_since_s[row] = True, now_s
        n = s.count
        s.next_deadline_s[:n] = np.where(s.active[:n], now_s + 2.0 + 1.5 * rng.random(n), np.inf)
        s.in_chunk[:n] = s.active[:n] & (rng.random(n) < 0.8)
        began = time.thread_time()
        plan, memory = tick(view, memory, now_s)
        taken.append(time.thread_time() - began)
        for a in plan.actions:
            if isinstance(a, Migrate | Place | Resume):
                row = session_row[a.session]
                s.state[row], s.worker[row] = HELD, worker_row[a.worker]
    return taken[WARM_TICKS:]


def rows(ticks: int) -> list[dict[str, Any]]:
    """One row per size."""
    found = []
    for workers, sessions, changes in SIZES:
        t = np.array(measure(workers, sessions, changes, ticks)) * 1000
        found.append(
            {
                "case": f"tick {workers} workers {sessions} sessions",
                "changes_per_tick": changes,
                "ticks": ticks,
                "mean_ms": round(float(t.mean()), 3),
                "p50_ms": round(float(np.quantile(t, 0.5)), 3),
                "p99_ms": round(float(np.quantile(t, 0.99)), 3),
                "max_ms": round(float(t.max()), 3),
                "goal_p99_ms": GOALS_MS.get(workers),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ticks", type=int, default=300)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = {"machine": platform.processor() or platform.machine(), "rows": rows(arguments.ticks)}
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
