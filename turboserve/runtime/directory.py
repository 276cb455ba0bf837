"""The durable record of who owns what: one SQLite file in WAL mode, written by the controller alone.

A change of owner is one compare-and-set of (owner, epoch): `own` succeeds only when the stored epoch is still the
one the caller saw, and commits before it returns. A timeout elsewhere is therefore never taken for a "no": whoever
is unsure asks the directory. Rows are small (a few hundred bytes); frames and tensors never come here.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turboserve.errors import Conflict, CorruptState
from turboserve.session import SessionRecord, SessionState

SCHEMA_VERSION = 4
"""2 added `request`, `move_id` and `move_target`, 3 `numerics_id` and `approximate_from`, 4 `point_node` (November
2026); a file of an earlier version is brought up to it."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sessions (
    session_id TEXT PRIMARY KEY, tenant TEXT NOT NULL, model TEXT NOT NULL, seed INTEGER NOT NULL,
    created_s REAL NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, steps INTEGER NOT NULL,
    state TEXT NOT NULL, epoch INTEGER NOT NULL, owner TEXT, reason TEXT NOT NULL, strikes INTEGER NOT NULL,
    request BLOB NOT NULL DEFAULT x'', move_id INTEGER NOT NULL DEFAULT 0, move_target TEXT NOT NULL DEFAULT '',
    numerics_id TEXT NOT NULL DEFAULT '', approximate_from INTEGER NOT NULL DEFAULT -1,
    point_node TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS wishes (number INTEGER PRIMARY KEY AUTOINCREMENT, op_id INTEGER NOT NULL UNIQUE,
    wishes TEXT NOT NULL);
"""
WISHES_KEPT = 256
"""Operators' wishes for workers; a gateway repeats one for seconds, not for so many others."""
_ADDED = (
    "ALTER TABLE sessions ADD COLUMN request BLOB NOT NULL DEFAULT x''",
    "ALTER TABLE sessions ADD COLUMN move_id INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE sessions ADD COLUMN move_target TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE sessions ADD COLUMN numerics_id TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE sessions ADD COLUMN approximate_from INTEGER NOT NULL DEFAULT -1",
    "ALTER TABLE sessions ADD COLUMN point_node TEXT NOT NULL DEFAULT ''",
)
_COLUMNS = "session_id, tenant, model, seed, created_s, width, height, steps, state, epoch, owner, reason, strikes"


@dataclass(frozen=True, slots=True)
class Stored:
    """A session as the directory has it: the record, what the gateway asked for (its message as msgpack bytes, empty
    in rows of version 1), the move that was under way (0 and "" for none), the numerics of the worker that had it last
    ("" unknown), the chunk from which on it goes on under others than it began with (-1: it does not), and the node
    where its newest recovery point lies ("" when it has had no worker, or in rows of versions before 4)."""

    record: SessionRecord
    request: bytes
    move_id: int
    move_target: str
    numerics_id: str
    approximate_from: int
    point_node: str = ""


