"""The arena's contract, over both twins of its table and across them."""

from __future__ import annotations

import os
import struct
from contextlib import contextmanager

import numpy as np
import pytest

from turboserve.errors import ArenaFull, ConfigError, Conflict, CorruptState, InvalidRequest, NotFound
from turboserve.runtime import native
from turboserve.runtime.arena import Arena, ExtentId, Ledger, create_arena
from turboserve.runtime.arena_table import HEADER_BYTES

SLAB = 4096
A, B = "a" * 26, "b" * 26


TWINS = ["python", *(["native"] if native.IMPLEMENTATION == "native" else [])]
MIXES = [(one, other) for one in TWINS for other in TWINS]
_mix = MIXES[0]


@pytest.fixture(autouse=True, params=MIXES, ids="-".join)
def mix(request):
    """Which twin works for the first worker, and which for everybody else."""
    global _mix
    _mix = request.param
    return request.param


@contextmanager
def arenas(slabs=8, partition_count=2):
    """Two workers and an onlooker over one memory."""
    one, other = _mix
    fd = create_arena(slabs * partition_count * SLAB, partition_count=partition_count, slab_bytes=SLAB)
    try:
        with (
            Arena.map(fd, partition=0, owner_epoch=1, implementation=one) as first,
            Arena.map(fd, partition=1, owner_epoch=1, implementation=other) as second,
            Arena.map(fd, implementation=other) as onlooker,
        ):
            yield fd, first, second, onlooker
    finally:
        os.close(fd)


def put(arena: Arena, session: str, data: bytes, *, epoch=1, chunk=0, meta=b""):
    reservation = arena.reserve(session, epoch, len(data))
    reservation.write(0, data)
    return arena.commit(reservation, chunk, bytes([chunk % 256]) * 32, meta)


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def test_an_extent_exists_from_its_commit_on_for_every_process():
    with arenas() as (_, first, second, onlooker):
        data = noise(3 * SLAB - 5)
        reservation = first.reserve(A, 4, len(data))
        reservation.write(0, data)
        assert onlooker.find(A) == second.find() == []
        extent = first.commit(reservation, 7, b"\1" * 32, b"meta")
        for arena in (first, second, onlooker):
            (found,) = arena.find(A)
            assert found == extent
            assert (found.epoch, found.chunk, found.meta, found.payload_bytes) == (4, 7, b"meta", len(data))
            assert b"".join(arena.read(found)) == arena.read_bytes(found) == data
            assert arena.find(B) == []
            arena.check()


def test_newest_first_is_by_epoch_then_chunk():
    with arenas() as (_, first, second, onlooker):
        for epoch, chunk in [(1, 9), (2, 1), (1, 3), (2, 0)]:
            put(first if epoch == 1 else second, A, b"x", epoch=epoch, chunk=chunk)
        assert [(one.epoch, one.chunk) for one in onlooker.find(A)] == [(2, 1), (2, 0), (1, 9), (1, 3)]


def test_the_ledger_is_exact_after_every_step():
    with arenas(slabs=8, partition_count=1 + 1) as (_, first, _second, onlooker):
        total = 16 * SLAB
        assert onlooker.ledger() == Ledger(total, total, 0, 0)
        reservation = first.reserve(A, 1, 2 * SLAB + 1)
        assert onlooker.ledger() == Ledger(total, total - 3 * SLAB, 3 * SLAB, 0)
        extent = first.commit(reservation, 0)
        assert onlooker.ledger() == Ledger(total, total - 3 * SLAB, 0, 3 * SLAB)
        assert onlooker.ledger(1) == Ledger(8 * SLAB, 8 * SLAB, 0, 0)
        assert first.free(extent) and not first.free(extent)
        assert onlooker.ledger() == Ledger(total, total, 0, 0)


def test_a_full_arena_refuses_before_any_copy_and_says_how_full_it_is():
    with arenas(slabs=4) as (_, first, _second, _onlooker):
        put(first, A, noise(3 * SLAB))
        before = first.ledger()
        with pytest.raises(ArenaFull, match="2 slabs of 4096 B; 1 of 4 are free"):
            first.reserve(B, 1, SLAB + 1)
        assert first.ledger() == before
        first.reserve(B, 1, SLAB)


def test_what_another_process_frees_is_room_for_the_owner():
    with arenas(slabs=4) as (_, first, second, onlooker):
        extent = put(first, A, noise(4 * SLAB))
        assert second.free(extent) and not onlooker.free(extent)
        assert first.find(A) == [] and onlooker.ledger(0).free_bytes == 4 * SLAB
        with pytest.raises(NotFound):
            onlooker.read_bytes(extent)
        again = put(first, B, noise(4 * SLAB, 1))
        assert not second.free(extent), "a late free of the old extent must not hit the new one"
        assert onlooker.read_bytes(again) == noise(4 * SLAB, 1)


