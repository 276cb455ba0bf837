"""Watching and steering one stream: the picture moves, follows the words, stops and goes on."""

from __future__ import annotations

import base64
import io
import itertools
import json
import time

import av
import pytest

from .browser import PATIENCE_S, Watcher
from .colours import vivid_shares
from .conftest import OpenPage, Server

pytestmark = pytest.mark.browser

PLAY = """async (data) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const video = document.createElement("video");
  video.muted = true;
  video.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  await video.play();
  return video.duration;
}"""


def wait_colour(watcher: Watcher, colour: str, timeout_s: float = PATIENCE_S) -> dict[str, float]:
    """Until the colour is the one vivid colour of the picture."""
    end_s = time.monotonic() + timeout_s
    while True:
        shares = vivid_shares(watcher.pixels())
        if shares[colour] > 0.01 and shares[colour] == max(shares.values()):
            return shares
        assert time.monotonic() < end_s, f"waited for {colour}, the picture holds {shares}"
        watcher.page.wait_for_timeout(100)


def test_video_advances_and_shows_what_was_asked(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    watcher.start("one large yellow circle drifting right on a black background")
    watcher.wait_moving()
    wait_colour(watcher, "yellow")
    assert watcher.page.inner_text(".tile .state-text").startswith("Live")
    first = watcher.wire()["chunks"][0]
    assert first["format"] == "h264"
    assert first["index"] == 0


def test_a_prompt_change_is_seen_and_its_moment_marked(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    watcher.start("one large red circle drifting left on a black background")
    watcher.wait_shown(4)
    wait_colour(watcher, "red")
    watcher.steer("one large green square drifting left on a black background")
    watcher.page.wait_for_selector(".moment:not([hidden])", timeout=1000 * PATIENCE_S)
    moment = watcher.page.locator(".moment")
    index = int(moment.get_attribute("data-index") or -1)
    chunks = watcher.wire()["chunks"]
    changed = next(chunk for chunk in chunks if chunk["prompt_version"] != chunks[0]["prompt_version"])
    assert index == changed["index"], "the moment on the picture is the first chunk with the new words"
    marker = watcher.page.locator(".strip .changed")
    assert marker.get_attribute("data-index") == str(index)
    assert marker.get_attribute("data-version") == str(changed["prompt_version"])
    assert watcher.page.inner_text(".tile .caption").startswith("one large green square")
    assert f"chunk {index}" in watcher.page.inner_text(".history li:nth-child(2)")
    wait_colour(watcher, "green")


def test_pause_stops_and_resume_continues(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    watcher.start("two blue squares bouncing over dark green")
    watcher.wait_shown(3)
    watcher.act("pause")
    watcher.wait_status("paused")
    received = watcher.wait_quiet()  # the chunk in work still comes
    still = watcher.pixels()
    watcher.page.wait_for_timeout(1500)
    assert watcher.pixels() == still
    assert len(watcher.wire()["chunks"]) == received
    assert "Paused" in watcher.page.inner_text(".veil")
    watcher.act("pause")
    watcher.wait_playing()
    watcher.wait_shown(received + 4)
    watcher.wait_moving()
    indices = [chunk["index"] for chunk in watcher.wire()["chunks"]]
    assert indices == list(range(len(indices)))


def test_stop_ends_the_stream_and_keeps_the_picture(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    watcher.start("a pink ring growing on grey")
    watcher.wait_shown(3)
    watcher.act("stop")
    watcher.wait_status("ended")
    assert "Ended" in watcher.page.inner_text(".veil")
    assert watcher.page.locator("[data-action=download]").is_enabled()
    assert watcher.page.locator("[data-action=pause]").is_disabled()
    watcher.page.click(".veil-action")  # start again
    watcher.wait_playing()


def test_words_the_model_does_not_know_are_struck_through(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    watcher.start("a majestic red circle drifting left in watercolour")
    struck = [word.lower() for word in watcher.page.locator(".tile .caption s").all_inner_texts()]
    assert "majestic" in struck
    assert "watercolour" in struck
    assert "red" not in struck
    note = watcher.page.inner_text(".tile .note")
    assert "this small model knows shapes and colours; real video: turboserve serve PATH" in note
    assert "random scene" not in note
    # So are those of a later prompt, once the picture follows it.
    watcher.steer("a blissful blue circle drifting left")
    watcher.page.wait_for_selector(".moment:not([hidden])", timeout=1000 * PATIENCE_S)
    assert watcher.page.locator(".tile .caption s").all_inner_texts() == ["blissful"]
    assert "turboserve serve PATH" in watcher.page.inner_text(".tile .note")


def test_a_prompt_without_any_known_word_says_that_the_scene_is_random(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    watcher.start("zebras")
    note = watcher.page.inner_text(".tile .note")
    assert "random scene" in note
    assert "turboserve serve PATH" in note
    watcher.wait_moving()


@pytest.mark.parametrize("wire_format", ["h264", "jpeg"])
def test_download_holds_every_frame_received(server: Server, open_page: OpenPage, wire_format: str) -> None:
    watcher = open_page(server.url)
    watcher.page.goto(f"{server.url}?tour=off&format={wire_format}")
    watcher.start("two yellow stars drifting left over a dark blue sky")
    watcher.wait_shown(5)
    watcher.act("stop")
    watcher.wait_status("ended")
    with watcher.page.expect_download() as waiting:
        watcher.act("download")
    assert waiting.value.suggested_filename.endswith(".mp4" if wire_format == "h264" else ".mov")
    data = waiting.value.path().read_bytes()
    with av.open(io.BytesIO(data)) as film:
        video = film.streams.video[0]
        assert video.average_rate == 12
        frames = list(film.decode(video))
    chunks = watcher.wire()["chunks"]
    assert {chunk["format"] for chunk in chunks} == {wire_format}
    assert len(frames) == sum(chunk["frames"] for chunk in chunks)
    times = [frame.time for frame in frames]
    assert all(abs(b - a - 1 / 12) < 1e-3 for a, b in itertools.pairwise(times))
    if wire_format == "h264":  # and the browser itself plays it
        player = watcher.page.context.new_page()
        length_s = player.evaluate(PLAY, base64.b64encode(data).decode())
        assert abs(length_s - len(frames) / 12) < 0.1


def test_copy_this_stream_gives_its_card(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url, permissions=["clipboard-read", "clipboard-write"])
    watcher.start("one red circle moving up on a black background")
    watcher.wait_shown(2)
    watcher.steer("one blue square moving up on a black background")
    watcher.wait_shown(8)
    watcher.act("stop")
    watcher.wait_status("ended")
    watcher.act("card")
    watcher.page.wait_for_selector("#notice:not([hidden])")
    card = json.loads(watcher.page.evaluate("navigator.clipboard.readText()"))
    chunks = watcher.wire()["chunks"]
    assert card["model"] == "shapes"
    assert len(card["inputs"]) == 2
    switch = next(chunk for chunk in chunks if chunk["prompt_version"] != chunks[0]["prompt_version"])
    assert card["inputs"][1]["from_index"] == switch["index"]
    by_index = {chunk["index"]: chunk["digest"] for chunk in chunks}
    assert card["digest"] == by_index[card["chunk_count"] - 1]


def test_without_webcodecs_the_page_takes_jpeg(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    watcher.page.add_init_script("delete window.VideoDecoder")
    watcher.page.reload()
    watcher.start("one large green triangle spinning on a black background")
    watcher.wait_moving()
    wait_colour(watcher, "green")
    assert {chunk["format"] for chunk in watcher.wire()["chunks"]} == {"jpeg"}
