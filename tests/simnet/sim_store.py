"""What survives processes: the node's arena with its recovery points, the controller's directory, the gateway's log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sim_model import Oracle
from sim_world import Violation, World

from turboserve.errors import Conflict
from turboserve.runtime.worker_events import FinishedChunk
from turboserve.server.log_records import Frontier, Record, replay
from turboserve.session import SessionRecord, SessionState

POINT_BYTES = 100


@dataclass(frozen=True)
class Point:
    """One recovery point: whole, or not there."""

    epoch: int
    next_index: int
    state: bytes
    digest: str
    made: tuple[FinishedChunk, ...]


class Arena:
    """Points by session, newest epoch first. It outlives every process but the launcher."""

    def __init__(self, world: World, capacity: int, disk_capacity: int) -> None:
        self.world = world
        self.capacity = capacity
        self.disk_capacity = disk_capacity
        self.full = False
        self.points: dict[str, Point] = {}
        self.disk: dict[str, Point] = {}
        self.on_commit: Callable[[str, Point], None] = lambda sid, point: None
        self.elsewhere: Callable[[str], bool] = lambda sid: False
        """Whether the newest point is to be looked for on another node."""

    def put(self, sid: str, point: Point) -> bool:
        """Write whole, commit last; a newer point replaces an older one only after that."""
        if self.full or (sid not in self.points and len(self.points) >= self.capacity):
            return False
        before = self.latest(sid)
        if before is not None and (before.epoch, before.next_index) > (point.epoch, point.next_index):
            return True  # a zombie's: it is kept beside the newer one, and never read
        self.points[sid] = point
        self.on_commit(sid, point)
        return True

    def latest(self, sid: str) -> Point | None:
        """The newest committed point; one on disk has to be loaded first."""
        return self.points.get(sid)

    def spill(self, sid: str) -> int:
        """To disk as well; its bytes there, 0 when there is none or no room."""
        if sid not in self.points or (sid not in self.disk and len(self.disk) >= self.disk_capacity):
            return 0
        self.disk[sid] = self.points[sid]
        return POINT_BYTES

    def newer(self, sid: str) -> bool:
        """Whether memory has a newer point than the disk, where both have one (runtime/controller_points.py)."""
        point, file = self.points.get(sid), self.disk.get(sid)
        if point is None or file is None:
            return False
        return (point.epoch, point.next_index) > (file.epoch, file.next_index)

    def drop_host(self, sid: str) -> None:
        """The disk has it too. A newer one stays."""
        if self.newer(sid):
            self.world.cover("a point written late stays")
            return
        if sid in self.points and self.disk.get(sid) != self.points[sid] and not self.elsewhere(sid):
            raise Violation("I6 the only copy of a point is freed")
        self.points.pop(sid, None)

    def load(self, sid: str) -> int:
        """From disk; its bytes in memory, 0 when there is none or no room."""
        if sid in self.disk and sid not in self.points and not self.full and len(self.points) < self.capacity:
            self.points[sid] = self.disk[sid]
        return POINT_BYTES if sid in self.points else 0

    def drop(self, sid: str) -> None:
        self.points.pop(sid, None)
        self.disk.pop(sid, None)


@dataclass
class Row:
    record: SessionRecord
    request: bytes = b""
    move_id: int = 0
    move_target: str = ""
    point_node: str = ""


class CrashNow(Exception):
    """The controller dies at this very point."""


class SimDirectory:
    """The directory in memory: what a call has returned from is durable. A crash may come before or after a write."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: dict[str, Row] = {}
        self.owners: dict[tuple[str, int], str | None] = {}
        self.epochs: dict[str, int] = {}
        self.numbers: dict[str, int] = {}
        self.wishes: dict[int, list[tuple[str, str]]] = {}
        self.crash_in = 0
        self.ended: set[str] = set()
        self.on_insert: Callable[[str], None] = lambda sid: None

    def _write(self, write: Callable[[], Any]) -> Any:
        if self.crash_in:
            self.crash_in -= 1
            if self.crash_in == 0:
                if self.world.rng.random() < 0.5:
                    write()
                raise CrashNow
        return write()

    def insert(self, record: SessionRecord, request: bytes = b"") -> None:
        if record.session_id in self.rows:
            raise Conflict(f"session {record.session_id} exists already")
        copy = SessionRecord(**{name: getattr(record, name) for name in _FIELDS})
        self.on_insert(record.session_id)
        self._write(lambda: self.rows.__setitem__(record.session_id, Row(copy, request)))

    def own(self, session_id: str, seen_epoch: int, owner: str | None, state: SessionState) -> int:
        row = self.rows.get(session_id)
        if row is None or row.record.epoch != seen_epoch:
            raise Conflict(f"session {session_id} is no longer at epoch {seen_epoch}")

        def write() -> None:
            epoch = seen_epoch + 1
            if self.owners.setdefault((session_id, epoch), owner) != owner:
                raise Violation(f"I1 epoch {epoch} of one session had two owners")
            row.record.epoch, row.record.owner, row.record.state = epoch, owner, state

        self._write(write)
        return seen_epoch + 1

    def set_state(self, session_id: str, state: SessionState, reason: str = "", strikes: int | None = None) -> None:
        row = self.rows.get(session_id)
        if row is not None:

            def write() -> None:
                row.record.state, row.record.reason = state, reason
                row.record.strikes = row.record.strikes if strikes is None else strikes

            self._write(write)

    def set_move(self, session_id: str, move_id: int, target: str) -> None:
        row = self.rows.get(session_id)
        if row is not None:

            def write() -> None:
                row.move_id, row.move_target = move_id, target

            self._write(write)

    def record_wish(self, op_id: int, wishes: list[tuple[str, str]]) -> None:
        self._write(lambda: self.wishes.__setitem__(op_id, wishes))

    def recorded_wish(self, op_id: int) -> list[tuple[str, str]] | None:
        return self.wishes.get(op_id)

    def set_numerics(self, session_id: str, numerics_id: str, approximate_from: int) -> None:
        pass  # all workers here make the same bits

    def set_point(self, session_id: str, node: str) -> None:
        row = self.rows.get(session_id)
        if row is not None:
            self._write(lambda: setattr(row, "point_node", node))

    def forget(self, session_id: str) -> None:
        self._write(lambda: self.rows.pop(session_id, None))

    def next_epoch(self, name: str) -> int:
        self.numbers[name] = self.numbers.get(name, 0) + 1
        return self.numbers[name]

    def stored(self) -> list[Row]:
        """Copies, as they would be read from the file."""
        return [
            Row(
                SessionRecord(**{name: getattr(row.record, name) for name in _FIELDS}),
                row.request,
                row.move_id,
                row.move_target,
                row.point_node,
            )
            for row in self.rows.values()
        ]


