"""Takes the pictures of the page that README and docs show: the real server, the real model, a real browser.

    python docs/make_screenshots.py            (or: make screenshots)

Starts a server of its own unless `--url` names one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turboserve.bench.chromium import chromium, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PICTURES = Path(__file__).parent / "images"
FIRST = "two small red circles drifting left over a dark blue sky"
THEN = "two yellow stars drifting left over a dark blue sky"


@contextlib.contextmanager
def visitor(browser: Browser, url: str, **settings: Any) -> Iterator[Page]:
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, "device_scale_factor": 2, **settings})
    page = context.new_page()
    page.goto(url)
    try:
        yield page
    finally:
        page.goto("about:blank")  # leaving ends the page's sessions
        context.close()


def first_visit(page: Page, name: str) -> None:
    """Four streams, one of which has just changed its words."""
    page.wait_for_function("() => document.querySelectorAll('.tile[data-status=playing]').length === 4", timeout=90_000)
    page.wait_for_timeout(9000)
    page.wait_for_selector(".tile:nth-child(2) .moment:not([hidden])", timeout=60_000)
    page.wait_for_timeout(900)
    page.screenshot(path=PICTURES / name)


def one_stream(page: Page, name: str, *, full_page: bool = False) -> None:
    """One stream, steered a moment ago."""
    page.fill("#prompt", FIRST)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".tile[data-status=playing]", timeout=90_000)
    page.wait_for_timeout(7000)
    page.fill(".steer input", THEN)
    page.press(".steer input", "Enter")
    page.wait_for_selector(".moment:not([hidden])", timeout=90_000)
    page.wait_for_timeout(1000)
    page.screenshot(path=PICTURES / name, full_page=full_page)


@click.command()
@click.option("--url", help="A running server without keys.  [default: starts one]")
def main(url: str | None) -> None:
    """Write the pictures to docs/images/."""
    PICTURES.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        address = (url or stack.enter_context(serving())).rstrip("/") + "/"
        browser = stack.enter_context(chromium())
        quiet = f"{address}?tour=off"
        with visitor(browser, address) as page:
            first_visit(page, "page.png")
        with visitor(browser, address, color_scheme="dark") as page:
            first_visit(page, "page-dark.png")
        with visitor(browser, quiet) as page:
            one_stream(page, "steering.png")
        phone = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2}
        with visitor(browser, quiet, **phone) as page:
            one_stream(page, "phone.png")
    for picture in sorted(PICTURES.glob("*.png")):
        click.echo(f"{picture.relative_to(PICTURES.parent.parent)}  {picture.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
