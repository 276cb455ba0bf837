"""The page's own logic, run in the browser without a stream: playout clock, wire framing, film writer."""

from __future__ import annotations

import base64
import io
import random
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from .conftest import OpenPage, Server

pytestmark = pytest.mark.browser

CHUNK_S = 1 / 3

# Plays chunks that arrive at the given times on a 60 Hz display; answers what a viewer would see of it.
SIMULATE = """async ({ arrivals, until, holds }) => {
  const { Playout } = await import(new URL("assets/playout.js", document.baseURI));
  const playout = new Playout(12);
  const shown = [];
  const delays = [];
  const moments = [];
  let chunk = 0;
  for (let now = 0; now < until; now += 1 / 60) {
    for (const [at, action] of holds) {
      if (at >= now && at < now + 1 / 60) playout[action](now);
    }
    while (chunk < arrivals.length && arrivals[chunk] <= now) {
      playout.chunkArrives(arrivals[chunk]);
      for (let position = 0; position < 4; position += 1) playout.push({ index: chunk, position, version: 1 });
      chunk += 1;
    }
    const { show, skipped } = playout.tick(now);
    for (const frame of [...skipped, ...(show ? [show] : [])]) {
      shown.push([frame.index, frame.position]);
      moments.push(now);
      if (frame.position === 0) delays.push(now - arrivals[frame.index]);
    }
  }
  return { shown, delays, moments, stalls: playout.stalls, stalledS: playout.stalledS, buffered: playout.bufferedS };
}"""


def live_arrivals(count: int, latency_s: float, jitter_s: float, seed: int = 1) -> list[float]:
    """Arrival times under the protocol's live pacing: chunk i begins at max(0, i - 1) chunks."""
    rng = random.Random(seed)
    times: list[float] = []
    for index in range(count):
        begins_s = max(max(0, index - 1) * CHUNK_S, times[-1] if times else 0)
        times.append(begins_s + latency_s + rng.random() * jitter_s)
    return times


def simulate(watcher: Any, arrivals: list[float], until: float, holds: list[Any] | None = None) -> dict[str, Any]:
    answer = watcher.page.evaluate(SIMULATE, {"arrivals": arrivals, "until": until, "holds": holds or []})
    return dict(answer)


def test_playout_of_steady_arrivals_never_stalls_and_keeps_little_in_hand(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    result = simulate(watcher, live_arrivals(120, latency_s=0.06, jitter_s=0.01), until=38)
    assert result["stalls"] == 0
    order = [(index, position) for index in range(110) for position in range(4)]
    assert [tuple(one) for one in result["shown"][: len(order)]] == order, "every frame once, in order"
    settled = result["delays"][20:]
    assert max(settled) < 0.12, "a chunk is on the screen soon after it arrived"


def test_playout_that_waited_long_for_its_first_chunk_starts_at_its_beginning(
    server: Server, open_page: OpenPage
) -> None:
    watcher = open_page(server.url)
    arrivals = [5 + time for time in live_arrivals(30, latency_s=0.1, jitter_s=0)]
    result = simulate(watcher, arrivals, until=13)
    assert result["stalls"] == 0
    assert result["delays"][0] < 0.02, "the first picture is shown at once"
    assert result["moments"][3] - result["moments"][0] > 2.4 / 12, "and its successors at their own pace"


def test_playout_learns_how_much_jittery_arrivals_need(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    result = simulate(watcher, live_arrivals(300, latency_s=0.08, jitter_s=0.2), until=95)
    assert result["stalls"] <= 6, result
    assert result["stalledS"] < 0.6
    assert result["delays"][-1] < 0.75


def test_playout_counts_a_stall_and_not_a_pause(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    arrivals = live_arrivals(30, latency_s=0.05, jitter_s=0)
    gap = [time + (1.5 if index >= 15 else 0) for index, time in enumerate(arrivals)]
    stalled = simulate(watcher, gap, until=14)
    assert stalled["stalls"] == 1
    assert 1.0 < stalled["stalledS"] < 1.5
    # The same gap while the viewer holds the picture is what was asked for.
    held = simulate(watcher, gap, until=14, holds=[[4.6, "hold"], [6.6, "release"]])
    assert held["stalls"] == 0
    assert len(held["shown"]) == 120


def test_units_of_a_payload_are_checked(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    script = """async (bytes) => {
      const { splitUnits } = await import(new URL("assets/protocol.js", document.baseURI));
      try {
        return splitUnits(new Uint8Array(bytes).buffer).map((unit) => [...unit]);
      } catch (error) {
        return error.message;
      }
    }"""
    assert watcher.page.evaluate(script, [1, 0, 0, 0, 7, 2, 0, 0, 0, 8, 9]) == [[7], [8, 9]]
    assert watcher.page.evaluate(script, []) == []
    assert watcher.page.evaluate(script, [1, 0, 0]) == "payload ends inside a length field"
    assert watcher.page.evaluate(script, [9, 0, 0, 0, 1]) == "payload ends inside a frame"


def test_films_of_both_formats_hold_their_pictures(server: Server, open_page: OpenPage) -> None:
    watcher = open_page(server.url)
    script = """async ({ format, frames }) => {
      const { writeFilm } = await import(new URL("assets/mp4.js", document.baseURI));
      const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
      const samples = frames.map((text, n) => ({ data: bytes(text), key: n % 4 === 0 }));
      const film = { format, width: 96, height: 64, fps: 16, frames: samples };
      const data = new Uint8Array(await writeFilm(film).arrayBuffer());
      return btoa(Array.from(data, (byte) => String.fromCharCode(byte)).join(""));
    }"""
    pictures = [np.full((64, 96, 3), 20 * n, np.uint8) for n in range(12)]
    for wire_format, frames in (("h264", _h264(pictures)), ("jpeg", _jpeg(pictures))):
        encoded = [base64.b64encode(frame).decode() for frame in frames]
        data = base64.b64decode(watcher.page.evaluate(script, {"format": wire_format, "frames": encoded}))
        with av.open(io.BytesIO(data)) as film:
            video = film.streams.video[0]
            assert (video.width, video.height, video.average_rate) == (96, 64, 16)
            means = [frame.to_ndarray(format="rgb24").mean() for frame in film.decode(video)]
        assert len(means) == 12
        assert all(abs(mean - 20 * n) < 6 for n, mean in enumerate(means)), means


def _jpeg(pictures: list[Any]) -> list[bytes]:
    frames = []
    for picture in pictures:
        sink = io.BytesIO()
        Image.fromarray(picture).save(sink, "JPEG")
        frames.append(sink.getvalue())
    return frames


def _h264(pictures: list[Any]) -> list[bytes]:
    codec = av.CodecContext.create("libx264", "w")
    codec.width, codec.height, codec.pix_fmt, codec.framerate = 96, 64, "yuv420p", 16
    codec.time_base = 1 / codec.framerate
    codec.options = {
        "tune": "zerolatency",
        "profile": "baseline",
        "x264-params": "keyint=4:scenecut=0:repeat-headers=1:annexb=1",
    }
    frames = []
    for n, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        frame.pts = n
        frames.append(b"".join(bytes(packet) for packet in codec.encode(frame)))
    return frames
