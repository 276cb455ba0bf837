"""A real fleet with far less memory than its sessions need: points go to disk and come back, and no frame changes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from real_server import RunningServer, start_server
from test_fleet import until
from test_real_server import SWITCH, Client, end_session, open_session

pytestmark = pytest.mark.timeout(300)
SESSIONS = 12
BEFORE, CHUNKS = 3, 6
MIB = 1 << 20
PARTITIONS = 5
"""The controller's, two workers' and what is kept for more."""


async def cluster(server: RunningServer) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        return (await http.get("/v1/cluster")).json()


async def reference(server: RunningServer) -> list[str]:
    opened = await open_session(server.url)
    client = Client(server.url, opened)
    await client.run(CHUNKS, prompts=SWITCH)
    await end_session(server.url, opened["id"])
    return client.digests


async def suspend(server: RunningServer, sid: str) -> bool:
    """Ask until it is suspended; False when its worker had no room to write its point for three seconds."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        for _ in range(15):
            await http.post(f"/v1/admin/sessions/{sid}/suspend")
            await asyncio.sleep(0.2)
            if (await http.get(f"/v1/sessions/{sid}")).json()["state"] == "suspended":
                return True
    return False


async def begin_and_suspend(server: RunningServer, count: int = SESSIONS) -> list[tuple[str, Client, bool]]:
    made = []
    for _ in range(count):
        opened = await open_session(server.url)
        client = Client(server.url, opened)
        await client.run(BEFORE, prompts=SWITCH)
        made.append((opened["id"], client, await suspend(server, opened["id"])))
    return made


async def go_on(server: RunningServer, made: list[tuple[str, Client, bool]], expected: list[str]) -> None:
    for sid, client, _ in made:
        await client.run(CHUNKS)
        assert client.digests == expected
        await end_session(server.url, sid)


@pytest.mark.soak
async def test_a_dozen_sessions_through_a_small_arena(tmp_path: Path) -> None:
    with start_server(tmp_path, "--workers", "2", "--arena-bytes", str(PARTITIONS * 6 * MIB)) as server:
        expected = await reference(server)
        made = await begin_and_suspend(server)
        assert all(suspended for *_, suspended in made)

        async def relieved() -> bool:
            said = await cluster(server)
            tiers = [one["tier"] for one in said["session_list"]]
            return said["points"]["spilled"] >= 5 and tiers.count("disk") == said["points"]["spilled"]

        await until(relieved)
        said = await cluster(server)
        assert said["storage"]["arena_committed_bytes"] < said["storage"]["arena_total_bytes"]
        assert said["points"]["evicted"] == said["points"]["not_spilled"] == 0
        (one, *_) = [row for row in said["session_list"] if row["tier"] == "disk"]
        assert one["bytes"]["disk"] > 0 and one["bytes"]["host"] == one["bytes"]["device"] == 0
        assert any(row["event"] == "spill" and "idle" in row["reason"] for row in said["decisions"])
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            metrics = (await http.get("/metrics")).text
        assert f'turboserve_points{{what="spilled"}} {said["points"]["spilled"]}' in metrics
        await go_on(server, made, expected)
        said = await cluster(server)
        assert said["points"]["read_back"] >= 5
        assert "replay" not in {row["event"] for row in said["decisions"]}

        async def empty() -> bool:
            storage = (await cluster(server))["storage"]
            return storage["arena_committed_bytes"] == storage["disk_used_bytes"] == 0

        await until(empty)


@pytest.mark.soak
async def test_a_small_disk_gives_up_what_is_worth_least(tmp_path: Path) -> None:
    options = ("--workers", "2", "--arena-bytes", str(PARTITIONS * 6 * MIB), "--disk-bytes", str(7 * MIB))
    with start_server(tmp_path, *options) as server:
        expected = await reference(server)
        made = await begin_and_suspend(server)

        async def evicted() -> bool:
            return (await cluster(server))["points"]["evicted"] > 0

        await until(evicted)
        said = await cluster(server)
        assert said["storage"]["disk_used_bytes"] <= 7 * MIB
        assert any(row["event"] == "evict" and "the disk is full" in row["reason"] for row in said["decisions"])
        await go_on(server, made, expected)
        assert "replay" in {row["event"] for row in (await cluster(server))["decisions"]}


@pytest.mark.soak
async def test_no_room_on_disk_at_all_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOSERVE_FAILPOINTS", "controller.spill.begun:enospc")
    with start_server(tmp_path, "--workers", "2", "--arena-bytes", str(PARTITIONS * 4 * MIB)) as server:
        expected = await reference(server)
        made = await begin_and_suspend(server, 8)

        async def refused() -> bool:
            return (await cluster(server))["points"]["not_spilled"] > 0

        await until(refused)
        said = await cluster(server)
        assert said["points"]["spilled"] == said["storage"]["disk_used_bytes"] == 0
        await go_on(server, made, expected)
