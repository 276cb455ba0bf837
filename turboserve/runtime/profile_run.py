"""A run to look at under a profiler: sessions of one model in this process, with the worker's own engine.

All sessions are open and ask for their next chunk as soon as they have the last one, so passes are shared as they are
on a busy worker. The first chunks run before anything is recorded: kernels compile and caches fill there.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from turboserve.errors import ConfigError, SessionPoisoned
from turboserve.model.interface import ChunkRequest, Control
from turboserve.model.registry import load_model
from turboserve.runtime.cost_model import calibrate
from turboserve.runtime.engine import Engine
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.numerics import check_numerics, set_up_determinism
from turboserve.runtime.profile_window import ProfileWindow
from turboserve.runtime.worker_events import BrokenSession
from turboserve.session import new_session_id

WARM_CHUNKS = 2


def device_for(name: str) -> torch.device:
    """`auto` takes a GPU where there is one; ConfigError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here", expected="--device cpu, or a machine with a GPU")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def run(model_name: str, device: str, sessions: int, chunks: int, trace: Path | None) -> dict[str, Any]:
    """`chunks` chunks of each session after the warm ones. With `trace` they are recorded there by torch.profiler,
    without they just run, for a profiler from outside. Returns {"model", "device", "sessions", "chunks", "wall_s",
    "passes", "trace"?, "table"?}."""
    where = device_for(device)
    set_up_determinism(where)
    model = load_model(model_name, str(where))
    pool = KvPool(model.state_layout(), max(4, sessions), where)
    check_numerics(model, pool)
    engine = Engine(model, pool, calibrate(model, pool, segment_max=sessions))
    names = [new_session_id() for _ in range(sessions)]
    for seed, name in enumerate(names):
        engine.open(name, seed, Control("a red circle drifting left"))
    _make(engine, names, 0, WARM_CHUNKS)
    window = ProfileWindow(where)
    passes = engine.stats.passes
    if trace is not None:
        window.open(trace, sessions * chunks)
    elif where.type == "cuda":
        # `nsys profile --capture-range=cudaProfilerApi` and ncu begin to record here.
        torch.cuda.profiler.start()
    started_s = time.monotonic()
    _make(engine, names, WARM_CHUNKS, chunks)
    wall_s = time.monotonic() - started_s
    found: dict[str, Any] = {
        "model": model_name,
        "device": str(where),
        "sessions": sessions,
        "chunks": sessions * chunks,
        "wall_s": round(wall_s, 4),
        "passes": engine.stats.passes - passes,
    }
    if trace is not None:
        window.close()
        found |= {"trace": str(trace), "table": str(trace.with_suffix(".txt"))}
    elif where.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    for name in names:
        engine.close(name)
    return found


def _make(engine: Engine, names: list[str], first: int, count: int) -> None:
    """`count` chunks of every session; each asks for the next one when it has the last."""
    steps = engine.model.spec.denoise_steps
    made = dict.fromkeys(names, 0)

    def ask(name: str) -> None:
        request = ChunkRequest(first + made[name], steps, Control("a red circle drifting left"))
        engine.submit(name, request, time.monotonic() + engine.model.spec.chunk_s)

    for name in names:
        ask(name)
    while engine.has_work:
        for event in engine.run_pass():
            if isinstance(event, BrokenSession):
                raise SessionPoisoned(f"chunk {event.chunk_index} failed: {event.message}")
            made[event.session_id] += 1
            if made[event.session_id] < count:
                ask(event.session_id)
