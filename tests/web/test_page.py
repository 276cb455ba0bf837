"""The page as a whole: first visit, several streams, narrow screens, keyboard, keys, queue, lost connections."""

from __future__ import annotations

import itertools
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from .browser import PATIENCE_S, Cable
from .conftest import OpenPage, Server, serving

pytestmark = pytest.mark.browser

NETWORK_NOISE = ("WebSocket connection", "net::ERR_", "Failed to load resource")


def read(server: Server, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(server.url + path, timeout=5) as answer:
        return dict(json.load(answer))


def test_a_first_visit_shows_four_moving_streams_that_take_turns(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url, tour=True)
    watcher.wait_playing(count=4)
    for tile in range(4):
        watcher.wait_moving(tile)
    watcher.page.wait_for_selector(".tile .moment:not([hidden])", timeout=1000 * PATIENCE_S)
    assert watcher.page.is_visible("#prompt")
    # Taking one over ends the other three.
    watcher.page.locator(".adopt").nth(1).click()
    assert watcher.page.locator(".tile").count() == 1
    assert watcher.page.evaluate("document.activeElement.matches('.steer input')")
    watcher.wait_moving()


def test_four_streams_side_by_side(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    watcher.page.fill("#prompt", "two small red circles drifting left over a dark blue sky")
    watcher.page.click("#open-four")
    watcher.wait_playing(count=4)
    for tile in range(4):
        watcher.wait_moving(tile)
    boxes = [watcher.page.locator(".tile").nth(tile).bounding_box() for tile in range(4)]
    assert len({round(box["y"]) for box in boxes if box}) == 1, "all four stand in one row"
    assert len({watcher.details("seed", tile) for tile in range(4)}) == 4
    # One of them is steered; its neighbours keep their words.
    watcher.steer("two green squares bouncing over dark purple", tile=2)
    watcher.page.locator(".tile").nth(2).locator(".moment:not([hidden])").wait_for(timeout=1000 * PATIENCE_S)
    captions = watcher.page.locator(".tile .caption").all_inner_texts()
    assert [caption.startswith("two green") for caption in captions] == [False, False, True, False]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_never_scrolls_sideways(server: Server, open_page: OpenPage, width: int, scheme: str) -> None:
    watcher = open_page(server.url, width=width, height=780, device_scale_factor=3, color_scheme=scheme)
    narrow = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert watcher.page.evaluate(narrow)
    watcher.start("two yellow stars drifting left over averylongwordthatnobodywouldeverbreakbyhand " * 2)
    watcher.wait_shown(1)
    assert watcher.page.evaluate(narrow)
    assert watcher.details("session")
    assert watcher.page.evaluate(narrow)
    # Every pixel of the model is a whole number of the screen's.
    factor = watcher.page.evaluate(
        "() => { const c = document.querySelector('canvas'); return (c.getBoundingClientRect().width * 3) / c.width; }"
    )
    assert abs(factor - round(factor)) < 1e-3


def test_everything_can_be_done_from_the_keyboard(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    keyboard = watcher.page.keyboard
    keyboard.press("/")
    assert watcher.page.evaluate("document.activeElement.id") == "prompt"
    keyboard.type("one large blue circle moving right on a black background")
    keyboard.press("Enter")
    watcher.wait_playing()
    assert watcher.page.evaluate("document.activeElement.matches('.steer input')"), "focus is where steering happens"
    keyboard.type("one large yellow circle moving right on a black background")
    keyboard.press("Enter")
    watcher.page.wait_for_selector(".moment:not([hidden])", timeout=1000 * PATIENCE_S)

    def tab_to(action: str) -> None:
        for _ in range(12):
            keyboard.press("Tab")
            if watcher.page.evaluate("document.activeElement.dataset.action") == action:
                outline = watcher.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", "what has the focus shows it"
                return
        raise AssertionError(f"Tab does not reach {action}")

    tab_to("pause")
    keyboard.press("Space")
    watcher.wait_status("paused")
    keyboard.press("Space")
    watcher.wait_playing()
    tab_to("stop")
    keyboard.press("Enter")
    watcher.wait_status("ended")
    tab_to("close")
    keyboard.press("Enter")
    assert watcher.page.locator(".tile").count() == 0
    assert watcher.page.evaluate("document.activeElement.id") == "prompt"


@pytest.fixture
def cable(server: Server) -> Iterator[Cable]:
    one = Cable(server.port)
    yield one
    one.close()


def test_a_lost_connection_goes_on_at_exactly_the_next_chunk(cable: Cable, open_page: OpenPage) -> None:
    watcher = open_page(f"http://127.0.0.1:{cable.port}/", allow_console=NETWORK_NOISE)
    watcher.start("two small red circles drifting left over a dark blue sky")
    watcher.wait_shown(4)
    cable.cut(refuse=True)
    watcher.wait_status("reconnecting")
    assert "It continues at chunk" in watcher.page.inner_text(".veil")
    watcher.page.wait_for_timeout(700)
    cable.mend()
    watcher.wait_playing()
    wire = watcher.wire()
    resumed_at = wire["attaches"][-1]["next_index"]
    assert resumed_at > 4
    watcher.wait_shown(resumed_at + 6)
    cable.cut()  # and once more, without a pause
    watcher.wait_shown(resumed_at + 16)
    chunks = watcher.wire()["chunks"]
    indices = [chunk["index"] for chunk in chunks]
    assert indices == list(range(len(indices))), "each chunk once, in order, over three connections"
    for before, after in itertools.pairwise(chunks):
        assert after["digest_prev"] == before["digest"]
    assert "unbroken" in watcher.details("chain")


def test_leaving_the_page_ends_its_sessions(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    watcher.start("a pink ring growing on grey")
    session = watcher.page.get_attribute(".tile", "data-session")
    assert read(server, f"v1/sessions/{session}")["state"] == "active"
    watcher.page.goto("about:blank")
    for _ in range(100):
        if read(server, f"v1/sessions/{session}")["state"] == "closed":
            return
        watcher.page.wait_for_timeout(100)
    raise AssertionError("the session outlives its page")


def test_theme_and_motion_follow_the_viewer(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url, color_scheme="dark", reduced_motion="reduce")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = watcher.page.evaluate(background)
    watcher.page.click("[data-theme-toggle]")  # auto -> light
    light = watcher.page.evaluate(background)
    assert dark != light
    watcher.page.reload()
    assert watcher.page.evaluate(background) == light, "the choice is kept"
    watcher.start("a pink ring growing on grey")
    watcher.steer("a blue ring growing on grey")
    watcher.page.wait_for_selector(".moment:not([hidden])", timeout=1000 * PATIENCE_S)
    assert watcher.page.evaluate("getComputedStyle(document.querySelector('.moment')).animationName") == "none"


@pytest.mark.timeout(240)  # starts a server of its own
def test_a_full_server_shows_the_place_in_the_queue(
    open_page: OpenPage, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("full")
    flags = ("--workers", "1", "--capacity", "1", "--slots", "1", "--api-key", "the-right-key")
    with serving(folder, *flags) as server:
        watcher = open_page(server.url, allow_console=NETWORK_NOISE)
        # A server with a key asks for it, says when it is wrong, and the tab remembers it.
        watcher.page.wait_for_selector("#key-dialog[open]")
        watcher.page.fill("#key", "a-wrong-key")
        watcher.page.press("#key", "Enter")
        watcher.page.wait_for_selector("#key-dialog[open] .wrong:not([hidden])")
        watcher.page.fill("#key", "the-right-key")
        watcher.page.press("#key", "Enter")
        watcher.page.wait_for_selector("#key-dialog:not([open])", state="attached")
        watcher.start("one large blue circle moving right on a black background")
        assert watcher.page.evaluate("sessionStorage.getItem('turboserve.key')") == "the-right-key"
        assert watcher.page.evaluate("Object.keys(localStorage).filter((item) => item.includes('key')).length") == 0
        # One place: the second waits and says where, and gets in when the first ends.
        watcher.page.fill("#prompt", "one large red circle moving right on a black background")
        watcher.page.press("#prompt", "Enter")
        watcher.wait_status("queued")
        assert watcher.page.inner_text(".tile[data-status=queued] .veil-title") == "Number 1 in the queue"
        watcher.page.locator(".tile[data-status=playing] [data-action=stop]").click()
        watcher.page.wait_for_selector(".tile[data-status=playing] .caption:has-text('red')", timeout=1000 * PATIENCE_S)
        watcher.wait_moving(0)
