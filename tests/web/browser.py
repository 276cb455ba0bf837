"""What the page tests do in the browser, in a viewer's words; and a proxy whose connections can be cut."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import Any

from playwright.sync_api import Page

# Upper bound of every wait: a busy machine with two cores makes video slower than it plays.
PATIENCE_S = 45.0


class Cable:
    """A TCP proxy in front of the server: `cut` resets every connection, as a lost network would."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: list[socket.socket] = []
        self._lock = threading.Lock()
        self._refuse = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, refuse: bool = False) -> None:
        """Reset all connections; with `refuse` new ones are reset too, until `mend`."""
        self._refuse = refuse
        with self._lock:
            victims, self._pairs = self._pairs, []
        for one in victims:
            _reset(one)

    def mend(self) -> None:
        self._refuse = False

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._refuse:
                _reset(near)
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target_port))
            except OSError:
                _reset(near)
                continue
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _reset(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.shutdown(socket.SHUT_RDWR)
        one.close()


# Every socket of the page notes what went over it, so that a test can ask for exact indices.
WIRE_TAP = """
(() => {
  const wire = (window.wire = { attaches: [], chunks: [], closes: 0, prompts: [] });
  const Real = window.WebSocket;
  window.WebSocket = class extends Real {
    constructor(...given) {
      super(...given);
      this.addEventListener("message", (event) => {
        if (typeof event.data !== "string") return;
        const message = JSON.parse(event.data);
        if (message.type === "chunk") wire.chunks.push({ ...message, url: this.url });
      });
      this.addEventListener("close", () => (wire.closes += 1));
    }
    send(data) {
      const message = JSON.parse(data);
      if (message.type === "attach") wire.attaches.push({ next_index: message.next_index, format: message.format });
      if (message.type === "prompt") wire.prompts.push(message);
      super.send(data);
    }
  };
})();
"""


class Watcher:
    """What a test asks of the page, in the words of a viewer."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def start(self, prompt: str) -> None:
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Enter")
        self.wait_playing()

    def wait_playing(self, count: int = 1, timeout_s: float = PATIENCE_S) -> None:
        self.page.wait_for_function(
            "count => document.querySelectorAll('.tile[data-status=playing]').length >= count",
            arg=count,
            timeout=timeout_s * 1000,
        )

    def wait_status(self, status: str, timeout_s: float = PATIENCE_S) -> None:
        self.page.wait_for_selector(f".tile[data-status={status}]", timeout=timeout_s * 1000)

    def steer(self, prompt: str, tile: int = 0) -> None:
        box = self.page.locator(".tile").nth(tile).locator(".steer input")
        box.fill(prompt)
        box.press("Enter")

    def act(self, action: str, tile: int = 0) -> None:
        self.page.locator(".tile").nth(tile).locator(f"[data-action={action}]").click()

    def pixels(self, tile: int = 0) -> list[int]:
        """RGBA of what the tile's canvas shows."""
        script = """n => {
          const canvas = document.querySelectorAll('.tile canvas')[n];
          return Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data);
        }"""
        return list(self.page.evaluate(script, tile))

    def wait_moving(self, tile: int = 0, timeout_s: float = PATIENCE_S) -> None:
        """Until the picture has changed three times."""
        script = """async ([n, timeout]) => {
          const canvas = document.querySelectorAll('.tile canvas')[n];
          const read = () => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.join();
          const end = performance.now() + timeout;
          let before = read();
          let changes = 0;
          while (changes < 3 && performance.now() < end) {
            await new Promise((resolve) => setTimeout(resolve, 60));
            const now = read();
            if (now !== before) changes += 1;
            before = now;
          }
          return changes;
        }"""
        changes = self.page.evaluate(script, [tile, timeout_s * 1000])
        assert changes >= 3, f"the picture of tile {tile} changed only {changes} times in {timeout_s} s"

    def wait_quiet(self, seconds: float = 1.5) -> int:
        """Until no chunk has come for a while; answers how many came in all."""
        count, since_s = len(self.wire()["chunks"]), time.monotonic()
        while time.monotonic() - since_s < seconds:
            self.page.wait_for_timeout(100)
            now = len(self.wire()["chunks"])
            if now != count:
                count, since_s = now, time.monotonic()
        return count

    def details(self, name: str, tile: int = 0) -> str:
        """A figure from a tile's details, once it is there."""
        more = self.page.locator(".tile").nth(tile).locator(".more")
        if more.get_attribute("open") is None:
            more.locator("summary").click()
        place = more.locator(f"[data-figure={name}]:not(:text-is('–'))")
        return place.inner_text(timeout=1000 * PATIENCE_S)

    def wire(self) -> dict[str, Any]:
        return dict(self.page.evaluate("window.wire"))

    def wait_shown(self, index: int, tile: int = 0, timeout_s: float = PATIENCE_S) -> None:
        """Until the picture has reached a chunk, by the strip below it."""
        script = """([n, index]) => {
          const bar = document.querySelectorAll('.tile')[n].querySelector('.strip .playing');
          return Number(bar?.dataset.index ?? -1) >= index;
        }"""
        self.page.wait_for_function(script, arg=[tile, index], timeout=timeout_s * 1000)
