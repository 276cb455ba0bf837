"""`turboserve trace`: each subcommand through the command line, on synthetic windows."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from turboserve.cli.trace import command
from turboserve.errors import ConfigError, TraceError
from turboserve.sim.trace import read_trace
from turboserve.sim.trace_convert import from_events, to_events
from turboserve.sim.workload import Workload, generate


def run(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments], standalone_mode=False, catch_exceptions=False)


@pytest.fixture
def trace_path(tmp_path):
    path = tmp_path / "small.csv.gz"
    run("synth", path, "--kind", "flash", "--horizon-s", "900", "--mean-active", "8", "--seed", "3")
    return path


def test_synth_is_repeatable(trace_path, tmp_path):
    run(
        "synth", tmp_path / "again.csv.gz", "--kind", "flash", "--horizon-s", "900", "--mean-active", "8", "--seed", "3"
    )
    assert (tmp_path / "again.csv.gz").read_bytes() == trace_path.read_bytes()


def test_synth_writes_a_family(tmp_path, trace_path):
    made = run("synth", tmp_path / "f.csv.gz", "--kind", "family", "--horizon-s", "300", "--json")
    written = json.loads(made.stdout)["written"]
    assert len(written) == 10 and written[0].endswith("f-02.csv.gz") and written[9].endswith("f-20.csv.gz")
    made = run("synth", tmp_path / "g.csv.gz", "--kind", "family", "--base", trace_path, "--json")
    assert read_trace(json.loads(made.stdout)["written"][4]).horizon_us <= 900_000_000


def test_stats_as_json_and_as_a_table(trace_path):
    found = json.loads(run("stats", trace_path, "--json").stdout)["traces"][0]
    assert found["trace"] == "small" and found["peak_active"] >= found["mean_active"] > 0
    assert "small" in run("stats", trace_path).stderr


def test_convert_there_and_back(trace_path, tmp_path):
    run("convert", trace_path, tmp_path / "e.json")
    document = json.loads((tmp_path / "e.json").read_text())
    assert {event["event_type"] for event in document["events"]} == {
        *("session_arrival", "user_active", "user_idle", "session_departure")
    }
    assert [event["sequence"] for event in document["events"]] == list(range(len(document["events"])))
    run("convert", tmp_path / "e.json", tmp_path / "back.csv.gz")
    a, b = read_trace(trace_path), read_trace(tmp_path / "back.csv.gz")
    for name in ("time_us", "session", "event", "chunks"):
        assert np.array_equal(getattr(a, name), getattr(b, name))


def test_convert_without_chunk_counts_takes_them_from_the_times():
    trace = generate(Workload(horizon_s=400, mean_active=5, seed=1))
    document = to_events(trace)
    for event in document["events"]:
        event["payload"].pop("chunks", None)
    back = from_events(document, "bare")
    cut = back.time_us[-1]
    # Only a period that the window's end cuts can ask for another count.
    assert np.all((back.chunks == trace.chunks) | (trace.time_us + trace.chunks * 1_000_000 > cut))


ARRIVAL = {"time_s": 0, "event_type": "session_arrival", "session_id": "a"}


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (None, "no list of events"),
        ([{"time_s": 0}], "event 0 lacks event_type, session_id"),
        ([ARRIVAL | {"event_type": "dance"}], "event 0 has type 'dance'"),
        ([ARRIVAL | {"time_s": "soon"}], "event 0 has time_s 'soon'"),
        ([ARRIVAL, ARRIVAL], "event 1: session a arrives twice"),
        ([ARRIVAL, ARRIVAL | {"time_s": 1, "event_type": "user_active"}], "event 1: session a is active already"),
        ([ARRIVAL | {"event_type": "user_idle"}], "event 0: user_idle of session a, which is not open"),
        ([ARRIVAL | {"payload": {"chunks": 0}}], "event 0: payload.chunks is 0"),
        ([ARRIVAL | {"payload": {"chunks": 10**30}}], "event 0: payload.chunks is 1000"),
        ([ARRIVAL | {"payload": ["chunks"]}], r"event 0 has payload \['chunks'\].*an object"),
        ([ARRIVAL | {"payload": {"tenant": "a,b"}}], "event 0: payload.tenant is 'a,b'"),
        ([ARRIVAL | {"sequence": "first"}], "event 0 has sequence 'first'"),
        ([ARRIVAL | {"sequence": float("nan")}], "event 0 has sequence nan"),
        ([ARRIVAL | {"sequence": 10**400}], "event 0 has sequence 1000"),
        ([ARRIVAL | {"time_s": float("nan")}], "event 0 has time_s nan.*seconds from 0"),
        ([ARRIVAL | {"time_s": float("inf")}], "event 0 has time_s inf.*shift the times"),
        ([ARRIVAL | {"time_s": 10**400}], "event 0 has time_s 1000"),
        ([ARRIVAL | {"time_s": True}], "event 0 has time_s True"),
        ([ARRIVAL | {"event_type": ["x"]}], r"event 0 has type \['x'\]"),
        ([ARRIVAL | {"session_id": "a,b"}], "event 0 has session_id 'a,b'.*printable"),
        ([ARRIVAL | {"session_id": "a\nb"}], "event 0 has session_id"),
        ([ARRIVAL | {"session_id": None}], "event 0 has session_id None"),
    ],
)
def test_broken_events_are_named(events, words):
    with pytest.raises(TraceError, match=words):
        from_events({"events": events}, "broken")


def test_a_session_may_arrive_idle_and_stay_open():
    back = from_events(
        {
            "events": [
                ARRIVAL | {"payload": {"active": False}},
                {"time_s": 2.5, "event_type": "user_active", "session_id": "a"},
                {"time_s": 5.0, "event_type": "session_arrival", "session_id": "b"},
            ]
        },
        "open",
    )
    assert back.event.tolist() == [0, 1, 0, 1, 3, 3] and back.chunks.tolist() == [0, 3, 0, 1, 0, 0]


def test_plot_draws_a_picture(trace_path, tmp_path):
    pytest.importorskip("matplotlib")
    run("plot", trace_path, "-o", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot draw into"):
        run("plot", trace_path, "-o", tmp_path / "p.bmp")


def test_wrong_options_are_named(trace_path, tmp_path):
    with pytest.raises(ConfigError, match="no conversion"):
        run("convert", trace_path, tmp_path / "b.csv.gz")
    with pytest.raises(ConfigError, match="--base without"):
        run("synth", tmp_path / "x.csv.gz", "--base", trace_path)
    with pytest.raises(ConfigError, match="no arrival curve"):
        run("synth", tmp_path / "x.csv.gz", "--kind", "lunar")
    with pytest.raises(ConfigError, match="tenant-loads"):
        run("synth", tmp_path / "x.csv.gz", "--tenant-loads", "1,many")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--kind", "bogus"), "no arrival curve 'bogus'; expected steady .* family"),
        (("--tenant-loads", "1,nan"), "tenant loads 1,nan; expected numbers above 0"),
        (("--tenant-loads", "inf"), "tenant loads inf"),
        (("--horizon-s", "inf"), "horizon_s is inf; expected a number above 0"),
        (("--horizon-s", "nan"), "horizon_s is nan"),
        (("--mean-active", "nan"), "mean_active is nan"),
        (("--swing", "inf"), "swing is inf; expected a number from 0 to"),
        (("--swing", "nan"), "swing is nan"),
        (("--tail", "inf"), "tail is inf"),
        (("--idle-s", "nan"), "idle_s_mean is nan"),
        (("--periods", "inf"), "periods_mean is inf"),
        (("--mean-active", "1e6", "--horizon-s", "1e6"), "1e.12 chunks would be drawn; expected at most"),
        (("--mean-active", "1e4", "--active-s", "0.1"), "active periods would be drawn"),
    ],
)
def test_what_cannot_be_drawn_is_named(flags, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        run("synth", tmp_path / "x.csv.gz", *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lines", ["", "0,a,arrive,\n9,a,depart,\n", "0,a,arrive,\n0,a,active,5\n"])
def test_a_base_without_active_periods_or_length_is_refused(lines, tmp_path):
    (tmp_path / "base.csv").write_text("time_s,session_id,event,chunks\n" + lines)
    with pytest.raises(TraceError, match=r"base has . sessions with an active period"):
        run("synth", tmp_path / "x.csv.gz", "--kind", "family", "--base", tmp_path / "base.csv")


def test_an_unwritable_target_is_named(trace_path, tmp_path):
    (tmp_path / "file").write_text("in the way")
    run("convert", trace_path, tmp_path / "e.json")
    for arguments in (
        ("synth", tmp_path / "file" / "x.csv.gz", "--horizon-s", "60"),
        ("convert", trace_path, tmp_path / "file" / "e.json"),
        ("convert", tmp_path / "e.json", tmp_path / "missing" / "t.csv.gz"),
    ):
        with pytest.raises(ConfigError, match=r"cannot write .*(file|missing)"):
            run(*arguments)


def test_a_picture_that_cannot_be_written_is_named(trace_path, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match=r"cannot write .*missing"):
        run("plot", trace_path, "-o", tmp_path / "missing" / "p.png")


def test_events_that_are_no_text_are_named(trace_path, tmp_path):
    for data, words in ((b"\xff\xfe{", "is not JSON"), (b"[" * 100_000, "nested too deeply|is not JSON")):
        (tmp_path / "e.json").write_bytes(data)
        with pytest.raises(TraceError, match=words):
            run("convert", tmp_path / "e.json", tmp_path / "t.csv.gz")
