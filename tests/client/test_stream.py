"""Streams that break, against the scripted server: what is mended, what is raised, what is bounded."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import numpy as np
import pytest
from scripted_server import FRAMES, Scripted, before_attached, chain, cut, frames_of, say

from turboserve import errors
from turboserve.client import AsyncSession, Session
from turboserve.client.retry import RetryPolicy

QUICK = RetryPolicy(attempts=4, window_s=5.0, first_s=0.02, longest_s=0.05)


async def open_at(server: Scripted, **options: Any) -> AsyncSession:
    return await AsyncSession.open("a red circle", base_url=server.base_url, retry=QUICK, **options)


async def take_all(session: AsyncSession) -> list[str]:
    return [chunk.digest async for chunk in session]


async def test_a_stream_from_first_to_last_chunk() -> None:
    async with Scripted() as server, await open_at(server, seed=3, steps=4, pace="free") as session:
        index = 0
        async for chunk in session:
            assert chunk.index == index
            assert chunk.digest == chain(index + 1)[-1] == session.digest
            np.testing.assert_array_equal(chunk.frames, frames_of(index))
            index += 1
        assert index == 12
        assert (session.end_reason, session.state, session.reconnects) == ("completed", "closed", 0)
        assert (session.ignored_words, session.seed, session.numerics_id) == (("purple",), 3, "n")
        assert [one async for one in session] == []
    method, path, _, body = server.requests[0]
    assert (method, path) == ("POST", "/v1/sessions")
    assert body == {"prompt": "a red circle", "seed": 3, "format": "raw", "steps": 4}
    assert server.attaches == [
        {"type": "attach", "token": "t0", "next_index": 0, "format": "raw", "pace": "free"},
    ]
    assert len(server.requests) == 1, "a stream that has ended needs no DELETE"


RESUMABLE = [None, 1001, 1011, 1012, 1013, 4400, 4413, 4429, 4503]


@pytest.mark.parametrize("code", RESUMABLE)
async def test_a_loss_that_can_be_mended_is_and_the_chain_is_the_same(code: int | None) -> None:
    async with Scripted(script=[cut(5, code), cut(2, code), before_attached(code), cut(0, code)]) as server:
        async with await open_at(server) as session:
            assert await take_all(session) == chain(12)
            assert session.reconnects == 3
        assert [one["next_index"] for one in server.attaches] == [0, 5, 7, 7, 7]


async def test_a_cut_between_header_and_frames() -> None:
    async def behave(server: Scripted, socket: Any) -> None:
        first = await server.attach(socket)
        await server.chunks(socket, first, first + 3)
        await say(socket, "chunk", index=3, digest="0" * 64, digest_prev="")
        socket.transport.abort()

    async with Scripted(script=[behave]) as server, await open_at(server) as session:
        assert await take_all(session) == chain(12)


async def test_a_refused_handshake_is_tried_again_after_its_hint() -> None:
    refusals: list[tuple[int, dict[str, str]]] = [(503, {"Retry-After": "0.3"}), (429, {})]
    async with Scripted(script=[cut(2)], http_refusals=[]) as server, await open_at(server) as session:
        await anext(session)
        server.http_refusals = refusals
        begun_s = time.monotonic()
        assert len(await take_all(session)) == 11
        assert time.monotonic() - begun_s >= 0.3


async def test_attempts_are_bounded_and_the_error_says_what_was_tried() -> None:
    script = [cut(2), *[before_attached() for _ in range(9)]]
    async with Scripted(script=script) as server, await open_at(server) as session:
        with pytest.raises(errors.Refused) as caught:
            await take_all(session)
        with pytest.raises(errors.Refused):  # and stays so
            await anext(session)
        with pytest.raises(errors.Refused):
            await session.update("late")
    assert caught.value.code == "unreachable"
    assert "4 times" in caught.value.message
    assert caught.value.retryable
    assert len(server.attaches) == 5


async def test_attempts_are_counted_afresh_after_a_chunk() -> None:
    async with Scripted(chunk_count=30, script=[cut(1) for _ in range(20)]) as server, await open_at(server) as session:
        assert await take_all(session) == chain(30)
        assert session.reconnects == 20


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (4401, errors.Unauthenticated),
        (4403, errors.Forbidden),
        (4404, errors.NotFound),
        (4409, errors.Conflict),
        (4410, errors.NotFound),
        (4500, errors.WorkerError),
        (1009, errors.InvalidRequest),
        (1002, errors.ProtocolError),
    ],
)
async def test_what_cannot_be_mended_is_a_typed_error_with_the_servers_words(
    code: int, kind: type[errors.TurboServeError]
) -> None:
    async with Scripted(script=[cut(3, code, "because so")]) as server, await open_at(server) as session:
        seen = 0
        with pytest.raises(kind, match="because so") as caught:
            async for _ in session:
                seen += 1
        assert seen == 3, "what came before the error is delivered"
        assert not caught.value.retryable
    assert len(server.attaches) == 1


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"payload": bytes(FRAMES * 8 * 6 * 3)}, errors.CorruptState),
        ({"digest_prev": "1" * 64}, errors.CorruptState),
        ({"digest": "1" * 64}, errors.CorruptState),
        ({"index": 4}, errors.ProtocolError),
        ({"bytes": 1}, errors.ProtocolError),
        ({"payload": b"short"}, errors.ProtocolError),
        ({"frames": "three"}, errors.ProtocolError),
    ],
)
async def test_wrong_chunks_are_never_handed_out(changes: dict[str, Any], kind: type[Exception]) -> None:
    async def behave(server: Scripted, socket: Any) -> None:
        first = await server.attach(socket)
        await server.chunks(socket, first, 2)
        await server.chunk(socket, 2, **changes)
        await socket.wait_closed()

    async with Scripted(script=[behave]) as server, await open_at(server) as session:
        taken = []
        with pytest.raises(kind):
            async for chunk in session:
                taken.append(chunk.index)
        assert taken == [0, 1]


@pytest.mark.parametrize("noise", ["{", "[]", '{"no": "type"}', '{"type":"attached"}', b"frames without a header"])
async def test_messages_that_fit_no_schema(noise: str | bytes) -> None:
    async def behave(server: Scripted, socket: Any) -> None:
        await server.attach(socket)
        await socket.send(noise)
        await socket.wait_closed()

    async with Scripted(script=[behave]) as server, await open_at(server) as session:
        with pytest.raises(errors.ProtocolError):
            await anext(session)


async def test_messages_of_a_newer_server_are_passed_over() -> None:
    async def behave(server: Scripted, socket: Any) -> None:
        first = await server.attach(socket)
        await say(socket, "weather", sun=True)
        await say(socket, "state", state="active", added=1)
        await server.chunks(socket, first, 12)
        await socket.close(1000, "completed")

    async with Scripted(script=[behave]) as server, await open_at(server) as session:
        assert await take_all(session) == chain(12)


async def test_an_attach_that_is_refused_by_a_message() -> None:
    async def behave(server: Scripted, socket: Any) -> None:
        await socket.recv()
        await say(socket, "error", code="index_out_of_range", message="9 is gone", retryable=False, expected="0 to 4")
        await socket.wait_closed()

    async with Scripted(script=[behave]) as server, await open_at(server) as session:
        with pytest.raises(errors.IndexOutOfRange, match="9 is gone; expected 0 to 4"):
            await anext(session)


async def test_a_caller_that_does_not_take_chunks_stops_their_making() -> None:
    async with Scripted() as server, await open_at(server) as session:
        await asyncio.sleep(0.3)
        assert server.sent_index == 3
        assert await take_all(session) == chain(12)
        assert server.unacked_max == 4


async def test_too_slow_means_to_wait_for_the_caller() -> None:
    async with Scripted(script=[cut(4, 4413)]) as server, await open_at(server) as session:
        await asyncio.sleep(0.5)
        assert len(server.attaches) == 1
        assert await take_all(session) == chain(12)
        assert len(server.attaches) == 2


# ---------------------------------------------------------------- prompts


async def test_an_update_is_answered_with_what_was_bound() -> None:
    async with Scripted() as server, await open_at(server) as session:
        answer = await session.update("a blue square", from_index=7)
        assert (answer.prompt_version, answer.from_index, answer.superseded) == (2, 7, False)
        assert server.prompts[0]["text"] == "a blue square"
        assert server.prompts[0]["from_index"] == 7
        assert await take_all(session) == chain(12)


def answering(kind: str, *, named: bool = True, **values: Any) -> Any:
    async def behave(server: Scripted, socket: Any) -> None:
        await server.attach(socket)
        while (message := json.loads(await socket.recv()))["type"] != "prompt":
            pass
        server.prompts.append(message)
        if named:
            values["event_id"] = message["event_id"]
        await say(socket, kind, **values)
        await socket.wait_closed()

    return behave


@pytest.mark.parametrize("named", [True, False])
async def test_a_prompt_that_came_too_late_for_its_index(named: bool) -> None:
    script = [
        answering("error", named=named, code="index_passed", message="chunk 3 has already begun", retryable=False)
    ]
    async with Scripted(script=script) as server, await open_at(server) as session:
        with pytest.raises(errors.IndexPassed, match="chunk 3"):
            await session.update("late", from_index=3)


async def test_a_prompt_that_a_newer_one_replaced() -> None:
    async with Scripted(script=[answering("prompt_superseded")]) as server, await open_at(server) as session:
        assert (await session.update("old")).superseded


async def test_a_prompt_whose_answer_was_lost_is_sent_again_under_the_same_event_id() -> None:
    async def lose_it(server: Scripted, socket: Any) -> None:
        await server.attach(socket)
        server.prompts.append(json.loads(await socket.recv()))
        socket.transport.abort()

    async with Scripted(script=[lose_it]) as server, await open_at(server) as session:
        assert (await session.update("a blue square")).prompt_version == 2
        assert await take_all(session) == chain(12)
    first, second = server.prompts
    assert first == second


async def test_a_repeated_prompt_that_had_arrived_counts_as_taken() -> None:
    async def lose_it(server: Scripted, socket: Any) -> None:
        await server.attach(socket)
        await socket.recv()
        socket.transport.abort()

    conflict = answering("error", code="event_id_conflict", message="used before", retryable=False)
    async with Scripted(script=[lose_it, conflict]) as server, await open_at(server) as session:
        answer = await session.update("a blue square")
        assert (answer.prompt_version, answer.superseded) == (None, False)


async def test_an_update_without_an_answer_ends_in_time() -> None:
    async def deaf(server: Scripted, socket: Any) -> None:
        await server.attach(socket)
        await socket.wait_closed()

    async with Scripted(script=[deaf]) as server, await open_at(server) as session:
        with pytest.raises(errors.Refused, match=r"within 0\.2 s"):
            await session.update("hello?", timeout_s=0.2)


# ---------------------------------------------------------------- leaving and coming back


async def test_close_ends_the_session_on_the_server_and_wakes_who_waits() -> None:
    async def silent(server: Scripted, socket: Any) -> None:
        await server.attach(socket)
        await socket.wait_closed()

    async with Scripted(script=[silent]) as server:
        session = await open_at(server)
        waiting = asyncio.create_task(take_all(session))
        updating = asyncio.create_task(session.update("x"))
        await asyncio.sleep(0.1)
        await session.close()
        await session.close()
        assert await waiting == []
        with pytest.raises(errors.Conflict):
            await updating
        assert [one[0] for one in server.requests] == ["POST", "DELETE"]


async def test_detach_and_attach_go_on_with_the_same_chain() -> None:
    async with Scripted() as server:
        session = await open_at(server)
        taken = [(await anext(session)).digest for _ in range(3)]
        await asyncio.sleep(0.1)
        ticket = await session.detach()
        assert ticket["next_index"] == 3
        assert "DELETE" not in [one[0] for one in server.requests]
        async with await AsyncSession.attach(**ticket, base_url=server.base_url, retry=QUICK) as again:
            taken += await take_all(again)
        assert taken == chain(12)


async def test_joining_in_the_middle_without_the_past() -> None:
    async with Scripted() as server:
        session = await open_at(server)
        for _ in range(3):
            await anext(session)
        ticket = {**await session.detach(), "digest": None}
        async with await AsyncSession.attach(**ticket, base_url=server.base_url) as again:
            assert await take_all(again) == chain(12)[3:]


# ---------------------------------------------------------------- REST


async def test_errors_of_the_server_keep_code_message_expectation_and_hint() -> None:
    body = {"code": "invalid_prompt", "message": "prompt is empty", "expected": "some text", "retryable": False}
    script = [(422, {}, json.dumps({"error": body}).encode())]
    async with Scripted(http_script=script) as server:
        with pytest.raises(errors.InvalidPrompt, match="prompt is empty; expected some text"):
            await open_at(server)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (429, "quota_exceeded", errors.QuotaExceeded),
        (503, "brand_new", errors.Overloaded),
        (500, "", errors.WorkerError),
    ],
)
async def test_refusals_carry_when_to_come_back(status: int, code: str, kind: type[errors.TurboServeError]) -> None:
    body = json.dumps({"error": {"code": code, "message": "no room", "retryable": True}}).encode()
    async with Scripted(http_script=[(status, {"Retry-After": "7"}, body)]) as server:
        with pytest.raises(kind, match="no room") as caught:
            await open_at(server)
    assert (caught.value.retry_after_s, caught.value.retryable) == (7.0, True)


async def test_something_else_listens_there() -> None:
    async with Scripted(http_script=[(200, {}, b"<html>")]) as server:
        with pytest.raises(errors.ProtocolError, match="JSON"):
            await open_at(server)
    async with Scripted(http_script=[(200, {}, b'{"id": 5}')]) as server:
        with pytest.raises(errors.ProtocolError, match="does not fit"):
            await open_at(server)


async def test_nobody_listens_there() -> None:
    with pytest.raises(errors.Refused, match=r"cannot reach http://127\.0\.0\.1:9"):
        await AsyncSession.open("x", base_url="http://127.0.0.1:9")
    with pytest.raises(errors.InvalidRequest, match="no server address"):
        await AsyncSession.open("x", base_url="127.0.0.1:8000")


async def test_address_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Scripted() as server:
        monkeypatch.setenv("TURBOSERVE_URL", server.base_url)
        monkeypatch.setenv("TURBOSERVE_API_KEY", "k1")
        async with AsyncSession("x"):
            pass
        async with AsyncSession("x", api_key="k2"):
            pass
    assert [one[2]["authorization"] for one in server.requests if one[0] == "POST"] == ["Bearer k1", "Bearer k2"]


async def test_a_session_that_is_not_open_says_how_to_open_it() -> None:
    async with Scripted() as server:
        session = AsyncSession("x", base_url=server.base_url)
        with pytest.raises(errors.Conflict, match="not open yet; expected `async with"):
            await anext(session)
        await session.close()
        assert server.requests == []
        with pytest.raises(TypeError, match="sneed"):
            AsyncSession("x", sneed=3)  # type: ignore[call-arg]


# ---------------------------------------------------------------- the synchronous one


async def test_the_synchronous_session_does_the_same() -> None:
    def use(url: str) -> list[str]:
        with Session("a red circle", base_url=url, retry=QUICK) as session:
            assert (session.width, session.fps) == (8, 12)
            first = next(session)
            assert session.update("a blue square").prompt_version == 2
            digests = [first.digest, *(chunk.digest for chunk in session)]
            assert session.digest == digests[-1]
            assert session.info()["model"] == "noise"
        assert list(session) == []
        with pytest.raises(errors.Conflict, match="closed"):
            session.update("late")
        return digests

    async with Scripted(script=[cut(5)]) as server:
        assert await asyncio.to_thread(use, server.base_url) == chain(12)


async def test_the_synchronous_session_raises_and_ends_its_thread() -> None:
    def use(url: str) -> None:
        import threading

        with Session("x", base_url=url, retry=QUICK) as session, pytest.raises(errors.NotFound):
            list(session)
        with pytest.raises(errors.Refused):
            Session("x", base_url="http://127.0.0.1:9")
        assert not [one for one in threading.enumerate() if one.name == "turboserve-session"]

    async with Scripted(script=[cut(2, 4404)]) as server:
        await asyncio.to_thread(use, server.base_url)
