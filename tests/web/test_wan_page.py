"""The page streams the Wan model too: from a checkpoint's parts, at 16 frames a second, without a vocabulary."""

from __future__ import annotations

import httpx
import pytest

from .conftest import OpenPage, serving

pytestmark = pytest.mark.browser


def test_the_page_streams_a_wan_model(tmp_path, open_page: OpenPage) -> None:
    with serving(tmp_path, "wan-tiny") as server:
        watcher = open_page(server.url)
        watcher.page.click("#choices summary")
        offered = watcher.page.locator("#choices select")
        offered.first.wait_for()
        assert [one.get_attribute("name") for one in offered.all()] == ["prompt_switch", "decoder"]
        watcher.page.select_option("select[name=decoder]", "light")
        watcher.page.select_option("select[name=prompt_switch]", "blend")
        watcher.start("any words will do: a fox in the snow")
        watcher.wait_moving()
        watcher.wait_shown(2)
        chunks = watcher.wire()["chunks"]
        assert [one["index"] for one in chunks[:3]] == [0, 1, 2]
        assert {one["format"] for one in chunks} <= {"h264", "jpeg"}
        session = chunks[0]["url"].split("/")[-2]
        opened = httpx.get(f"{server.url}v1/sessions/{session}").json()
        assert (opened["decoder"], opened["prompt_switch"]) == ("light", "blend")
        watcher.page.goto("about:blank")  # before the server goes
