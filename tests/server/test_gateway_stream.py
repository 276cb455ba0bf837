"""The WebSocket over real sockets, with a scripted cluster behind the real gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import pytest
import websockets
from gateway_harness import Harness, Viewer, serving

from turboserve.server.gateway_config import Limits


@pytest.fixture
async def server(tmp_path: Path):
    async with serving(tmp_path) as harness:
        yield harness


async def test_chunks_are_contiguous_and_the_chain_is_right(server: Harness) -> None:
    opened = await server.open(seed=7)
    async with server.viewer(opened) as viewer:
        headers = await viewer.take(12)
    assert [one["index"] for one in headers] == list(range(12))
    viewer.check_chain()
    assert viewer.attached["next_index"] == 0 and viewer.attached["mime"]


async def test_same_inputs_same_chain(server: Harness) -> None:
    chains = []
    for _ in range(2):
        opened = await server.open(seed=7)
        async with server.viewer(opened) as viewer:
            await viewer.take(6)
            chains.append(viewer.check_chain())
    assert chains[0] == chains[1]


async def test_four_chunks_stand_unacked_then_generation_waits(server: Harness) -> None:
    opened = await server.open()
    async with server.viewer(opened) as viewer:
        await viewer.take(4, ack=False)
        await asyncio.sleep(0.1)
        assert len(server.cluster.credits[opened["id"]]) == 4
        await viewer.send("ack", index=1)
        await viewer.take(2, ack=False)
        await asyncio.sleep(0.1)
        assert len(server.cluster.credits[opened["id"]]) == 6


async def test_resume_continues_exactly(server: Harness) -> None:
    opened = await server.open(seed=3)
    async with server.viewer(opened) as first:
        await first.take(3)
        await first.take(2, ack=False)
    async with server.socket(opened["id"]) as socket:
        second = Viewer(socket)
        await second.send("attach", token=first.token, next_index=0, format="raw", pace="free")
        error = await second.until("error")
        assert error["code"] == "index_out_of_range" and error["expected"].startswith("3 to ")
        await second.attach(first.token, next_index=3)
        await second.take(5)
    assert [header["index"] for header, _ in second.chunks] == [3, 4, 5, 6, 7]
    second.check_chain()
    assert second.chunks[0][0]["digest_prev"] == first.chunks[2][0]["digest"]
    assert second.chunks[0] == (
        first.chunks[3][0] | {"latency_ms": second.chunks[0][0]["latency_ms"]},
        first.chunks[3][1],
    )


async def test_token_rotates_and_the_old_one_lives_until_the_first_ack(server: Harness) -> None:
    opened = await server.open()
    async with server.viewer(opened) as first:
        await first.take(1)
    async with server.viewer(opened | {"token": first.token}, next_index=1) as second:
        await second.take(1, ack=False)
    # The answer may have been lost: the token it was made with still opens the session.
    async with server.viewer(opened | {"token": first.token}, next_index=1) as third:
        await third.take(2)
        await server.http.get(f"/v1/sessions/{opened['id']}")
    async with server.socket(opened["id"]) as socket:
        viewer = Viewer(socket)
        await viewer.send("attach", token=first.token, next_index=3)
        assert await viewer.close_code() == 4401


async def test_a_second_tab_takes_over(server: Harness) -> None:
    opened = await server.open()
    async with server.viewer(opened) as first:
        await first.take(2)
        async with server.viewer(opened | {"token": first.token}, next_index=2) as second:
            assert await first.close_code() == 4409
            await second.take(3)
    last = max(header["index"] for header, _ in first.chunks)
    assert [header["index"] for header, _ in second.chunks] == [2, 3, 4]
    assert last <= 5  # what was on its way when the stream was taken over, and never more than four unacked


async def test_prompt_reaches_the_next_chunk_and_the_newest_wins(server: Harness) -> None:
    opened = await server.open()
    server.cluster.chunk_s = None
    async with server.viewer(opened) as viewer:
        await asyncio.sleep(0.05)  # chunk 0 has begun
        await viewer.send("prompt", text="a blue square", event_id="a")
        accepted = await viewer.until("prompt_accepted")
        assert accepted == {"type": "prompt_accepted", "event_id": "a", "prompt_version": 2, "from_index": 1}
        await viewer.send("prompt", text="a green triangle", event_id="b")
        assert (await viewer.until("prompt_superseded"))["event_id"] == "a"
        assert (await viewer.until("prompt_accepted"))["prompt_version"] == 3
        await viewer.send("prompt", text="again", event_id="b")
        assert (await viewer.until("error"))["code"] == "event_id_conflict"
        await viewer.send("prompt", text="too late", from_index=0)
        assert (await viewer.until("error"))["code"] == "index_passed"
        server.cluster.chunk_s = 0.001
        server.cluster.release()
        headers = await viewer.take(3)
    assert [one["prompt_version"] for one in headers] == [1, 3, 3]
    assert [one.prompt for one in server.cluster.credits[opened["id"]]][:3] == ["a red circle"] + [
        "a green triangle"
    ] * 2


async def test_prompts_for_later_chunks_wait_there(server: Harness) -> None:
    opened = await server.open()
    server.cluster.chunk_s = None
    async with server.viewer(opened) as viewer:
        await viewer.send("prompt", text="a blue square", from_index=3)
        await viewer.send("prompt", text="a green square", from_index=5)
        await viewer.until("prompt_accepted")
        await viewer.until("prompt_accepted")
        server.cluster.chunk_s = 0.001
        server.cluster.release()
        headers = await viewer.take(7)
    assert [one["prompt_version"] for one in headers] == [1, 1, 1, 2, 2, 3, 3]
    card = (await server.http.get(f"/v1/sessions/{opened['id']}/card")).json()
    assert [one["from_index"] for one in card["inputs"]] == [0, 3, 5]
    assert card["chunk_count"] >= 7


async def test_pause_and_resume(server: Harness) -> None:
    opened = await server.open()
    async with server.viewer(opened) as viewer:
        await viewer.take(2)
        await viewer.send("pause")
        while (await viewer.until("state")).get("reason") != "paused":
            pass
        for _ in range(8):
            await viewer.send("ack", index=max(header["index"] for header, _ in viewer.chunks))
            await asyncio.sleep(0.02)
        seen = len(server.cluster.credits[opened["id"]])
        await asyncio.sleep(0.2)
        assert len(server.cluster.credits[opened["id"]]) == seen
        state = (await server.http.get(f"/v1/sessions/{opened['id']}")).json()
        assert state["state"] == "idle" and state["paused"]
        answer = await server.http.post(f"/v1/sessions/{opened['id']}/resume")
        assert answer.status_code == 200
        for _ in range(3):
            header = await viewer.until("chunk")
            await viewer.send("ack", index=header["index"])
    viewer.check_chain()


async def test_live_pace_keeps_to_time(tmp_path: Path) -> None:
    async with serving(tmp_path, fps=40.0) as server:  # 0.1 s a chunk
        opened = await server.open()
        async with server.viewer(opened, pace="live") as viewer:
            began = asyncio.get_running_loop().time()
            await viewer.take(9)
            spent = asyncio.get_running_loop().time() - began
        assert 0.65 < spent < 1.2  # chunk 8 may begin at 7 * 0.1 s
        state = (await server.http.get(f"/v1/sessions/{opened['id']}")).json()
        assert state["on_time_share"] == 1.0


async def test_max_duration_ends_the_stream(server: Harness) -> None:
    opened = await server.open(max_duration_s=10 / 100)  # ten frames: three chunks
    async with server.viewer(opened) as viewer:
        await viewer.take(3)
        end = await viewer.until("end")
        assert end == {"type": "end", "delivered": 3, "reason": "completed"}
        assert await viewer.close_code() == 1000
    state = (await server.http.get(f"/v1/sessions/{opened['id']}")).json()
    assert state["state"] == "closed"


async def test_stop_ends_the_stream(server: Harness) -> None:
    opened = await server.open()
    async with server.viewer(opened) as viewer:
        await viewer.take(1)
        await viewer.send("stop")
        assert (await viewer.until("end"))["reason"] == "stopped"
        assert await viewer.close_code() == 1000


async def test_two_hundred_bad_messages(server: Harness) -> None:
    opened, other = await server.open(), await server.open()
    async with server.viewer(other) as neighbour, server.viewer(opened) as viewer:
        bad = ["", "{", "[]", "null", '{"type":"nope"}', '{"type":"ack"}', '{"type":"ack","index":-1}', "\x00", '"x"']

        async def flood() -> None:
            with contextlib.suppress(websockets.ConnectionClosed):
                for number in range(200):
                    await viewer.socket.send(bad[number % len(bad)])

        _, code = await asyncio.gather(flood(), viewer.close_code())
        assert code == 4400
        errors = [one for one in viewer.messages if one["type"] == "error"]
        assert errors and all(one["code"] in ("malformed", "index_out_of_range") for one in errors)
        await neighbour.take(5)
    neighbour.check_chain()
    # Resumable: the session is still there.
    async with server.viewer(opened | {"token": viewer.token}, next_index=len(viewer.chunks)) as again:
        await again.take(1)


async def test_flood_is_dropped_then_closed(server: Harness) -> None:
    opened = await server.open()
    async with server.viewer(opened) as viewer:
        for _ in range(120):
            await viewer.send("ping")
        code = await viewer.close_code()
    assert code == 4429
    assert any(one["type"] == "error" and one["code"] == "flood" for one in viewer.messages)


async def test_message_over_the_limit(server: Harness) -> None:
    opened = await server.open()
    async with server.viewer(opened) as viewer:
        await viewer.socket.send("x" * 70_000)
        assert await viewer.close_code() == 1009


async def test_attach_is_due_within_its_time(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(attach_s=0.2)) as server:
        opened = await server.open()
        async with server.socket(opened["id"]) as socket:
            assert await Viewer(socket).close_code() == 4401
        async with server.socket("a" * 26) as socket:
            viewer = Viewer(socket)
            await viewer.send("attach", token="x", next_index=0)
            assert await viewer.close_code() == 4404
        async with server.socket(opened["id"]) as socket:
            viewer = Viewer(socket)
            await viewer.send("attach", token="x" * 43, next_index=0)
            assert await viewer.close_code() == 4401
        async with server.socket(opened["id"]) as socket:
            viewer = Viewer(socket)
            await viewer.send("ack", index=0)
            assert (await viewer.until("error"))["code"] == "conflict"


async def test_foreign_origin_is_refused_at_the_handshake(server: Harness) -> None:
    opened = await server.open()
    for origin in ("http://evil.example", server.url + ".evil.example", "null", server.url.replace("http", "https")):
        with pytest.raises(websockets.InvalidStatus) as refused:
            async with server.socket(opened["id"], origin=origin):
                pass
        assert refused.value.response.status_code == 403
    async with server.socket(opened["id"], origin=server.url):
        pass


async def test_a_viewer_that_acks_nothing_is_let_go_and_may_come_back(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(slow_close_s=0.4)) as server:
        opened = await server.open()
        async with server.viewer(opened) as viewer:
            await viewer.take(4, ack=False)
            assert await viewer.close_code() == 4413
        async with server.viewer(opened | {"token": viewer.token}, next_index=4) as again:
            await again.take(2)
        assert [header["index"] for header, _ in again.chunks] == [4, 5]


async def test_a_session_nobody_attaches_to_expires(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(attach_grace_s=0.3)) as server:
        opened = await server.open()
        await asyncio.sleep(0.5)
        state = (await server.http.get(f"/v1/sessions/{opened['id']}")).json()
        assert (state["state"], state["reason"]) == ("closed", "expired")
        async with server.socket(opened["id"]) as socket:
            viewer = Viewer(socket)
            await viewer.send("attach", token=opened["token"], next_index=0)
            assert await viewer.close_code() == 4410


async def test_queue_position_is_told_and_the_stream_starts_when_there_is_room(server: Harness) -> None:
    server.cluster.room = 1
    first = await server.open()
    second = await server.open()
    assert (first["state"], second["state"], second["queue_position"]) == ("idle", "queued", 1)
    async with server.viewer(second) as viewer:
        state = await viewer.until("state")
        assert (state["state"], state["queue_position"]) == ("queued", 1)
        await server.http.delete(f"/v1/sessions/{first['id']}")
        await viewer.take(2)
    viewer.check_chain()


async def test_a_lost_worker_is_replaced_and_the_stream_goes_on_exactly(server: Harness) -> None:
    opened = await server.open(seed=5)
    reference = await server.open(seed=5)
    async with server.viewer(reference) as viewer:
        await viewer.take(10)
        wanted = [header["digest"] for header, _ in viewer.chunks]
    async with server.viewer(opened) as viewer:
        await viewer.take(4)
        server.cluster.add_worker("w1")
        server.cluster.place(opened["id"], "w1", next_index=0)  # made again from its inputs
        while len(viewer.chunks) < 10:
            header = await viewer.until("chunk")
            await viewer.send("ack", index=header["index"])
    assert [header["digest"] for header, _ in viewer.chunks] == wanted
    viewer.check_chain()
    assert viewer.chunks[-1][0]["epoch"] == 2


async def test_chunks_of_an_old_epoch_are_refused(server: Harness) -> None:
    opened = await server.open()
    server.cluster.chunk_s = None
    async with server.viewer(opened) as viewer:
        await asyncio.sleep(0.05)
        _, credit = server.cluster.held.pop(0)
        stale, pixels = server.cluster.make(credit, server.cluster.sessions[opened["id"]])
        server.cluster.place(opened["id"])
        server.gateway.chunk_ready(stale, pixels)
        await asyncio.sleep(0.05)
        assert not viewer.chunks
        server.cluster.release()
        server.cluster.chunk_s = 0.001
        await viewer.take(2)
    assert server.gateway.find(opened["id"], None).counts.fenced == 1
    assert [header["epoch"] for header, _ in viewer.chunks] == [2, 2]


async def test_a_chunk_that_does_not_continue_the_chain_fails_the_session(server: Harness) -> None:
    opened = await server.open()
    async with server.viewer(opened) as viewer:
        await viewer.take(2)
        server.cluster.sessions[opened["id"]].digest = "ab" * 32
        code = await viewer.close_code()
    assert code == 4500
    error = [one for one in viewer.messages if one["type"] == "error"][-1]
    assert error["code"] == "state_corrupt"


async def test_slow_reader_keeps_memory_bounded_and_neighbours_on_time(server: Harness) -> None:
    slow = [await server.open() for _ in range(8)]
    sockets = []
    for opened in slow:
        url = server.url.replace("http", "ws", 1) + f"/v1/sessions/{opened['id']}/stream"
        socket = await websockets.connect(url, max_queue=1, compression=None, max_size=None)
        await socket.send(json.dumps({"type": "attach", "token": opened["token"], "next_index": 0, "format": "raw"}))
        sockets.append(socket)
    opened = await server.open()
    async with server.viewer(opened) as viewer:
        await viewer.take(30)
    viewer.check_chain()
    for one in slow:
        session = server.gateway.find(one["id"], None)
        assert len(session.ring) <= 4 and session.bound <= 4
    for socket in sockets:
        socket.transport.abort()
