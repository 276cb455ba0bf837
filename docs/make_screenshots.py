"""Takes the pictures of the page that README and docs show: the real server, the real model, a real browser.

    python docs/make_screenshots.py            (or: make screenshots)

Starts a server of its own unless `--url` names one.
"""

from __future__ import annotations

import contextlib
import json
import urllib.request
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


def order(url: str, path: str, body: dict[str, Any] | None = None) -> None:
    data = json.dumps(body or {}).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"}, method="POST")
    urllib.request.urlopen(request, timeout=10).close()


def operations(browser: Browser, url: str) -> None:
    """The fleet with four streams on it, one of which lies suspended; a session's menu; the same on a phone."""
    with visitor(browser, url) as watching:
        ready = "() => document.querySelectorAll('.tile[data-status=playing]').length === 4"
        watching.wait_for_function(ready, timeout=90_000)
        watching.wait_for_timeout(40_000)
        sessions = watching.evaluate("[...document.querySelectorAll('.tile')].map((tile) => tile.dataset.session)")
        tall = {"viewport": {"width": 1280, "height": 1060}, "device_scale_factor": 1.5}
        with visitor(browser, url + "ops", **tall) as page:
            page.wait_for_selector(f"[data-session='{sessions[0]}']", timeout=30_000)
            page.wait_for_timeout(5000)
            order(url, f"v1/sessions/{sessions[0]}/pause")  # one that is watched would be back at once
            page.wait_for_timeout(1000)
            order(url, f"v1/admin/sessions/{sessions[0]}/suspend")
            page.wait_for_selector(f"[data-lane='shelf:host'] [data-session='{sessions[0]}']", timeout=30_000)
            page.wait_for_timeout(300)
            page.screenshot(path=PICTURES / "ops.png")
            page.click(f"[data-session='{sessions[1]}']")
            page.wait_for_selector("#explain:not([hidden]) li b")
            page.screenshot(path=PICTURES / "ops-session.png")
        phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
        with visitor(browser, url + "ops", **phone) as page:
            page.wait_for_selector(f"[data-session='{sessions[1]}']", timeout=30_000)
            page.wait_for_timeout(2500)
            page.screenshot(path=PICTURES / "ops-phone.png")


def pages(browser: Browser, address: str) -> None:
    """The page to watch and steer."""
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


@click.command()
@click.option("--url", help="A running server without keys.  [default: starts one]")
@click.option("--only", type=click.Choice(["page", "ops"]), help="Leave the others as they are.")
def main(url: str | None, only: str | None) -> None:
    """Write the pictures to docs/images/."""
    PICTURES.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        address = (url or stack.enter_context(serving())).rstrip("/") + "/"
        browser = stack.enter_context(chromium())
        if only != "ops":
            pages(browser, address)
        if only != "page":
            operations(browser, address)
    for picture in sorted(PICTURES.glob("*.png")):
        click.echo(f"{picture.relative_to(PICTURES.parent.parent)}  {picture.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
