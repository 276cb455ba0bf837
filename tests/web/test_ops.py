"""The operations page: lanes that sessions slide between, shelves, plots, the decision log, commands.

What the cluster does is put in by the test where the real one would have to be brought to it; the rest is the server's.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from playwright.sync_api import Page, Route

from .browser import PATIENCE_S
from .conftest import OpenPage, Server

pytestmark = pytest.mark.browser

A, B, C = "aaaa" + "x" * 22, "bbbb" + "y" * 22, "cccc" + "z" * 22
EXPLAINED = {"index": 4, "worker": "w0", "total_ms": 9.0, "stages_ms": {"denoise": 9.0}, "decisions": []}
WAIT_MS = 1000 * PATIENCE_S
NO_SIDEWAYS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"


def session(sid: str, **more: Any) -> dict[str, Any]:
    facts = {"id": sid, "state": "active", "stage": "running", "active": True, "worker": "w0", "tier": "device"}
    return facts | {"epoch": 1, "next_index": 5, "on_time": 5, "late": 0, "attached": True, "bytes": {}} | more


def worker(name: str, **more: Any) -> dict[str, Any]:
    facts = {"id": name, "state": "ready", "active": 1, "capacity": 4, "busy_share": 0.5, "chunk_latency_ms": 61.0}
    return facts | {"device": "cpu", "node": "here", "pid": 7} | more


class FakeCluster:
    """Stands before GET /v1/cluster and notes every command."""

    def __init__(self, page: Page) -> None:
        self.picture: dict[str, Any] = {
            "clock": {"time_s": 100.0, "unix_s": 1.7e9},
            "workers": [worker("w0"), worker("w1")],
            "sessions": {"active": 2, "suspended": 0},
            "session_list": [session(A), session(B, worker="w1")],
            "decisions": [
                {"time_s": 90.0, "event": "place", "session": A, "worker": "w0", "reason": "least loaded"},
                {"time_s": 91.0, "event": "queue", "session": C, "reason": "no room"},
            ],
            "totals": {"on_time_share_1m": 0.9996, "viewers": 2, "may_kill": True, "controller": "connected"},
        }
        self.orders: list[tuple[str, Any]] = []
        self.refusal: dict[str, Any] | None = None
        page.route("**/v1/cluster", self._picture)
        page.route("**/explain", lambda route: route.fulfill(json=EXPLAINED))
        page.route("**/v1/admin/sessions/**", self._order)
        page.route("**/v1/admin/workers**", self._order)
        page.route("**/v1/admin/workers/**", self._order)

    def _picture(self, route: Route) -> None:
        route.fulfill(json=copy.deepcopy(self.picture))

    def _order(self, route: Route) -> None:
        body = route.request.post_data
        self.orders.append((route.request.url.split("/v1/admin/")[1], json.loads(body) if body else None))
        if self.refusal:
            route.fulfill(status=409, json={"error": self.refusal})
        else:
            route.fulfill(json={"state": "ok", "message": ""})


def chips(page: Page, lane: str) -> list[str]:
    return page.locator(f"[data-lane='{lane}'] .chip-name").all_inner_texts()


def open_ops(open_page: OpenPage, server: Server, **settings: Any) -> tuple[Page, FakeCluster]:
    page = open_page(server.url, **settings).page
    fake = FakeCluster(page)
    page.goto(server.url + "ops")
    page.wait_for_selector(".session", timeout=WAIT_MS)
    return page, fake


def test_the_real_cluster_with_a_stream_on_it(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    watcher.start("a pink ring growing on grey")
    watcher.wait_shown(2)
    sid = watcher.page.get_attribute(".tile", "data-session") or ""
    ops = watcher.page.context.new_page()
    ops.goto(server.url + "ops")
    ops.wait_for_selector(".worker[data-state=ready]", timeout=WAIT_MS)
    chip = ops.locator(f"[data-session='{sid}']")
    chip.wait_for(timeout=WAIT_MS)
    ops.wait_for_function(
        "() => Number(document.querySelector('[data-state=active] b').textContent) >= 1", timeout=WAIT_MS
    )
    ops.wait_for_function("() => document.querySelector('#latency-plot .p95')?.getAttribute('d').includes('L')")
    ops.wait_for_selector("#ontime-plot rect.good", state="attached", timeout=WAIT_MS)
    assert "on time" in ops.inner_text("#ontime-text")
    # The menu says where the newest chunk's time went.
    chip.click()
    ops.wait_for_selector("#explain:not([hidden]) li b", timeout=WAIT_MS)
    assert "denoise" in ops.inner_text("#explain-stages") and sid in ops.inner_text("#session-facts")
    assert "place" in ops.inner_text("#explain-stages"), "the decision behind it"
    ops.keyboard.press("Escape")
    assert ops.evaluate(NO_SIDEWAYS)
    ops.close()


def test_a_session_slides_to_its_new_lane(server: Server, open_page: OpenPage) -> None:
    page, fake = open_ops(open_page, server)
    assert (chips(page, "w0"), chips(page, "w1")) == (["aaaa"], ["bbbb"])
    page.locator(f"[data-session={A}]").focus()
    page.evaluate(
        """() => {
          window.slides = [];
          const animate = Element.prototype.animate;
          Element.prototype.animate = function (frames, options) {
            window.slides.push([this.querySelector('button')?.dataset.session, frames[0].transform, options.duration]);
            return animate.call(this, frames, options);
          };
        }"""
    )
    fake.picture["session_list"][0] = session(A, worker="w1", epoch=2)
    page.wait_for_selector(f"[data-lane=w1] [data-session={A}]", timeout=WAIT_MS)
    slid = [one for one in page.evaluate("window.slides") if one[0] == A]
    assert slid and "translate" in slid[0][1] and slid[0][2] >= 200, "it came from where it was"
    assert page.evaluate("document.activeElement.dataset.session") == A, "and kept the focus"


def test_less_motion_means_none(server: Server, open_page: OpenPage) -> None:
    page, fake = open_ops(open_page, server, reduced_motion="reduce")
    page.evaluate("() => { Element.prototype.animate = () => { throw new Error('it moved'); }; }")
    fake.picture["session_list"][0] = session(A, worker="w1", epoch=2)
    page.wait_for_selector(f"[data-lane=w1] [data-session={A}]", timeout=WAIT_MS)


def test_a_dead_worker_keeps_its_lane_for_a_while_and_suspended_sessions_lie_on_a_shelf(
    server: Server, open_page: OpenPage
) -> None:
    page, fake = open_ops(open_page, server)
    fake.picture["workers"] = [worker("w1")]
    fake.picture["decisions"].append({"time_s": 99.0, "event": "worker_lost", "worker": "w0", "reason": "it closed"})
    suspended = session(A, state="suspended", worker=None, tier="host", bytes={"host": 3 << 20})
    fake.picture["session_list"] = [suspended, session(B, state="migrating", worker="w1")]
    page.wait_for_selector("[data-lane=w0][data-state=lost]", timeout=WAIT_MS)
    # Colour is never the only sign: the state is a word, and every chip has a mark and a full label.
    assert "lost" in page.inner_text("[data-lane=w0] .badge") and "it closed" in page.inner_text("[data-lane=w0]")
    assert chips(page, "shelf:host") == ["aaaa"] and "3.0 MB" in page.inner_text("[data-lane='shelf:host']")
    label = page.get_attribute(f"[data-session={A}]", "aria-label") or ""
    assert "suspended" in label and "host memory" in label
    assert page.inner_text(f"[data-session={A}] .chip-sign") != page.inner_text(f"[data-session={B}] .chip-sign")
    fake.picture["clock"]["time_s"] = 200.0
    page.wait_for_selector("[data-lane=w0]", state="detached", timeout=WAIT_MS)


def test_commands_are_asked_back_and_refusals_shown(server: Server, open_page: OpenPage) -> None:
    page, fake = open_ops(open_page, server, allow_console=("Failed to load resource",))
    page.click("[data-lane=w0] [data-act=drain]")
    page.wait_for_selector("#confirm-dialog[open]")
    page.click("#confirm-dialog [value=no]")
    assert fake.orders == []
    page.click("[data-lane=w0] [data-act=drain]")
    page.click("#confirm-yes")
    page.wait_for_selector("#notice:has-text('w0 is draining')")
    page.click("[data-lane=w1] [data-act=kill]")
    page.click("#confirm-yes")
    page.wait_for_selector("#notice:has-text('w1 was killed')")
    page.click("#add-worker")
    page.click("#confirm-yes")
    page.wait_for_selector("#notice:has-text('asked for')")
    page.drag_and_drop(f"[data-session={A}]", "[data-lane=w1] h3")
    page.click("#confirm-yes")
    page.wait_for_selector("#notice:has-text('moving to w1')")
    expected = [
        ("workers/w0/drain", None),
        ("workers/w1/kill", None),
        ("workers", {"add": 1}),
        (f"sessions/{A}/migrate", {"target": "w1"}),
    ]
    assert fake.orders == expected
    # The same from the keyboard, through the menu; what is refused stays to be read.
    fake.refusal = {"code": "conflict", "message": "a transfer is under way", "hint": "wait a moment"}
    page.focus(f"[data-session={A}]")
    page.keyboard.press("Enter")
    page.wait_for_selector("#session-dialog[open]")
    page.focus("[data-act=suspend]")
    page.keyboard.press("Space")
    page.wait_for_selector("#session-wrong:has-text('a transfer is under way. wait a moment')")
    assert fake.orders[-1] == (f"sessions/{A}/suspend", None)
    fake.refusal = None
    page.focus("[data-act=migrate]")
    page.keyboard.press("Enter")
    page.wait_for_selector("#session-dialog:not([open])", state="attached")
    assert fake.orders[-1] == (f"sessions/{A}/migrate", {"target": "w1"})


def test_decisions_are_filtered_by_kind_and_words(server: Server, open_page: OpenPage) -> None:
    page, _ = open_ops(open_page, server)
    rows = page.locator("#decisions tr")
    assert rows.count() == 2 and "queue" in rows.nth(0).inner_text(), "newest first"
    page.select_option("#filter-kind", "place")
    assert rows.count() == 1 and "least loaded" in rows.nth(0).inner_text()
    page.fill("#filter-text", "nothing like this")
    assert rows.count() == 0 and page.is_visible("#decisions-none")
    page.select_option("#filter-kind", "")
    page.fill("#filter-text", "no room")
    assert rows.count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(server: Server, open_page: OpenPage, scheme: str) -> None:
    page, fake = open_ops(open_page, server, width=360, height=740, color_scheme=scheme)
    fake.picture["session_list"] = [session(f"{place:04d}" + "q" * 22) for place in range(24)]
    page.wait_for_selector("[data-session^='0023']", timeout=WAIT_MS)
    assert page.evaluate(NO_SIDEWAYS)
    page.click("[data-session^='0007']")
    page.wait_for_selector("#session-dialog[open]")
    assert page.evaluate(NO_SIDEWAYS)


def test_a_server_without_that_power_does_not_offer_it(server: Server, open_page: OpenPage) -> None:
    page, fake = open_ops(open_page, server)
    assert page.locator("[data-act=kill]").count() == 2
    fake.picture["totals"]["may_kill"] = False
    page.wait_for_selector("[data-act=kill]", state="detached", timeout=WAIT_MS)
    assert page.locator("[data-act=drain]").count() == 2


def test_an_outage_is_said_and_mends_itself(server: Server, open_page: OpenPage) -> None:
    page, fake = open_ops(open_page, server, allow_console=("Failed to load resource",))
    page.route("**/v1/cluster", lambda route: route.fulfill(status=503, json={"error": {"message": "not now"}}))
    page.wait_for_selector("#trouble:not([hidden]):has-text('not now')", timeout=WAIT_MS)
    assert page.locator(".session").count() == 2, "the last picture stays"
    page.unroute("**/v1/cluster")
    page.route("**/v1/cluster", fake._picture)
    page.wait_for_selector("#trouble[hidden]", state="attached", timeout=WAIT_MS)
