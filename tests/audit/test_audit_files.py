"""The auditor's readers: broken files are named by file and line; settings are said; the figures are right."""

import gzip
import json

import pytest
from click.testing import CliRunner
from scripted_run import ScriptedRun

from turboserve.audit import run_files
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
        (lambda text: text.replace("s0,1,0,w0,", f"s0,{10**20},0,w0,", 1), "line 4: index is '1000"),
        (lambda text: text.replace("0.600000", "nan", 1), "line 2: finish_s is 'nan'"),
        (lambda text: text.replace("0.600000", "inf", 1), "line 2: finish_s is 'inf'.*within 50 days"),
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
        (lambda text: text.replace("4.000,s0,idle", "inf,s0,idle"), "line 6: time inf is not within"),
        (lambda text: text.replace("4.000,s0,idle", "nan,s0,idle"), "line 6: time nan is not within"),
        (lambda text: text.replace("4.000,s0,idle", "-4,s0,idle"), "line 6: time -4 is not within"),
        (lambda text: text.replace("active,4", "active,0"), "line 3: chunks 0 are not within 1 to"),
        (lambda text: text.replace("active,4", f"active,{10**12}"), "line 3: chunks 1000"),
        (lambda text: text.replace("4.000,s0,idle", "\n4.000,s0,idle"), "line 6: a blank line"),
        (lambda text: text.replace("s0,idle,", "s0"), "line 6: 2 fields"),
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


def test_a_trace_of_too_many_chunks_is_refused(tmp_path, monkeypatch):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    monkeypatch.setattr(run_files, "CHUNK_ROOM", 71)
    with pytest.raises(TraceError, match="asks for 72 chunks; expected at most 71"):
        audit_run(directory, trace, str(profile), {})


def test_a_cut_or_unpacked_file_is_named(tmp_path):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    for path in (directory / "chunks.csv.gz", trace):
        whole = path.read_bytes()
        for data, words in (
            (whole[: len(whole) // 2], f"{path.name} is truncated"),
            (gzip.decompress(whole), f"{path.name} is not gzip"),
            (whole[:40] + b"\xff" * 20 + whole[60:], f"{path.name} (is damaged|is not gzip, or is damaged)"),
            (gzip.compress(b"\xff\xfe"), f"{path.name} is damaged"),
        ):
            path.write_bytes(data)
            with pytest.raises(TraceError, match=words):
                audit_run(directory, trace, str(profile), {})
        path.write_bytes(whole)
    assert audit_run(directory, trace, str(profile), {"warmup_s": 10.0})["violation_counts"] == {}


def test_a_cut_file_is_no_interruption(tmp_path):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    trace.write_bytes(trace.read_bytes()[:-12])
    main = pytest.importorskip("turboserve.cli.main").main
    said = CliRunner().invoke(
        main, ["trace", "audit", str(directory), "--trace", str(trace), "--profile", str(profile)]
    )
    assert said.exit_code == 1 and "truncated" in said.stderr and "interrupted" not in said.stderr


def test_the_trace_may_be_plain_or_marked_and_end_in_blank_lines(tmp_path):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    text = gzip.decompress(trace.read_bytes())
    for name, data in (
        ("plain.csv", text + b"\n\n"),
        ("packed.csv", gzip.compress(text)),
        ("marked.csv", b"\xef\xbb\xbf" + text.replace(b",s0,", b',"s0",')),
    ):
        (tmp_path / name).write_bytes(data)
        answer = audit_run(directory, tmp_path / name, str(profile), {"warmup_s": 10.0})
        assert answer["violation_counts"] == {}


@pytest.mark.parametrize("value", ["null", "Infinity", "NaN", "1e400", '"5"', "true"])
def test_the_end_of_a_transfer_is_a_number_or_left_out(value, tmp_path):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    path = directory / "decisions.jsonl"
    path.write_text(path.read_text().replace('"end_s": 5.075', f'"end_s": {value}'))
    if value == "null":
        assert "transfer_time" in audit_run(directory, trace, str(profile), {"warmup_s": 10.0})["violation_counts"]
    else:
        with pytest.raises(TraceError, match=r"decisions\.jsonl line 8"):
            audit_run(directory, trace, str(profile), {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "report.json is no report"),
        ('{"settings": []}', "report.json is no report"),
        ('{"chunks": NaN}', "report.json is not JSON: NaN"),
        ("[" * 100_000, "report.json is not JSON"),
        ('{"settings": {"warmup_s": "soon"}}', "settings.warmup_s of report.json is 'soon'"),
        ('{"settings": {"pace": "fast"}}', "settings.pace of report.json is 'fast'; expected realtime"),
        ('{"settings": {"provision_s": null}}', "settings.provision_s of report.json is None"),
    ],
)
def test_a_broken_report_is_named(text, words, tmp_path):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    (directory / "report.json").write_text(text)
    with pytest.raises((TraceError, ConfigError), match=words):
        audit_run(directory, trace, str(profile), {})


def test_a_figure_beyond_any_number_differs(tmp_path):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    (directory / "report.json").write_text(f'{{"chunks": 1e400, "cost": {10**400}}}')
    assert audit_run(directory, trace, str(profile), {"warmup_s": 10.0})["violation_counts"] == {"report": 2}


def test_the_bound_on_the_fleet_comes_from_the_report(tmp_path):
    run = ScriptedRun()
    run.report = {"settings": {"workers_max": 2, "warmup_s": 10.0}}
    directory, trace, profile = run.write(tmp_path)
    answer = audit_run(directory, trace, str(profile), {})
    assert answer["settings"]["max_workers"] == 2 and answer["violation_counts"] == {"max_workers": 1}
    assert audit_run(directory, trace, str(profile), {"max_workers": 3})["violation_counts"] == {}


def test_a_flag_that_is_no_number_is_refused(tmp_path):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    with pytest.raises(ConfigError, match="--provision-s is nan"):
        audit_run(directory, trace, str(profile), {"provision_s": float("nan")})


def test_flags_of_the_run_that_no_rule_asks_about_are_taken(tmp_path):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    arguments = ["audit", str(directory), "--trace", str(trace), "--profile", str(profile), "--warmup-s", "10"]
    for more in (["--out", str(directory)], ["--html"], ["--no-html"]):
        assert CliRunner().invoke(command, [*arguments, *more], standalone_mode=False).return_value == 0


@pytest.mark.parametrize("key", ["chunk_s", "migrate_s", "batch_latency_s", "provision_s"])
def test_a_profile_with_words_for_numbers_is_named(key, tmp_path):
    directory, trace, profile = ScriptedRun().write(tmp_path)
    profile.write_text(json.dumps(json.loads(profile.read_text()) | {key: "much"}))
    with pytest.raises(ConfigError, match=key):
        audit_run(directory, trace, str(profile), {})
    profile.write_text("7")
    with pytest.raises(ConfigError, match="no JSON object"):
        audit_run(directory, trace, str(profile), {})
