"""Records "Pull the plug on a worker" as it happens: a real fleet of two, a real kill, a real browser.

    python docs/make_demo_video.py            (or: make demo-video)

Writes docs/images/plug.mp4 (H.264, at most MAX_BYTES) and the still docs/images/plug.png. Nothing is cut, sped up or
staged but the wait until the streams have their reserve.
"""

from __future__ import annotations

import base64
import contextlib
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import click
from PIL import Image

from turboserve.bench.chromium import chromium, serving

if TYPE_CHECKING:
    from playwright.sync_api import Page

PICTURES = Path(__file__).parent / "images"
SIZE = (1280, 860)
FILM_SIZE = (1024, 688)
MAX_BYTES = 1_500_000
BEFORE_S = 3.0
AFTER_S = 4.0


class Film:
    """Frames of a page as the browser shows them, with their times."""

    def __init__(self, page: Page) -> None:
        self._session = page.context.new_cdp_session(page)
        self.frames: list[tuple[float, bytes]] = []
        self._session.on("Page.screencastFrame", self._frame)

    def start(self) -> None:
        self._session.send(
            "Page.startScreencast", {"format": "jpeg", "quality": 85, "maxWidth": SIZE[0], "maxHeight": SIZE[1]}
        )

    def _frame(self, event: dict[str, Any]) -> None:
        self.frames.append((time.monotonic(), base64.b64decode(event["data"])))
        self._session.send("Page.screencastFrameAck", {"sessionId": event["sessionId"]})

    def stop(self) -> None:
        self._session.send("Page.stopScreencast")

    def save(self, path: Path, crf: int) -> None:
        """An mp4 with the frames at their own times."""
        with av.open(str(path), "w") as film:
            stream: Any = film.add_stream("libx264", rate=30, options={"crf": str(crf), "preset": "slow"})
            stream.width, stream.height = FILM_SIZE
            stream.pix_fmt = "yuv420p"
            began_s, last = self.frames[0][0], -1
            for at_s, data in self.frames:
                number = round(30 * (at_s - began_s))
                if number <= last:
                    continue
                last = number
                picture = Image.open(io.BytesIO(data)).convert("RGB").resize(FILM_SIZE, Image.Resampling.LANCZOS)
                frame = av.VideoFrame.from_image(picture)
                frame.pts = number
                film.mux(stream.encode(frame))
            film.mux(stream.encode())


def perform(page: Page, film: Film) -> None:
    """The show, from the streams at rest to the verdict."""
    page.wait_for_selector("#plug-start:not([disabled])", timeout=120_000)
    page.click("#plug-start")
    page.wait_for_selector("#plug-pull:not([disabled])", timeout=120_000)
    page.wait_for_timeout(4000)  # the first words have changed once
    film.start()
    page.wait_for_timeout(1000 * BEFORE_S)
    page.click("#plug-pull")
    page.wait_for_selector("#plug-lanes [data-state=lost]", timeout=60_000)
    page.screenshot(path=PICTURES / "plug-dead.png")
    page.wait_for_selector("#plug-badge[data-done=true]", timeout=240_000)
    page.wait_for_timeout(1000 * AFTER_S)
    film.stop()
    page.screenshot(path=PICTURES / "plug.png")


@click.command()
@click.option("--url", help="A running server of two workers without keys.  [default: starts one]")
@click.option("--streams", default=4, show_default=True, type=click.IntRange(1, 4))
@click.option("--playback-rate", default=1.0, show_default=True)
def main(url: str | None, streams: int, playback_rate: float) -> None:
    """Write the film and its still to docs/images/."""
    PICTURES.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        flags = ("--workers", "2", "--playback-rate", str(playback_rate))
        address = (url or stack.enter_context(serving(*flags))).rstrip("/") + "/"
        browser = stack.enter_context(chromium())
        context = browser.new_context(viewport={"width": SIZE[0], "height": SIZE[1]})
        page = context.new_page()
        page.goto(f"{address}?streams={streams}")
        film = Film(page)
        perform(page, film)
        page.goto("about:blank")  # leaving ends the page's sessions
    path = PICTURES / "plug.mp4"
    for crf in (28, 32, 36, 40, 44):
        film.save(path, crf)
        if path.stat().st_size <= MAX_BYTES:
            break
    else:
        raise click.ClickException(f"{path} has {path.stat().st_size} bytes; at most {MAX_BYTES} are wanted")
    length_s = film.frames[-1][0] - film.frames[0][0]
    click.echo(f"{path.name}: {length_s:.0f} s, {len(film.frames)} frames, {path.stat().st_size // 1024} KB, crf {crf}")


if __name__ == "__main__":
    main()
