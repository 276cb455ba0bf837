"""The controller's hands in the arena and on the disk: what leaves the arena is on disk, also where
somebody writes late."""

from __future__ import annotations

import logging
import os
import queue

import pytest
from test_spill import SLAB, A, put

from turboserve.runtime.arena import Arena, create_arena
from turboserve.runtime.controller_points import ControllerPoints
from turboserve.runtime.recovery_store import RecoveryStore

WAIT_S = 30.0


@pytest.fixture
def arena_fd():
    fd = create_arena(512 * SLAB, slab_bytes=SLAB, partition_count=2)
    yield fd
    os.close(fd)


def test_a_point_leaves_the_arena_once_it_is_on_disk_and_a_newer_one_stays(arena_fd, tmp_path):
    """A worker that was cut off goes on for a while: its point comes after the spill, or between that and the drop."""
    answers: queue.Queue[tuple] = queue.Queue()
    points = ControllerPoints(
        arena_fd, 1, tmp_path / "spill", 1 << 20, lambda done, *found: answers.put(found), logging.getLogger()
    )

    def spilled() -> int:
        points.spill(A, print)
        _, bytes_, _ = answers.get(timeout=WAIT_S)
        return bytes_

    def counted():
        points.figures(print)
        (found,) = answers.get(timeout=WAIT_S)
        return found

    try:
        with Arena.map(arena_fd, partition=1, owner_epoch=1) as arena:
            store = RecoveryStore(arena)
            put(store, chunk=3)
            first_bytes = spilled()
            assert first_bytes and A in counted().shares and not counted().newer
            late = put(store, chunk=4)
            assert counted().newer == {A}
            points.drop_host(A)
            assert counted().newer == {A} and store.latest(A) == late
            assert spilled() > first_bytes and not counted().newer
            points.drop_host(A)
            assert A not in counted().shares
    finally:
        points.close()
