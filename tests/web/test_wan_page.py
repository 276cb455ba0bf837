"""The page streams the Wan model too: from a checkpoint's parts, at 16 frames a second, without a vocabulary."""

from __future__ import annotations

import pytest

from .conftest import OpenPage, serving

pytestmark = pytest.mark.browser


def test_the_page_streams_a_wan_model(tmp_path, open_page: OpenPage) -> None:
    with serving(tmp_path, "wan-tiny") as server:
        watcher = open_page(server.url)
        watcher.start("any words will do: a fox in the snow")
        watcher.wait_moving()
        watcher.wait_shown(2)
        chunks = watcher.wire()["chunks"]
        assert [one["index"] for one in chunks[:3]] == [0, 1, 2]
        assert {one["format"] for one in chunks} <= {"h264", "jpeg"}
        watcher.page.goto("about:blank")  # before the server goes
