"""The trace reader: what it takes, and what it says about a line that it does not take."""

import gzip

import pytest

from turboserve.errors import TraceError
from turboserve.sim import trace as trace_module
from turboserve.sim.batches import Batches
from turboserve.sim.trace import CHUNKS_MAX, TIME_MAX_S, read_trace, write_trace
from turboserve.sim.trace_convert import read_events, to_events
from turboserve.sim.trace_stats import stats

HEADER = "time_s,session_id,event,chunks\n"
GOOD = HEADER + "0,a,arrive,\n0,a,active,3\n3,a,depart,\n"


def refused(tmp_path, text, name="t.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    return caught.value


@pytest.mark.parametrize(
    ("lines", "message", "expected"),
    [
        ("0,a,arrive,\ninf,a,active,3\n", ":3: time 'inf'", "seconds from 0 to 2678400 (31 days)"),
        ("nan,a,arrive,\n", ":2: time 'nan'", "seconds from 0"),
        ("1e300,a,arrive,\n", ":2: time '1e300'", "seconds from 0"),
        ("soon,a,arrive,\n", ":2: time 'soon'", "seconds from 0"),
        ("-1,a,arrive,\n", ":2: negative time '-1'", "seconds from 0"),
        ("1,a,arrive,\n0.5,a,depart,\n", ":3: time goes back to 0.5", "events sorted by time"),
        ("0,a,arrive,\n0,a,active,99999999999999999999\n", ":3: chunks '99999999999999999999'", "from 1 to 2678400"),
        ("0,a,arrive,\n0,a,active,1000000000000\n", ":3: chunks '1000000000000'", "from 1 to 2678400"),
        ("0,a,arrive,\n0,a,active,many\n", ":3: chunks 'many'", "a whole number"),
        ("0,a,jump,\n", ":2: unknown event 'jump'", "arrive | active | idle | depart"),
        ("0,a,arrive,\n\n0,a,active,3\n", ":3: a blank line", "time_s,session_id,event,chunks[,tenant]"),
        ("0,a,arrive\n", ":2: 3 fields", "time_s,session_id,event,chunks[,tenant]"),
        ('0,"a,b",arrive,\n', ":2: session_id 'a,b'", "printable characters"),
        ('0,"a""b",arrive,\n', ":2: session_id 'a\"b'", "printable characters"),
        ('0,"a\nb",arrive,\n', ":3: session_id 'a\\nb'", "printable characters"),
        ("0,,arrive,\n", ":2: session_id ''", "1 to 200"),
        ("0,a\tb,arrive,\n", ":2: session_id 'a\\tb'", "printable characters"),
        (f"0,{'x' * 201},arrive,\n", ":2: session_id 'xxx", "1 to 200"),
        (f"0,{'x' * 200_000},arrive,\n", "field larger than field limit", "time_s"),
    ],
)
def test_a_bad_line_is_named_with_what_is_allowed(lines, message, expected, tmp_path):
    error = refused(tmp_path, HEADER + lines)
    assert message in error.message and expected in error.expected
    assert len(error.message) < len(str(tmp_path)) + 200


def test_a_tenant_may_not_break_the_file_either(tmp_path):
    text = 'time_s,session_id,event,chunks,tenant\n0,a,arrive,,"x,y"\n'
    assert "tenant 'x,y'" in refused(tmp_path, text).message


def test_epoch_times_are_refused_before_anything_is_sampled(tmp_path):
    error = refused(tmp_path, HEADER + "1700000000,a,arrive,\n1700000001,a,active,3\n")
    assert "shift the times to begin at 0" in error.hint


def test_the_longest_window_is_read_and_sampled(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text(HEADER + f"0,a,arrive,\n0,a,active,{CHUNKS_MAX}\n{TIME_MAX_S},a,depart,\n")
    assert stats(read_trace(path))["chunks"] == CHUNKS_MAX


def test_too_many_chunks_in_all_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_module, "CHUNKS_IN_ALL_MAX", 5)
    text = HEADER + "0,a,arrive,\n0,a,active,3\n0,b,arrive,\n0,b,active,3\n"
    assert "6 chunks in all" in refused(tmp_path, text).message


def test_a_simulation_without_memory_says_so():
    from turboserve.orchestrator.view import make_view
    from turboserve.sim.profile_files import load_profile

    profile = load_profile("k4")
    with pytest.raises(TraceError, match="no memory for the 1000000000000 chunks"):
        Batches(make_view((profile,)), profile, 10**12, closed=False, by_pass=False)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("blank_end.csv", GOOD.encode() + b"\n \n\n"),
        ("mark.csv", b"\xef\xbb\xbf" + GOOD.encode()),
        ("packed.csv", gzip.compress(GOOD.encode(), mtime=0)),
        ("packed_mark.csv.gz", gzip.compress(b"\xef\xbb\xbf" + GOOD.encode(), mtime=0)),
        ("windows.csv", GOOD.replace("\n", "\r\n").encode()),
        ("quoted.csv", GOOD.replace(",a,", ',"a",').encode()),
    ],
    ids=["blank end", "mark", "packed", "packed mark", "windows", "quoted"],
)
def test_harmless_differences_are_read(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    trace = read_trace(tmp_path / name)
    assert trace.session_ids == ("a",) and trace.chunks.tolist() == [0, 3, 0]
    write_trace(trace, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == HEADER + "0.000,a,arrive,\n0.000,a,active,3\n3.000,a,depart,\n"


def test_a_file_that_cannot_be_unpacked_says_why(tmp_path):
    packed = gzip.compress(GOOD.encode())
    assert "is not gzip" in refused(tmp_path, GOOD, "plain.csv.gz").message
    assert "truncated" in refused(tmp_path, packed[:-12], "cut.csv.gz").message
    assert "cannot read the trace" in refused(tmp_path, packed[:12] + b"\xff\xff" + packed[14:], "torn.csv.gz").message
    assert "cannot read the trace" in refused(tmp_path, b"\xff\xfe").message


def test_what_the_reader_takes_survives_the_json(tmp_path):
    import json

    (tmp_path / "t.csv").write_text(GOOD.replace(",a,", ",Zoë's 1st; 'x',"))
    trace = read_trace(tmp_path / "t.csv")
    (tmp_path / "t.json").write_text("\ufeff" + json.dumps(to_events(trace)), encoding="utf-8")
    assert read_events(tmp_path / "t.json").session_ids == trace.session_ids == ("Zoë's 1st; 'x'",)
