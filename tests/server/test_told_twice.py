"""A second SIGTERM, to a worker and to the whole server: what is watched goes to disk, soon, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from real_server import RunningServer, start_server
from test_fleet import until, workers
from test_real_server import SWITCH, Client, children_of, cmdline, open_session

pytestmark = pytest.mark.timeout(200)
SESSIONS = 3
BOUND_S = 2 * 8.0
"""Twice what docs/fleet.md promises: the suite runs two files at a time, on whatever machine there is."""


class Watching(Client):
    """A viewer who watches until the server goes away."""

    async def watch(self) -> None:
        with contextlib.suppress(websockets.ConnectionClosed, ConnectionError):
            await self.run(10_000)


async def begun(server: RunningServer, count: int = SESSIONS) -> tuple[list[Watching], list[asyncio.Task[None]]]:
    """Streams under way, each a few chunks on."""
    clients = [Watching(server.url, await open_session(server.url)) for _ in range(count)]
    for client in clients:
        await client.run(2, prompts=SWITCH)
    tasks = [asyncio.create_task(client.watch()) for client in clients]

    async def moving() -> bool:
        return all(client.next_index >= 4 for client in clients)

    await until(moving, pause_s=0.01)
    return clients, tasks


async def reference(server: RunningServer) -> list[str]:
    client = Client(server.url, await open_session(server.url))
    await client.run(60, prompts=SWITCH)
    return client.digests


async def found(server: RunningServer, client: Client) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        return (await http.get(f"/v1/sessions/{client.url.split('/')[-2]}")).json()


async def events(server: RunningServer) -> set[str]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        return {one["event"] for one in (await http.get("/v1/cluster")).json()["decisions"]}


async def end_twice(server: RunningServer, pause_s: float) -> float:
    """Seconds from the second signal to the server's end."""
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(pause_s)
    began_s = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(server.process.wait, 30) == 0
    return time.monotonic() - began_s


async def offered_again(tmp_path: Path, clients: list[Watching], expected: list[str], *, on_disk: bool) -> set[str]:
    """Start the server anew; every session goes on where it was. The decisions that took."""
    with start_server(tmp_path, "--workers", "2") as server:
        for client in clients:
            client.url = server.url.replace("http", "ws", 1) + client.url[client.url.index("/v1/") :]
            session = await found(server, client)
            assert session["state"] == "suspended"
            assert (session["bytes"]["disk"] > 0) is on_disk
            goal = client.next_index + 3
            await client.run(goal)
            assert client.digests == expected[:goal]
        return await events(server)


@pytest.mark.parametrize("pause_s", [0.05, pytest.param(0.7, marks=pytest.mark.soak)])
async def test_a_server_told_twice_has_everything_on_disk(tmp_path: Path, pause_s: float) -> None:
    with start_server(tmp_path, "--workers", "2", "--shutdown-timeout", "60") as server:
        expected = await reference(server)
        clients, tasks = await begun(server)
        assert await end_twice(server, pause_s) < BOUND_S
        await asyncio.gather(*tasks)
    assert "replay" not in await offered_again(tmp_path, clients, expected, on_disk=True)


@pytest.mark.soak
async def test_a_worker_that_does_not_answer_loses_its_sessions_to_the_disk(tmp_path: Path) -> None:
    """It stands still: the points it wrote as it went are what is left, and they are enough."""
    with start_server(tmp_path, "--workers", "2", "--shutdown-timeout", "60") as server:
        expected = await reference(server)
        clients, tasks = await begun(server)
        for pid in children_of(server.pid):
            if b"runtime.worker" in cmdline(pid):
                os.kill(pid, signal.SIGSTOP)
        assert await end_twice(server, 0.05) < BOUND_S
        await asyncio.gather(*tasks)
    assert "replay" not in await offered_again(tmp_path, clients, expected, on_disk=True)


@pytest.mark.soak
async def test_what_could_not_be_written_is_named_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBOSERVE_FAILPOINTS", "controller.spill.begun:enospc")
    with start_server(tmp_path, "--workers", "2", "--shutdown-timeout", "60", "--log-format", "json") as server:
        expected = await reference(server)
        clients, tasks = await begun(server)
        assert await end_twice(server, 0.05) < BOUND_S
        await asyncio.gather(*tasks)
        lines = [json.loads(one) for one in server.log_text().splitlines() if one.startswith("{")]
        (said,) = [one for one in lines if "not on disk" in one.get("event", one.get("message", ""))]
        assert {client.url.split("/")[-2] for client in clients} <= set(said["sessions"])
    monkeypatch.delenv("TURBOSERVE_FAILPOINTS")
    assert "replay" in await offered_again(tmp_path, clients, expected, on_disk=False)


def _kept(session: dict[str, Any]) -> bool:
    return session["state"] == "suspended" and session["bytes"]["host"] + session["bytes"]["disk"] > 0


async def test_a_worker_told_twice_leaves_its_sessions_suspended_and_exits_0(tmp_path: Path) -> None:
    """The only worker there is: there is nowhere to migrate to. What it has at the second signal goes to disk; what it
    was rid of by then, because nobody watches, lies in host memory."""
    with start_server(tmp_path, "--workers", "1") as server:
        expected = await reference(server)
        clients, tasks = await begun(server, 2)
        for task in tasks:
            task.cancel()  # nobody watches, so that it stays where it goes
        await asyncio.gather(*tasks, return_exceptions=True)
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            (worker,) = (await workers(http)).values()
            began_s = time.monotonic()
            os.kill(worker["pid"], signal.SIGTERM)
            await asyncio.sleep(0.1)
            with contextlib.suppress(ProcessLookupError):  # it had little to do: once was enough
                os.kill(worker["pid"], signal.SIGTERM)

            async def gone() -> bool:
                return worker["pid"] not in children_of(server.pid)

            await until(gone, pause_s=0.02)
            assert time.monotonic() - began_s < 15, "once, it would take a minute"
            assert "process died" not in server.log_text(), "it exited 0"

            async def suspended() -> bool:
                return all([_kept(await found(server, client)) for client in clients])

            await until(suspended)
            assert (await http.post("/v1/admin/workers", json={"add": 1})).status_code == 200
        for client in clients:
            goal = client.next_index + 3
            await client.run(goal)
            assert client.digests == expected[:goal]
        assert "replay" not in await events(server)
