"""Recovery points on disk: the same point comes back, and one that was touched does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from turboserve.errors import CorruptState, NotFound, PoolExhausted
from turboserve.runtime.arena import Arena, create_arena
from turboserve.runtime.recovery_store import RecoveryPoint, RecoveryStore
from turboserve.runtime.spill_files import SpillFiles

SESSION = "s" * 26
SLAB = 4096


@pytest.fixture
def store():
    fd = create_arena(64 * SLAB, slab_bytes=SLAB)
    arena = Arena.map(fd, partition=0, owner_epoch=1)
    yield RecoveryStore(arena)
    arena.close()
    os.close(fd)


def point_in(store: RecoveryStore, session: str = SESSION) -> RecoveryPoint:
    pages = [store.put_page(session, 3, f"kv/{chunk}", bytes([chunk]) * 5000, chunk=chunk) for chunk in range(3)]
    return store.commit_point(
        session, 3, 3, pages=pages, tail=b"t" * 9000, frames=[b"f" * 100, b"g" * 50], digest=b"d" * 32, meta=b"meta"
    )


def content(store: RecoveryStore, point: RecoveryPoint) -> tuple:
    pages = [b"".join(store.read_page(page)) for page in point.pages]
    facts = (point.epoch, point.chunk, point.digest, point.meta, [(page.key, page.chunk) for page in point.pages])
    return facts, pages, b"".join(store.read_tail(point)), store.read_frames(point)


def test_there_and_back(tmp_path: Path, store: RecoveryStore):
    files = SpillFiles(tmp_path, 1 << 20)
    point = point_in(store)
    before = content(store, point)
    size = files.write(store, point)
    assert files.sessions() == {SESSION: size}
    store.drop(SESSION)
    assert store.arena.ledger().committed_bytes == 0
    assert content(store, files.read(SESSION, store)) == before
    assert store.latest(SESSION) is not None
    files.drop(SESSION)
    files.drop(SESSION)
    with pytest.raises(NotFound):
        files.read(SESSION, store)


def test_no_byte_can_be_changed_or_cut_off(tmp_path: Path, store: RecoveryStore):
    files = SpillFiles(tmp_path, 1 << 20)
    files.write(store, point_in(store))
    store.drop(SESSION)
    whole = files.path(SESSION).read_bytes()
    for at in range(0, len(whole), 97):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
            files.path(SESSION).write_bytes(damaged)
            with pytest.raises(CorruptState):
                files.read(SESSION, store)
    assert store.arena.ledger().committed_bytes == 0


def test_the_disk_is_bounded_and_a_failed_write_leaves_the_old_file(tmp_path: Path, store: RecoveryStore, monkeypatch):
    files = SpillFiles(tmp_path, 40_000)
    size = files.write(store, point_in(store))
    with pytest.raises(PoolExhausted):
        files.write(store, point_in(store, "o" * 26))
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write(store, point_in(store))
    assert files.sessions() == {SESSION: size} and not list(tmp_path.glob("*.part"))


def test_what_a_killed_writer_left_is_swept(tmp_path: Path, store: RecoveryStore):
    (tmp_path / f"{SESSION}.part").write_bytes(b"half")
    files = SpillFiles(tmp_path, 1 << 20)
    assert files.sessions() == {} and not list(tmp_path.iterdir())


def test_an_arena_without_room_takes_nothing(tmp_path: Path, store: RecoveryStore):
    files = SpillFiles(tmp_path, 1 << 20)
    files.write(store, point_in(store))
    store.drop(SESSION)
    taken = store.arena.reserve("x" * 26, 1, 58 * SLAB)
    before = store.arena.ledger()
    with pytest.raises(PoolExhausted):
        files.read(SESSION, store)
    after = store.arena.ledger()
    assert (after.free_bytes, after.committed_bytes) == (before.free_bytes, before.committed_bytes)
    store.arena.free(taken)
