"""A real fleet: two workers, killed, drained, added, and sessions moved between them. One server for all of it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from real_server import RunningServer, start_server
from test_real_server import SWITCH, Client, children_of, cmdline, end_session, open_session

pytestmark = [pytest.mark.timeout(300)]
CHUNKS = 40


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory):
    with start_server(tmp_path_factory.mktemp("fleet"), "--workers", "2") as server:
        yield server


@pytest.fixture
async def http(fleet: RunningServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=fleet.url, timeout=60) as client:
        yield client


async def workers(http: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    return {one["id"]: one for one in (await http.get("/v1/cluster")).json()["workers"]}


async def until(what, timeout_s: float = 30.0, pause_s: float = 0.1):
    """The first true answer of `what`."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := await what()):
        assert time.monotonic() < deadline_s, "it does not come"
        await asyncio.sleep(pause_s)
    return found


async def ready(http: httpx.AsyncClient, count: int) -> dict[str, dict[str, Any]]:
    async def there():
        found = {name: one for name, one in (await workers(http)).items() if one["state"] == "ready"}
        return found if len(found) >= count else None

    return await until(there)


async def owner(http: httpx.AsyncClient, sid: str) -> str | None:
    for name, worker in (await workers(http)).items():
        if any(one["id"] == sid for one in worker["sessions"]):
            return name
    return None


async def events(http: httpx.AsyncClient) -> set[str]:
    return {one["event"] for one in (await http.get("/v1/cluster")).json()["decisions"]}


_reference: list[str] = []


async def reference(url: str) -> list[str]:
    """The chain of a stream that nothing happens to."""
    if not _reference:
        opened = await open_session(url)
        client = Client(url, opened)
        await client.run(CHUNKS, prompts=SWITCH)
        await end_session(url, opened["id"])
        _reference.extend(client.digests)
    return _reference


async def disturbed(url: str, disturb) -> Client:
    """A stream with `disturb(session id)` after the fourth chunk, while it goes on."""
    opened = await open_session(url)
    client = Client(url, opened)
    done = asyncio.Event()
    running = asyncio.create_task(client.run(CHUNKS, prompts=SWITCH, last_after=done))

    async def begun() -> bool:
        return client.next_index >= 4

    await until(begun, pause_s=0.005)
    await disturb(opened["id"])
    done.set()
    await running
    await end_session(url, opened["id"])
    return client


async def test_kill_9_of_its_worker_changes_no_frame(fleet: RunningServer, http: httpx.AsyncClient) -> None:
    expected = await reference(fleet.url)
    await ready(http, 2)

    async def kill(sid: str) -> None:
        name = await until(lambda: owner(http, sid))
        os.kill((await workers(http))[name]["pid"], signal.SIGKILL)

    began_s = time.monotonic()
    client = await disturbed(fleet.url, kill)
    assert client.digests == expected
    assert time.monotonic() - began_s < 30
    noted = await events(http)
    assert "recover" in noted and "replay" not in noted, "it went on from its recovery point"


async def test_migrated_there_and_back_and_suspended_in_mid_stream(
    fleet: RunningServer, http: httpx.AsyncClient
) -> None:
    expected = await reference(fleet.url)
    await ready(http, 2)

    async def move(sid: str) -> None:
        for _ in range(2):
            source = await until(lambda: owner(http, sid))
            (target,) = set(await ready(http, 2)) - {source}
            answer = await http.post(f"/v1/admin/sessions/{sid}/migrate", json={"target": target})
            assert answer.status_code == 200, answer.text

            async def there(target: str = target) -> bool:
                state = (await http.get(f"/v1/sessions/{sid}")).json()["state"]
                return await owner(http, sid) == target and state != "migrating"

            await until(there)
        answer = await http.post(f"/v1/admin/sessions/{sid}/suspend")
        assert answer.status_code == 200, answer.text

    client = await disturbed(fleet.url, move)
    assert client.digests == expected

    async def noted() -> bool:
        return {"migrate", "suspend", "resume"} <= await events(http)

    await until(noted)
    assert "replay" not in await events(http)


async def test_a_killed_controller_stops_no_stream(fleet: RunningServer, http: httpx.AsyncClient) -> None:
    expected = await reference(fleet.url)
    await ready(http, 2)
    opened: dict[str, Any] = {}
    took_s = 0.0

    async def kill(sid: str) -> None:
        nonlocal opened, took_s
        (pid,) = [one for one in children_of(fleet.pid) if b"control_loop" in cmdline(one)]
        os.kill(pid, signal.SIGKILL)
        began_s = time.monotonic()
        opened = await open_session(fleet.url)
        took_s = time.monotonic() - began_s

    client = await disturbed(fleet.url, kill)
    assert client.digests == expected
    # 5 s is the promise; a machine that runs other things besides may take longer to start a process.
    assert took_s < 15.0, "admissions are back"
    again = Client(fleet.url, opened)
    await again.run(CHUNKS, prompts=SWITCH)
    assert again.digests == expected
    await end_session(fleet.url, opened["id"])
    assert "replay" not in await events(http)


async def test_a_drained_worker_leaves_its_stream_to_another_and_exits_0(
    fleet: RunningServer, http: httpx.AsyncClient
) -> None:
    expected = await reference(fleet.url)
    before = await ready(http, 2)
    answer = await http.post("/v1/admin/workers", json={"add": 1})
    assert answer.status_code == 200, answer.text
    drained = ""

    async def drain(sid: str) -> None:
        nonlocal drained
        await ready(http, 3)
        drained = await until(lambda: owner(http, sid))
        assert (await http.post(f"/v1/admin/workers/{drained}/drain")).status_code == 200

    client = await disturbed(fleet.url, drain)
    assert client.digests == expected

    async def gone() -> bool:
        return drained not in await workers(http)

    await until(gone)
    assert len(await ready(http, 2)) == 2 and set(before) | {"w2"} >= set(await workers(http))
    assert drained in fleet.log_text().rpartition("process ended")[2], "the launcher saw exit code 0"


async def test_a_worker_told_to_end_leaves_its_stream_to_another(fleet: RunningServer, http: httpx.AsyncClient) -> None:
    expected = await reference(fleet.url)
    await ready(http, 2)
    ended, died = 0, fleet.log_text().count("process died")

    async def end(sid: str) -> None:
        nonlocal ended
        name = await until(lambda: owner(http, sid))
        ended = (await workers(http))[name]["pid"]
        os.kill(ended, signal.SIGTERM)

    client = await disturbed(fleet.url, end)
    assert client.digests == expected

    async def gone() -> bool:
        return ended not in children_of(fleet.pid)

    await until(gone)
    assert "replay" not in await events(http)
    assert fleet.log_text().count("process died") == died, "it exited 0"
