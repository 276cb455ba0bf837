"""Sessions between the server's node and a worker that joined from another network namespace: with their state, over a
wire of which nothing is shared but packets."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from real_server import RunningServer, start_server
from test_real_server import Client, end_session, open_session
from test_worker_join import HERE, joined, other_namespace, until, workers  # noqa: F401

pytestmark = pytest.mark.timeout(300)


async def post(server: RunningServer, path: str, **body: Any) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        answer = await http.post(path, json=body)
        assert answer.status_code < 300, answer.text
        return answer.json()


async def session(server: RunningServer, sid: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        picture = (await http.get("/v1/cluster")).json()
    return next(one for one in picture["session_list"] if one["id"] == sid)


async def decisions(server: RunningServer, event: str) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        return [one for one in (await http.get("/v1/cluster")).json()["decisions"] if one["event"] == event]


class Timed(Client):
    """Notes when each chunk came."""

    times_s: list[float]

    async def play(self, chunks: int, last_after: asyncio.Event | None = None) -> None:
        """Chunk after chunk, and the time of each."""
        self.times_s = getattr(self, "times_s", [])
        while self.next_index < chunks:
            await self.run(chunks, last_after=last_after)

    async def watch(self) -> None:
        seen = 0
        while True:
            if len(self.digests) > seen:
                seen = len(self.digests)
                self.times_s.append(time.monotonic())
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def pair(namespace: str, folder: Path, failpoints: str = "") -> AsyncIterator[tuple[Any, Any, str]]:
    """A server with one worker and one that joined it, ready: (server, the joined process, its id)."""
    with (
        start_server(folder, "--workers", "1", "--control-host", HERE) as server,
        joined(namespace, server, folder / "joined.log", failpoints) as process,
    ):

        async def ready() -> list[str]:
            found = await workers(server)
            return [one for one in found if one[0] == "j" and found[one]["state"] == "ready"]

        [name] = await until(ready, "the joined worker was not ready", 180)
        yield server, process, name


async def moved(server: RunningServer, sid: str, target: str) -> None:
    """Have it moved, and wait until it is there."""
    await post(server, f"/v1/admin/sessions/{sid}/migrate", target=target)

    async def there() -> bool:
        one = await session(server, sid)
        return one["worker"] == target and one["stage"] in ("running", "stalled")

    await until(there, f"it did not come to {target}", 20)


async def reference(server: RunningServer, chunks: int) -> list[str]:
    opened = await open_session(server.url)
    client = Client(server.url, opened)
    await client.run(chunks)
    await end_session(server.url, opened["id"])
    return client.digests


async def chunks_made(server: RunningServer, at_least: int) -> int:
    """By all workers, once they have reported so many and nothing more for several heartbeats."""
    made, since_s = 0, time.monotonic()

    async def settled() -> bool:
        nonlocal made, since_s
        now = sum(one["chunks"] for one in (await workers(server)).values())
        if now != made:
            made, since_s = now, time.monotonic()
        return made >= at_least and time.monotonic() - since_s > 2.5

    await until(settled, "the workers did not report", 60)
    return made


def bytes_of(decision: dict[str, Any]) -> tuple[int, int, float, int]:
    """(sent ahead, sent while it stood still, for how many ms, bytes of the point) of a "carried" decision."""
    found = re.match(r"(\d+) B .* ahead, (\d+) B .* for ([\d.]+) ms, of (\d+) B", decision["reason"])
    assert found, decision
    return int(found[1]), int(found[2]), float(found[3]), int(found[4])


async def test_a_playing_stream_moves_to_the_joined_worker_and_back_with_its_state(namespace, tmp_path):
    async with pair(namespace, tmp_path) as (server, _, name):
        chunks = 60
        chain = await reference(server, chunks)
        made_before = await chunks_made(server, chunks)
        opened = await open_session(server.url)
        sid = opened["id"]
        client = Timed(server.url, opened)
        client.times_s = []
        watching = asyncio.create_task(client.watch())
        there_and_back = asyncio.Event()
        playing = asyncio.create_task(client.play(chunks, there_and_back))
        await until(lambda: asyncio.sleep(0, client.next_index >= 8), "it does not play")
        first = (await session(server, sid))["worker"]
        there, back = (name, "w0") if first == "w0" else ("w0", name)
        await moved(server, sid, there)
        assert (await session(server, sid))["point_node"] == (await workers(server))[there]["node"]
        moved_at = client.next_index
        goal = min(moved_at + 8, chunks)
        await until(lambda: asyncio.sleep(0, client.next_index >= goal), "it does not play there")
        await moved(server, sid, back)
        there_and_back.set()
        await asyncio.wait_for(playing, 120)
        watching.cancel()
        assert client.digests == chain
        carried = await decisions(server, "carried")
        assert [(one["source"], one["worker"]) for one in carried] == [(first, there), (there, back)]
        for one in carried:
            ahead, last, stood_ms, whole = bytes_of(one)
            assert ahead > 500_000, "its pages went while it played"
            assert last < whole, "what had gone ahead was not sent again"
            assert 0 < stood_ms < 2000
        assert await decisions(server, "replay") == []
        assert await chunks_made(server, made_before + chunks) <= made_before + chunks + 8, "chunks were made again"
        gaps = sorted(b - a for a, b in zip(client.times_s, client.times_s[1:], strict=False))
        reasons = [one["reason"] for one in carried]
        print(f"gaps of chunks: median {gaps[len(gaps) // 2]:.3f} s, longest {gaps[-2:]}; {reasons}")


async def test_a_suspended_session_resumes_where_its_point_lies_and_comes_home_when_that_node_goes(
    namespace,
    tmp_path,
):
    async with pair(namespace, tmp_path) as (server, process, name):
        chain = await reference(server, 24)
        opened = [await open_session(server.url) for _ in range(2)]
        clients = [Client(server.url, one) for one in opened]
        for one, client in zip(opened, clients, strict=True):
            await client.run(5)
            if (await session(server, one["id"]))["worker"] != name:
                await moved(server, one["id"], name)

        async def suspended(sid: str) -> bool:
            return (await session(server, sid))["stage"] == "host"

        async def idle(sid: str) -> bool:
            return (await session(server, sid))["stage"] == "stalled"

        for one in opened:
            await until(lambda sid=one["id"]: idle(sid), "its viewer has left")
            await post(server, f"/v1/admin/sessions/{one['id']}/suspend")
            await until(lambda sid=one["id"]: suspended(sid), "it was not suspended")
        # The first one resumes on its own node, from its point.
        await clients[0].run(14)  # past what the gateway has already
        assert (await session(server, opened[0]["id"]))["worker"] == name
        # Then the node goes: what plays moves with its state, what is suspended is brought home.
        process.send_signal(signal.SIGTERM)
        playing = asyncio.create_task(clients[0].run(24))
        assert await asyncio.to_thread(process.wait, 30) == 0
        await playing
        home = (await workers(server))["w0"]["node"]
        for one in opened:
            assert (await session(server, one["id"]))["point_node"] == home
        await clients[1].run(24)
        assert clients[0].digests == clients[1].digests == chain
        assert await decisions(server, "replay") == []
        assert len(await decisions(server, "brought")) == 1


KILLS = [
    "worker.send.last:kill",
    "worker.send.done:kill@2",
    "worker.say.HandedOver:kill",
    "worker.receive.point:kill@2",
]


@pytest.mark.parametrize("place", [KILLS[0], *(pytest.param(one, marks=pytest.mark.soak) for one in KILLS[1:])])
async def test_a_joined_worker_killed_in_the_midst_of_a_transfer_costs_no_chunk(
    namespace,
    tmp_path,
    place,
):
    """Its arena is gone with it; the chain goes on, from an older point of the server's node or from the log."""
    async with pair(namespace, tmp_path, place) as (server, process, name):
        chain = await reference(server, 20)
        opened = await open_session(server.url)
        sid, client = opened["id"], Client(server.url, opened)
        killed = asyncio.Event()
        playing = asyncio.create_task(client.run(20, last_after=killed))
        await until(lambda: asyncio.sleep(0, client.next_index >= 4), "it does not play")
        comes = place.startswith("worker.receive")
        start = "w0" if comes else name
        if (await session(server, sid))["worker"] != start:
            await moved(server, sid, start)
        await post(server, f"/v1/admin/sessions/{sid}/migrate", target=name if comes else "w0")
        assert await asyncio.to_thread(process.wait, 30) == -signal.SIGKILL
        killed.set()
        await asyncio.wait_for(playing, 120)
        assert client.digests == chain
        assert (await session(server, sid))["worker"] == "w0"
