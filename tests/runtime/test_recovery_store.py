"""Recovery points: pages written once, one manifest a point, the last whole one wins."""

from __future__ import annotations

import os

import numpy as np
import pytest

from turboserve.errors import ArenaFull, InvalidRequest, NotFound
from turboserve.runtime.arena import Arena, create_arena
from turboserve.runtime.recovery_store import RecoveryStore

SLAB = 4096
A, B = "a" * 26, "b" * 26


@pytest.fixture
def stores():
    fd = create_arena(64 * SLAB, partition_count=2, slab_bytes=SLAB)
    with Arena.map(fd, partition=0, owner_epoch=1) as first, Arena.map(fd, partition=1, owner_epoch=1) as second:
        yield RecoveryStore(first), RecoveryStore(second)
    os.close(fd)


def noise(count: int, *seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def test_a_successor_finds_pages_tail_frames_digest_and_meta(stores):
    first, second = stores
    pages = [first.put_page(A, 1, f"kv/{i}", noise(6000, i), chunk=i) for i in range(3)]
    tail, frames = noise(9000, 9), [noise(500, 10), b"", noise(4096, 11)]
    made = first.commit_point(A, 1, 3, pages=pages, tail=tail, frames=frames, digest=b"\7" * 32, meta=b"m" * 900)
    point = second.latest(A)
    assert point == made
    assert (point.epoch, point.chunk, point.digest, point.meta) == (1, 3, b"\7" * 32, b"m" * 900)
    assert [page.key for page in point.pages] == ["kv/0", "kv/1", "kv/2"]
    assert [b"".join(second.read_page(page)) for page in point.pages] == [noise(6000, i) for i in range(3)]
    assert b"".join(second.read_tail(point)) == tail
    assert second.read_frames(point) == frames
    assert second.latest(B) is None


def test_a_new_point_uses_old_pages_again_and_drops_what_nobody_names(stores):
    first, second = stores
    window: list = []
    for chunk in range(8):
        window.append(first.put_page(A, 1, f"kv/{chunk}", noise(SLAB, chunk), chunk=chunk))
        window = window[-3:]
        point = first.commit_point(A, 1, chunk + 1, pages=window, tail=noise(SLAB, 50, chunk), digest=b"")
        first.drop_older(A, point)
        # 3 pages and one point of two slabs (manifest and tail); while the window fills, fewer.
        assert first.arena.ledger(0).committed_bytes == (len(window) + 2) * SLAB
        assert second.latest(A) == point and point.digest == b""
    assert second.drop(A) == 5 * SLAB and second.latest(A) is None
    assert first.sessions() == {}
    first.arena.check()


def test_pages_written_ahead_of_their_point_stay(stores):
    first, _ = stores
    old = first.put_page(A, 1, "kv/0", b"0", chunk=0)
    point = first.commit_point(A, 1, 1, pages=[old], tail=b"t", digest=b"")
    ahead = first.put_page(A, 1, "kv/1", b"1", chunk=1)
    first.drop_older(A, point)
    assert bytes(first.read_page(ahead)[0]) == b"1"
    # A new owner goes on from the point in epoch 2: what epoch 1 wrote ahead is a leftover.
    second_point = first.commit_point(A, 2, 1, pages=[old], tail=b"t", digest=b"")
    first.drop_older(A, second_point)
    with pytest.raises(NotFound):
        first.read_page(ahead)
    assert bytes(first.read_page(old)[0]) == b"0"


def test_a_newer_epoch_wins_over_a_later_chunk_of_a_zombie(stores):
    first, second = stores
    first.commit_point(A, 1, 16, pages=[], tail=b"old", digest=b"")
    second.commit_point(A, 2, 16, pages=[], tail=b"new", digest=b"")
    first.commit_point(A, 1, 17, pages=[], tail=b"zombie", digest=b"")
    assert b"".join(second.read_tail(second.latest(A))) == b"new"


def test_a_point_that_does_not_verify_is_passed_over(stores):
    first, second = stores
    page = first.put_page(A, 1, "kv/0", noise(SLAB, 1), chunk=0)
    good = first.commit_point(A, 1, 1, pages=[page], tail=b"good", digest=b"")
    newer = first.commit_point(A, 1, 2, pages=[page], tail=b"newer", digest=b"")
    assert second.latest(A) == newer
    first.arena._slabs[newer.extent.id.entry * SLAB + newer.tail_offset] ^= 1
    assert second.latest(A) == good
    first.arena._slabs[page.extent.entry * SLAB + 5] ^= 1
    assert second.latest(A) is None


def test_a_point_cannot_name_a_page_that_has_ended(stores):
    first, _ = stores
    page = first.put_page(A, 1, "kv/0", b"x", chunk=0)
    first.arena.free(page.extent)
    with pytest.raises(NotFound, match="kv/0"):
        first.commit_point(A, 1, 1, pages=[page], tail=b"", digest=b"")


def test_without_room_nothing_changes(stores):
    first, _ = stores
    point = first.commit_point(A, 1, 1, pages=[], tail=b"t", digest=b"")
    before = first.arena.ledger()
    with pytest.raises(ArenaFull):
        first.commit_point(A, 1, 2, pages=[], tail=bytes(40 * SLAB), digest=b"")
    with pytest.raises(ArenaFull):
        first.put_page(A, 1, "kv/1", bytes(40 * SLAB), chunk=1)
    with pytest.raises(InvalidRequest, match="digest"):
        first.commit_point(A, 1, 2, pages=[], tail=b"", digest=bytes(33))
    assert first.arena.ledger() == before and first.latest(A) == point


def test_nothing_of_an_earlier_session_is_left_in_a_point(stores):
    first, _ = stores
    page = first.put_page(A, 1, "kv/0", b"\xaa" * (20 * SLAB), chunk=0)
    first.arena.free(page.extent)
    point = first.commit_point(B, 1, 1, pages=[], tail=b"t" * 100, frames=[b"f" * 30, b"g"], digest=b"", meta=b"m")
    assert b"".join(first.arena.read(point.extent)).count(b"\xaa") == 0


def test_copies_in_pieces_into_a_reserved_point(stores):
    first, second = stores
    pending = first.begin_point(A, 1, 1, pages=[], tail_bytes=3 * SLAB, frame_bytes=[10], meta=b"")
    assert second.latest(A) is None
    tail = noise(3 * SLAB, 4)
    pending.write_tail(SLAB, tail[SLAB:])
    pending.write_tail(0, tail[:SLAB])
    pending.write_frames(0, b"0123456789")
    pending.commit(b"\1" * 32)
    point = second.latest(A)
    assert b"".join(second.read_tail(point)) == tail and second.read_frames(point) == [b"0123456789"]
    first.begin_point(A, 1, 2, pages=[], tail_bytes=SLAB).cancel()
    assert first.arena.ledger(0).reserved_bytes == 0
