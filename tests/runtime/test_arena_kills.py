"""Owners that die: the Python twin at every store it makes, both twins by kill -9 at random moments."""

from __future__ import annotations

import os
import random
import signal
import time

import numpy as np
import pytest

from turboserve.errors import ArenaFull
from turboserve.runtime import native
from turboserve.runtime.arena import Arena, create_arena
from turboserve.runtime.recovery_store import RecoveryStore

TWINS = ["python", *(["native"] if native.IMPLEMENTATION == "native" else [])]
SLAB = 4096
A, B = "a" * 26, "b" * 26


class Killed(BaseException):
    pass


class Dying:
    """A view of shared memory whose owner dies at the n-th store; a long store gets half done."""

    left = 0

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def __getitem__(self, at):
        return self._view[at]

    def __setitem__(self, at, value) -> None:
        if Dying.left == 0:
            if isinstance(at, slice):
                half = (at.stop - at.start) // 2
                self._view[at.start : at.start + half] = value[:half]
            raise Killed
        Dying.left -= 1
        self._view[at] = value

    def __len__(self) -> int:
        return len(self._view)

    def release(self) -> None:
        self._view.release()


def steps(arena: Arena):
    """What the owner does, one step at a time; each yield says which chunks must exist then."""
    first = arena.reserve(A, 1, 2 * SLAB)
    yield {0}
    first.write(0, b"x" * 2 * SLAB)
    extent = arena.commit(first, 1, b"d" * 32, b"meta")
    yield {0, 1}
    second = arena.reserve(A, 1, 3 * SLAB)
    yield {0, 1}
    arena.commit(second, 2)
    yield {0, 1, 2}
    arena.free(extent)
    yield {0, 2}
    third = arena.reserve(B, 1, 4 * SLAB)
    yield {0, 2}
    arena.commit(third, 3)
    yield {0, 2, 3}


def test_the_python_twin_killed_at_every_store():
    """After n stores, for every n: a successor sees the state before or after the step, and all else is free."""
    deaths = 0
    for kill_at in range(1000):
        fd = create_arena(8 * SLAB, slab_bytes=SLAB)
        with Arena.map(fd, partition=0, owner_epoch=1, implementation="python") as arena:
            kept = arena.reserve(A, 1, 10)
            kept.write(0, b"0123456789")
            arena.commit(kept, 0)
            arena.free(arena.commit(arena.reserve(A, 1, SLAB), 9))
            table = arena._table
            plain = (table._state, table._dropped, table._links, table._headers)
            names = ("_state", "_dropped", "_links", "_headers")
            Dying.left = kill_at
            for name in names:
                setattr(table, name, Dying(getattr(table, name)))
            before = after = {0}
            walk = steps(arena)
            died = False
            try:
                for after in walk:
                    before = after
            except Killed:
                died = True
            deaths += died
            for name, view in zip(names, plain, strict=True):
                setattr(table, name, view)
            with Arena.map(fd, partition=0, owner_epoch=2, implementation=TWINS[-1]) as successor:
                successor.check()
                chunks = {one.chunk for one in successor.find()}
                following = next_states(before) if died else [before]
                assert chunks in following, f"killed at store {kill_at}: {chunks}, expected one of {following}"
                for extent in successor.find():
                    successor.read_bytes(extent)
                ledger = successor.ledger()
                assert ledger.reserved_bytes == 0
                assert ledger.committed_bytes == sum(one.slab_bytes for one in successor.find())
                if ledger.free_bytes:
                    successor.reserve(B, 1, ledger.free_bytes)
        os.close(fd)
        if not died:
            break
    assert not died and deaths > 15


def next_states(before: set[int]) -> list[set[int]]:
    order = [{0}, {0}, {0, 1}, {0, 1}, {0, 1, 2}, {0, 2}, {0, 2}, {0, 2, 3}]
    return [state for at, state in enumerate(order) if state == before or (at and order[at - 1] == before)]


def write_until_killed(fd: int, partition: int, epoch: int, implementation: str) -> None:
    """In a forked child: recovery points of two sessions, for ever."""
    try:
        store = RecoveryStore(Arena.map(fd, partition=partition, owner_epoch=epoch, implementation=implementation))
        rng = np.random.default_rng(epoch)
        pages: dict[str, list] = {A: [], B: []}
        chunk = 0
        while True:
            for session in (A, B):
                try:
                    pages[session].append(
                        store.put_page(session, epoch, "kv", rng.bytes(int(rng.integers(1, 5 * SLAB))), chunk=chunk)
                    )
                    pages[session] = pages[session][-4:]
                    tail = rng.bytes(int(rng.integers(1, 9 * SLAB)))
                    point = store.commit_point(session, epoch, chunk + 1, pages=pages[session], tail=tail, digest=b"d")
                    store.drop_older(session, point)
                except ArenaFull:
                    store.drop(session)
                    pages[session] = []
            chunk += 1
    finally:
        os._exit(1)


@pytest.mark.parametrize("implementation", TWINS)
def test_workers_killed_at_random_moments_leave_whole_points_and_an_exact_ledger(implementation):
    rng = random.Random(3)
    fd = create_arena(160 * SLAB, partition_count=2, slab_bytes=SLAB)
    with Arena.map(fd, implementation=implementation) as onlooker:
        store = RecoveryStore(onlooker)
        for epoch in range(1, 31):
            partition = epoch % 2
            pid = os.fork()
            if pid == 0:
                write_until_killed(fd, partition, epoch, implementation)
            deadline_s = time.monotonic() + 20
            while not any(one.epoch == epoch for one in onlooker.find(A)) and time.monotonic() < deadline_s:
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.02))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            onlooker.sweep(partition)
            onlooker.check()
            ledger = onlooker.ledger()
            assert ledger.reserved_bytes == 0
            assert ledger.committed_bytes == sum(one.slab_bytes for one in onlooker.find())
            assert ledger.free_bytes + ledger.committed_bytes == ledger.total_bytes
            for extent in onlooker.find():
                onlooker.read_bytes(extent)
            for session in (A, B):
                point = store.latest(session)
                if point is not None:
                    newest = max(one.age_key for one in onlooker.find(session, kind=2))
                    assert (point.epoch, point.chunk) == newest[:2], "the newest point must be whole"
            if epoch % 5 == 0:
                store.drop(A)
                store.drop(B)
                assert onlooker.ledger().committed_bytes == 0
    os.close(fd)
