"""A chunk's way from a worker process to the gateway process: the frame ring against what one would pick otherwise.

`between-processes`: this process asks, a second one sends a chunk, the time ends with the frames in hand as an array.
The ring's bell is a byte on a pipe, as the worker's control message is in service. Baselines: multiprocessing.Queue
with a numpy array (pickled), and raw bytes over a multiprocessing pipe. `push-pop`: one thread does both, so that
what is left is the ring's own work. Neither verifies the digest; `verify` times that alone, against SHA-256.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue

import click
import numpy as np

from turboserve.bench import timing
from turboserve.bench.command import bench_command
from turboserve.bench.report import Row, cpu_name, make_row, versions
from turboserve.digest import next_digest
from turboserve.runtime import frame_ring
from turboserve.runtime.frame_ring import FrameHeader, attach_consumer, attach_producer

SHAPES = [(4, 96, 96), (12, 480, 832)]  # a chunk of `shapes`, and one at 480p
TWINS = ["python", *(["native"] if frame_ring.IMPLEMENTATION == "native" else [])]
TWIN_NAMES = {"python": "Python twin", "native": "C++"}


def chunk_pixels(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (*shape, 3), np.uint8)


def chunk_header(pixels: np.ndarray) -> FrameHeader:
    frames, height, width, _ = pixels.shape
    return FrameHeader(
        session_id="a" * 26,
        worker_epoch=1,
        session_epoch=1,
        chunk_index=0,
        frames=frames,
        height=height,
        width=width,
        steps=4,
        prompt_version=0,
        digest=bytes.fromhex(next_digest("", pixels)),
        digest_prev=b"",
    )


def send_chunks(shape: tuple[int, int, int], rings: dict[str, str], asked: Connection, queue: Queue) -> None:
    """The second process: sends one chunk each time it is asked, the way it is asked."""
    pixels = chunk_pixels(shape)
    header = chunk_header(pixels)
    producers = {
        twin: attach_producer(os.open(path, os.O_RDWR), worker_epoch=1, implementation=twin)
        for twin, path in rings.items()
    }
    while (way := asked.recv_bytes().decode()) != "end":
        if way in producers:
            producers[way].push(header, pixels)
            asked.send_bytes(b"!")
        elif way == "queue":
            queue.put(pixels)
        elif way == "pipe":
            asked.send_bytes(pixels.reshape(-1))
        else:
            asked.send_bytes(b"!")


def between_processes(shape: tuple[int, int, int], rounds: int) -> tuple[dict[str, timing.Timing], float]:
    """Times of every way a chunk can cross, and the largest error against the chunk that was sent."""
    reference = chunk_pixels(shape)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    queue = context.Queue()
    with ExitStack() as stack:
        rings: dict[str, str] = {}
        ways: dict[str, Callable[[], np.ndarray | None]] = {}
        for twin in TWINS:
            fd = frame_ring.create(-(-3 * reference.nbytes // 4096) * 4096, implementation=twin)
            stack.callback(os.close, fd)
            rings[twin] = f"/proc/{os.getpid()}/fd/{fd}"
            consumer = stack.enter_context(attach_consumer(fd, implementation=twin))

            def through_ring(twin: str = twin, consumer: frame_ring.FrameConsumer = consumer) -> np.ndarray:
                here.send_bytes(twin.encode())
                here.recv_bytes()
                record = consumer.pop(verify=False)
                assert record is not None, "the bell rang before the chunk was there"
                return record.array()

            ways[twin] = through_ring

        def through_queue() -> np.ndarray:
            here.send_bytes(b"queue")
            return queue.get()

        def through_pipe() -> np.ndarray:
            here.send_bytes(b"pipe")
            return np.frombuffer(here.recv_bytes(), np.uint8).reshape(reference.shape)

        def nothing() -> None:
            here.send_bytes(b"nothing")
            here.recv_bytes()

        ways |= {"queue": through_queue, "pipe": through_pipe}
        sender = context.Process(target=send_chunks, args=(shape, rings, there, queue), daemon=True)
        sender.start()
        try:
            error = max(timing.max_rel_err(way(), reference) for way in ways.values())
            contenders = {**ways, "nothing": nothing, "memcpy": timing.memory_copy(reference.nbytes)}
            times = timing.alternate(contenders, rounds=rounds)
            here.send_bytes(b"end")
            sender.join(10)
        finally:
            sender.kill()
    return times, error


def push_pop(shape: tuple[int, int, int], rounds: int) -> tuple[dict[str, timing.Timing], float]:
    """Times of push and pop in one thread, of the digest's check, and the largest error."""
    reference = chunk_pixels(shape)
    header = chunk_header(reference)
    with ExitStack() as stack:
        contenders: dict[str, Callable] = {}
        for twin in TWINS:
            fd = frame_ring.create(-(-3 * reference.nbytes // 4096) * 4096, implementation=twin)
            stack.callback(os.close, fd)
            producer = stack.enter_context(attach_producer(fd, worker_epoch=1, implementation=twin))
            consumer = stack.enter_context(attach_consumer(fd, implementation=twin))

            def through(
                producer: frame_ring.FrameProducer = producer, consumer: frame_ring.FrameConsumer = consumer
            ) -> np.ndarray:
                producer.push(header, reference)
                record = consumer.pop(verify=False)
                assert record is not None
                return record.array()

            contenders[twin] = through
        error = max(timing.max_rel_err(way(), reference) for way in contenders.values())
        record = frame_ring.FrameRecord(header, reference.tobytes())
        contenders |= {
            "verify": record.verify,
            "sha256": lambda: hashlib.sha256(record.pixels).digest(),
            "memcpy": timing.memory_copy(reference.nbytes),
        }
        return timing.alternate(contenders, rounds=rounds), error


@bench_command
@click.option("--rounds", default=200, type=click.IntRange(3), help="Measurements of each contender.")
def command(wanted: Callable[[str], bool], rounds: int) -> Iterator[Row]:
    """Chunks from worker to gateway: the frame ring, its Python twin, and pickles."""
    for shape in SHAPES:
        settings = {
            "shape": "x".join(map(str, (*shape, 3))),
            "dtype": "uint8",
            "device": cpu_name(),
            "versions": versions("numpy"),
        }
        if any(wanted(f"frame-ring/between-processes/{TWIN_NAMES[twin]}") for twin in TWINS):
            times, error = between_processes(shape, rounds)
            floor_ms = 2 * times["memcpy"].median_ms + times["nothing"].median_ms
            held_against = [
                ("queue", "multiprocessing.Queue, pickled array"),
                ("pipe", "multiprocessing pipe, raw bytes"),
            ]
            for twin in TWINS:
                for baseline, name in [*held_against, *([("python", "Python twin")] if twin == "native" else [])]:
                    yield make_row(
                        case=f"frame-ring/between-processes/{TWIN_NAMES[twin]}",
                        timing=times[twin],
                        floor="two copies of the chunk and one round trip over a pipe, in this run",
                        floor_ms=floor_ms,
                        baseline=name,
                        baseline_ms=times[baseline].median_ms,
                        max_rel_err=error,
                        **settings,
                    )
        if wanted("frame-ring/verify") or any(wanted(f"frame-ring/push-pop/{TWIN_NAMES[twin]}") for twin in TWINS):
            times, error = push_pop(shape, rounds)
            for twin in TWINS:
                yield make_row(
                    case=f"frame-ring/push-pop/{TWIN_NAMES[twin]}",
                    timing=times[twin],
                    floor="two copies of the chunk, in this run",
                    floor_ms=2 * times["memcpy"].median_ms,
                    baseline="Python twin",
                    baseline_ms=times["python"].median_ms,
                    max_rel_err=error,
                    **settings,
                )
            yield make_row(
                case="frame-ring/verify",
                timing=times["verify"],
                floor="one SHA-256 of the chunk by hashlib, in this run",
                floor_ms=times["sha256"].median_ms,
                baseline="push-pop without it, " + TWIN_NAMES[TWINS[-1]],
                baseline_ms=times[TWINS[-1]].median_ms,
                max_rel_err=error,
                **settings,
            )
