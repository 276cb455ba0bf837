"""The directory: one compare-and-set decides, and what it said is still there after a kill."""

from __future__ import annotations

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
