"""The directory: one compare-and-set decides, and what it said is still there after a kill."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from turboserve.errors import Conflict, CorruptState
from turboserve.runtime.directory import Directory
from turboserve.session import SessionRecord, SessionState, new_session_id


def record(session_id: str = "a" * 26, **changes: object) -> SessionRecord:
    fields = {"tenant": "t", "model": "shapes", "seed": 7, "created_s": 1.5, "width": 96, "height": 96, "steps": 4}
    return SessionRecord(session_id=session_id, **(fields | changes))


def test_round_trip(tmp_path):
    directory = Directory(tmp_path / "d.sqlite")
    first, second = record(), record("b" * 26, created_s=2.0, seed=2**62)
    directory.insert(second)
    directory.insert(first)
    directory.set_state(first.session_id, SessionState.FAILED, "poison", strikes=2)
    directory.close()
    found = Directory(tmp_path / "d.sqlite").sessions()
    assert [one.session_id for one in found] == [first.session_id, second.session_id]
    assert (found[0].state, found[0].reason, found[0].strikes) == (SessionState.FAILED, "poison", 2)
    assert found[1].seed == 2**62


def test_only_the_first_of_two_owners_wins(tmp_path):
    directory = Directory(tmp_path / "d.sqlite")
    directory.insert(record())
    assert directory.own("a" * 26, 0, "w0", SessionState.LOADING) == 1
    with pytest.raises(Conflict, match="epoch 0"):
        directory.own("a" * 26, 0, "w1", SessionState.LOADING)
    assert directory.sessions()[0].owner == "w0"
    with pytest.raises(Conflict):
        directory.insert(record())


def test_second_controller_is_refused(tmp_path):
    first = Directory(tmp_path / "d.sqlite")
    with pytest.raises(Conflict, match="another controller"):
        Directory(tmp_path / "d.sqlite")
    first.close()
    Directory(tmp_path / "d.sqlite").close()


def test_other_version_is_refused(tmp_path):
    directory = Directory(tmp_path / "d.sqlite")
    directory._db.execute("UPDATE meta SET value = '99' WHERE key = 'version'")
    directory.close()
    with pytest.raises(CorruptState, match="version 99"):
        Directory(tmp_path / "d.sqlite")


def test_epochs_grow_across_restarts(tmp_path):
    seen = []
    for _ in range(3):
        directory = Directory(tmp_path / "d.sqlite")
        seen += [directory.next_epoch("gateway"), directory.next_epoch("w0")]
        directory.close()
    assert seen == [1, 1, 2, 2, 3, 3]


def test_wishes_for_workers_come_back_and_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setattr("turboserve.runtime.directory.WISHES_KEPT", 2)
    directory = Directory(tmp_path / "d.sqlite")
    for op_id in (70, 50, 60):
        directory.record_wish(op_id, [(f"1-{op_id}", "w2"), (f"1-{op_id + 1}", "w3")])
    directory.close()
    again = Directory(tmp_path / "d.sqlite")
    assert again.recorded_wish(50) == [("1-50", "w2"), ("1-51", "w3")]
    assert again.recorded_wish(60) is not None and again.recorded_wish(70) is None
    with pytest.raises(sqlite3.IntegrityError):
        again.record_wish(60, [])


def test_what_own_returned_survives_a_kill(tmp_path):
    """A process is killed at once after `own` answered; the answer must be in the file."""
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from turboserve.runtime.directory import Directory
from turboserve.session import SessionRecord, SessionState
d = Directory(Path({str(tmp_path)!r}) / "d.sqlite")
known = {{one.session_id: one for one in d.sessions()}}
sid = "a" * 26
if sid not in known:
    d.insert(SessionRecord(sid, "t", "shapes", 7, 0.0, 96, 96, 4))
epoch = d.own(sid, known[sid].epoch if sid in known else 0, "w0", SessionState.LOADING)
print(epoch, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    for turn in range(1, 6):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == -9, done.stderr
        assert int(done.stdout) == turn


def test_session_ids_are_long_and_differ():
    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(lambda _: new_session_id(), range(1000)))
    assert len(ids) == 1000
    assert all(len(one) == 26 and one.isalnum() and one == one.lower() for one in ids)


def test_the_numerics_come_back_and_an_older_file_has_none(tmp_path):
    directory = Directory(tmp_path / "d.sqlite")
    directory.insert(record())
    directory.insert(record("b" * 26, created_s=2.0))
    directory.set_numerics("a" * 26, "abc", 7)
    directory.close()
    again = Directory(tmp_path / "d.sqlite")
    assert [(one.numerics_id, one.approximate_from) for one in again.stored()] == [("abc", 7), ("", -1)]
    for column in ("numerics_id", "approximate_from"):
        again._db.execute(f"ALTER TABLE sessions DROP COLUMN {column}")
    again._db.execute("UPDATE meta SET value = '2' WHERE key = 'version'")
    again.close()
    old = Directory(tmp_path / "d.sqlite")
    assert [(one.numerics_id, one.approximate_from) for one in old.stored()] == [("", -1)] * 2
    old.set_numerics("a" * 26, "abc", -1)
    assert old.stored()[0].numerics_id == "abc"


def test_what_was_asked_for_and_the_move_under_way_come_back(tmp_path):
    directory = Directory(tmp_path / "d.sqlite")
    directory.insert(record(), b"asked")
    directory.own("a" * 26, 0, "w0", SessionState.LOADING)
    directory.set_move("a" * 26, 7, "w1")
    directory.close()
    (stored,) = Directory(tmp_path / "d.sqlite").stored()
    assert (stored.request, stored.move_id, stored.move_target, stored.record.owner) == (b"asked", 7, "w1", "w0")


def version_1(path: Path) -> None:
    """A file as the first version made it."""
    db = sqlite3.connect(path, isolation_level=None)
    db.executescript(
        """PRAGMA journal_mode=WAL;
        CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
        CREATE TABLE sessions (
            session_id TEXT PRIMARY KEY, tenant TEXT NOT NULL, model TEXT NOT NULL, seed INTEGER NOT NULL,
            created_s REAL NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, steps INTEGER NOT NULL,
            state TEXT NOT NULL, epoch INTEGER NOT NULL, owner TEXT, reason TEXT NOT NULL, strikes INTEGER NOT NULL
        ) WITHOUT ROWID;
        INSERT INTO meta VALUES ('version', '1'), ('epoch:w0', '5');
        INSERT INTO sessions VALUES
            ('aaaaaaaaaaaaaaaaaaaaaaaaaa', 't', 'shapes', 7, 1.5, 96, 96, 4, 'running', 3, 'w0', '', 0);"""
    )
    db.close()


def test_a_file_of_version_1_is_brought_up_to_date(tmp_path):
    version_1(tmp_path / "d.sqlite")
    directory = Directory(tmp_path / "d.sqlite")
    (stored,) = directory.stored()
    assert (stored.record.epoch, stored.record.owner, stored.request, stored.move_id) == (3, "w0", b"", 0)
    assert directory.next_epoch("w0") == 6
    directory.set_move("a" * 26, 7, "w1")
    directory.close()
    assert Directory(tmp_path / "d.sqlite").stored()[0].move_id == 7


def test_a_write_ahead_log_cut_or_damaged_anywhere_leaves_a_whole_earlier_state(tmp_path):
    """What is in the log up to the damage counts, transaction by transaction; nothing half done, no epoch twice."""
    origin = tmp_path / "origin"
    directory = Directory(origin / "d.sqlite")
    directory._db.execute("PRAGMA wal_autocheckpoint=0")
    states = []
    for number in range(12):
        sid = f"{number % 3}".rjust(26, "a")
        known = {one.session_id: one for one in directory.sessions()}
        if sid not in known:
            directory.insert(record(sid), b"asked")
        else:
            directory.own(sid, known[sid].epoch, f"w{number}", SessionState.LOADING)
        states.append({one.session_id: (one.epoch, one.owner) for one in directory.sessions()})
    image = (origin / "d.sqlite").read_bytes()
    log = (origin / "d.sqlite-wal").read_bytes()
    directory.close()
    allowed = [{}, *states]
    rng = random.Random(7)
    lasts = set()
    for turn in range(120):
        at = rng.randrange(len(log))
        damaged = log[:at] if turn % 2 else log[:at] + bytes([log[at] ^ 0x40]) + log[at + 1 :]
        folder = tmp_path / f"t{turn}"
        folder.mkdir()
        (folder / "d.sqlite").write_bytes(image)
        (folder / "d.sqlite-wal").write_bytes(damaged)
        found = Directory(folder / "d.sqlite")
        now = {one.session_id: (one.epoch, one.owner) for one in found.sessions()}
        assert now in allowed
        lasts.add(allowed.index(now))
        found.next_epoch("controller")
        found.close()
    assert len(lasts) > 6, "damage at many places"


def test_a_file_that_is_no_database_is_said_to_be_one(tmp_path):
    (tmp_path / "d.sqlite").write_bytes(b"not a database" * 500)
    with pytest.raises(CorruptState, match="cannot be read"):
        Directory(tmp_path / "d.sqlite")
