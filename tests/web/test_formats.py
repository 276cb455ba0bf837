"""Encoded streams in a real browser: `mp4` through Media Source Extensions, `h264` through WebCodecs, `jpeg`."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from turboserve.video.encode import Encoder

pytestmark = pytest.mark.browser

HELPERS = """
var bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
// The colours in the middle and in the lower right corner, as they are drawn.
var colours = (image, width, height) => {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const at = (x, y) => [...context.getImageData(x, y, 1, 1).data.slice(0, 3)];
  return [at(width >> 1, height >> 1), at(width - 3, height - 3)];
};
"""

MSE = """
async ({ mime, parts }) => {
  if (!MediaSource.isTypeSupported(mime)) throw new Error("not supported: " + mime);
  const source = new MediaSource(), video = document.createElement("video");
  video.muted = true;
  video.src = URL.createObjectURL(source);
  document.body.append(video);
  await new Promise((done) => source.addEventListener("sourceopen", done, { once: true }));
  const buffer = source.addSourceBuffer(mime);
  const steps = [];
  for (const part of parts) {
    await new Promise((done, fail) => {
      buffer.addEventListener("updateend", done, { once: true });
      buffer.addEventListener("error", () => fail(new Error("append failed")), { once: true });
      buffer.appendBuffer(bytes(part));
    });
    steps.push(buffer.buffered.length ? [buffer.buffered.start(0), buffer.buffered.end(buffer.buffered.length - 1),
      buffer.buffered.length] : null);
  }
  source.endOfStream();
  const seen = [];
  for (const time of [0.04, 1.04]) {
    video.currentTime = time;
    await new Promise((done) => video.addEventListener("seeked", done, { once: true }));
    seen.push(colours(video, video.videoWidth, video.videoHeight));
  }
  return { steps, seen, duration: video.duration, error: video.error && video.error.message };
}
"""

WEBCODECS = """
async ({ codec, chunks }) => {
  const frames = [], errors = [];
  const decoder = new VideoDecoder({
    output: (frame) => { frames.push(colours(frame, frame.displayWidth, frame.displayHeight)); frame.close(); },
    error: (error) => errors.push(error.message),
  });
  const config = { codec, optimizeForLatency: true };
  const { supported } = await VideoDecoder.isConfigSupported(config);
  decoder.configure(config);
  let number = 0;
  for (const chunk of chunks) {
    for (const [place, unit] of chunk.entries()) {
      decoder.decode(new EncodedVideoChunk({ type: place ? "delta" : "key", timestamp: number++, data: bytes(unit) }));
    }
  }
  await decoder.flush();
  return { supported, frames, errors };
}
"""

JPEG = """
async ({ pictures }) => Promise.all(pictures.map(async (one) => {
  const image = await createImageBitmap(new Blob([bytes(one)], { type: "image/jpeg" }));
  return colours(image, image.width, image.height);
}))
"""


def film(first: int, count: int) -> np.ndarray:
    """Frames whose left turns from red to blue and whose right gets brighter, by frame number."""
    frames = np.zeros((count, 96, 96, 3), np.uint8)
    for place, number in enumerate(range(first, first + count)):
        frames[place, :, :64] = (220 - 15 * number, 40, 20 + 15 * number)
        frames[place, :, 64:] = 40 + 12 * number
    return frames


CHUNKS = [film(0, 1), film(1, 4), film(5, 4), film(9, 4)]


def split(message: bytes) -> list[bytes]:
    """The parts of a `jpeg` or `h264` message."""
    parts, at = [], 0
    while at < len(message):
        (length,) = struct.unpack_from("<I", message, at)
        parts.append(message[at + 4 : at + 4 + length])
        at += 4 + length
    return parts


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def same_colours(seen, frame, tolerance=12) -> bool:
    middle, corner = frame[48, 48].astype(int), frame[93, 93].astype(int)
    return abs(seen[0] - middle).max() <= tolerance and abs(seen[1] - corner).max() <= tolerance


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page()
    # WebCodecs wants a secure origin, which a blank page is not.
    page.route("http://localhost/", lambda route: route.fulfill(body="<!doctype html><body></body>"))
    page.goto("http://localhost/")
    page.add_script_tag(content=HELPERS)
    yield page
    page.close()


def test_mp4_plays_through_media_source_also_after_another_attach(page):
    first, second = Encoder("mp4", 96, 96, 12), Encoder("mp4", 96, 96, 12, first_frame=5)
    parts = [first.init_segment(), *(first.encode_chunk(CHUNKS[index], index) for index in (0, 1))]
    parts += [second.init_segment(), *(second.encode_chunk(CHUNKS[index], index) for index in (2, 3))]
    result = page.evaluate(MSE, {"mime": first.mime, "parts": [text(part) for part in parts]})
    assert result["error"] is None
    # Each fragment is playable at once, and there is no hole where the attach changed.
    ends_s = [step[1] for step in result["steps"] if step]
    assert [round(end_s * 12) for end_s in ends_s] == [1, 5, 5, 9, 13]
    assert all(step[2] == 1 and step[0] == 0 for step in result["steps"] if step)
    assert same_colours(result["seen"][0], CHUNKS[0][0]) and same_colours(result["seen"][1], CHUNKS[3][3])


def test_h264_decodes_in_web_codecs(page):
    encoder = Encoder("h264", 96, 96, 12)
    chunks = [split(encoder.encode_chunk(frames, index)) for index, frames in enumerate(CHUNKS)]
    codec = encoder.mime.split('"')[1]
    sent = {"codec": codec, "chunks": [[text(unit) for unit in chunk] for chunk in chunks]}
    result = page.evaluate(WEBCODECS, sent)
    assert result["supported"] and not result["errors"]
    frames = [frame for chunk in CHUNKS for frame in chunk]
    assert len(result["frames"]) == len(frames) == 13
    assert all(same_colours(seen, frame) for seen, frame in zip(result["frames"], frames, strict=True))


def test_jpeg_decodes(page):
    pictures = split(Encoder("jpeg", 96, 96, 12).encode_chunk(CHUNKS[1], 0))
    result = page.evaluate(JPEG, {"pictures": [text(picture) for picture in pictures]})
    assert all(same_colours(seen, frame) for seen, frame in zip(result, CHUNKS[1], strict=True))
