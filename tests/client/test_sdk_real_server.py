"""The SDK and the commands against the whole server with the embedded model."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from click.testing import CliRunner

from turboserve import AsyncSession, Session, errors
from turboserve.card import Card
from turboserve.cli.main import main

pytestmark = pytest.mark.timeout(300)

PROMPT = "two small red circles drifting left over a dark blue sky"
SWITCH = "one large green square growing on a black background"
CHUNKS, SWITCH_INDEX, SEED = 8, 4, 4711
OPTIONS: dict[str, Any] = {"seed": SEED, "pace": "free"}


async def take(session: AsyncSession, count: int, *, drop_at: tuple[int, ...] = ()) -> list[str]:
    """Digests of `count` chunks; the connection is torn after the given indices."""
    digests = []
    async for chunk in session:
        digests.append(chunk.digest)
        if chunk.index in drop_at:
            assert session._link._socket is not None
            session._link._socket.transport.abort()
        if len(digests) == count:
            break
    return digests


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Card:
    """The same stream without a server, by `turboserve generate`."""
    folder = tmp_path_factory.mktemp("generated")
    seconds = CHUNKS / 3
    args = ["--seconds", seconds, "--at", f"{SWITCH_INDEX / 3:.4f}s={SWITCH}", "--seed", SEED]
    result = CliRunner().invoke(
        main,
        ["generate", PROMPT, "-o", f"{folder}/out.mp4", "--card", f"{folder}/card.json", *map(str, args)],
    )
    assert result.exit_code == 0, result.output
    card = Card.read(folder / "card.json")
    assert (card.chunk_count, card.inputs[1].from_index) == (CHUNKS, SWITCH_INDEX)
    return card


async def test_the_server_makes_the_chain_that_generate_makes_even_across_torn_connections(
    server_url: str, generated: Card
) -> None:
    async with AsyncSession(PROMPT, base_url=server_url, **OPTIONS) as session:
        answer = await session.update(SWITCH, from_index=SWITCH_INDEX)
        assert (answer.prompt_version, answer.from_index) == (2, SWITCH_INDEX)
        digests = await take(session, CHUNKS, drop_at=(1, 5))
        assert session.reconnects == 2
        assert (session.prompt_version, session.numerics_id) == (2, generated.numerics_id)
    assert tuple(digests) == generated.digests


def test_the_synchronous_session_and_its_card(server_url: str, generated: Card, tmp_path: Path) -> None:
    with Session(PROMPT, base_url=server_url, **OPTIONS) as session:
        session.update(SWITCH, from_index=SWITCH_INDEX)
        digests = []
        for chunk in session:
            assert chunk.frames.shape == (4, 96, 96, 3)
            assert (chunk.prompt_version, chunk.steps) == (1 if chunk.index < SWITCH_INDEX else 2, 4)
            digests.append(chunk.digest)
            if len(digests) == CHUNKS:
                break
        session.pause()
        session_id = session.id
        card_path = tmp_path / "card.json"
        card_path.write_text(httpx.get(f"{server_url}/v1/sessions/{session_id}/card").text)
    assert tuple(digests) == generated.digests
    with pytest.raises(StopIteration):
        next(session)

    replayed = CliRunner().invoke(main, ["replay", str(card_path), "--json"])
    assert replayed.exit_code == 0, replayed.output
    assert json.loads(replayed.stdout)["chunks"] >= CHUNKS
    state = httpx.get(f"{server_url}/v1/sessions/{session_id}")
    assert state.status_code == 404 or state.json()["state"] == "closed", "leaving the block ends the session"


def read_back(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("format", ["raw", "mp4"])
def test_save(server_url: str, tmp_path: Path, format: str) -> None:
    path = tmp_path / "out.mp4"
    with Session(PROMPT, base_url=server_url, format=format, max_duration_s=2, **OPTIONS) as session:
        assert session.save(path) == 24
        assert session.end_reason == "completed"
    frames = read_back(path)
    assert frames.shape == (24, 96, 96, 3)
    assert frames.std() > 5


async def test_encoded_formats_show_the_same_picture(server_url: str) -> None:
    pictures = {}
    for format in ("raw", "jpeg", "h264"):
        async with AsyncSession(PROMPT, base_url=server_url, format=format, **OPTIONS) as session:
            chunk = await anext(session)
            pictures[format] = (chunk.digest, chunk.frames.astype(int))
    exact_digest, exact = pictures["raw"]
    for format in ("jpeg", "h264"):
        digest, frames = pictures[format]
        assert digest == exact_digest
        assert frames.shape == exact.shape
        assert np.abs(frames - exact).mean() < 6, format


async def test_pause_and_resume(server_url: str) -> None:
    async with AsyncSession(PROMPT, base_url=server_url, **OPTIONS) as session:
        await take(session, 2)
        await session.pause()
        seen = 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                async for _ in session:
                    seen += 1
        assert seen <= 4, "what was on its way"
        assert session.state == "idle"
        await session.resume()
        assert len(await take(session, 2)) == 2
        assert (await session.info())["next_index"] >= 4 + seen


async def test_detach_and_attach(server_url: str) -> None:
    whole = await AsyncSession.open(PROMPT, base_url=server_url, **OPTIONS)
    async with whole:
        expected = await take(whole, 5)
    session = await AsyncSession.open(PROMPT, base_url=server_url, **OPTIONS)
    digests = await take(session, 2)
    async with await AsyncSession.attach(**await session.detach(), base_url=server_url, pace="free") as again:
        assert (again.width, again.fps) == (96, 12)
        digests += await take(again, 3)
    assert digests == expected


async def test_refusals_are_typed(server_url: str) -> None:
    async with AsyncSession(PROMPT, base_url=server_url, **OPTIONS) as session:
        await take(session, 2)
        with pytest.raises(errors.IndexPassed, match="already begun"):
            await session.update(SWITCH, from_index=0)
        with pytest.raises(errors.InvalidPrompt, match="empty"):
            await session.update("  ")
        answers = await asyncio.gather(*(session.update(f"a {c} circle") for c in ("red", "green", "blue")))
        assert [one.prompt_version for one in answers] == [2, 3, 4]
        assert len(await take(session, 3)) == 3, "none of this disturbs the stream"
    for wish, kind in (
        ({"model": "shape"}, errors.UnknownModel),
        ({"steps": 1}, errors.InvalidRequest),
        ({"format": "gif"}, errors.InvalidRequest),
    ):
        with pytest.raises(kind):
            await AsyncSession.open(PROMPT, base_url=server_url, **wish)
    with pytest.raises(errors.InvalidPrompt):
        await AsyncSession.open("", base_url=server_url)


async def test_words_it_does_not_know(server_url: str) -> None:
    async with AsyncSession("a red xylophone", base_url=server_url) as session:
        assert session.ignored_words == ("xylophone",)


def test_status(server_url: str) -> None:
    result = CliRunner().invoke(main, ["status", "--url", server_url, "--json"])
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert body["ready"] is True
    assert body["cluster"]["workers"][0]["state"] == "ready"
    table = CliRunner().invoke(main, ["status"], env={"TURBOSERVE_URL": server_url})
    assert "w0" in table.stderr
