"""One tick's moves against the best that any set of moves of the same number could do."""

from __future__ import annotations

import numpy as np
import pytest

from tests.orchestrator.stories import K4
from turboserve.orchestrator.plan import Migrate
from turboserve.orchestrator.scheduler import Memory, TickConfig, tick
from turboserve.orchestrator.unequal import load_latency
from turboserve.orchestrator.view import HELD, READY, add_session, add_worker, make_view

TABLE = np.array(K4.batch_latency_s)
HORIZON_CHUNKS = 20.0  # of a fresh memory: no period has been seen
NOW_S = 100.0


def value(home: np.ndarray, was: np.ndarray, load: np.ndarray, workers: int, move_s: np.ndarray) -> float:
    """The objective of the oracle: latency of the fullest worker * horizon + seconds moved."""
    fullest = np.bincount(home, weights=load, minlength=workers).max()
    return load_latency(TABLE, fullest) * HORIZON_CHUNKS + float(move_s[home != was].sum())


def oracle(was: np.ndarray, load: np.ndarray, workers: int, move_s: np.ndarray, budget: int) -> float:
    """Optimum by trying every set of at most `budget` moves, one out and one in a worker."""
    best = value(was, was, load, workers, move_s)

    def extend(home: np.ndarray, start: int, sent: int, took: int, left: int) -> None:
        nonlocal best
        for i in range(start, len(was)):
            if sent >> was[i] & 1:
                continue
            for w in range(workers):
                if w == was[i] or took >> w & 1:
                    continue
                home[i] = w
                best = min(best, value(home, was, load, workers, move_s))
                if left > 1:
                    extend(home, i + 1, sent | 1 << was[i], took | 1 << w, left - 1)
                home[i] = was[i]

    extend(was.copy(), 0, 0, 0, budget)
    return best


def after_one_tick(was: np.ndarray, load: np.ndarray, workers: int, budget: int) -> np.ndarray:
    """Homes once the moves that one tick asks for are done."""
    view = make_view((K4,), workers_max=workers, workers_min=workers, provision_s=0.0)
    for w in range(workers):
        row = add_worker(view, f"w{w}", state=READY, request_s=0.0, ready_at_s=0.0)
        view.workers.state[row] = READY
    s = view.sessions
    for i, (w, of) in enumerate(zip(was.tolist(), load.tolist(), strict=True)):
        row = add_session(view, f"s{i:02d}", now_s=0.0, load=of)
        s.state[row], s.worker[row], s.active[row] = HELD, w, True
        s.state_bytes[row] = of * K4.state_bytes
        s.next_deadline_s[row] = NOW_S + 2.0
    plan, _ = tick(view, Memory(), NOW_S, TickConfig(moves_min=budget))
    home = was.copy()
    for action in plan.actions:
        if isinstance(action, Migrate):
            home[int(action.session[1:])] = int(action.worker[1:])
    return home


def gaps(count: int, seed: int, unequal: bool) -> list[float]:
    """(ours - optimum) / optimum on random small instances."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        workers = int(rng.integers(2, 7))
        sessions = int(rng.integers(workers, 3 * workers + 1))
        was = rng.integers(0, workers, sessions)
        load = rng.choice([0.5, 1.0, 1.5, 2.0, 3.0], sessions) if unequal else np.ones(sessions)
        move_s = load * K4.migrate_s
        budget = int(rng.integers(1, 4))
        ours = after_one_tick(was, load, workers, budget)
        assert (ours != was).sum() <= budget
        best = oracle(was, load, workers, move_s, budget)
        found.append((value(ours, was, load, workers, move_s) - best) / best)
    return found


@pytest.mark.parametrize("unequal", [False, True])
def test_gap_to_the_exact_oracle(unequal: bool) -> None:
    found = gaps(40, 7, unequal)
    assert min(found) > -1e-9
    assert np.mean(found) <= 0.02


@pytest.mark.soak
def test_gap_to_the_exact_oracle_on_five_hundred() -> None:
    """Half of them with unequal sessions. Prints the mean and the largest gap."""
    for unequal in (False, True):
        found = gaps(250, 11, unequal)
        print(f"unequal={unequal}: mean gap {100 * np.mean(found):.3f}%, largest {100 * max(found):.2f}%")
        assert np.mean(found) <= 0.02
