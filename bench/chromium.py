"""The system's Chromium, headless, and a server of our own to point it at: for page benches and screenshots."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

LAUNCH_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium_path() -> str:
    """Where the system's Chromium is. Its absence is an error that says what to do."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    raise RuntimeError("Chromium is missing: run `apt-get install chromium` (or your system's way)")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    path = chromium_path()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=LAUNCH_ARGS)
        try:
            yield browser
        finally:
            browser.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


@contextlib.contextmanager
def serving(*flags: str, folder: Path | None = None, ready_s: float = 60) -> Iterator[str]:
    """`turboserve serve` on a free port: yields its address once it is ready, stops it in the end."""
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch)
        port = free_port()
        log = place / "serve.log"
        command = [sys.executable, "-m", "turboserve", "serve", "--port", str(port), "--data-dir", str(place / "data")]
        with log.open("wb") as sink:
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen([*command, *flags], stdout=sink, stderr=sink, env=one_thread)
        try:
            url = f"http://127.0.0.1:{port}/"
            end_s = time.monotonic() + ready_s
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > end_s:
                    raise RuntimeError(f"the server did not become ready in {ready_s} s:\n{log.read_text()[-4000:]}")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
