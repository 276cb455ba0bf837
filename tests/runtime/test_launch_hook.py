"""`--scale-hook`: the user's command gets each wish once, as JSON, again when it fails, and within bounds."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from turboserve.runtime import cluster, launch_hook
from turboserve.runtime import messages as m
from turboserve.runtime.cluster import FleetHost
from turboserve.runtime.fleet_link import FleetLink
from turboserve.runtime.launch_hook import HookBackend


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict]] = []

    def __getattr__(self, name):
        return lambda event, **fields: self.lines.append((event, fields))


def events_of(backend: HookBackend, count: int, timeout_s: float = 10.0) -> list[m.FleetEvent]:
    found: list[m.FleetEvent] = []
    deadline_s = time.monotonic() + timeout_s
    while len(found) < count:
        found += backend.events()
        assert time.monotonic() < deadline_s, found
        time.sleep(0.01)
    return found


@pytest.fixture
def command(tmp_path: Path) -> str:
    """Appends each request to a file; fails as often as a counter file says."""
    script = tmp_path / "hook.sh"
    script.write_text(
        f"""#!/bin/sh
cat > {tmp_path}/last; echo "$1 $(cat {tmp_path}/last)" >> {tmp_path}/calls
if [ -s {tmp_path}/fail ]; then : > {tmp_path}/fail; echo "no machine is free" >&2; exit 3; fi
"""
    )
    script.chmod(0o700)
    return str(script)


def calls(tmp_path: Path) -> list[tuple[str, dict]]:
    lines = (tmp_path / "calls").read_text().splitlines()
    return [(line.split(" ", 1)[0], json.loads(line.split(" ", 1)[1])) for line in lines]


def test_the_command_gets_each_wish_as_json(tmp_path: Path, command: str):
    backend = HookBackend(command, {"model": "shapes", "controller": "10.0.0.1:5"}, Log())
    backend.add("w3", "7-1")
    assert [(one.worker_id, one.kind) for one in events_of(backend, 1)] == [("w3", "started")]
    backend.add("w3", "7-2")  # it is there already
    backend.remove("w3", "7-3")
    assert events_of(backend, 1)[0].kind == "exited"
    asked = calls(tmp_path)
    assert [action for action, _ in asked] == ["add", "remove"]
    assert asked[0][1] == {
        "request_id": "7-1", "action": "add", "worker_id": "w3", "model": "shapes", "controller": "10.0.0.1:5"
    }  # fmt: skip


def test_a_call_that_fails_is_made_again_with_the_same_request_id(tmp_path: Path, command: str, monkeypatch):
    monkeypatch.setattr(launch_hook, "BACK_OFF_MIN_S", 0.01)
    (tmp_path / "fail").write_text("once")
    log = Log()
    backend = HookBackend(command, {}, log)
    backend.add("w3", "7-1")
    assert events_of(backend, 1)[0].kind == "started"
    assert [request["request_id"] for _, request in calls(tmp_path)] == ["7-1", "7-1"]
    assert any("no machine is free" in str(fields) for _, fields in log.lines)


def test_a_call_that_hangs_or_always_fails_is_given_up(monkeypatch):
    monkeypatch.setattr(launch_hook, "BACK_OFF_MIN_S", 0.01)
    monkeypatch.setattr(launch_hook, "ATTEMPTS_MAX", 2)
    backend = HookBackend("sleep 5;", {}, Log(), timeout_s=0.1)
    backend.add("w3", "7-1")
    (event,) = events_of(backend, 1)
    assert event.kind == "failed" and "more than" in event.reason and backend.present() == []


def test_a_wish_counts_once_however_often_it_comes():
    class Backend:
        def __init__(self) -> None:
            self.added: list[str] = []
            self.said = [m.FleetEvent(worker_id="w1", kind="started")]

        def add(self, worker_id, request_id):
            self.added.append(worker_id)

        def events(self):
            said, self.said = self.said, []
            return said

        def present(self):
            return [m.FleetEvent(worker_id="w0", kind="started")]

    backend = Backend()
    host = FleetHost(backend, Log())
    theirs = FleetLink(host.new_link())
    wish = m.FleetWish(request_id="1-1", kind="add", worker_id="w5")
    theirs.send(wish)
    theirs.send(wish)
    host.poll()
    assert backend.added == ["w5"]
    assert [one.worker_id for one in theirs.receive()] == ["w0", "w5", "w1"]
    again = FleetLink(host.new_link())
    assert theirs.receive() == [] and theirs.closed, "a new controller has a line of its own"
    again.send(wish)
    host.poll()
    assert backend.added == ["w5"], "another controller repeats the wish of the one before"
    assert [(one.worker_id, one.kind) for one in again.receive()] == [("w0", "started"), ("w5", "exited")]
    again.send(m.FleetWish(request_id="2-1", kind="add", worker_id="w6"))
    host.new_link().close()  # it died before the launcher looked, and may have answered its operator
    assert backend.added == ["w5", "w6"]


def test_requests_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "REQUESTS_KEPT", 3)
    seen = cluster.SeenWishes()
    assert [seen.is_new(one) for one in ("a", "b", "a", "c", "d", "d")] == [True, True, False, True, True, False]
    assert seen.is_new("a"), "the oldest is forgotten"
