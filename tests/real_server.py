"""Starts the whole server as a user does: launcher, controller, gateway and worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
READY_S = 90.0


@dataclass
class RunningServer:
    """A `turboserve serve` of our own. `pid` is the launcher's; it leads a process group of its own."""

    url: str
    process: subprocess.Popen[bytes]
    data_dir: Path
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def start_server(folder: Path, *options: str, port: int | None = None) -> Iterator[RunningServer]:
    """Start the real server, wait until it is ready, stop it on the way out."""
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    log = folder / "server.log"
    data_dir = folder / "data"
    command = [sys.executable, "-m", "turboserve", "serve", "--port", str(port), "--data-dir", str(data_dir), *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with open(log, "ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    server = RunningServer(f"http://127.0.0.1:{port}", process, data_dir, log)
    try:
        wait_ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_ready(server: RunningServer, timeout_s: float = READY_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if server.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{server.url}/readyz", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            pass
        time.sleep(0.05)
    pytest.fail(f"the server was not ready within {timeout_s:.0f} s:\n{server.log_text()[-4000:]}")


async def received(peer: Any, within_s: float = 120.0) -> Any:
    """The next message. Not by `asyncio.wait_for`: in Python 3.11 that may swallow a cancellation which comes just when
    the message does, and a viewer that was told to leave would watch on."""
    async with asyncio.timeout(within_s):
        return await peer.recv()
