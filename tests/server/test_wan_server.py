"""A checkpoint folder through the whole server: two workers, each prompt-switch mode, frames as they are made alone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from real_server import RunningServer, start_server
from tiny_pipeline import write_pipeline

from turboserve import AsyncSession
from turboserve.cli.main import main
from turboserve.model.wan.tiny import write_tiny

pytestmark = pytest.mark.timeout(300)
PROMPT, AFTER, SWITCH_INDEX, CHUNKS, SEED = "a fox in the snow", "the same fox at night", 4, 7, 11
# Four chunks may be made before the first is taken: the fifth is the first one that a prompt sent at once always meets.
FPS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny-wan", light=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory, folder):
    pipeline = write_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny-pipeline")
    options = ("--workers", "2", "--video-pipeline", str(pipeline))
    with start_server(tmp_path_factory.mktemp("wan-server"), str(folder), *options) as running:
        yield running


def asked(server: RunningServer, route: str) -> Any:
    return httpx.get(f"{server.url}{route}").json()


def generated(folder: Path, out: Path, switch: str, decoder: str = "full", count: int = CHUNKS) -> list[str]:
    """The digests of the same stream by `turboserve generate`, without a server."""
    seconds, at_s = (9 + 12 * (count - 1)) / FPS, (9 + 12 * (SWITCH_INDEX - 1)) / FPS
    done = CliRunner().invoke(
        main,
        ["generate", PROMPT, "--model", str(folder), "--seed", str(SEED), "--seconds", str(seconds), "--prompt-switch",
         switch, "--at", f"{at_s}s={AFTER}", "--decoder", decoder,
         "-o", str(out / f"{switch}.mp4"), "--card", str(out / f"{switch}.json")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    card = json.loads((out / f"{switch}.json").read_text())
    assert [one["from_index"] for one in card["inputs"]] == [0, SWITCH_INDEX]
    return card["digests"]


async def stream(server: RunningServer, switch: str) -> tuple[list[str], list[tuple[int, ...]]]:
    digests, shapes = [], []
    async with AsyncSession(
        PROMPT, base_url=server.url, seed=SEED, pace="free", prompt_switch=switch, max_duration_s=60
    ) as session:
        await session.update(AFTER, from_index=SWITCH_INDEX)
        async for chunk in session:
            digests.append(chunk.digest)
            shapes.append(chunk.frames.shape)
            if len(digests) == CHUNKS:
                break
    return digests, shapes


async def test_a_folder_serves_in_every_prompt_switch_mode_with_the_frames_it_makes_alone(server, folder, tmp_path):
    models = asked(server, "/v1/models")["data"]
    assert models[0]["id"] == "tiny-wan" and models[0]["prompt_switch"] == ["swap", "recache", "blend"]
    modes = models[0]["prompt_switch"]
    streams = await asyncio.gather(*(stream(server, mode) for mode in modes))  # side by side, on two workers
    for mode, (digests, shapes) in zip(modes, streams, strict=True):
        assert shapes == [(9, 32, 32, 3)] + [(12, 32, 32, 3)] * (CHUNKS - 1)
        assert digests == generated(folder, tmp_path, mode), mode
    chains = [tuple(digests) for digests, _ in streams]
    assert len(set(chains)) == 3 and len({one[:SWITCH_INDEX] for one in chains}) == 1
    workers = asked(server, "/v1/cluster")["workers"]
    assert [one["state"] for one in workers] == ["ready", "ready"]


async def migrated(http: httpx.AsyncClient, path: str, session: AsyncSession, target: str) -> None:
    """Ask until it is not on its way somewhere already, and take no chunk before it is there."""
    for _ in range(100):
        answer = await http.post(path, json={"target": target})
        if answer.status_code != 409:
            break
        await asyncio.sleep(0.2)
    assert answer.status_code == 200, answer.text
    for _ in range(600):
        if (await session.info())["worker"] == target:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"it did not come to {target}")


async def test_each_session_has_its_decoder_wherever_it_goes_and_its_card_proves_it(server, folder, tmp_path):
    """A stream of each kind side by side; suspended, resumed and moved, both make what `generate` makes."""
    assert asked(server, "/v1/models")["data"][0]["decoders"] == ["full", "light"]
    for wrong in ("taew", "vae"):
        async with httpx.AsyncClient(base_url=server.url) as http:
            refused = await http.post("/v1/sessions", json={"prompt": PROMPT, "decoder": wrong})
        assert refused.status_code == 422, refused.text
        error = refused.json()["error"]
        assert error["expected"] == "one of full, light" and error["message"].startswith("decoder is not offered")

    async def moved(decoder: str) -> list[str]:
        digests = []
        async with (
            AsyncSession(PROMPT, base_url=server.url, seed=SEED, pace="free", decoder=decoder) as session,
            httpx.AsyncClient(base_url=server.url, timeout=60) as http,
        ):
            here = f"/v1/admin/sessions/{session.id}"
            await session.update(AFTER, from_index=SWITCH_INDEX)
            async for chunk in session:
                digests.append(chunk.digest)
                if len(digests) == 2:
                    assert (await http.post(f"{here}/suspend")).status_code == 200
                if len(digests) == SWITCH_INDEX + 1:
                    worker = (await session.info())["worker"]
                    other = {"w0": "w1", "w1": "w0"}[worker]
                    await migrated(http, f"{here}/migrate", session, other)
                if len(digests) == CHUNKS:
                    break
            assert (await session.info())["decoder"] == decoder
            card = (await http.get(f"/v1/sessions/{session.id}/card")).json()
        assert card["decoder"] == decoder
        (tmp_path / f"of-{decoder}.json").write_text(json.dumps(card))
        return digests

    kinds = ("full", "light")
    made = dict(zip(kinds, await asyncio.gather(*(moved(one) for one in kinds)), strict=True))
    for decoder, digests in made.items():
        assert digests == generated(folder, tmp_path, "swap", decoder)
        card = tmp_path / f"of-{decoder}.json"
        verified = CliRunner().invoke(main, ["replay", str(card), "--model", str(folder), "--json"])
        assert verified.exit_code == 0 and json.loads(verified.output)["verdict"] == "match", verified.output
        other = json.loads(card.read_text()) | {"decoder": kinds[decoder == "full"]}
        card.write_text(json.dumps(other))
        verified = CliRunner().invoke(main, ["replay", str(card), "--model", str(folder), "--json"])
        assert verified.exit_code == 1 and json.loads(verified.output)["first_wrong_index"] == 0


async def test_suspended_and_migrated_in_the_middle_of_a_switch_the_frames_are_the_same(server, folder, tmp_path):
    """Its bytes leave the worker twice: before the new prompt, and after the first blended chunk."""
    digests, workers = [], []
    async with (
        AsyncSession(PROMPT, base_url=server.url, seed=SEED, pace="free", prompt_switch="blend") as session,
        httpx.AsyncClient(base_url=f"{server.url}/v1/admin/sessions/{session.id}", timeout=60) as admin,
    ):
        await session.update(AFTER, from_index=SWITCH_INDEX)
        async for chunk in session:
            digests.append(chunk.digest)
            workers.append((await session.info())["worker"])
            if len(digests) == 2:
                assert (await admin.post("/suspend")).status_code == 200
            if len(digests) == SWITCH_INDEX + 1:
                other = {"w0": "w1", "w1": "w0"}[workers[-1]]
                await migrated(admin, "/migrate", session, other)
            if len(digests) == CHUNKS:
                break
    assert digests == generated(folder, tmp_path, "blend")


@pytest.mark.parametrize("kind", ["jpeg", "h264", "mp4"])
async def test_the_page_s_formats_carry_it(server, kind):
    async with AsyncSession(PROMPT, base_url=server.url, seed=SEED, pace="free", format=kind) as session:
        made = [chunk async for chunk in _first(session, 2)]
    assert [one.index for one in made] == [0, 1] and all(one.payload for one in made)


async def _first(session: AsyncSession, count: int) -> Any:
    taken = 0
    async for chunk in session:
        yield chunk
        taken += 1
        if taken == count:
            return


async def test_a_pipeline_makes_a_video_beside_a_live_session(server):
    names = [one["id"] for one in (await asyncio.to_thread(asked, server, "/v1/models"))["data"]]
    assert names == ["tiny-wan", "tiny-pipeline"]
    wish = {"prompt": PROMPT, "model": "tiny-pipeline", "seconds": 0.5, "size": "32x32", "steps": 3, "seed": 5}
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        live = asyncio.create_task(stream(server, "swap"))
        made = (await http.post("/v1/videos", json=wish)).json()
        assert made["object"] == "video" and made["model"] == "tiny-pipeline", made
        async with asyncio.timeout(120):
            while (video := (await http.get(f"/v1/videos/{made['id']}")).json())["status"] != "completed":
                assert video["status"] != "failed", video
                await asyncio.sleep(0.1)
        assert len((await live)[0]) == CHUNKS
        content = await http.get(f"/v1/videos/{made['id']}/content")
        assert content.headers["content-type"] == "video/mp4" and content.content[4:8] == b"ftyp"
        listed = (await http.get("/v1/videos")).json()
        assert [one["id"] for one in listed["data"]] == [made["id"]]
        assert (await http.delete(f"/v1/videos/{made['id']}")).json()["deleted"]
        assert (await http.get(f"/v1/videos/{made['id']}")).status_code == 404
        wrong = await http.post("/v1/videos", json={**wish, "size": "31x32"})
        assert wrong.status_code == 422 and wrong.json()["error"]["param"] == "size"


# The second kill waits until the first worker is back.
@pytest.mark.parametrize("decoder", ["full", pytest.param("light", marks=pytest.mark.soak)])
async def test_kill_9_of_its_worker_in_mid_blend_changes_no_frame(server, folder, tmp_path, decoder):
    """It goes on in another worker from its recovery point, not from its inputs."""
    digests, count = [], SWITCH_INDEX + 8  # four may be made already when the fourth is here
    async with (
        AsyncSession(
            PROMPT, base_url=server.url, seed=SEED, pace="free", prompt_switch="blend", decoder=decoder
        ) as session,
        httpx.AsyncClient(base_url=server.url, timeout=60) as http,
    ):
        await session.update(AFTER, from_index=SWITCH_INDEX)
        async for chunk in session:
            digests.append(chunk.digest)
            if len(digests) == SWITCH_INDEX + 1:
                before = await session.info()
                workers = {one["id"]: one["pid"] for one in (await http.get("/v1/cluster")).json()["workers"]}
                os.kill(workers[before["worker"]], signal.SIGKILL)
            if len(digests) == count:
                break
        assert (await session.info())["epoch"] > before["epoch"]
        decisions = (await http.get("/v1/cluster")).json()["decisions"]
        told = {decision["event"] for decision in decisions if decision.get("session") == session.id}
        assert "recover" in told and "replay" not in told, told
    assert digests == generated(folder, tmp_path, "blend", decoder, count)
