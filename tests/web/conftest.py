"""The page tests run the real server with the embedded model, and the system's Chromium."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from .browser import WIRE_TAP, Watcher, chromium

READY_S = 100


@dataclass(frozen=True)
class Server:
    url: str
    port: int


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


@contextlib.contextmanager
def serving(data_dir: Path, *flags: str) -> Iterator[Server]:
    """`turboserve serve` on a free port, ready; stopped in the end."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    log = data_dir / "serve.log"
    command = [sys.executable, "-m", "turboserve", "serve", "--port", str(port), "--data-dir", str(data_dir / "data")]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, *flags], stdout=sink, stderr=sink, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        end_s = time.monotonic() + READY_S
        while not _ready(url):
            assert process.poll() is None, f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}"
            assert time.monotonic() < end_s, f"the server was not ready in {READY_S} s:\n{log.read_text()[-4000:]}"
            time.sleep(0.1)
        yield Server(url, port)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("web")) as one:
        yield one


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


OpenPage = Callable[..., Watcher]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """`open_page(url, width=..., ...)`: a fresh visitor. Any error on the page's console fails the test."""
    contexts = []
    complaints: list[str] = []

    def make(url: str, *, tour: bool = False, width: int = 1280, height: int = 800, **settings: object) -> Watcher:
        allowed = settings.pop("allow_console", ())
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)  # type: ignore[arg-type]
        contexts.append(context)
        context.add_init_script(WIRE_TAP)
        page = context.new_page()

        def note(text: str) -> None:
            if not any(one in text for one in allowed):  # type: ignore[attr-defined]
                complaints.append(text)

        page.on("console", lambda message: note(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: note(str(error)))
        page.goto(url if tour else f"{url}?tour=off")
        return Watcher(page)

    yield make
    for context in contexts:
        for page in context.pages:
            page.goto("about:blank")  # leaving the page ends its sessions
        context.close()
    assert not complaints, complaints
