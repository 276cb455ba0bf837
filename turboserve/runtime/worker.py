"""The worker process: one model copy on one device, and the sessions it makes video for.

    python -m turboserve.runtime.worker --config-fd N

The main thread owns torch and runs the engine; a second thread owns the sockets, the timers and the frame ring
(`worker_io.py`) and decides nothing by itself (`worker_logic.py`). Between them go a bounded queue of commands and
calls into the second thread's loop. The process never outlives its launcher (`lifeline.py`), and SIGTERM makes it ask
to be drained.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from turboserve.errors import TurboServeError
from turboserve.runtime import frame_ring, lifeline, logs
from turboserve.runtime import messages as m
from turboserve.runtime.failpoints import set_process
from turboserve.runtime.worker_config import WorkerConfig, read_config
from turboserve.video.encoded import check_encoder

SWITCH_INTERVAL_S = 0.001
"""How long the talking thread may keep the interpreter from the engine's (Python's default is five times this)."""


@dataclass(slots=True)
class Loaded:
    """A model on its device, ready to serve."""

    engine: Any
    hello: m.WorkerHello
    producer: frame_ring.FrameProducer | None
    store: Any
    """Where its recovery points lie; None without an arena."""


def load_from_registry(config: WorkerConfig) -> Any:
    """The model that the config names."""
    from turboserve.model.registry import load_model

    return load_model(config.model, config.device)


def load(config: WorkerConfig, load_model: Callable[[WorkerConfig], Any], log: Any) -> Loaded:
    """Everything slow: weights, memory, self-test, calibration."""
    if config.joined:
        check_encoder()

    import torch

    from turboserve.model.interface import Tier, layout_hash, state_bytes
    from turboserve.runtime.arena import Arena
    from turboserve.runtime.background_points import BackgroundPoints, frozen_bytes
    from turboserve.runtime.cost_model import MeasuredCost, calibrate
    from turboserve.runtime.engine import Engine
    from turboserve.runtime.kv_pool import KvPool, slots_within
    from turboserve.runtime.numerics import check_numerics, set_up_determinism
    from turboserve.runtime.paced import PacedModel, read_profile
    from turboserve.runtime.recovery_store import RecoveryStore
    from turboserve.runtime.session_points import SessionPoints
    from turboserve.runtime.snapshot import SnapshotShape
    from turboserve.runtime.state_copies import copies_for, staging_bytes
    from turboserve.runtime.work_board import WorkBoard

    started_s = time.monotonic()
    set_up_determinism(torch.device(config.device))
    model = load_model(config)
    layout = model.state_layout()
    slots = config.slots
    staging = 0
    if model.device.type == "cuda":
        staging = staging_bytes(config.pack_below_bytes) if config.arena_fd >= 0 else 0
        free_bytes, total_bytes = torch.cuda.mem_get_info(model.device)
        clones = frozen_bytes(layout) if config.arena_fd >= 0 else 0
        slots = slots_within(slots, state_bytes(layout, Tier.DEVICE), free_bytes - staging - clones, total_bytes)
        if slots < config.slots:
            log.warning("fewer slots than asked for fit the device", asked=config.slots, slots=slots)
    pool = KvPool(layout, slots, model.device)
    numerics = check_numerics(model, pool)
    log.info(
        "numerics",
        numerics_id=numerics.numerics_id,
        device_class=numerics.device_class,
        packed_equals_alone=numerics.packed_equals_alone,
        found=numerics.model_report,
    )
    cost = MeasuredCost(segment_max=slots)
    if config.paced_profile:
        model = PacedModel(model, read_profile(config.paced_profile))
        cost = model.cost(slots)
        log.info("every pass is padded to a latency profile", profile=config.paced_profile)
    elif config.calibrate:
        cost = calibrate(model, pool, segment_max=slots)
    if model.device.type == "cpu" and not numerics.packed_equals_alone:
        log.warning("packed rows differ from lone ones: every pass runs one session")
        cost.segment_max = 1
    log.info(
        "model loaded",
        model=model.spec.name,
        model_hash=model.spec.model_hash,
        slots=slots,
        session_bytes=state_bytes(layout),
        device_bytes=pool.total_bytes(Tier.DEVICE),
        staging_bytes=staging,
        pass_base_ms=round(1e3 * cost.base_s, 3),
        token_us=round(1e6 * cost.fitted_token_s, 2),
        measured_ms={count: round(1e3 * seconds, 2) for count, seconds in cost.table_s()},
        load_s=round(time.monotonic() - started_s, 2),
    )
    chunk_table = cost.chunk_table_s(model.spec.denoise_steps, slots)
    if config.paced_profile:
        chunk_table = list(read_profile(config.paced_profile).batch_latency_s)
    ring_fd = config.ring_fd
    if ring_fd < 0 and not config.joined:
        ring_fd = frame_ring.create(config.ring_bytes)
    arena = None
    if config.arena_fd >= 0:
        arena = Arena.map(config.arena_fd, partition=config.arena_partition, owner_epoch=config.worker_epoch)
        if config.joined:
            log.info("recovery points have an arena of this worker's own", bytes=arena.ledger().total_bytes)
    hello = m.WorkerHello(
        worker_id=config.worker_id,
        worker_epoch=config.worker_epoch,
        pid=os.getpid(),
        node=config.node,
        model=config.model,
        model_hash=model.spec.model_hash,
        numerics_id=numerics.numerics_id,
        device=config.device,
        device_class=numerics.device_class,
        gpu_count=config.gpu_count if model.device.type == "cuda" else 0,
        group=config.worker_id,
        slot_count=slots,
        capacity=min(config.capacity, slots),
        session_bytes=state_bytes(layout),
        layout_hash=layout_hash(layout),
        ring_fd=ring_fd,
        address=config.advertise,
        arena_bytes=arena.ledger().total_bytes if arena is not None else 0,
        own_arena=config.joined and arena is not None,
        start_s=time.monotonic() - config.born_s if config.born_s else 0.0,
        batch_latency_s=tuple(chunk_table),
    )
    producer = None if config.joined else frame_ring.attach_producer(ring_fd, worker_epoch=config.worker_epoch)
    store = points = None
    if arena is not None:
        store = RecoveryStore(arena)
        shape = SnapshotShape(model.spec, layout, numerics.numerics_id)
        points = SessionPoints(store, shape, copies_for(model.device, arena, config.pack_below_bytes))
    every = config.recovery_every_chunks or model.spec.recovery_every_chunks
    beside = None
    if points is not None and model.device.type == "cuda":
        beside = BackgroundPoints(points, layout, model.device)
    engine = Engine(model, pool, cost, points=points, recovery_every_chunks=every, background=beside)
    if config.board_fd >= 0:
        board = WorkBoard(config.board_fd)
        board.show(())  # of the process that was here before
        engine.show_work = board.show
    return Loaded(engine, hello, producer, store)


def serve(config: WorkerConfig, loaded: Loaded, log: Any) -> int:
    """Run until told to stop; the exit code. The calling thread becomes the engine's."""
    from turboserve.runtime.engine_loop import EngineLoop, Quit
    from turboserve.runtime.worker_io import Figures, WorkerIO
    from turboserve.runtime.worker_logic import WorkerLogic

    engine = loaded.engine
    logic = WorkerLogic(
        loaded.hello,
        engine.model.spec,
        heartbeat_s=config.heartbeat_s,
        # The launcher kills after the whole timeout: be done before.
        leave_timeout_s=0.8 * config.shutdown_timeout_s,
        prepared_keep_s=config.prepared_keep_s,
    )

    def figures() -> Figures:
        stats = engine.stats
        return Figures(
            passes=stats.passes,
            segments=stats.segments,
            chunks=stats.chunks,
            busy_s=stats.busy_s,
            chunk_latency_s=stats.chunk_latency_s,
            active=engine.active_count,
            resident=engine.session_count,
            slots_free=engine.pool.free_count,
            device_bytes=engine.pool.held_bytes(),
            points=stats.points,
            points_refused=stats.points_refused,
            point_s=stats.point_s,
        )

    traces = Path(config.profile_dir) / config.worker_id if config.profile_dir else None
    engine_loop = EngineLoop(engine, lambda event, epoch: io.post_soon(event, epoch), traces)
    io = WorkerIO(
        config,
        logic,
        loaded.producer,
        command=engine_loop.put,
        stop=lambda code: engine_loop.put(Quit(code)),
        figures=figures,
        at_work=lambda: engine.at_work,
        log=log,
        store=loaded.store,
    )

    def talk() -> None:
        try:
            _run_asyncio(io.run(signals))
        except BaseException as error:
            log.error("the talking thread failed", error=repr(error), exc_info=True)
            try:
                engine_loop.put(Quit(1))
            except queue.Full:
                os._exit(1)

    # The kernel may give the signal to any thread, and a main thread that waits for commands would not notice: it goes
    # through a pipe to the thread that talks.
    signals, signalled = socket.socketpair()
    signalled.setblocking(False)
    signal.set_wakeup_fd(signalled.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    if config.joined:
        signal.signal(signal.SIGINT, lambda *_: None)  # no launcher: Ctrl-C asks to be drained too
    threading.Thread(target=talk, name="talk", daemon=True).start()
    return engine_loop.run()


def _run_asyncio(coroutine: Any) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(coroutine)
    else:
        uvloop.run(coroutine)


def main(argv: list[str] | None = None, load_model: Callable[[WorkerConfig], Any] = load_from_registry) -> None:
    """Entry point; `load_model` is for tests that bring a model of their own."""
    parser = argparse.ArgumentParser(prog="turboserve-worker")
    parser.add_argument("--config-fd", type=int, required=True)
    config = read_config(parser.parse_args(argv).config_fd)
    lifeline.hold_to_parent(config.parent_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's; it stops us in order
    run_worker(config, load_model)


def run_worker(config: WorkerConfig, load_model: Callable[[WorkerConfig], Any] = load_from_registry) -> NoReturn:
    """Be that worker, in this process, until told to stop; ends the process with the worker's exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # while loading there is nothing to drain
    set_process(config.worker_id)
    log = logs.set_up_logs(config.worker_id, log_format=config.log_format, level=config.log_level)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        loaded = load(config, load_model, log)
        code = serve(config, loaded, log)
    except TurboServeError as error:
        log.error("the worker cannot go on", error=str(error))
        code = 1
    # The talking thread is a daemon; flush what it logged and leave without waiting for sockets.
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
