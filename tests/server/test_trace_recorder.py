"""`serve --record-trace`: what users did becomes a trace that the simulator's reader takes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from gateway_harness import serving

from turboserve.errors import ConfigError
from turboserve.server.trace_recorder import TraceRecorder, trace_path
from turboserve.sim.trace import EVENT_NAMES, read_trace

CHUNK_S = 0.5


def events(path: Path) -> list[tuple[float, str, str, int]]:
    trace = read_trace(path)
    columns = zip(trace.time_us, trace.session, trace.event, trace.chunks, strict=True)
    return [(t / 1e6, trace.session_ids[s], EVENT_NAMES[e], int(c)) for t, s, e, c in columns]


def test_the_life_of_two_sessions(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "t.csv.gz"
    trace = TraceRecorder(path, 100.0, CHUNK_S)
    assert events(path) == [], "the file is there from the start"
    trace.arrive("a", 101.0)
    trace.activity("a", False, 0, 101.0)
    trace.activity("a", True, 0, 102.0)
    trace.activity("a", True, 1, 102.5)  # only the viewer went away for a moment
    trace.arrive("b", 103.0)
    trace.activity("a", False, 5, 104.5)
    trace.activity("a", True, 5, 110.0)
    trace.activity("a", False, 5, 111.0)  # paused before a chunk was made: no period
    trace.activity("a", True, 5, 120.0)
    trace.depart("a", 7, 121.0)
    trace.depart("a", 9, 130.0)  # said twice
    trace.write(131.0)
    assert events(path) == [
        (1.0, "a", "arrive", 0),
        (2.0, "a", "active", 3),
        (3.0, "b", "arrive", 0),
        (4.5, "a", "idle", 0),
        (20.0, "a", "active", 1),
        (21.0, "a", "depart", 0),
    ]


def test_a_server_that_stops_cuts_what_is_under_way(tmp_path: Path) -> None:
    trace = TraceRecorder(tmp_path / "t.csv", 0.0, CHUNK_S)
    trace.arrive("a", 1.0)
    trace.activity("a", True, 0, 2.0)
    trace.write(3.0)
    assert [event for _, _, event, _ in events(tmp_path / "t.csv")] == ["arrive"], "how long it will be is not known"
    trace.cut({"a": 8}, 6.0)
    trace.write(6.0)
    assert events(tmp_path / "t.csv")[1:] == [(2.0, "a", "active", 4), (6.0, "a", "idle", 0)]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_it_is_a_trace(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    trace = TraceRecorder(tmp_path / "t.csv", 0.0, CHUNK_S)
    now_s, index = 0.0, dict.fromkeys("abcde", 0)
    for _ in range(200):
        now_s += rng.choice([0.0, 0.0002, 0.4, 3.0])
        session = rng.choice("abcde")
        index[session] += rng.choice([0, 1, 4])
        what = rng.random()
        if what < 0.1:
            trace.arrive(session, now_s)
        elif what < 0.95:
            trace.activity(session, rng.random() < 0.5, index[session], now_s)
        else:
            trace.depart(session, index[session], now_s)
    trace.write(now_s)
    assert events(tmp_path / "t.csv")


async def test_a_gateway_records_its_viewers(tmp_path: Path) -> None:
    path = tmp_path / "users.csv.gz"
    async with serving(tmp_path / "data") as server:
        server.gateway.trace = TraceRecorder(path, server.gateway.now(), 1.0)
        opened = await server.open()
        async with server.viewer(opened) as viewer:
            await viewer.take(3)
            await viewer.send("pause")
            while (await viewer.until("state"))["state"] != "idle":
                pass
            await viewer.send("stop")
            await viewer.until("end")
        server.gateway.trace.write(server.gateway.now())
    kinds = [(sid, event) for _, sid, event, _ in events(path)]
    sid = opened["id"]
    assert kinds == [(sid, "arrive"), (sid, "active"), (sid, "idle"), (sid, "depart")]
    assert events(path)[1][3] >= 3


def test_a_place_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="record-trace"):
        TraceRecorder(tmp_path / "file" / "t.csv", 0.0, CHUNK_S)


def test_a_restarted_gateway_writes_beside_the_first() -> None:
    assert trace_path("/x/users.csv.gz", 1) == Path("/x/users.csv.gz")
    assert trace_path("/x/users.csv.gz", 3) == Path("/x/users.3.csv.gz")
