"""Spilled sessions: whole or as before, whatever is cut, flipped, full or killed."""

from __future__ import annotations

import os
import random
import resource
import signal
import time

import numpy as np
import pytest

from turboserve.errors import ArenaFull, CorruptState, InvalidRequest, NotFound, PoolExhausted
from turboserve.runtime.arena import Arena, create_arena
from turboserve.runtime.recovery_store import RecoveryStore
from turboserve.runtime.spill import SpillDirectory

SLAB = 4096
A, B = "a" * 26, "b" * 26


@pytest.fixture
def store():
    fd = create_arena(512 * SLAB, slab_bytes=SLAB)
    with Arena.map(fd, partition=0, owner_epoch=1) as arena:
        yield RecoveryStore(arena)
    os.close(fd)


def noise(count: int, *seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def put(store: RecoveryStore, session: str = A, chunk: int = 3, page_bytes: int = 20_000):
    pages = [store.put_page(session, 2, f"kv/{i}", noise(page_bytes, chunk, i), chunk=i) for i in range(chunk)]
    return store.commit_point(
        session, 2, chunk, pages=pages, tail=noise(7000, chunk), frames=[noise(99, 1), b""], digest=b"d" * 32, meta=b"m"
    )


def same(store: RecoveryStore, chunk: int, point) -> bool:
    pages = [b"".join(store.read_page(page)) for page in point.pages]
    return (
        pages == [noise(20_000, chunk, i) for i in range(chunk)]
        and b"".join(store.read_tail(point)) == noise(7000, chunk)
        and store.read_frames(point) == [noise(99, 1), b""]
        and (point.epoch, point.chunk, point.digest, point.meta) == (2, chunk, b"d" * 32, b"m")
    )


def test_a_spilled_session_comes_back_in_another_life(store, tmp_path):
    put(store)
    spilled = SpillDirectory(tmp_path / "spill", bytes_max=1 << 20).spill(store, A)
    assert (spilled.epoch, spilled.chunk) == (2, 3)
    store.drop(A)
    folder = SpillDirectory(tmp_path / "spill", bytes_max=1 << 20)
    assert folder.sessions() == {A: spilled.file_bytes} and folder.used_bytes == spilled.file_bytes
    point = folder.load(store, A)
    assert same(store, 3, point) and store.latest(A) == point
    again = folder.load(store, A)  # its pages are here, so only the tail is read
    assert again.pages == point.pages and same(store, 3, again)
    assert folder.drop(A) == spilled.file_bytes and folder.drop(A) == 0 == folder.used_bytes
    with pytest.raises(NotFound):
        folder.load(store, A)
    with pytest.raises(NotFound):
        folder.spill(store, B)
    with pytest.raises(InvalidRequest):
        folder.load(store, "../../../../etc/passwd-------")
    assert os.stat(folder.path).st_mode & 0o777 == 0o700


def test_a_file_that_was_cut_or_flipped_anywhere_does_not_load(store, tmp_path):
    put(store, chunk=1, page_bytes=2000)
    folder = SpillDirectory(tmp_path, bytes_max=1 << 20)
    folder.spill(store, A)
    store.drop(A)
    path = tmp_path / f"{A}.state"
    whole = path.read_bytes()
    rng = random.Random(1)
    bits = [*range(8 * 200), *(rng.randrange(8 * len(whole)) for _ in range(300))]
    for bit in bits:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CorruptState):
            folder.load(store, A)
    for length in [0, 1, 15, 16, 31, *(rng.randrange(len(whole)) for _ in range(30)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptState):
            folder.load(store, A)
    assert store.arena.ledger().free_bytes == store.arena.ledger().total_bytes
    path.write_bytes(whole)
    folder.load(store, A)


def test_only_who_has_the_key_makes_files_that_load(store, tmp_path):
    put(store)
    SpillDirectory(tmp_path, bytes_max=1 << 20).spill(store, A)
    with pytest.raises(CorruptState):
        SpillDirectory(tmp_path, bytes_max=1 << 20, key=b"k" * 32).load(store, A)
    (tmp_path / f"{A}.state").rename(tmp_path / f"{B}.state")
    with pytest.raises(CorruptState, match="holds"):
        SpillDirectory(tmp_path, bytes_max=1 << 20).load(store, B)


def test_the_folder_is_bounded_and_keeps_the_old_file(store, tmp_path):
    put(store)
    folder = SpillDirectory(tmp_path, bytes_max=100_000)
    first = folder.spill(store, A)
    put(store, B)
    with pytest.raises(PoolExhausted, match="at most 100000"):
        folder.spill(store, B)
    put(store, A, chunk=4, page_bytes=40_000)
    with pytest.raises(PoolExhausted):
        folder.spill(store, A)
    assert folder.sessions() == {A: first.file_bytes} and list(tmp_path.glob("*.tmp")) == []
    store.drop(A)
    assert same(store, 3, folder.load(store, A))


def test_a_full_disk_keeps_the_old_file(store, tmp_path):
    """In a child with a limit on file sizes, which fails in the middle of the write as a full disk does."""
    put(store)
    folder = SpillDirectory(tmp_path, bytes_max=1 << 30)
    folder.spill(store, A)
    put(store, A, chunk=9)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            folder.spill(store, A)
        except PoolExhausted:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert list(tmp_path.glob("*.tmp")) == []
    store.drop(A)
    assert same(store, 3, folder.load(store, A))


def test_a_full_arena_loads_nothing(store, tmp_path):
    put(store)
    folder = SpillDirectory(tmp_path, bytes_max=1 << 20)
    folder.spill(store, A)
    store.drop(A)
    store.arena.reserve(B, 1, store.arena.ledger().free_bytes - 6 * SLAB)
    before = store.arena.ledger()
    with pytest.raises(ArenaFull):
        folder.load(store, A)
    assert store.arena.ledger() == before and store.latest(A) is None


def test_kill_at_any_moment_leaves_a_whole_file(store, tmp_path):
    """A child spills two points in turn; whenever it dies, one of the two loads."""
    rng = random.Random(2)
    put(store, A, chunk=2)
    folder = SpillDirectory(tmp_path, bytes_max=1 << 30)
    folder.spill(store, A)
    for _ in range(15):
        pid = os.fork()
        if pid == 0:
            try:
                chunk = 2
                while True:
                    chunk = 5 - chunk
                    put(store, A, chunk)
                    folder.spill(store, A)
                    store.drop(A)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.005, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        fd = create_arena(512 * SLAB, slab_bytes=SLAB)
        with Arena.map(fd, partition=0, owner_epoch=1) as arena:
            fresh = RecoveryStore(arena)
            reopened = SpillDirectory(tmp_path, bytes_max=1 << 30)
            point = reopened.load(fresh, A)
            assert point.chunk in (2, 3) and same(fresh, point.chunk, point)
            assert list(tmp_path.glob("*.tmp")) == []
        os.close(fd)
