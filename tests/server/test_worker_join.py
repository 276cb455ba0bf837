"""A worker that joins from another network namespace: an address of its own, nothing shared but a wire."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
import websockets
from click.testing import CliRunner
from real_server import REPOSITORY, RunningServer, received, start_server
from test_real_server import Client, end_session, open_session

from turboserve.cli.worker import address, command
from turboserve.errors import ConfigError

pytestmark = pytest.mark.timeout(300)  # two processes load a model: on a busy machine that alone takes a minute
# By the process, as the names below: two runs on one machine must not meet.
SUBNET = f"10.{213 + os.getpid() % 32}.{os.getpid() // 32 % 256}"
HERE, THERE = f"{SUBNET}.1", f"{SUBNET}.2"
NAMESPACE, LINK = f"tsjoin{os.getpid() % 10000}", f"tsj{os.getpid() % 10000}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module", name="namespace")
def other_namespace() -> Iterator[str]:
    """Another network, joined to ours by one virtual cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making a network namespace needs root and iproute2")
    try:
        ip("netns", "add", NAMESPACE)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", LINK, "type", "veth", "peer", "name", "eth0", "netns", NAMESPACE)
        ip("addr", "add", f"{HERE}/30", "dev", LINK)
        ip("link", "set", LINK, "up")
        ip("-n", NAMESPACE, "addr", "add", f"{THERE}/30", "dev", "eth0")
        ip("-n", NAMESPACE, "link", "set", "eth0", "up")
        yield NAMESPACE
    finally:
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=False)
        subprocess.run(["ip", "link", "del", LINK], check=False, capture_output=True)


def control_address(server: RunningServer) -> str:
    """What the server prints for those who want to join."""
    deadline_s = time.monotonic() + 20
    while "--join " not in server.log_text():
        assert time.monotonic() < deadline_s, server.log_text()[-2000:]
        time.sleep(0.05)
    return server.log_text().split("--join ")[1].split()[0]


@contextlib.contextmanager
def joined(namespace: str, server: RunningServer, log: Path, failpoints: str = "") -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "turboserve", "worker", "--join", control_address(server)]
    command += ["--token-file", str(server.data_dir / "cluster.token"), "--advertise", THERE]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TURBOSERVE_FAILPOINTS": failpoints}
    with open(log, "ab") as output:
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *command], stdout=output, stderr=output, env=environment
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def workers(server: RunningServer) -> dict[str, dict]:
    async with httpx.AsyncClient(base_url=server.url, timeout=20) as http:
        return {one["id"]: one for one in (await http.get("/v1/cluster")).json()["workers"]}


async def until(check, what: str, timeout_s: float = 150.0):
    deadline_s = time.monotonic() + timeout_s
    while not (found := await check()):
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.1)
    return found


async def test_it_makes_the_same_stream_and_is_drained_by_ctrl_c(namespace, tmp_path):
    with (
        start_server(tmp_path, "--workers", "1", "--control-host", HERE) as server,
        joined(namespace, server, tmp_path / "joined.log") as process,
    ):

        async def ready():
            found = await workers(server)
            return [one for one in found if one[0] == "j" and found[one]["state"] == "ready"]

        [name] = await until(ready, "the joined worker was not ready")
        opened = [await open_session(server.url) for _ in range(2)]
        clients = [Client(server.url, one) for one in opened]
        await asyncio.gather(*(client.run(6) for client in clients))
        async with httpx.AsyncClient(base_url=server.url, timeout=20) as http:
            states = [(await http.get(f"/v1/sessions/{one['id']}")).json() for one in opened]
        assert {state["worker"] for state in states} == {"w0", name}
        assert clients[0].digests == clients[1].digests  # same seed, same prompt, made on two nodes
        for one in opened:
            await end_session(server.url, one["id"])
        process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(process.wait, 30) == 0
        assert "w0" in await workers(server)


