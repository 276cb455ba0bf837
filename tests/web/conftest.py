"""The page tests run the real server with the embedded model, and the system's Chromium."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser
from real_server import RunningServer, start_server

from turboserve.bench.chromium import chromium

from .browser import WIRE_TAP, Watcher


@dataclass(frozen=True)
class Server:
    """Where the page is: `url` ends with a slash."""

    url: str

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 80


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Server]:
    """A real server of a test's own."""
    with start_server(folder, *flags) as running:
        yield Server(running.url + "/")


@pytest.fixture(scope="session")
def server(real_server: RunningServer) -> Server:
    return Server(real_server.url + "/")


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Gone when the package is done: while Playwright's loop runs, no test of another package can run its own."""
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
