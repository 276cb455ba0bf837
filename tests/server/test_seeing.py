"""What operators and the curious are shown: where a chunk's time went, the cluster's picture, the last minutes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from gateway_harness import Harness, serving

from turboserve.runtime import messages as m
from turboserve.server.chunk_times import CHUNKS_KEPT, STAGES, ChunkTimes
from turboserve.server.history import SECONDS_KEPT, History

SID = "a" * 26
DIGEST = "0" * 64


@pytest.fixture
async def server(tmp_path: Path):
    async with serving(tmp_path) as harness:
        yield harness


def ready(index: int, *, wait_ms: float = 0.0, context_before_ms: float = 0.0) -> m.ChunkReady:
    return m.ChunkReady(
        session_id=SID,
        epoch=1,
        chunk_index=index,
        digest=DIGEST,
        digest_prev=DIGEST,
        frames=4,
        steps=4,
        prompt_version=1,
        wait_ms=wait_ms,
        denoise_ms=30.0,
        decode_ms=5.0,
        batch_size=2.0,
        context_before_ms=context_before_ms,
    )


def test_the_stages_of_a_chunk_add_up_to_its_whole_time() -> None:
    times = ChunkTimes()
    times.decided({"time_s": 9.0, "event": "place", "session": SID, "worker": "w0", "reason": "least latency"})
    times.begun(0, 10.0, 10.25, due_s=11.0, live=True)
    times.credited(0, 1, "w0", 10.26)
    times.accepted(ready(0, wait_ms=10.0), 10.31)
    times.sent(0, 10.32, 10.35, 10.36)
    times.sent(0, 99.0, 99.1, 99.2)  # a replay to a later viewer
    found = times.timings(0)
    assert found is not None
    stages = found["stages_ms"]
    assert tuple(stages) == STAGES
    expected = {
        "queue": 250,
        "input_log": 10,
        "moved": 0,
        "batch_wait": 10,
        "denoise": 30,
        "decode": 5,
        "transport": 5,
        "hand_over": 10,
        "encode": 30,
        "send": 10,
    }
    assert stages == pytest.approx(expected, abs=0.01)
    assert found["total_ms"] == pytest.approx(360, abs=0.01) and found["on_time"] and found["worker"] == "w0"
    assert found["slack_ms"] == pytest.approx(690, abs=0.01)
    assert [one["reason"] for one in found["decisions"]] == ["least latency"]
    # Its context pass is known with the next chunk, and only then; a decision made later is not behind this one.
    assert found["context_ms"] is None
    times.decided({"time_s": 20.0, "event": "migrate", "session": SID, "reason": "balance"})
    times.begun(1, 10.1, 10.31, due_s=11.3, live=True)
    times.credited(1, 1, "w0", 10.31)
    times.accepted(ready(1, context_before_ms=7.5), 10.5)
    first = times.timings(0)
    assert first is not None and first["context_ms"] == 7.5 and len(first["decisions"]) == 1
    # Chunk 1 might have begun by the clock at 10.1, but the chunk before it was only there at 10.31: no queue.
    second = times.timings(1)
    assert second is not None and second["stages_ms"]["queue"] == 0 and "encode" not in second["stages_ms"]


def test_a_chunk_asked_for_twice_says_how_long_the_first_worker_had_it() -> None:
    times = ChunkTimes()
    times.begun(5, 1.0, 1.0, due_s=2.0, live=True)
    times.credited(5, 1, "w0", 1.0)
    times.credited(5, 2, "w1", 1.7)
    times.accepted(ready(5), 1.8)
    times.credited(5, 3, "w0", 9.0)  # made again after a later loss; the viewer's chunk was the one before
    found = times.timings(5)
    assert found is not None and found["credits"] == 2 and found["worker"] == "w1"
    assert found["stages_ms"]["moved"] == pytest.approx(700)


def test_the_record_is_bounded() -> None:
    times = ChunkTimes()
    for index in range(3 * CHUNKS_KEPT):
        times.begun(index, 0.0, 0.0, 0.0, live=False)
    assert times.kept() == (2 * CHUNKS_KEPT, 3 * CHUNKS_KEPT - 1)
    assert times.timings(0) is None and times.newest() is None


def test_history_by_the_second() -> None:
    history = History()
    for latency_s in (0.1, 0.2, 0.3):
        history.measure("chunk_latency", latency_s)
        history.measure("chunk_on_time", 1.0)
    history.measure("chunk_late", 1.0)
    history.close_second(1000.0, {"active": 3}, 2)
    history.close_second(1001.0, {}, 2)
    columns = history.columns()
    assert columns["on_time"] == [3, 0] and columns["late"] == [1, 0] and columns["active"] == [3, 0]
    assert columns["latency_p50_ms"] == [200.0, None] and columns["latency_max_ms"] == [300.0, None]
    assert history.on_time_share(60) == 0.75 and history.on_time_share(1) is None
    for second in range(2 * SECONDS_KEPT):
        history.close_second(2000.0 + second, {}, 0)
    assert len(history.columns()["time_s"]) == SECONDS_KEPT and len(history.columns(5)["late"]) == 5


async def test_explain_over_http(server: Harness) -> None:
    opened = await server.open()
    path = f"/v1/sessions/{opened['id']}/explain"
    assert (await server.http.get(path)).status_code == 404, "no chunk yet"
    picture = {"decisions": [{"time_s": 0.0, "event": "place", "session": opened["id"], "reason": "room on w0"}]}
    for _ in range(2):  # the same decision comes with every picture
        server.cluster.tell(m.ClusterSnapshot(body=json.dumps(picture)))
    async with server.viewer(opened) as viewer:
        await viewer.take(3)
        for _ in range(200):
            found = (await server.http.get(path, params={"chunk": 1})).json()
            if "send" in found.get("stages_ms", {}):
                break
            await asyncio.sleep(0.01)
        assert tuple(found["stages_ms"]) == STAGES and found["index"] == 1
        assert found["total_ms"] == pytest.approx(sum(found["stages_ms"].values()), abs=0.01)
        assert [one["reason"] for one in found["decisions"]] == ["room on w0"]
        newest = (await server.http.get(path)).json()
        assert newest["index"] >= 2
    for wrong, status in (("999", 404), ("-1", 422), ("x", 422)):
        assert (await server.http.get(path, params={"chunk": wrong})).status_code == status


async def test_the_cluster_with_what_the_gateway_knows(server: Harness) -> None:
    opened = await server.open()
    async with server.viewer(opened, pace="live") as viewer:
        await viewer.take(2)
        rows = [{"id": opened["id"], "state": "active", "worker": "w0"}, {"id": "b" * 26, "state": "suspended"}]
        server.cluster.tell(m.ClusterSnapshot(body=json.dumps({"workers": [], "session_list": rows})))
        server.process.app.state.cluster_view._made_s = -1e9
        found = (await server.http.get("/v1/cluster")).json()
        first, second = found["session_list"]
        assert first["next_index"] >= 2 and first["attached"] and first["on_time"] + first["late"] >= 2
        assert second == rows[1], "a session the gateway does not know is shown as the controller has it"
        assert found["totals"]["viewers"] == 1 and found["totals"]["live_chunks"] >= 2
        assert found["sessions"]["active"] == 1
        # Asked twice at once, it is made once.
        assert (await server.http.get("/v1/cluster")).content == server.process.app.state.cluster_view._text


async def test_history_over_http(server: Harness) -> None:
    server.gateway.history.close_second(5.0, {}, 1)
    found = (await server.http.get("/v1/admin/history", params={"seconds": 1})).json()
    assert found["time_s"] == [5.0] and found["workers"] == [1] and found["interval_s"] == 1.0
    for wrong in ("0", "x", "601", "-3", "9" * 40):
        assert (await server.http.get("/v1/admin/history", params={"seconds": wrong})).status_code == 422


async def test_killing_is_for_loopback_without_keys(server: Harness, tmp_path: Path) -> None:
    answer = await server.http.post("/v1/admin/workers/w0/kill")
    # The scripted controller cannot; that it was asked is what counts here.
    assert answer.status_code == 409 and "kill_worker" in answer.text
    async with serving(tmp_path / "keyed", api_key="secret") as keyed:
        headers = {"Authorization": "Bearer secret"}
        answer = await keyed.http.post("/v1/admin/workers/w0/kill", headers=headers)
        assert answer.status_code == 403 and "loopback" in answer.text
        assert not [one for one in keyed.cluster.seen if isinstance(one, m.AdminCommand)]


async def test_active_or_idle_is_the_gateways_own_knowledge(server: Harness) -> None:
    """The controller says idle of a session that opened before its viewer came, and does not take it back."""
    opened = await server.open()
    async with server.viewer(opened, pace="live") as viewer:
        await viewer.take(1)
        epoch = server.cluster.sessions[opened["id"]].epoch
        server.cluster.tell(m.SessionState(session_id=opened["id"], state="idle", epoch=epoch, owned=True))
        path = f"/v1/sessions/{opened['id']}"
        assert (await server.http.get(path)).json()["state"] == "active"
        await viewer.take(1)
        await server.http.post(f"{path}/pause")
        assert (await server.http.get(path)).json()["state"] == "idle"