class FormatClient:
    """A viewer that knows the contract and nothing of our code; it may come with another format each time."""

    def __init__(self, url: str, opened: dict[str, Any]) -> None:
        self.url = url.replace("http", "ws", 1) + f"/v1/sessions/{opened['id']}/stream"
        self.sid, self.token = opened["id"], opened["token"]
        self.size = (opened["height"], opened["width"])
        self.digests: list[str] = []
        self.next_index = 0

    async def run(self, format: str, chunks: int, *, ack: bool = True) -> np.ndarray:
        """Take `chunks` more and look at every frame; without `ack` they are received and not acknowledged."""
        data: list[tuple[dict[str, Any], bytes]] = []
        init = b""
        async with websockets.connect(self.url, max_size=None, compression=None) as socket:
            attach = {"type": "attach", "token": self.token, "next_index": self.next_index, "pace": "free"}
            await socket.send(json.dumps(attach | {"format": format}))
            while len(data) < chunks:
                message = json.loads(await received(socket))
                assert message["type"] not in ("error", "end"), message
                if message["type"] == "attached":
                    self.token = message["token"]
                    assert format != "mp4" or "avc1" in message["mime"]
                if message["type"] != "chunk":
                    continue
                payload = await received(socket)
                assert len(payload) == message["bytes"] and message["format"] == format
                if message.get("init"):
                    assert format == "mp4" and message["index"] == -1 and not data
                    init = payload
                    continue
                index = self.next_index + len(data)
                assert message["index"] == index
                assert message["digest_prev"] == (self.digests[index - 1] if index else "")
                assert self.digests[index : index + 1] in ([], [message["digest"]])
                self.digests[index:] = [message["digest"]]
                data.append((message, payload))
                if ack:
                    await socket.send(json.dumps({"type": "ack", "index": index}))
        frames = decode_chunks(format, [one for _, one in data], init, self.size)
        assert len(frames) == sum(header["frames"] for header, _ in data)
        if ack:
            self.next_index += chunks
        return frames


def decode_chunks(format: str, payloads: list[bytes], init: bytes, size: tuple[int, int]) -> np.ndarray:
    """Every frame of these chunks; h264 and jpeg chunk by chunk, each with a decoder that has seen nothing."""
    if format == "raw":
        return np.frombuffer(b"".join(payloads), np.uint8).reshape(-1, *size, 3)
    if format == "mp4":
        with av.open(io.BytesIO(init + b"".join(payloads))) as film:
            return np.stack([one.to_ndarray(format="rgb24") for one in film.decode(video=0)])
    frames = []
    for payload in payloads:
        codec, at = av.CodecContext.create("h264" if format == "h264" else "mjpeg", "r"), 0
        while at < len(payload):
            length = int.from_bytes(payload[at : at + 4], "little")
            frames += codec.decode(av.Packet(payload[at + 4 : at + 4 + length]))
            at += 4 + length
        frames += codec.decode(None)
    return np.stack([one.to_ndarray(format="rgb24") for one in frames])


def received_bytes() -> int:
    """All that has come over the cable from the other network."""
    return int(Path(f"/sys/class/net/{LINK}/statistics/rx_bytes").read_text())