class Directory:
    """Open directory file. One process at a time: a second one is refused by a file lock.

    Each call that changes something is durable when it returns: SQLite's log is synced at every commit. An error of
    the disk comes out as sqlite3.Error, and the process that gets one must stop: nothing it says is true any more.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = (path.parent / f"{path.name}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise Conflict(
                f"the directory {path} is in use by another controller", hint="stop it, or use another --data-dir"
            ) from None
        self._db = sqlite3.connect(path, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            self._check_version(path)
        except sqlite3.DatabaseError as error:
            self.close()
            raise CorruptState(
                f"the directory {path} cannot be read: {error}",
                hint="move it away: the gateway opens its sessions anew, from its own log",
            ) from None

    def _check_version(self, path: Path) -> None:
        found = self._db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
        if found is None:
            self._db.execute("INSERT INTO meta VALUES ('version', ?)", (str(SCHEMA_VERSION),))
        elif found[0] in ("1", "2", "3"):
            with self._transaction():
                have = {row[1] for row in self._db.execute("PRAGMA table_info(sessions)")}
                for change in _ADDED:
                    if change.split()[5] not in have:
                        self._db.execute(change)
                self._db.execute("UPDATE meta SET value = ? WHERE key = 'version'", (str(SCHEMA_VERSION),))
        elif found[0] != str(SCHEMA_VERSION):
            raise CorruptState(f"{path} has directory version {found[0]}", expected=f"version {SCHEMA_VERSION}")

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    def next_epoch(self, name: str) -> int:
        """A number that grows with every call, also across restarts (gateway, controller and worker epochs)."""
        with self._transaction():
            key = f"epoch:{name}"
            row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
            value = int(row[0]) + 1 if row else 1
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, str(value)))
            return value

    def insert(self, record: SessionRecord, request: bytes = b"") -> None:
        """A new session with what was asked for; Conflict when the id is known."""
        try:
            self._db.execute(
                f"INSERT INTO sessions ({_COLUMNS}, request) VALUES ({', '.join('?' * 14)})",
                (
                    *(record.session_id, record.tenant, record.model, record.seed, record.created_s),
                    *(record.width, record.height, record.steps, record.state.value, record.epoch),
                    *(record.owner, record.reason, record.strikes, request),
                ),
            )
        except sqlite3.IntegrityError:
            raise Conflict(f"session {record.session_id} exists already") from None

    def own(self, session_id: str, seen_epoch: int, owner: str | None, state: SessionState) -> int:
        """Compare-and-set of the owner: the new epoch, durable. Conflict when somebody else was first."""
        changed = self._db.execute(
            "UPDATE sessions SET owner = ?, state = ?, epoch = epoch + 1 WHERE session_id = ? AND epoch = ?",
            (owner, state.value, session_id, seen_epoch),
        ).rowcount
        if changed != 1:
            raise Conflict(
                f"session {session_id} is no longer at epoch {seen_epoch}", hint="read the directory and decide again"
            )
        return seen_epoch + 1

    def set_state(self, session_id: str, state: SessionState, reason: str = "", strikes: int | None = None) -> None:
        """State and reason; the owner and the epoch stay."""
        self._db.execute(
            "UPDATE sessions SET state = ?, reason = ?, strikes = COALESCE(?, strikes) WHERE session_id = ?",
            (state.value, reason, strikes, session_id),
        )

    def set_move(self, session_id: str, move_id: int, target: str) -> None:
        """The migration that is under way; 0 and "" when it is over."""
        self._db.execute(
            "UPDATE sessions SET move_id = ?, move_target = ? WHERE session_id = ?", (move_id, target, session_id)
        )

    def record_wish(self, op_id: int, wishes: list[tuple[str, str]]) -> None:
        """What the launcher is about to be asked for, for an operator: each worker's (request_id, worker_id)."""
        with self._transaction():
            self._db.execute("INSERT INTO wishes (op_id, wishes) VALUES (?, ?)", (op_id, json.dumps(wishes)))
            self._db.execute("DELETE FROM wishes WHERE number <= (SELECT MAX(number) FROM wishes) - ?", (WISHES_KEPT,))

    def recorded_wish(self, op_id: int) -> list[tuple[str, str]] | None:
        """What this or an earlier controller asked for under that wish; None when it is new."""
        row = self._db.execute("SELECT wishes FROM wishes WHERE op_id = ?", (op_id,)).fetchone()
        return None if row is None else [(request_id, worker_id) for request_id, worker_id in json.loads(row[0])]

    def set_numerics(self, session_id: str, numerics_id: str, approximate_from: int) -> None:
        """Which bits it is made of from now on; see `Stored`."""
        self._db.execute(
            "UPDATE sessions SET numerics_id = ?, approximate_from = ? WHERE session_id = ?",
            (numerics_id, approximate_from, session_id),
        )

    def set_point(self, session_id: str, node: str) -> None:
        """The node where the session's newest recovery point lies."""
        self._db.execute("UPDATE sessions SET point_node = ? WHERE session_id = ?", (node, session_id))

    def forget(self, session_id: str) -> None:
        """Drop a session that ended."""
        self._db.execute("DELETE FROM sessions WHERE session_id = ?", (session_id,))

    def sessions(self) -> list[SessionRecord]:
        """All records, oldest first."""
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM sessions ORDER BY created_s, session_id").fetchall()
        return [_record(row) for row in rows]

    def stored(self) -> list[Stored]:
        """All sessions with what was asked for, oldest first."""
        rows = self._db.execute(
            f"SELECT request, move_id, move_target, numerics_id, approximate_from, point_node, {_COLUMNS} FROM sessions"
            " ORDER BY created_s, session_id"
        ).fetchall()
        return [Stored(_record(row[6:]), *row[:6]) for row in rows]

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


def _record(row: tuple[Any, ...]) -> SessionRecord:
    """A row in the order of _COLUMNS, which is the order of the record's fields."""
    fields = dict(zip(_COLUMNS.split(", "), row, strict=True))
    return SessionRecord(**(fields | {"state": SessionState(fields["state"])}))


class _Transaction:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")
