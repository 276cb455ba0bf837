"""`turboserve top` and `turboserve explain` against canned answers; `top` also in a terminal of its own."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from canned_server import canned
from click.testing import CliRunner
from rich.console import Console

from turboserve.cli._server import bar, sparkline
from turboserve.cli._top_screen import Look, screen
from turboserve.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[2]
A, B, C = "a" * 26, "bbbb" + "c" * 22, "zzzz" + "d" * 22
CLUSTER: dict[str, Any] = {
    "clock": {"time_s": 100.0, "unix_s": 1.7e9},
    "workers": [
        {"id": "w0", "state": "ready", "active": 2, "capacity": 4, "busy_share": 0.5, "chunk_latency_ms": 61.0},
        {"id": "w1", "state": "draining", "active": 0, "capacity": 4},
    ],
    "sessions": {"active": 2, "suspended": 1, "failed": 1, "closed": 7},
    "session_list": [
        {"id": A, "state": "active", "worker": "w0", "tier": "device"},
        {"id": B, "state": "migrating", "worker": "w0", "tier": "device"},
        {"id": C, "state": "suspended", "worker": None, "tier": "host"},
    ],
    "decisions": [
        {"time_s": 90.0, "event": "place", "session": A, "worker": "w0", "reason": "least loaded"},
        {"time_s": 98.0, "event": "migrate", "session": B, "source": "w0", "worker": "w1", "reason": "drain of w0"},
    ],
    "totals": {"on_time_share_1m": 0.99999, "on_time_share": 1.0, "live_chunks": 1234},
}
HISTORY = {"latency_p95_ms": [10.0, None, 40.0], "late": [0, 0, 1], "time_s": [1, 2, 3]}
ANSWERS = {"/v1/cluster": (200, CLUSTER), "/v1/admin/history?seconds=120": (200, HISTORY)}


def drawn(look: Look, width: int, height: int = 40) -> list[str]:
    out = Console(width=width, no_color=True, force_terminal=False, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    out.print(screen(look, width, height))
    return out.export_text().splitlines()


def test_bars_and_sparklines() -> None:
    assert bar(0, 8) == "" and bar(1, 8) == "█" * 8 and bar(2, 8) == "█" * 8 and bar(0.5, 1) == "▌"
    assert sparkline([0.0, None, 5.0, 10.0]) == "▁ ▅█" and sparkline([None, None]) == "  " and sparkline([]) == ""


@pytest.mark.parametrize("width", [40, 60, 100, 160])
def test_the_screen_fits_every_width(width: int) -> None:
    lines = drawn(Look("http://127.0.0.1:8000", CLUSTER, HISTORY), width)
    assert all(len(line) <= width for line in lines), lines
    text = "\n".join(lines)
    for needed in ("w0", "draining", "2 active", "1 failed", "99.99 %", "q quits", "migrate"):
        assert needed in text, needed
    if width >= 100:
        assert "bbbb→" in text and "host   1: zzzz" in text and "drain of w0" in text and "w0 → w1" in text


def test_a_low_terminal_keeps_the_workers_and_leaves_decisions_out() -> None:
    text = "\n".join(drawn(Look("x", CLUSTER, HISTORY), 100, 12))
    assert "w0" in text and "w1" in text and "least loaded" not in text


def test_trouble_is_said_with_the_age_of_the_figures() -> None:
    text = "\n".join(drawn(Look("x", CLUSTER, HISTORY, age_s=12.0, trouble="nobody answers"), 100))
    assert "12 s old" in text and "nobody answers; trying again" in text and "w0" in text


def test_once_and_json() -> None:
    with canned(ANSWERS) as server:
        env = {"TURBOSERVE_URL": server.url}
        result = CliRunner(env=env).invoke(main, ["top", "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["cluster"] == CLUSTER
        result = CliRunner(env=env).invoke(main, ["top", "--once"])
        assert result.exit_code == 0 and "w0" in result.stderr and result.stdout == ""
    result = CliRunner(env=env).invoke(main, ["top", "--once"])
    assert result.exit_code == 1 and "error" in result.stderr


def test_live_in_a_terminal_through_an_outage() -> None:
    """It draws, says when the server is gone, finds it again by itself, and leaves on q with the terminal as it was."""
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    seen = b""

    def until(words: bytes, timeout_s: float = 30.0) -> None:
        nonlocal seen
        end_s = time.monotonic() + timeout_s
        while words not in seen:
            assert time.monotonic() < end_s, seen[-2000:]
            if select.select([near], [], [], 0.2)[0]:
                seen += os.read(near, 65536)

    with canned(ANSWERS) as server:
        command = [sys.executable, "-m", "turboserve", "top", "--interval", "0.25", "--url", server.url]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
        process = subprocess.Popen(command, stdin=far, stdout=far, stderr=far, env=environment)
        try:
            until(b"least loaded")
            server.answers = {"/v1/cluster": (503, {"error": {"code": "overloaded", "message": "not now, please"}})}
            until(b"not now, please")
            server.answers = ANSWERS
            seen = b""
            until(b"live")
            assert process.poll() is None
            os.write(near, b"q")
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait()
            os.close(near)
            os.close(far)


FOUND = {
    "id": A,
    "index": 7,
    "worker": "w1",
    "epoch": 2,
    "steps": 4,
    "prompt_version": 1,
    "credits": 2,
    "batch_size": 3.0,
    "stages_ms": {"queue": 0.0, "moved": 700.0, "denoise": 60.5},
    "total_ms": 760.5,
    "context_ms": 9.0,
    "on_time": False,
    "slack_ms": -12.0,
    "decisions": [{"event": "resume", "worker": "w1", "reason": "w0 was lost"}],
}


def test_explain() -> None:
    with canned({f"/v1/sessions/{A}/explain?chunk=7": (200, FOUND)}) as server:
        env = {"TURBOSERVE_URL": server.url, "COLUMNS": "120"}
        result = CliRunner(env=env).invoke(main, ["explain", A, "--chunk", "7"])
        assert result.exit_code == 0, result.output
        for needed in ("moved", "700.0", "LATE by 12 ms", "asked for 2 times", "w0 was lost", "context pass 9.0 ms"):
            assert needed in result.stderr, needed
        moved = next(line for line in result.stderr.splitlines() if line.startswith("moved"))
        assert "█" * 20 in moved, "the bar is as long as its share"
        result = CliRunner(env=env).invoke(main, ["explain", A, "--chunk", "7", "--json"])
        assert json.loads(result.stdout) == FOUND
        result = CliRunner(env=env).invoke(main, ["explain", "no/such?session"])
        assert result.exit_code == 1 and "no such path" in result.stderr
        assert server.asked[-1] == "/v1/sessions/no%2Fsuch%3Fsession/explain"
