"""The load generator: a trace scaled and planned, the simulated player, the figures; a small load on a real server."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from real_server import RunningServer

from turboserve.bench.serve_figures import figures, predicted, rows, spread
from turboserve.bench.serve_trace import PeriodPlan, plans, scaled
from turboserve.bench.serve_viewer import LiveClock, PeriodSeen, ViewerSeen
from turboserve.cli.main import main
from turboserve.errors import ConfigError
from turboserve.sim.profile_files import load_profile
from turboserve.sim.trace import demand, read_trace, write_trace

TRACES = Path(__file__).resolve().parents[2] / "traces"
CLOCK = LiveClock(chunk_s=0.5, chunk_target_s=0.4)
TRACE = """time_s,session_id,event,chunks
0.000,a,arrive,
0.000,a,active,8
8.000,a,idle,
10.000,b,arrive,
10.000,b,active,4
14.000,b,depart,
20.000,a,active,6
26.000,a,depart,
90.000,c,arrive,
90.000,c,active,40
130.000,c,depart,
"""


def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.csv"
    path.write_text(TRACE)
    return path


def test_a_trace_runs_faster_and_keeps_its_shape(tmp_path: Path) -> None:
    trace = scaled(read_trace(small(tmp_path)), speed=2.0)
    (a, b, c) = plans(trace, chunk_s=0.5)
    assert a.periods == (PeriodPlan(0.0, 8), PeriodPlan(10.0, 6)), "8 s of video at twice the speed: 4 s, 8 chunks"
    assert (b.arrive_s, b.depart_s) == (5.0, 7.0) and c.periods[0].chunks == 40
    # What comes out is a trace again, and the same for the same arguments.
    write_trace(trace, tmp_path / "out.csv.gz")
    again = read_trace(tmp_path / "out.csv.gz")
    assert np.array_equal(again.time_us, trace.time_us) and again.session_ids == trace.session_ids


def test_a_window_of_a_trace_cuts_who_stays_and_leaves_out_who_came_before(tmp_path: Path) -> None:
    trace = scaled(read_trace(small(tmp_path)), from_s=5.0, length_s=100.0)
    b, c = plans(trace, chunk_s=1.0)
    assert (b.session_id, b.arrive_s) == ("b", 5.0)
    assert (c.session_id, c.arrive_s, c.depart_s) == ("c", 85.0, 100.0)
    with pytest.raises(ConfigError):
        scaled(read_trace(small(tmp_path)), from_s=30.0, length_s=10.0)


def test_thinning_bounds_the_nominal_demand() -> None:
    trace = read_trace(TRACES / "synthetic_steady.csv.gz")
    thin = scaled(trace, speed=10.0, from_s=0.0, length_s=900.0, active_max=4, seed=3)
    assert 2 <= demand(thin).peak <= 5  # lengths are rounded to whole seconds
    assert len(thin.session_ids) < len(trace.session_ids) / 3
    fewer = scaled(trace, keep=0.1, seed=1)
    assert 0.05 < len(fewer.session_ids) / len(trace.session_ids) < 0.2


def test_the_simulated_player() -> None:
    period = PeriodSeen(start_s=10.0, wanted=4, first_of_session=True)
    # It may start at 10 + 2.5 x 0.4 = 11.0; chunk 2 comes 0.3 s after it was due, chunk 3 again in time.
    period.arrivals_s = [10.2, 10.7, 12.3, 12.4]
    period.versions = [1, 1, 2, 2]
    shown, stalls = period.play(CLOCK)
    assert shown == pytest.approx([11.0, 11.5, 12.3, 12.8]) and stalls == pytest.approx([0, 0, 0.3, 0])
    assert period.on_time(CLOCK) == 3
    period.steered_s, period.steered_version = 11.0, 2
    assert period.input_to_visible_s(CLOCK) == pytest.approx(1.3)
    period.steered_version = 9
    assert period.input_to_visible_s(CLOCK) is None, "the period ended before"


def test_figures_count_what_was_wanted_not_only_what_came() -> None:
    good = PeriodSeen(0.0, 4, True, arrivals_s=[0.2, 0.6, 1.1, 1.6], latencies_ms=[90.0] * 4, versions=[1] * 4)
    nothing = PeriodSeen(0.0, 6, True)
    seen = [ViewerSeen("a", [good]), ViewerSeen("b", [nothing], failure="overloaded: full")]
    found = figures(seen, CLOCK, 12.3456, 9.0, Counter(place=1))
    assert (found["chunks_wanted"], found["chunks_delivered"], found["on_time_share"]) == (10, 4, 0.4)
    assert found["failed_sessions"] == {"overloaded: full": 1} and found["continuous_play_ratio"] == 1.0
    assert found["sessions_without_stall_share"] == 1.0 and found["worker_seconds"] == 12.35
    assert found["time_to_first_chunk_s"]["p50"] == 0.2 and found["inter_chunk_gap_s"]["count"] == 3
    json.dumps(found, allow_nan=False)
    made = rows(seen, CLOCK, seen, "2 sessions")
    assert {one.case for one in made} == {"time_to_first_chunk", "chunk_latency", "inter_chunk_gap"}
    assert next(one for one in made if one.case == "chunk_latency").of_floor == 1.0
    assert spread([]) == {"count": 0}


def test_the_prediction_is_the_simulators() -> None:
    trace = scaled(read_trace(TRACES / "synthetic_steady.csv.gz"), speed=4.0, length_s=600.0, active_max=4)
    found = predicted(trace, load_profile("k4"), workers=1, workers_max=1, initial=1, batching="pass")
    assert 0.9 < found["on_time_share"] <= 1.0 and found["worker_seconds"] > 100


def test_a_small_load_on_a_real_server(real_server: RunningServer, tmp_path: Path) -> None:
    path, out = tmp_path / "load.csv", tmp_path / "rows.json"
    path.write_text(
        "time_s,session_id,event,chunks\n0.0,a,arrive,\n0.0,a,active,2\n0.5,b,arrive,\n0.5,b,active,3\n"
        "2.0,a,idle,\n3.5,b,depart,\n4.0,a,active,1\n5.0,a,depart,\n"
    )
    result = CliRunner().invoke(
        main,
        ["bench", "serve", "--trace", str(path), "--url", real_server.url, "--steer-share", "1", "--out", str(out)],
    )
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    seen = found["figures"]
    assert (seen["sessions"], seen["chunks_wanted"], seen["chunks_delivered"]) == (2, 18, 18), seen
    assert seen["failed_sessions"] == {} and seen["worker_seconds"] > 3 and seen["decisions"].get("place", 0) >= 2
    assert seen["input_to_visible_s"]["count"] >= 1
    assert {one["case"] for one in found["rows"]} >= {"time_to_first_chunk", "chunk_latency", "inter_chunk_gap"}
    assert all(one["checked"] and one["floor_ms"] > 0 for one in found["rows"])
