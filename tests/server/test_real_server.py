"""The whole server over sockets, with the embedded model: the promises an independent client can check."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from real_server import received, start_server, wait_ready

pytestmark = pytest.mark.timeout(300)
SEED = 20261
PROMPT = "two small red circles drifting left over a dark blue sky"


async def open_session(url: str, **body: Any) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        answer = await http.post("/v1/sessions", json={"prompt": PROMPT, "seed": SEED, "format": "raw", **body})
        assert answer.status_code == 201, answer.text
        return answer.json()


async def end_session(url: str, sid: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        await http.delete(f"/v1/sessions/{sid}")


class Client:
    """An independent client: it knows the contract and nothing of our code."""

    def __init__(self, url: str, opened: dict[str, Any]) -> None:
        self.url = url.replace("http", "ws", 1) + f"/v1/sessions/{opened['id']}/stream"
        self.token = opened["token"]
        self.next_index = 0
        self.digest = b""
        self.digests: list[str] = []

    async def run(
        self,
        chunks: int,
        *,
        prompts: dict[int, str] | None = None,
        drop_at: int | None = None,
        last_after: asyncio.Event | None = None,
    ) -> None:
        """Take chunks until `chunks` are there; `prompts` are sent ahead, bound to their indices. The last one is acked
        only once `last_after` is set: until then the stream is not over, however slow the one who sets it."""
        async with websockets.connect(self.url, max_size=None, compression=None) as socket:
            attach = {"type": "attach", "token": self.token, "next_index": self.next_index, "pace": "free"}
            await socket.send(json.dumps(attach))
            for index, text in (prompts or {}).items():
                await socket.send(json.dumps({"type": "prompt", "text": text, "from_index": index}))
            while self.next_index < chunks:
                message = json.loads(await received(socket))
                assert message["type"] not in ("error", "end"), message
                if message["type"] == "attached":
                    self.token = message["token"]
                if message["type"] != "chunk":
                    continue
                payload = await received(socket)
                assert message["index"] == self.next_index and len(payload) == message["bytes"]
                assert message["digest_prev"] == self.digest.hex()
                self.digest = hashlib.sha256(self.digest + payload).digest()
                assert message["digest"] == self.digest.hex()
                self.digests.append(message["digest"])
                self.next_index += 1
                if drop_at == message["index"]:
                    socket.transport.abort()  # received, and the ack is lost with the connection
                    return
                if last_after is not None and self.next_index == chunks:
                    await last_after.wait()
                await socket.send(json.dumps({"type": "ack", "index": message["index"]}))


CHUNKS = 8
SWITCH = {4: "one large green square growing on a black background"}


async def chain(url: str, **body: Any) -> list[str]:
    opened = await open_session(url, **body)
    try:
        client = Client(url, opened)
        await client.run(CHUNKS, prompts=SWITCH)
        return client.digests
    finally:
        await end_session(url, opened["id"])


async def test_same_chain_twice_with_neighbours_and_across_a_drop(server_url: str) -> None:
    first = await chain(server_url)
    assert len(set(first)) == CHUNKS
    assert await chain(server_url) == first

    with_neighbours, *others = await asyncio.gather(
        chain(server_url), *(chain(server_url, seed=SEED + 1 + number) for number in range(3))
    )
    assert with_neighbours == first
    assert all(other != first for other in others)

    opened = await open_session(server_url)
    client = Client(server_url, opened)
    await client.run(CHUNKS, prompts=SWITCH, drop_at=2)
    await client.run(CHUNKS, drop_at=5)
    await client.run(CHUNKS)
    await end_session(server_url, opened["id"])
    assert client.digests == first


async def test_the_card_says_what_was_streamed(server_url: str) -> None:
    opened = await open_session(server_url)
    client = Client(server_url, opened)
    await client.run(CHUNKS, prompts=SWITCH)
    async with httpx.AsyncClient(base_url=server_url, timeout=60) as http:
        card = (await http.get(f"/v1/sessions/{opened['id']}/card")).json()
        state = (await http.get(f"/v1/sessions/{opened['id']}")).json()
        await http.delete(f"/v1/sessions/{opened['id']}")
    assert card["seed"] == SEED and card["model"] == "shapes" and card["model_hash"]
    assert [one["from_index"] for one in card["inputs"]] == [0, 4]
    assert card["chunk_count"] >= CHUNKS
    assert state["delivered"] == CHUNKS and state["worker"] in ("w0", "w1")


async def test_encoded_formats_share_one_chain(server_url: str) -> None:
    chains = set()
    for format in ("jpeg", "h264", "mp4"):
        opened = await open_session(server_url, format=format)
        digests = []
        url = server_url.replace("http", "ws", 1) + opened["stream_url"]
        async with websockets.connect(url, max_size=None, compression=None) as socket:
            await socket.send(json.dumps({"type": "attach", "token": opened["token"], "next_index": 0, "pace": "free"}))
            while len(digests) < 3:
                message = json.loads(await received(socket))
                assert message["type"] != "error", message
                if message["type"] == "chunk":
                    payload = await socket.recv()
                    assert len(payload) == message["bytes"] > 0
                    if not message.get("init"):
                        digests.append(message["digest"])
                        await socket.send(json.dumps({"type": "ack", "index": message["index"]}))
        await end_session(server_url, opened["id"])
        chains.add(tuple(digests))
    assert len(chains) == 1


async def test_a_one_shot_video(server_url: str) -> None:
    async with httpx.AsyncClient(base_url=server_url, timeout=60) as http:
        made = (await http.post("/v1/videos", json={"prompt": PROMPT, "seconds": "1"})).json()
        assert made["object"] == "video" and made["status"] in ("queued", "in_progress")
        deadline_s = time.monotonic() + 60
        while (video := (await http.get(f"/v1/videos/{made['id']}")).json())["status"] != "completed":
            assert video["status"] != "failed" and time.monotonic() < deadline_s, video
            await asyncio.sleep(0.1)
        content = await http.get(f"/v1/videos/{made['id']}/content")
        assert content.headers["content-type"] == "video/mp4" and content.content[4:8] == b"ftyp"
        import io

        import av

        with av.open(io.BytesIO(content.content)) as film:
            assert sum(1 for _ in film.decode(video=0)) == 12
        assert (await http.delete(f"/v1/videos/{made['id']}")).json()["deleted"]
        assert (await http.get(f"/v1/videos/{made['id']}")).status_code == 404


async def test_one_stream_through_every_process_that_may_die(tmp_path: Path) -> None:
    """A dropped socket, a killed gateway, a server stopped and started again: one chain. Then a killed launcher."""
    with start_server(tmp_path, "--workers", "1") as server:
        reference = Client(server.url, await open_session(server.url))
        await reference.run(9, prompts={3: SWITCH[4]})
        client = Client(server.url, await open_session(server.url))
        await client.run(9, prompts={3: SWITCH[4]}, drop_at=4)

        gateway = next(pid for pid in children_of(server.pid) if b"server.process" in cmdline(pid))
        os.kill(gateway, signal.SIGKILL)
        await asyncio.sleep(0.2)
        wait_ready(server)
        await client.run(6)

        async with websockets.connect(client.url, max_size=None, compression=None) as socket:
            await socket.send(json.dumps({"type": "attach", "token": client.token, "next_index": 6, "pace": "free"}))
            client.token = json.loads(await socket.recv())["token"]
            began_s = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(websockets.ConnectionClosed):
                while True:
                    await received(socket, 20)
            assert socket.close_code == 1012
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        assert time.monotonic() - began_s < 9

    with start_server(tmp_path, "--workers", "1", port=int(server.url.rpartition(":")[2])) as server:
        session = client.url.split("/")[-2]
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            found = (await http.get(f"/v1/sessions/{session}")).json()
        assert found["state"] == "suspended" and found["bytes"]["disk"] > 0, "it waits on disk"
        await client.run(9)
        assert client.digests == reference.digests

        children = children_of(server.pid)
        assert len(children) == 3
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait()
        deadline_s = time.monotonic() + 5
        while any(alive(pid) for pid in children) and time.monotonic() < deadline_s:
            time.sleep(0.05)  # noqa: ASYNC251 - nothing else runs in this loop any more
        assert not [pid for pid in children if alive(pid)]


def children_of(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid:
                    found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
