"""The scheduler's hot loops compiled by numba, against the same Python uncompiled (their `.py_func` twin).

Inputs are those of a tick: the synthetic cluster of bench/orchestrator/decision_times.py. Both contenders get the same
arrays and their answers are compared. Processor time of the thread; compilation is not in it (a worker pays it once,
numba caches it on disk). The floor is reading the columns once: numpy copying as many bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import numpy as np

from turboserve.bench.command import bench_command
from turboserve.bench.orchestrator.decision_times import cluster
from turboserve.bench.report import Row, cpu_name, make_row, versions
from turboserve.bench.timing import alternate, max_rel_err, memory_copy
from turboserve.orchestrator import placement
from turboserve.orchestrator.view import ClusterView

SIZES = ((256, 4_000), (10_000, 200_000))  # workers, sessions


def loops(view: ClusterView) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Name of each loop -> (the compiled function, its arguments as a tick has them)."""
    s, n, m = view.sessions, view.sessions.count, view.workers.count
    found = placement.survey(view, 1.0)
    table = placement.latency_table(view.profile)
    rng = np.random.default_rng(0)
    uneven = found.active_on + rng.integers(0, 4, m)  # loads as they are before a tick that must move sessions
    columns = (s.state[:n], s.active[:n], s.in_chunk[:n], s.worker[:n])
    return {
        "survey": (
            placement._survey,
            (*columns, s.target[:n], s.load[:n], s.next_deadline_s[:n], view.profile.chunk_s, 1.0, m),
        ),
        "lightest": (
            placement.lightest,
            (found.ready, found.load_on, uneven, found.held, found.inbound, 1.0, 1_000, 1_000, False),
        ),
        "best-cap": (placement.best_cap, (uneven, found.ready, table, 20.0, 0.01, 0.0)),
        "movable": (
            placement.movable,
            (*columns, s.next_deadline_s[:n], s.moved_s[:n], uneven > int(np.median(uneven)), 1.0, 0.0),
        ),
    }


def _flat(answer: Any) -> np.ndarray:
    """All numbers of an answer in a row; infinities, which both must have at the same places, as a large number."""
    parts = answer if isinstance(answer, tuple) else (answer,)
    flat = np.concatenate([np.atleast_1d(np.asarray(part, np.float64)).ravel() for part in parts])
    return np.nan_to_num(flat, posinf=1e300)


@bench_command
@click.option("--rounds", default=9, type=click.IntRange(3), help="Runs of each contender.")
@click.option("--largest/--no-largest", default=True, help="Also 10,000 workers with 200,000 sessions.")
def command(wanted: Callable[[str], bool], rounds: int, largest: bool) -> Iterator[Row]:
    """The scheduler's numba loops against their plain Python twins."""
    for workers, sessions in SIZES if largest else SIZES[:1]:
        for name, (compiled, arguments) in loops(cluster(workers, sessions)).items():
            case = f"scheduler-loops/{name}"
            if not wanted(case):
                continue
            columns = sum(one.nbytes for one in arguments if isinstance(one, np.ndarray))
            twin = compiled.py_func
            error = max_rel_err(_flat(compiled(*arguments)), _flat(twin(*arguments)))
            if error:
                raise AssertionError(
                    f"{name}: the compiled loop answers otherwise than its twin; the times mean nothing"
                )
            times = alternate(
                {
                    "numba": lambda f=compiled, a=arguments: f(*a),
                    "plain": lambda f=twin, a=arguments: f(*a),
                    "copy": memory_copy(columns),
                },
                rounds=rounds,
                warmup=1,
                clock=time.thread_time,
            )
            yield make_row(
                case=case,
                shape=f"{workers} workers, {sessions} sessions",
                dtype="columns",
                device=cpu_name(),
                versions=versions("numba", "numpy"),
                timing=times["numba"],
                floor=f"numpy copies the {columns} bytes of its columns",
                floor_ms=times["copy"].median_ms,
                baseline="the same loop in plain Python",
                baseline_ms=times["plain"].median_ms,
                max_rel_err=error,
            )