def test_scattered_slabs_make_one_payload():
    with arenas(slabs=8) as (_, first, _second, onlooker):
        small = [put(first, A, noise(SLAB, i), chunk=i) for i in range(8)]
        for extent in small[::2]:
            first.free(extent)
        data = noise(4 * SLAB - 1, 99)
        reservation = first.reserve(B, 1, len(data))
        assert len(reservation.addresses()) == 4
        reservation.write(100, data[100:])
        reservation.write(0, data[:100])
        extent = first.commit(reservation, 0)
        assert onlooker.read_bytes(extent) == data
        assert [onlooker.read_bytes(one) for one in small[1::2]] == [noise(SLAB, i) for i in range(1, 8, 2)]
        first.check()


def test_a_successor_keeps_commits_and_frees_reservations():
    with arenas() as (fd, first, _second, onlooker):
        kept = put(first, A, noise(5000))
        first.reserve(B, 1, 5000)
        dropped = put(first, B, noise(100))
        onlooker.free(dropped)
        with Arena.map(fd, partition=0, owner_epoch=2, implementation=_mix[1]) as successor:
            assert successor.ledger(0) == Ledger(8 * SLAB, 6 * SLAB, 0, 2 * SLAB)
            assert successor.read_bytes(kept) == noise(5000)
            successor.check()
            with pytest.raises(Conflict, match="taken over by epoch 2"):
                first.reserve(A, 1, 1)
            with pytest.raises(Conflict, match="belongs to epoch 2"):
                Arena.map(fd, partition=0, owner_epoch=2, implementation=_mix[1])
            put(successor, B, noise(6 * SLAB))


def test_the_launcher_sweeps_what_a_dead_owner_reserved():
    with arenas() as (_, first, second, onlooker):
        put(first, A, noise(100))
        first.reserve(B, 1, 3 * SLAB)
        second.reserve(B, 1, SLAB)
        assert onlooker.sweep(0) == 3 * SLAB and onlooker.sweep(0) == 0
        assert onlooker.ledger(0) == Ledger(8 * SLAB, 7 * SLAB, 0, SLAB)
        assert onlooker.ledger(1).reserved_bytes == SLAB


def test_a_zombies_commit_of_a_swept_reservation_is_refused():
    with arenas() as (_, first, _second, onlooker):
        reservation = first.reserve(A, 1, 10)
        onlooker.sweep(0)
        with pytest.raises(Conflict, match="not reserved"):
            first.commit(reservation, 0)
        assert onlooker.find() == []


def test_flipped_bytes_do_not_verify():
    with arenas() as (fd, first, _second, onlooker):
        extent = put(first, A, noise(3 * SLAB))
        geometry = first.geometry
        at = geometry.data_at + extent.id.entry * SLAB + 2 * SLAB + 17
        (byte,) = os.pread(fd, 1, at)
        os.pwrite(fd, bytes([byte ^ 4]), at)
        with pytest.raises(CorruptState, match="do not verify"):
            onlooker.read(extent)
        os.pwrite(fd, b"\0\0\0\0", geometry.headers_at + HEADER_BYTES * extent.id.entry + 60)
        os.pwrite(fd, struct.pack("<q", 5), geometry.headers_at + HEADER_BYTES * extent.id.entry + 56)
        with pytest.raises(CorruptState, match="header of extent"):
            onlooker.find(A)


def test_wrong_uses_are_said():
    with arenas() as (fd, first, _second, onlooker):
        with pytest.raises(Conflict, match="owns no partition"):
            onlooker.reserve(A, 1, 1)
        with pytest.raises(InvalidRequest, match="26"):
            first.reserve("short", 1, 1)
        with pytest.raises(InvalidRequest, match="meta"):
            first.commit(first.reserve(A, 1, 1), 0, meta=bytes(400))
        with pytest.raises(ConfigError, match="partition 2"):
            Arena.map(fd, partition=2, owner_epoch=1, implementation=_mix[0])
        with pytest.raises(NotFound):
            onlooker.get(ExtentId(99, 1))
        reader, writer = os.pipe()
        with pytest.raises(ConfigError, match="no arena"):
            Arena.map(reader)
        os.close(reader)
        os.close(writer)
    with pytest.raises(ConfigError):
        create_arena(1 << 20, slab_bytes=1000)


def test_an_empty_extent_takes_a_slab_and_reads_as_nothing():
    with arenas() as (_, first, _second, onlooker):
        extent = put(first, A, b"", meta=b"only this")
        assert onlooker.read_bytes(extent) == b"" and extent.slab_bytes == SLAB