async def test_its_chunks_cross_the_network_encoded(namespace, tmp_path):
    """In every format, through changes of it in mid-stream; the same chain as on the server's own worker. Without an
    arena here nothing is moved meanwhile."""
    with (
        start_server(tmp_path, "--workers", "1", "--arena-bytes", "0", "--control-host", HERE) as server,
        joined(namespace, server, tmp_path / "joined.log"),
    ):

        async def ready():
            found = await workers(server)
            return [one for one in found if one[0] == "j" and found[one]["state"] == "ready"]

        [name] = await until(ready, "the joined worker was not ready")

        async def where(sid: str) -> str:
            async with httpx.AsyncClient(base_url=server.url, timeout=20) as http:
                return (await http.get(f"/v1/sessions/{sid}")).json()["worker"]

        first, second = [await open_session(server.url, format="h264") for _ in range(2)]
        clients = {one["id"]: FormatClient(server.url, one) for one in (first, second)}
        await asyncio.gather(*(client.run("h264", 2) for client in clients.values()))
        by_worker = {await where(sid): client for sid, client in clients.items()}
        assert set(by_worker) == {"w0", name}
        local, far = by_worker["w0"], by_worker[name]

        # Chunks are made ahead in the format of the newest attach, so raw frames come last.
        raw_bytes = first["chunk_frames"]["rest"] * first["height"] * first["width"] * 3
        seen, local_frames = [], []
        crossed: dict[str, float] = {}
        for format in ("h264", "jpeg", "mp4", "raw"):
            before = received_bytes()
            ours, theirs = await asyncio.gather(local.run("raw", 6), far.run(format, 6))
            crossed[format] = (received_bytes() - before) / 6
            local_frames.append(ours)
            seen.append(theirs)
        assert far.digests == local.digests and len(far.digests) == 26
        frames = np.concatenate(local_frames)
        whole = np.concatenate(seen)
        assert whole.shape == frames.shape
        assert np.array_equal(seen[3], local_frames[3])
        assert np.abs(whole.astype(int) - frames).mean() < 6  # lossy, and the same pictures in the same places
        # What the channel carries besides (heartbeats, acks' answers, headers) is in these counts.
        assert crossed["raw"] > raw_bytes, crossed
        assert max(crossed[format] for format in ("h264", "jpeg", "mp4")) < raw_bytes / 6, (crossed, raw_bytes)
        print(f"bytes a chunk over the cable: {crossed}; its frames have {raw_bytes:.0f}")

        # Four chunks that are received and not acknowledged come again, in whatever format is asked for.
        begin = far.next_index
        for format in ("h264", "mp4", "raw", "jpeg", "mp4"):
            await far.run(format, 4, ack=False)
        assert far.next_index == begin
        await asyncio.gather(far.run("h264", 6), local.run("h264", 6))
        assert far.digests == local.digests

        async with httpx.AsyncClient(base_url=server.url, timeout=20) as http:
            for worker, client in by_worker.items():
                explained = (await http.get(f"/v1/sessions/{client.sid}/explain", params={"chunk": 22})).json()
                stages = explained["stages_ms"]
                assert explained["worker"] == worker
                assert 0 < stages["encode"] < 1000 and stages["transport"] < 5000, explained
                assert explained["total_ms"] == pytest.approx(sum(stages.values()), abs=0.01)
        for one in (first, second):
            await end_session(server.url, one["id"])


@pytest.mark.soak
async def test_a_video_is_made_on_it(namespace, tmp_path):
    """/v1/videos where the only room is on the other machine: the file's chunks come encoded, too."""
    with (
        start_server(tmp_path, "--workers", "1", "--capacity", "1", "--slots", "1", "--control-host", HERE) as server,
        joined(namespace, server, tmp_path / "joined.log"),
    ):

        async def ready():
            return sum(1 for one in (await workers(server)).values() if one["state"] == "ready") == 2

        await until(ready, "the joined worker was not ready")
        async with httpx.AsyncClient(base_url=server.url, timeout=20) as http:
            bodies = [{"prompt": "a red circle", "seconds": "2", "seed": 7} for _ in range(2)]
            made = [(await http.post("/v1/videos", json=body)).json()["id"] for body in bodies]

            async def done():
                states = [(await http.get(f"/v1/videos/{one}")).json() for one in made]
                assert all(one["status"] != "failed" for one in states), states
                return all(one["status"] == "completed" for one in states)

            await until(done, "the videos were not made")
            placed = {one["worker"] for one in (await http.get("/v1/cluster")).json()["decisions"] if one.get("worker")}
            assert len([one for one in placed if one[0] == "j"]) == 1, placed
            files = [(await http.get(f"/v1/videos/{one}/content")).content for one in made]
        films = []
        for file in files:
            with av.open(io.BytesIO(file)) as film:
                films.append(np.stack([one.to_ndarray(format="rgb24") for one in film.decode(video=0)]))
        assert films[0].shape == films[1].shape and len(films[0]) >= 24
        assert np.array_equal(films[0], films[1])  # the same frames, by the same encoder, on two machines


def test_a_worker_with_another_token_is_not_let_in(tmp_path):
    token = tmp_path / "token"
    token.write_text("ab" * 32)
    token.chmod(0o644)
    refused = CliRunner().invoke(command, ["--join", "127.0.0.1:1", "--token-file", str(token)])
    assert isinstance(refused.exception, ConfigError) and "0600" in str(refused.exception)


@pytest.mark.parametrize("text", ["", "host", "host:", ":80", "host:0", "host:99999", "host:x"])
def test_an_address_says_where_and_at_which_port(text):
    with pytest.raises(ConfigError):
        address(text)
    assert address("[::1]:80") == ("::1", 80)
