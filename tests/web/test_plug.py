"""The show on the watch page, with a real fleet of two: one worker is killed, its streams go on frame for frame."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from typing import Any

import pytest
from playwright.sync_api import Page
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from .browser import PATIENCE_S
from .conftest import OpenPage, Server, serving

pytestmark = pytest.mark.browser

WAIT_MS = 2000 * PATIENCE_S
NO_SIDEWAYS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"


def cluster(server: Server) -> dict[str, Any]:
    with urllib.request.urlopen(server.url + "v1/cluster", timeout=5) as answer:
        return dict(json.load(answer))


@pytest.mark.timeout(240)  # starts a server of its own
def test_a_killed_worker_costs_no_frame(open_page: OpenPage, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("plug")
    # At half speed two busy cores keep up; the reserve the page builds is in seconds of play either way.
    with serving(folder, "--workers", "2", "--playback-rate", "0.5") as server:
        page = open_page(server.url + "?streams=2", tour=True, width=1280, height=860).page
        page.wait_for_selector("#plug-start:not([disabled])", timeout=WAIT_MS)
        page.click("#plug-start")
        page.wait_for_selector("#plug-pull:not([disabled])", timeout=WAIT_MS)
        assert page.locator(".tile").count() == 2 and page.is_visible("#plug-lanes")
        victim = page.inner_text("#plug-pull").removeprefix("Kill worker ")
        pid = next(one["pid"] for one in cluster(server)["workers"] if one["id"] == victim)
        ours = page.evaluate("[...document.querySelectorAll('.tile')].map((tile) => tile.dataset.session)")
        page.click("#plug-pull")
        page.wait_for_selector(f"#plug-lanes [data-lane={victim}][data-state=lost]", timeout=WAIT_MS)
        # All of its sessions are chips on the other one's lane.
        other = next(one["id"] for one in cluster(server)["workers"] if one["id"] != victim)
        for sid in ours:
            page.wait_for_selector(f"#plug-lanes [data-lane={other}] [data-session='{sid}']", timeout=WAIT_MS)
        page.wait_for_selector("#plug-badge[data-done=true]", timeout=WAIT_MS)
        badge = page.locator("#plug-badge")
        assert badge.get_attribute("data-wrong") == "false", badge.inner_text()
        verified = int(badge.get_attribute("data-verified") or 0)
        assert verified >= 2 * 17 and f"{verified} chunks verified identical" in badge.inner_text()
        told = page.inner_text("#plug-text")
        assert "SHA-256" in told and "made after the kill" in told, "it says what was compared"
        assert page.locator(".tile[data-status=playing]").count() == 2
        assert "pictures stood still" in page.inner_text("#plug-facts")
        # It was a real kill: the process is another one, or not back yet.
        assert pid not in [one.get("pid") for one in cluster(server)["workers"]]
        assert page.evaluate(NO_SIDEWAYS)
        # Back to the page as it was; the twins are gone with the streams of the show.
        page.click("#plug-leave")
        page.wait_for_selector("#plug-stage[hidden]", state="attached")
        page.wait_for_function("() => document.querySelectorAll('.tile[data-status=playing]').length === 4")
        assert page.is_visible("#prompt")
        move_and_suspend_for_real(page, server)
        page.goto("about:blank")  # before the server goes


def move_and_suspend_for_real(page: Page, server: Server) -> None:
    """From the operations page: one of the streams is dragged to the other worker, paused, and put on the shelf."""
    sid = page.evaluate("document.querySelector('.tile[data-status=playing]').dataset.session")
    ops = page.context.new_page()
    ops.goto(server.url + "ops")
    for _ in range(40):  # the killed worker may still be starting
        if all(one["state"] == "ready" for one in cluster(server)["workers"]) and len(cluster(server)["workers"]) == 2:
            break
        ops.wait_for_timeout(500)
    other = drag_to_the_other_worker(ops, server, sid)
    ops.click("#confirm-yes")
    ops.wait_for_selector(f"[data-lane='{other}'] [data-session='{sid}']", timeout=WAIT_MS)
    # Once nobody wants chunks of it, it goes to host memory and stays there.
    post(server, f"v1/sessions/{sid}/pause")
    ops.wait_for_selector(f"[data-session='{sid}'][aria-label*=idle]", timeout=WAIT_MS)
    post(server, f"v1/admin/sessions/{sid}/suspend")
    ops.wait_for_selector(f"[data-lane='shelf:host'] [data-session='{sid}']", timeout=WAIT_MS)
    assert ops.evaluate(NO_SIDEWAYS)
    post(server, f"v1/sessions/{sid}/resume")
    ops.wait_for_selector(f"[data-kind=worker] [data-session='{sid}']", timeout=WAIT_MS)
    ops.close()


def drag_to_the_other_worker(ops: Page, server: Server, sid: str) -> str:
    """Drag the session's chip; returns the worker it was dropped on, with the question open. Once more when the
    scheduler moved the session at that very moment: a worker has just come back."""
    for _ in range(5):
        (row,) = (one for one in cluster(server)["session_list"] if one["id"] == sid)
        other = next(str(one["id"]) for one in cluster(server)["workers"] if one["id"] != row["worker"])
        ops.wait_for_selector(f"[data-lane='{other}'][data-state=ready]", timeout=WAIT_MS)
        ops.wait_for_selector(f"[data-lane='{row['worker']}'] [data-session='{sid}']", timeout=WAIT_MS)
        ops.drag_and_drop(f"[data-session='{sid}']", f"[data-lane='{other}'] h3")
        with contextlib.suppress(PlaywrightTimeout):
            ops.wait_for_selector("#confirm-yes", timeout=3000)
            return other
    raise AssertionError(f"dragging {sid} opened no question")


def post(server: Server, path: str) -> None:
    request = urllib.request.Request(server.url + path, b"{}", {"Content-Type": "application/json"}, method="POST")
    urllib.request.urlopen(request, timeout=15).close()


def test_one_worker_is_not_enough_and_says_so(server: Server, open_page: OpenPage) -> None:
    page = open_page(server.url, width=360, height=740).page
    alone = {"workers": [{"id": "w0", "state": "ready"}], "totals": {"may_kill": True}}
    page.route("**/v1/cluster", lambda route: route.fulfill(json=alone))
    page.reload()
    page.wait_for_selector("#plug:not([hidden])", timeout=WAIT_MS)
    assert page.is_disabled("#plug-start") and "two ready workers" in page.inner_text("#plug-text")
    assert page.evaluate(NO_SIDEWAYS)
    alone["totals"] = {"may_kill": False}
    page.reload()
    page.wait_for_timeout(500)
    assert page.is_hidden("#plug"), "a server with keys does not offer it"


COMPARE = """async ({ digests, epochs, card }) => {
  const { runTwin } = await import(new URL("assets/twin.js", document.baseURI));
  const sent = [];
  window.fetch = async (url, options) => {
    const body = options.body ? JSON.parse(options.body) : null;
    sent.push([options.method, String(url), body]);
    return new Response(JSON.stringify({ id: "t".repeat(26), token: "k", worker: "w1" }), { status: 200 });
  };
  window.WebSocket = class extends EventTarget {
    static OPEN = 1;
    constructor() {
      super();
      this.readyState = 1;
      this.index = 0;
      setTimeout(() => this.onopen());
    }
    send(text) {
      const message = JSON.parse(text);
      sent.push(["ws", message.type, message]);
      if (message.type === "attach" || message.type === "ack") this.next();
    }
    next() {
      const index = this.index++;
      if (index >= digests.length) return;
      const header = { type: "chunk", index, digest: digests[index], epoch: epochs[index], prompt_version: 1 };
      this.onmessage({ data: JSON.stringify(header) });
      this.onmessage({ data: new ArrayBuffer(8) });
    }
    close() { this.readyState = 3; }
  };
  const seen = [];
  const take = (index, digest) => {
    seen.push(digest);
    return digest !== "bad";
  };
  const answer = await runTwin(card, digests.length, take, 1);
  return { answer, seen, sent };
}"""
CARD = {
    "seed": 7,
    "size": "96x96",
    "steps": [{"from_index": 0, "steps": 4}],
    "inputs": [{"from_index": 0, "prompt": "a"}, {"from_index": 2, "prompt": "b"}, {"from_index": 9, "prompt": "c"}],
}


def test_the_undisturbed_run_gets_the_same_inputs_and_a_difference_ends_it(server: Server, open_page: OpenPage) -> None:
    page = open_page(server.url).page
    given = {"digests": ["d0", "d1", "d2"], "epochs": [1, 1, 1], "card": CARD}
    found = page.evaluate(COMPARE, given)
    assert found["answer"] == {"worker": "w1", "disturbed": False} and found["seen"] == ["d0", "d1", "d2"]
    wish = found["sent"][0][2]
    assert (wish["seed"], wish["prompt"], wish["steps"], wish["size"]) == (7, "a", 4, "96x96")
    prompts = [(one[2]["from_index"], one[2]["text"]) for one in found["sent"] if one[1] == "prompt"]
    assert prompts == [(2, "b"), (9, "c")]
    kinds = [one[1] for one in found["sent"] if one[0] == "ws"]
    assert kinds[0] == "attach" and kinds.count("ack") == 2
    assert found["sent"][-1][0] == "DELETE", "nothing of it is left on the server"
    page.reload()
    found = page.evaluate(COMPARE, {**given, "digests": ["d0", "bad", "d2"], "epochs": [1, 1, 1]})
    assert found["seen"] == ["d0", "bad"], "what comes after a difference proves nothing"
    page.reload()
    found = page.evaluate(COMPARE, {**given, "epochs": [1, 1, 2]})
    assert found["answer"]["disturbed"], "a run that changed its owner is no undisturbed one"
