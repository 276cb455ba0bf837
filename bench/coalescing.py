"""Chunks of many sessions through one engine: passes shared where the measured cost says so, against one by one.

Two paces. `closed`: every session asks for its next chunk when it has the last one, so the worker is never idle;
the figures are milliseconds of work per chunk and the p95 of chunk latency. `live`: chunks fall due at the model's
playback rate, sessions start evenly spread over one chunk, and latency counts from when a chunk fell due or its
predecessor was out, whichever came later.

Both contenders are the serving engine: `coalesced` decides by the calibrated cost model, `one by one` is the same
engine with one session a pass, earliest deadline first. Every run's digest chains are compared. On a CPU the clock is
the engine thread's own processor time, with idle time skipped: a shared machine's other work stays out of the figures,
though not out of its caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import click
import numpy as np
import torch

from turboserve.bench.command import bench_command
from turboserve.bench.report import Row, cpu_name, make_row, versions
from turboserve.bench.timing import Timing
from turboserve.model.interface import ChunkRequest, Control, StreamingModel
from turboserve.model.registry import load_model
from turboserve.runtime.cost_model import MeasuredCost, calibrate
from turboserve.runtime.engine import Engine
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.numerics import device_class, set_up_determinism
from turboserve.runtime.worker_events import FinishedChunk

PROMPTS = ("a red circle drifting left", "two blue squares", "a green triangle drifting up", "a yellow star spinning")
CONTENDERS = ("coalesced", "one by one")


class WorkClock:
    """Seconds of work, plus the idle time that was skipped."""

    def __init__(self, device: torch.device) -> None:
        self._now = time.perf_counter if device.type == "cuda" else time.thread_time
        self._skipped_s = -self._now()

    def __call__(self) -> float:
        return self._now() + self._skipped_s

    def skip_to(self, then_s: float) -> None:
        self._skipped_s += max(0.0, then_s - self())


@dataclass
class Run:
    """What one schedule gave: latencies and the whole duration in seconds, each session's digest chain."""

    latencies_s: list[float] = field(default_factory=list)
    duration_s: float = 0.0
    segments_per_pass: float = 0.0
    digests: dict[str, list[str]] = field(default_factory=dict)

    @property
    def p95_ms(self) -> float:
        return 1e3 * float(np.percentile(self.latencies_s, 95))

    @property
    def per_chunk_ms(self) -> float:
        return 1e3 * self.duration_s / len(self.latencies_s)


def drive(model: StreamingModel, cost: MeasuredCost, sessions: int, chunks: int, *, live: bool) -> Run:
    """`chunks` chunks of each session through a fresh engine."""
    clock = WorkClock(model.device)
    engine = Engine(model, KvPool(model.state_layout(), sessions, model.device), cost, clock=clock)
    chunk_s = model.spec.chunk_s
    names = [f"s{index:02d}".ljust(26, "a") for index in range(sessions)]
    run = Run(digests={name: [] for name in names})
    due_s: dict[str, float] = {}  # when the next chunk of a session may begin; absent while one is in work
    asked_s: dict[str, float] = {}
    start_s: dict[str, float] = {}
    for index, name in enumerate(names):
        engine.open(name, index, Control(PROMPTS[index % len(PROMPTS)]))
        start_s[name] = clock() + (chunk_s * index / sessions if live else 0.0)
        due_s[name] = start_s[name]
    began_s = clock()
    while due_s or engine.has_work:
        if not engine.has_work and due_s:
            clock.skip_to(min(due_s.values()))
        for name in [one for one, at_s in due_s.items() if at_s <= clock()]:
            at_s = due_s.pop(name)
            index = len(run.digests[name])
            asked_s[name] = at_s
            control = Control(PROMPTS[names.index(name) % len(PROMPTS)])
            engine.submit(name, ChunkRequest(index, model.spec.denoise_steps, control), at_s + chunk_s)
        for event in engine.run_pass():
            assert isinstance(event, FinishedChunk), event
            name, now_s = event.session_id, clock()
            run.latencies_s.append(now_s - asked_s[name])
            run.digests[name].append(event.digest)
            made = len(run.digests[name])
            if made < chunks:
                due_s[name] = max(now_s, start_s[name] + made * chunk_s) if live else now_s
    run.duration_s = clock() - began_s
    run.segments_per_pass = engine.stats.segments / engine.stats.passes
    return run


def contenders(cost: MeasuredCost, sessions: int) -> dict[str, MeasuredCost]:
    """The calibrated cost anew for each run: what one learns is not the other's."""
    return {
        name: MeasuredCost(cost.fitted_base_s, cost.fitted_token_s, segment_max=sessions if name == "coalesced" else 1)
        for name in CONTENDERS
    }


@bench_command
@click.option("--rounds", default=3, type=click.IntRange(1), help="Runs of each contender.")
@click.option("--chunks", default=6, type=click.IntRange(2), help="Chunks of each session in a run.")
@click.option("--sessions", default="1,2,4,8,16", help="Numbers of sessions, with commas.")
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--model", default="shapes", help="A name from `turboserve models`.")
def command(
    wanted: Callable[[str], bool], rounds: int, chunks: int, sessions: str, device: str, model: str
) -> Iterator[Row]:
    """Coalesced passes against one session at a time, for growing numbers of sessions."""
    set_up_determinism(torch.device(device))
    loaded = load_model(model, device)
    counts = [int(one) for one in sessions.split(",")]
    with_room = KvPool(loaded.state_layout(), max(8, *counts), loaded.device)
    cost = calibrate(loaded, with_room, segment_max=max(counts), repeats=5, budget_s=30)
    del with_room
    where = cpu_name() if device == "cpu" else device_class(loaded.device)
    for count in counts:
        for pace in ("closed", "live"):
            cases = [f"coalescing/{pace}/{figure}" for figure in ("latency-p95", "per-chunk")]
            if not any(wanted(case) for case in cases):
                continue
            runs: dict[str, list[Run]] = {name: [] for name in CONTENDERS}
            for number in range(rounds):
                order = CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]
                for name in order:
                    run = drive(loaded, contenders(cost, count)[name], count, chunks, live=pace == "live")
                    runs[name].append(run)
            chains = [run.digests for name in CONTENDERS for run in runs[name]]
            if any(one != chains[0] for one in chains):
                raise AssertionError("digest chains differ between runs; the comparison means nothing")
            shape = f"{count} sessions, {np.mean([one.segments_per_pass for one in runs['coalesced']]):.1f} a pass"
            tokens = loaded.spec.slot.page_tokens
            passes = loaded.spec.denoise_steps + 1
            own_ms = 1e3 * passes * cost.fitted_token_s * tokens
            for case, figure, floor, floor_ms in (
                (
                    cases[0],
                    "p95_ms",
                    "the passes of one chunk per session, each segment at its own time",
                    own_ms * (count if pace == "closed" else 1),
                ),
                (cases[1], "per_chunk_ms", "the passes of one chunk, each segment at its own time", own_ms),
            ):
                if case.endswith("per-chunk") and pace == "live":
                    continue  # at playback pace the work per chunk is mostly idle time
                times = {name: Timing(tuple(float(getattr(one, figure)) for one in runs[name])) for name in CONTENDERS}
                yield make_row(
                    case=case,
                    shape=shape,
                    dtype="float32",
                    device=where,
                    versions=versions("torch", "numpy"),
                    timing=times["coalesced"],
                    floor=floor,
                    floor_ms=floor_ms,
                    baseline="one by one, earliest deadline first",
                    baseline_ms=times["one by one"].median_ms,
                    max_rel_err=0.0,
                )
