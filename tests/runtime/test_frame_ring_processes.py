"""The frame ring between real processes: streams, and producers killed in mid-write."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from turboserve.digest import next_digest
from turboserve.runtime import frame_ring
from turboserve.runtime.frame_ring import FrameHeader, attach_consumer, attach_producer, create

TWINS = ["python"] + (["native"] if frame_ring.IMPLEMENTATION == "native" else [])

# A worker that streams `count` chunks of changing sizes with a right digest chain.
WORKER = """
import os, random, sys
from turboserve.runtime.frame_ring import FrameHeader, attach_producer
from turboserve.digest import next_digest
path, epoch, implementation, count, width_max = sys.argv[1:]
epoch, count = int(epoch), int(count)
rng = random.Random(epoch)
producer = attach_producer(os.open(path, os.O_RDWR), worker_epoch=epoch, implementation=implementation)
print("ready", flush=True)
noise = rng.randbytes(4 * 3 * int(width_max))
digest = b""
for index in range(count):
    width = rng.randrange(1, int(width_max))
    pixels = memoryview(noise)[index % 97 : index % 97 + 3 * 3 * width]
    digest_prev, digest = digest, bytes.fromhex(next_digest(digest.hex(), pixels))
    header = FrameHeader(
        session_id="abcdefghijklmnopqrstuvwxyz", worker_epoch=epoch, session_epoch=1, chunk_index=index,
        frames=3, height=1, width=width, steps=4, prompt_version=0, digest=digest, digest_prev=digest_prev,
    )
    if not producer.push(header, pixels, timeout_s=60):
        raise SystemExit("the ring stayed full")
"""


def spawn_worker(fd: int, epoch: int, implementation: str, count: int, width_max: int) -> subprocess.Popen:
    """The worker opens the ring through this process's /proc entry, as one that inherited nothing would."""
    path = f"/proc/{os.getpid()}/fd/{fd}"
    arguments = [path, str(epoch), implementation, str(count), str(width_max)]
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert worker.stdout.readline() == "ready\n"
    return worker


@pytest.mark.parametrize("producer", TWINS)
@pytest.mark.parametrize("consumer", TWINS)
def test_a_stream_crosses_from_one_process_to_another(producer, consumer):
    fd = create(1 << 18, implementation=consumer)
    worker = spawn_worker(fd, 1, producer, count=300, width_max=20_000)
    try:
        with attach_consumer(fd, implementation=consumer) as gateway:
            digest = b""
            for index in range(300):
                record = gateway.pop(timeout_s=30)
                assert record.header.chunk_index == index and record.header.digest_prev == digest
                digest = record.header.digest
            assert gateway.pop() is None
        assert worker.wait(10) == 0
    finally:
        worker.kill()
        worker.communicate()
        os.close(fd)


def produce_until_killed(fd: int, epoch: int, implementation: str, pixels: bytes) -> None:
    """In a forked child: pushes the same large chunk for ever, so that most moments lie inside a copy."""
    try:
        header = FrameHeader(
            session_id="abcdefghijklmnopqrstuvwxyz",
            worker_epoch=epoch,
            session_epoch=1,
            chunk_index=0,
            frames=1,
            height=1,
            width=len(pixels) // 3,
            steps=4,
            prompt_version=0,
            digest=bytes.fromhex(next_digest("", pixels)),
            digest_prev=b"",
        )
        producer = attach_producer(fd, worker_epoch=epoch, implementation=implementation)
        while True:
            producer.push(header, pixels, timeout_s=1)
    finally:
        os._exit(1)


@pytest.mark.parametrize("implementation", TWINS)
def test_a_producer_killed_at_any_moment_shows_no_half_record(implementation):
    """40 producers, each killed at a random moment of its work: no half record, and the next worker goes on."""
    rng = random.Random(5)
    fd = create(3 << 20, implementation=implementation)
    with attach_consumer(fd, implementation=implementation) as gateway:
        for epoch in range(1, 41):
            # Digests differ between epochs, so half of one chunk over half of another does not verify.
            pixels = rng.randbytes(3 * rng.randrange(100_000, 400_000))
            pid = os.fork()
            if pid == 0:
                produce_until_killed(fd, epoch, implementation, pixels)
            first = gateway.pop(timeout_s=60)
            assert first.header.worker_epoch == epoch
            kill_at_s = time.monotonic() + rng.uniform(0.0, 0.01)
            while time.monotonic() < kill_at_s:
                gateway.pop(timeout_s=0.001)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            while gateway.pop():
                pass
            assert gateway.used_bytes == 0
    os.close(fd)


def test_a_stopped_worker_that_wakes_after_its_successor_is_fenced():
    fd = create(1 << 20)
    worker = spawn_worker(fd, 1, "python", count=10_000, width_max=1000)
    try:
        with attach_consumer(fd) as gateway:
            assert gateway.pop(timeout_s=30)
            worker.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
            gateway.discard()
            with attach_producer(fd, worker_epoch=2):
                worker.send_signal(signal.SIGCONT)
                assert "taken over by worker epoch 2" in worker.communicate(timeout=30)[1]
            assert worker.returncode != 0
    finally:
        worker.kill()
        worker.communicate()
        os.close(fd)


@pytest.mark.skipif(frame_ring.IMPLEMENTATION != "native", reason="the Python twin holds the interpreter lock")
def test_copies_run_without_the_interpreter_lock():
    """While one thread copies 30 MiB chunks, another one's Python steps go on."""
    pixels = bytes(3 * (10 << 20))
    digest = bytes(32)
    header = FrameHeader(
        session_id="abcdefghijklmnopqrstuvwxyz",
        worker_epoch=1,
        session_epoch=1,
        chunk_index=0,
        frames=1,
        height=1,
        width=len(pixels) // 3,
        steps=4,
        prompt_version=0,
        digest=digest,
        digest_prev=b"",
    )
    fd = create(40 << 20)
    gaps_s: list[float] = []
    done = threading.Event()

    def watch() -> None:
        last_s = time.monotonic()
        while not done.is_set():
            time.sleep(0.0005)
            now_s = time.monotonic()
            gaps_s.append(now_s - last_s)
            last_s = now_s

    with attach_producer(fd, worker_epoch=1) as producer, attach_consumer(fd) as gateway:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        began_s = time.monotonic()
        for _ in range(8):
            producer.push(header, pixels)
            gateway.pop(verify=False)
        copying_s = time.monotonic() - began_s
        done.set()
        watcher.join()
    os.close(fd)
    # With the lock held the watcher could only run between copies, about twice per round.
    assert len(gaps_s) > 40, f"{len(gaps_s)} steps in {copying_s:.3f} s of copying"