_FIELDS = (
    *("session_id", "tenant", "model", "seed", "created_s", "width", "height", "steps"),
    *("state", "epoch", "owner", "reason", "strikes"),
)


@dataclass
class SimLog:
    """The gateway's log: appended at once, durable a little later; a kill takes what is not, or leaves some of it."""

    world: World
    oracle: Oracle
    disk: list[Record] = field(default_factory=list)
    pending: list[Record] = field(default_factory=list)
    frontier: dict[str, int] = field(default_factory=dict)
    count: int = 0

    def append(self, record: Record) -> None:
        self.pending.append(record)

    def commit(self) -> int:
        """All that is pending; how many records of this gateway's life are durable now."""
        for record in self.pending:
            self._keep(record)
        self.count += len(self.pending)
        self.pending.clear()
        return self.count

    def _keep(self, record: Record) -> None:
        self.disk.append(record)
        self.oracle.durable(record)
        if isinstance(record, Frontier):
            self.frontier[record.sid] = max(self.frontier.get(record.sid, 0), record.delivered)

    def crash(self) -> None:
        """What the kernel had got of the last batch may be on disk, although nobody was told."""
        for record in self.pending[: self.world.rng.randint(0, len(self.pending))]:
            self._keep(record)
        self.pending.clear()
        self.count = 0

    def read(self) -> list[Any]:
        """The sessions a starting gateway finds; the log is rewritten to just these."""
        known = list(replay(self.disk).values())
        self.disk = [record for one in known for record in one.as_records()]
        return known
