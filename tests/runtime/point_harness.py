"""An arena and engines on it, for tests of what leaves with a session and comes back."""

from __future__ import annotations

import os

from turboserve.runtime.arena import Arena, create_arena
from turboserve.runtime.background_points import BackgroundPoints
from turboserve.runtime.engine import Engine
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.recovery_store import RecoveryStore
from turboserve.runtime.session_points import SessionPoints
from turboserve.runtime.snapshot import SnapshotShape

SLAB_BYTES = 4096


class Node:
    """One node's arena; each `engine` is another worker's, with a partition of its own."""

    def __init__(self, bytes_: int = 8 << 20, *, workers: int = 3, slab_bytes: int = SLAB_BYTES) -> None:
        self.fd = create_arena(bytes_, name="test", partition_count=workers, slab_bytes=slab_bytes)
        self.arenas: list[Arena] = []
        self.beside: list[BackgroundPoints] = []
        self.reader = Arena.map(self.fd)

    def engine(
        self,
        model,
        *,
        slots: int = 4,
        numerics_id: str = "n",
        every: int = 1,
        cost=None,
        background: bool = False,
        partition: int | None = None,
        owner_epoch: int = 1,
    ) -> Engine:
        partition = len(self.arenas) if partition is None else partition
        arena = Arena.map(self.fd, partition=partition, owner_epoch=owner_epoch)
        self.arenas.append(arena)
        layout = model.state_layout()
        points = SessionPoints(RecoveryStore(arena), SnapshotShape(model.spec, layout, numerics_id))
        pool = KvPool(layout, slots, model.device)
        beside = BackgroundPoints(points, layout, pool.device) if background else None
        self.beside += [beside] if beside is not None else []
        return Engine(model, pool, cost, points=points, recovery_every_chunks=every, background=beside)

    @property
    def store(self) -> RecoveryStore:
        return RecoveryStore(self.reader)

    def committed_bytes(self) -> int:
        self.reader.check()
        ledger = self.reader.ledger()
        assert ledger.free_bytes + ledger.reserved_bytes + ledger.committed_bytes == ledger.total_bytes
        assert ledger.reserved_bytes == 0
        return ledger.committed_bytes

    def close(self) -> None:
        for one in self.beside:
            one.close()
        for arena in [*self.arenas, self.reader]:
            arena.close()
        os.close(self.fd)


def run(engine: Engine) -> list:
    """All passes there are; the events."""
    events = []
    while engine.has_work:
        events += engine.run_pass()
    return events
