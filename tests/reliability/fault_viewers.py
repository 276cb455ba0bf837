"""Viewers that take turns, reconnect after every loss, and keep what an independent client can check: indices, digests,
when each chunk came."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import websockets

RECONNECT_S = 0.1
PAUSED = -1


@dataclass(frozen=True)
class Seen:
    """What of a session a run without faults is held against."""

    sid: str
    seed: int
    prompt: str
    digests: list[str]


@dataclass
class FaultViewer:
    """One session's viewer. While `on` it plays live; else it is paused and attached."""

    url: str
    opened: dict[str, Any]
    prompt: str
    chunk_s: float
    on: bool = False
    next_index: int = 0
    digest: bytes = b""
    digests: list[str] = field(default_factory=list)
    arrivals: list[tuple[int, float, int]] = field(default_factory=list)
    """(index, when it came, which turn it belongs to; PAUSED between turns)"""
    turn: int = 0
    reconnects: int = 0
    failed: str = ""
    _socket: Any = None
    _task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.token = self.opened["token"]
        self.tokens = [self.token]

    @property
    def sid(self) -> str:
        return str(self.opened["id"])

    @property
    def seen(self) -> Seen:
        return Seen(self.sid, self.opened["seed"], self.prompt, self.digests)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def play(self, on: bool) -> None:
        """Take one's turn, or pause. A gap between turns is none of the stream, nor is one before the chunk that a
        paused viewer still gets when it attaches anew."""
        self.on = on
        self.turn += 1
        if self._socket is not None:
            with contextlib.suppress(websockets.ConnectionClosed):
                await self._socket.send(json.dumps({"type": "resume" if on else "pause"}))

    async def _run(self) -> None:
        while not self.failed:
            try:
                await self._connection()
            except (OSError, websockets.WebSocketException, TimeoutError, asyncio.IncompleteReadError):
                pass
            except AssertionError as error:
                self.failed = str(error)
                return
            self._socket = None
            self.reconnects += 1
            await asyncio.sleep(RECONNECT_S)

    async def _connection(self) -> None:
        stream = self.url.replace("http", "ws", 1) + self.opened["stream_url"]
        async with websockets.connect(stream, max_size=None, compression=None, open_timeout=10) as socket:
            attach = {"type": "attach", "token": self.token, "next_index": self.next_index, "format": "raw"}
            await socket.send(json.dumps(attach))
            try:
                await self._read(socket)
            finally:
                if socket.close_code == 4401:  # the answer that had the newer token was lost, or never durable
                    at = self.tokens.index(self.token)
                    assert at > 0 or len(self.tokens) > 1, "the only token there was does not open the session"
                    self.token = self.tokens[at - 1]
                assert socket.close_code not in (4404, 4410, 4500), f"closed with {socket.close_code}"

    async def _read(self, socket: Any) -> None:
        while True:
            message = json.loads(await socket.recv())
            match message["type"]:
                case "attached":
                    self.token = message["token"]
                    self.tokens = [*self.tokens[-3:], self.token]
                    self._socket = socket
                    await socket.send(json.dumps({"type": "resume" if self.on else "pause"}))
                case "chunk":
                    payload = await socket.recv()
                    self._take(message, payload)
                    await socket.send(json.dumps({"type": "ack", "index": message["index"]}))
                case "error" | "end":
                    raise AssertionError(f"{message}")

    def _take(self, header: dict[str, Any], payload: bytes) -> None:
        assert header["index"] == self.next_index, f"chunk {header['index']} comes, {self.next_index} is next"
        assert header["digest_prev"] == self.digest.hex(), f"the chain breaks at {header['index']}"
        self.digest = hashlib.sha256(self.digest + payload).digest()
        assert header["digest"] == self.digest.hex(), f"chunk {header['index']} has another digest than it says"
        self.digests.append(header["digest"])
        self.next_index += 1
        self.arrivals.append((header["index"], time.monotonic(), self.turn if self.on else PAUSED))

    # ------------------------------------------------------------------ what it saw

    def gaps(self, since_s: float, until_s: float) -> list[float]:
        """Seconds between chunks that follow each other in one turn, where the later one came in a stretch of time."""
        found = []
        for before, after in zip(self.arrivals, self.arrivals[1:], strict=False):
            if before[2] == after[2] != PAUSED and since_s <= after[1] <= until_s:
                found.append(after[1] - before[1])
        return found

    def stalls(self, buffer_chunks: int = 2) -> int:
        """How often a player that starts with so many chunks ran dry, over all turns."""
        count = 0
        for turn in {one[2] for one in self.arrivals} - {PAUSED}:
            times = [at_s for _, at_s, of in self.arrivals if of == turn]
            if len(times) <= buffer_chunks:
                continue
            start_s = times[buffer_chunks - 1]
            for number, at_s in enumerate(times[buffer_chunks:], buffer_chunks):
                due_s = start_s + number * self.chunk_s
                if at_s > due_s:
                    count += 1
                    start_s += at_s - due_s
        return count


async def open_viewer(http: httpx.AsyncClient, url: str, number: int, chunk_s: float, rate: float) -> FaultViewer:
    prompt = f"two {['red', 'blue', 'green', 'white'][number % 4]} circles drifting left over a dark sky"
    answer = await http.post("/v1/sessions", json={"prompt": prompt, "seed": 1000 + number, "format": "raw"})
    assert answer.status_code == 201, answer.text
    return FaultViewer(url, answer.json(), prompt, chunk_s / rate)


def undisturbed_chain(seen: Seen) -> list[str]:
    """The digests that the session's inputs give in one engine that nothing happens to."""
    from turboserve.card import CardInput, StepsRun
    from turboserve.cli import _making as making
    from turboserve.model.registry import load_spec

    spec = load_spec("shapes")
    inputs, steps = (CardInput(0, seen.prompt, 1),), (StepsRun(0, spec.denoise_steps),)
    requests = making.requests(inputs, steps, len(seen.digests), "swap")
    return [chunk.digest for chunk in _solo().stream(seen.seed, requests)]


_loaded: list[Any] = []


def _solo() -> Any:
    from turboserve.runtime.solo import Solo

    if not _loaded:
        _loaded.append(Solo.load("shapes", "cpu"))
    return _loaded[0]
