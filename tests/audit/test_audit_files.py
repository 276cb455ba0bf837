"""The auditor's readers: broken files are named by file and line; settings are said; the figures are right."""

import gzip
import json

import pytest
from click.testing import CliRunner
from scripted_run import ScriptedRun

from turboserve.audit.audit import audit_run
from turboserve.cli.trace import command
from turboserve.errors import ConfigError, TraceError


def edit_gzip(path, change):
    text = gzip.decompress(path.read_bytes()).decode()
    path.write_bytes(gzip.compress(change(text).encode()))


def test_the_figures_of_the_scripted_run(tmp_path):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    found = audit_run(directory, trace, str(profile), {"warmup_s": 10.0})["recomputed"]
    # Released from 10 s on: s1's chunks 11..59 (the last one shed), s0's period at 20 s (3), s2 (5).
    assert (found["chunks"], found["delivered"], found["shed"]) == (49 + 3 + 5, 56, 1)
    assert found["on_time_share"] == pytest.approx(56 / 57)
    assert found["reduced_step_share"] == pytest.approx(1 / 56)
    assert found["batch_n_max"] == 1
    # w0 10..60, w1 10..55.5, w2 request at 5 but counted from 10, to 50.
    assert found["worker_hours"] * 3600 == pytest.approx(50 + 45.5 + 40)
    assert found["cost"] == pytest.approx(2 * found["worker_hours"])
    assert found["workers"] == {"mean": pytest.approx(135.5 / 50), "max": 3}
    assert (found["migrations"], found["suspends"], found["resumes"]) == (0, 0, 2)
    assert found["service_s"]["max"] == pytest.approx(0.4)


def test_balance_excess_by_hand(tmp_path):
    run = ScriptedRun()
    directory, trace, profile = run.write(tmp_path)
    found = audit_run(directory, trace, str(profile), {"warmup_s": 0.0})["recomputed"]["balance_excess"]
    # Both sessions share w0 of two workers until s0's period is over: one too many. From 20 s to the end of s0's
    # second period both are on w1: one too many again, but for the 75 ms of s0's resume. While s1 comes back after the
    # loss it is active and runs nowhere: one too few. Else the fullest worker has one session, as it must.
    first = run.chunk("s0", 3)["finish_s"]
    second = run.chunk("s0", 6)["finish_s"] - 20.0
    assert found == pytest.approx((first + second - 0.075 - 0.075) / 60.0, abs=1e-5)


def test_settings_come_from_the_report_and_flags_win(tmp_path):
    run = ScriptedRun()
    run.report = {"settings": {"provision_s": 40.0, "warmup_s": 10.0}}
    directory, trace, profile = run.write(tmp_path)
    answer = audit_run(directory, trace, str(profile), {})
    assert answer["settings"]["provision_s"] == 40.0 and "provision" in answer["violation_counts"]
    assert audit_run(directory, trace, str(profile), {"provision_s": 30.0})["violation_counts"] == {}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text.replace("worker", "wrker", 1), "lacks worker"),
        (lambda text: text.replace("s0,1,0,w0,", "s0,one,0,w0,", 1), "line 4: index is 'one'"),
        (lambda text: text.replace("s0,1,0,w0,", "s0,1,0,", 1), "line 4 has 9 fields"),
    ],
)
def test_broken_chunk_rows_are_named(spoil, words, tmp_path):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    edit_gzip(directory / "chunks.csv.gz", spoil)
    with pytest.raises(TraceError, match=words):
        audit_run(directory, trace, str(profile), {})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text.replace("time_s", "t", 1), "line 1"),
        (lambda text: text.replace("active,4", "active,four"), "line 3"),
        (lambda text: text.replace("s0,idle", "s7,idle"), "line 6"),
        (lambda text: text.replace("s1,arrive", "s0,arrive"), "line 4: session s0 arrives twice"),
        (lambda text: text.replace("s0,idle", "s0,rests"), "line 6: unknown event 'rests'"),
    ],
)
def test_broken_trace_lines_are_named(spoil, words, tmp_path):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    edit_gzip(trace, spoil)
    with pytest.raises(TraceError, match=words):
        audit_run(directory, trace, str(profile), {})


def test_a_reason_may_hold_a_comma(tmp_path):
    run = ScriptedRun()
    run.shed[0]["reason"] = 'no room, and "nobody" to ask'
    directory, trace, profile = run.write(tmp_path)
    assert audit_run(directory, trace, str(profile), {"warmup_s": 10.0})["violation_counts"] == {}


def test_broken_decisions_report_and_profile(tmp_path):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    good = (directory / "decisions.jsonl").read_text()
    for bad in ('{"event": "place"}', '{"time_s": 1, "event": "dance"}', "not json"):
        (directory / "decisions.jsonl").write_text(bad + "\n" + good)
        with pytest.raises(TraceError, match=r"decisions\.jsonl line 1"):
            audit_run(directory, trace, str(profile), {})
    (directory / "decisions.jsonl").write_text(good)
    with pytest.raises(TraceError, match="is missing"):
        audit_run(tmp_path, trace, str(profile), {})
    profile.write_text(json.dumps({"chunk_s": 1.0}))
    with pytest.raises(ConfigError, match="lacks chunk_target_s"):
        audit_run(directory, trace, str(profile), {})
    with pytest.raises(ConfigError, match="no profile 'k5'"):
        audit_run(directory, trace, "k5", {})
    with pytest.raises(TraceError, match="batching pass"):
        audit_run(directory, trace, str(ScriptedRun().write(tmp_path)[2]), {"batching": "pass"})


def test_command_prints_one_object_and_exits_by_what_it_found(tmp_path):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    arguments = ["audit", str(directory), "--trace", str(trace), "--profile", str(profile), "--warmup-s", "10"]
    clean = CliRunner().invoke(command, [*arguments, "--json"], standalone_mode=False)
    assert clean.return_value == 0 and json.loads(clean.stdout)["violations"] == []
    same_flags = [*arguments, "--policy", "hpa", "--seed", "3", "--knob", "target=0.6", "--lose-at", "55.5"]
    assert CliRunner().invoke(command, same_flags, standalone_mode=False).return_value == 0
    broken = CliRunner().invoke(command, [*arguments, "--provision-s", "60"], standalone_mode=False)
    assert broken.return_value == 1 and json.loads(broken.stdout)["violations"][0]["rule"] == "provision"
