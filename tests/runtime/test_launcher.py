"""The launcher with real child processes: restarts, order of stopping, and nobody outlives it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from turboserve.errors import ConfigError
from turboserve.runtime import lifeline, ports
from turboserve.runtime.launcher import Launcher

ROOT = Path(__file__).parents[2]
CHILD = """
from turboserve.runtime import lifeline
import sys, time
lifeline.hold_to_parent(int(sys.argv[1]))
time.sleep(600)
"""

LAUNCHER = f"""
import json, logging, os, sys
sys.path.insert(0, {str(ROOT)!r})
from turboserve.runtime import lifeline
from turboserve.runtime.launcher import Launcher

class Log:
    def __getattr__(self, name):
        return lambda event, **fields: None

launcher = Launcher(Log(), shutdown_timeout_s=5)
def starter(generation):
    fd = lifeline.json_fd("{{}}", "config")
    return [sys.executable, "-c", {CHILD!r}, str(launcher.parent_fd)], fd, ()
for name in "abc":
    launcher.add(name, starter)
said = []
def poll():
    pids = launcher.pids
    if len(pids) == 3 and pids != (said[-1] if said else None):
        said.append(pids)
        print(json.dumps(pids), flush=True)
sys.exit(launcher.run(poll))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(what, timeout_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def launched():
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    pids = json.loads(process.stdout.readline())
    yield process, pids
    process.kill()
    process.wait()
    process.stdout.close()


def test_no_child_outlives_a_killed_launcher(launched):
    process, pids = launched
    assert all(alive(pid) for pid in pids.values())
    process.kill()
    process.wait()
    assert wait_until(lambda: not any(alive(pid) for pid in pids.values()), 5.0)


def test_sigterm_stops_all_and_exits_0(launched):
    process, pids = launched
    process.terminate()
    assert process.wait(timeout=15) == 0
    assert not any(alive(pid) for pid in pids.values())


STUBBORN = CHILD.replace("time.sleep(600)", "signal.signal(15, lambda *_: None)\nwhile True: time.sleep(1)").replace(
    "import sys, time", "import signal, sys, time"
)


@pytest.mark.parametrize(("signals", "least_s", "most_s"), [(2, 2.5, 30.0), (3, 0.0, 4.0)])
def test_a_second_signal_waits_a_little_and_a_third_not_at_all(signals, least_s, most_s):
    """Without either it would be a minute."""
    program = LAUNCHER.replace(repr(CHILD), repr(STUBBORN)).replace("shutdown_timeout_s=5", "shutdown_timeout_s=60")
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        pids = json.loads(process.stdout.readline())
        time.sleep(0.5)  # until the children have their handlers
        began_s = time.monotonic()
        for _ in range(signals):
            process.terminate()
            time.sleep(0.2)
        assert process.wait(timeout=30) == 0
        assert least_s < time.monotonic() - began_s < most_s
        assert not any(alive(pid) for pid in pids.values())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_sigint_exits_130(launched):
    process, _ = launched
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=15) == 130


def test_a_dead_child_is_started_again(launched):
    process, pids = launched
    os.kill(pids["b"], signal.SIGKILL)
    again = json.loads(process.stdout.readline())
    assert again["b"] != pids["b"]
    assert (again["a"], again["c"]) == (pids["a"], pids["c"])


def test_a_child_that_keeps_dying_ends_the_launcher(monkeypatch):
    class Log:
        def __getattr__(self, name):
            return lambda event, **fields: None

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    monkeypatch.setattr("turboserve.runtime.launcher.RESTARTS_MAX", 1)
    launcher = Launcher(Log())
    launcher.add(
        "bad", lambda generation: ([sys.executable, "-c", "raise SystemExit(3)"], lifeline.json_fd("", "c"), ())
    )
    try:
        assert launcher.run() == 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_taken_port_names_its_owner_and_a_free_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            ports.listen_socket("127.0.0.1", port)
    assert f"pid {os.getpid()}" in str(caught.value)
    free = int(str(caught.value.hint).split("--port ")[1].split()[0])
    ports.listen_socket("127.0.0.1", free).close()
