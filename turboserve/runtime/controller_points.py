"""The controller's hands in the arena and on the disk: what it drops, spills and reads back. One thread of its own.

Workers write recovery points; the controller, who knows which sessions there are, ends those of sessions that are
gone. It spills a suspended session's point to disk and reads it back into its own partition. Nothing here decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from turboserve.errors import ArenaFull, NotFound, PoolExhausted, TurboServeError
from turboserve.orchestrator.eviction import Partition
from turboserve.runtime.arena import KIND_POINT, Arena
from turboserve.runtime.controller_storage import StoredBytes
from turboserve.runtime.failpoints import failpoint
from turboserve.runtime.recovery_store import RecoveryStore
from turboserve.runtime.spill import SpillDirectory

SWEEP_S = 10.0
SPILL_TRIES = 3


Done = Callable[[str, int, str], None]
"""(session, bytes, why it is 0 bytes): `full` where there was no room."""


class ControllerPoints:
    """`post` brings a result to the controller's own thread: it is called with a function to run there."""

    def __init__(
        self, arena_fd: int, generation: int, folder: Path, disk_bytes: int, post: Callable[..., Any], log: Any
    ) -> None:
        # Every start of the controller is a new owner of partition 0: what an earlier one had only reserved is free.
        self._store = RecoveryStore(Arena.map(arena_fd, partition=0, owner_epoch=generation))
        self._files = SpillDirectory(folder, bytes_max=disk_bytes)
        self._post = post
        self._log = log
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="points")
        self._sweep_at_s = time.monotonic() + SWEEP_S

    def close(self) -> None:
        """Finish the one thing that is begun; what waits is left."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def on_disk(self) -> dict[str, int]:
        """session -> bytes of its point on disk."""
        return self._files.sessions()

    # ------------------------------------------------------------------ wishes, from the controller's thread

    def drop(self, session_id: str) -> None:
        """The session has ended."""
        self._thread.submit(self._guarded, self._drop, session_id)

    def drop_file(self, session_id: str) -> None:
        """The session goes on; what lies on disk is old."""
        self._thread.submit(self._guarded, self._files.drop, session_id)

    def drop_host(self, session_id: str) -> None:
        """What is in the arena lies on disk too. A newer point stays: a worker that was cut off may write late."""
        self._thread.submit(self._guarded, self._drop_host, session_id)

    def spill(self, session_id: str, done: Done) -> None:
        """`done(session, bytes on disk, why)`; 0 bytes: it stays where it is. The arena keeps its copy."""
        self._thread.submit(self._guarded, self._spill, session_id, done)

    def load(self, session_id: str, done: Done) -> None:
        """`done(session, bytes in the arena, why)`; 0 bytes: there is no usable point, or no room for it."""
        self._thread.submit(self._guarded, self._load, session_id, done)

    def sweep(self, known: Collection[str], now_s: float) -> None:
        """Every SWEEP_S: drop what belongs to no session. A worker that was cut off may have left it later."""
        if now_s >= self._sweep_at_s:
            self._sweep_at_s = now_s + SWEEP_S
            self._thread.submit(self._guarded, self._sweep, frozenset(known))

    def figures(self, done: Callable[[StoredBytes], None]) -> None:
        """`done(what is stored)`."""
        self._thread.submit(self._guarded, self._figures, done)

    # ------------------------------------------------------------------ in the thread

    def _guarded(self, do: Callable[..., object], *args: Any) -> None:
        try:
            do(*args)
        except Exception as error:
            # Losing a copy costs time, never a stream; a bug here must be seen all the same.
            self._log.error("recovery points", doing=do.__name__, error=str(error), exc_info=True)

    def _drop(self, session_id: str) -> None:
        self._store.drop(session_id)
        self._files.drop(session_id)

    def _drop_host(self, session_id: str) -> None:
        if not self._is_newer(session_id):
            self._store.drop(session_id)

    def _is_newer(self, session_id: str) -> bool:
        """Whether the arena has a newer point than the session's file; False where there is none."""
        on_disk = self._files.newest(session_id)
        extents = self._store.arena.find(session_id, kind=KIND_POINT)
        if on_disk is None or not extents or (extents[0].epoch, extents[0].chunk) <= on_disk:
            return False
        point = self._store.latest(session_id)  # all of its bytes are read: it is one that can be used
        return point is not None and (point.epoch, point.chunk) > on_disk

    def _spill(self, session_id: str, done: Done) -> None:
        bytes_, why = 0, "failed"
        try:
            bytes_ = self._spilled(session_id)
            failpoint("controller.spill.written")
        except PoolExhausted as error:
            why = "full"
            self._log.warning("no room on disk", session=session_id, error=str(error))
        except (TurboServeError, OSError) as error:
            self._log.error("recovery point not written to disk", session=session_id, error=str(error))
        finally:
            self._post(done, session_id, bytes_, why)

    def _spilled(self, session_id: str) -> int:
        """Bytes of the file. A session that was taken from its worker may be written to meanwhile: then once more."""
        for tries in range(SPILL_TRIES):
            try:
                return self._files.spill(self._store, session_id).file_bytes
            except NotFound:
                if tries == SPILL_TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def _load(self, session_id: str, done: Done) -> None:
        bytes_, why = 0, "failed"
        try:
            bytes_ = self._files.load(self._store, session_id).total_bytes
        except ArenaFull:
            why = "full"
        except (TurboServeError, OSError) as error:
            self._log.error("recovery point not read from disk", session=session_id, error=str(error))
        finally:
            self._post(done, session_id, bytes_, why)

    def _sweep(self, known: frozenset[str]) -> None:
        for session_id in set(self._store.sessions()) | set(self._files.sessions()):
            if session_id not in known:
                self._log.info("recovery points of no session dropped", session=session_id)
                self._drop(session_id)

    def _figures(self, done: Callable[[StoredBytes], None]) -> None:
        arena = self._store.arena
        ledgers = [arena.ledger(number) for number in range(arena.geometry.partition_count)]
        files = self._files.sessions()
        totals = {
            "arena_total_bytes": sum(one.total_bytes for one in ledgers),
            "arena_free_bytes": sum(one.free_bytes for one in ledgers),
            "arena_reserved_bytes": sum(one.reserved_bytes for one in ledgers),
            "arena_committed_bytes": sum(one.committed_bytes for one in ledgers),
            "disk_used_bytes": sum(files.values()),
            "disk_total_bytes": self._files.bytes_max,
        }
        partitions = tuple(Partition(one.total_bytes, one.total_bytes - one.free_bytes) for one in ledgers)
        shares = self._store.shares()
        newer = frozenset(one for one in files if one in shares and self._is_newer(one))
        self._post(done, StoredBytes(partitions, shares, files, totals, newer))
