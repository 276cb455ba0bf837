"""One run spoiled in one way at a time; the auditor must name each rule. A check that cannot fail is no check."""

import pytest
from scripted_run import ScriptedRun

from turboserve.audit.audit import audit_run

FLAGS = {"warmup_s": 10.0, "initial_workers": 2}


def audit(run, tmp_path, **flags):
    directory, trace, profile = run.write(tmp_path)
    return audit_run(directory, trace, str(profile), FLAGS | flags)


def spoil(change):
    """Register a way to spoil the run under the rule it breaks: the function's name up to two underscores."""
    PLANTED.append(pytest.param(change, change.__name__.split("__")[0], id=change.__name__))
    return change


PLANTED: list = []


@spoil
def batch_latency__too_fast(run):
    run.chunk("s1", 20)["finish_s"] -= 0.01


@spoil
def batch_latency__shared_batch_as_fast_as_one(run):
    for session in ("s0", "s1"):
        run.chunk(session, 0)["finish_s"] = 0.4


@spoil
def batch_latency__reduced_steps_do_not_pay_for_this(run):
    run.chunk("s1", 30)["steps"] = 3


@spoil
def batch_latency__larger_than_the_table(run):
    run.chunk("s1", 20)["n"] = 5


@spoil
def batch_latency__nobody_in_it(run):
    run.chunk("s1", 20)["n"] = 0


@spoil
def batch_rows__fewer_than_n(run):
    run.chunk("s1", 20)["n"] = 2


@spoil
def batch_rows__more_than_n(run):
    first, second = run.chunk("s1", 20), run.chunk("s1", 21)
    second["batch"] = first["batch"]


@spoil
def batch_rows__another_start(run):
    run.chunk("s1", 0)["start_s"] = 0.001


@spoil
def batch_overlap__next_begins_early(run):
    later = run.chunk("s0", 5)
    other = run.chunk("s1", 21)
    assert other["worker"] == later["worker"]
    other["start_s"] = later["start_s"] + 0.1
    other["finish_s"] = other["start_s"] + 0.4


@spoil
def worker_lifetime__batch_before_ready(run):
    run.decision("worker_ready", worker="w2")["time_s"] = 40.1


@spoil
def worker_lifetime__batch_after_release(run):
    run.decision("worker_release", worker="w2")["time_s"] = 42.0


@spoil
def worker_lifetime__batch_after_loss(run):
    run.decision("worker_lost", worker="w1")["time_s"] = 54.0


@spoil
def worker_lifetime__never_requested(run):
    run.decisions.remove(run.decision("worker_request", worker="w2"))


@spoil
def worker_lifetime__never_ready(run):
    run.decisions.remove(run.decision("worker_ready", worker="w2"))


@spoil
def worker_lifetime__requested_twice(run):
    run.decisions.append(run.decision("worker_request", worker="w2") | {"time_s": 6.0})


@spoil
def provision__ready_too_soon(run):
    run.decision("worker_ready", worker="w2")["time_s"] = 34.9


@spoil
def provision__one_more_from_the_start(run):
    run.decision("worker_request", worker="w2")["time_s"] = 0.0
    run.decision("worker_ready", worker="w2")["time_s"] = 0.0


@spoil
def chunk_once__missing(run):
    run.chunks.remove(run.chunk("s1", 20))


@spoil
def chunk_once__last_missing(run):
    run.shed.clear()


@spoil
def chunk_once__twice(run):
    run.chunks.append(run.chunk("s1", 20) | {"start_s": 61.0, "finish_s": 61.4, "batch": 999})


@spoil
def chunk_once__delivered_and_shed(run):
    run.shed.append(run.shed[0] | {"index": 58})


@spoil
def chunk_once__unknown_session(run):
    run.chunks.append(run.chunk("s1", 20) | {"session_id": "s9", "start_s": 61.0, "finish_s": 61.4, "batch": 999})


@spoil
def chunk_once__beyond_what_was_asked(run):
    run.shed.append(run.shed[0] | {"index": 60})


@spoil
def period__wrong(run):
    run.chunk("s0", 4)["period"] = 0


@spoil
def chunk_order__swapped(run):
    first, second = run.chunk("s1", 20), run.chunk("s1", 21)
    first["index"], second["index"] = 21, 20


@spoil
def two_workers__at_once(run):
    run.chunk("s1", 21)["worker"] = "w0"
    run.chunk("s1", 21)["start_s"] = run.chunk("s1", 20)["start_s"] + 0.2
    run.chunk("s1", 21)["finish_s"] = run.chunk("s1", 20)["start_s"] + 0.6


@spoil
def release__started_early(run):
    chunk = run.chunk("s1", 40)
    chunk["start_s"], chunk["finish_s"] = chunk["release_s"] - 0.2, chunk["release_s"] + 0.2


@spoil
def release__said_to_be_earlier(run):
    run.chunk("s1", 40)["release_s"] -= 0.5


@spoil
def release__said_to_be_later(run):
    run.chunk("s1", 40)["release_s"] += 0.0001


@spoil
def worker_change__no_migrate(run):
    run.decisions.remove(run.decision("migrate"))


@spoil
def worker_change__no_suspend(run):
    run.decisions.remove(run.decision("suspend"))


@spoil
def worker_change__no_resume(run):
    run.decisions.remove(run.decision("resume", session="s0"))


@spoil
def worker_change__no_resume_after_loss(run):
    run.decisions.remove(run.decision("resume", session="s1"))


@spoil
def worker_change__migrate_from_elsewhere(run):
    run.decision("migrate")["source"] = "w2"


@spoil
def worker_change__migrate_to_elsewhere(run):
    run.decision("migrate")["worker"] = "w2"


@spoil
def worker_change__placed_again(run):
    line = run.decision("migrate")
    line["event"] = "place"
    del line["source"], line["end_s"]


@spoil
def worker_change__placed_after_suspend(run):
    line = run.decision("resume", session="s0")
    line["event"] = "place"
    del line["end_s"]


@spoil
def transfer_time__short_migrate(run):
    run.decision("migrate")["end_s"] -= 0.001


@spoil
def transfer_time__short_suspend(run):
    run.decision("suspend")["end_s"] -= 0.001


@spoil
def transfer_time__short_resume(run):
    run.decision("resume", session="s0")["end_s"] -= 0.001


@spoil
def transfer_time__migrate_without_an_end(run):
    del run.decision("migrate")["end_s"]


@spoil
def transfer_overlap__migrate_during_a_batch(run):
    batch = run.chunk("s1", 7)
    run.decision("migrate").update(time_s=batch["start_s"] - 0.01, end_s=batch["start_s"] + 0.02)


@spoil
def transfer_overlap__batch_not_finished_when_suspended(run):
    finish_s = run.chunk("s0", 3)["finish_s"]
    run.decision("suspend").update(time_s=finish_s - 0.05, end_s=finish_s + 0.025)


@spoil
def transfer_overlap__resume_before_the_suspend_has_ended(run):
    run.decision("resume", session="s0").update(time_s=5.05, end_s=5.125)


@spoil
def transfers_at_once__two_inbound(run):
    run.decision("migrate").update(time_s=20.05, end_s=20.08)


@spoil
def transfers_at_once__two_outbound(run):
    run.decision("suspend").update(time_s=6.52, end_s=6.595)


@spoil
def resident_max__two_where_one_fits(run):
    run.profile["resident_max"] = 1


@spoil
def held_at_release__departs_a_moment_later(run):
    run.decision("worker_release", worker="w2")["time_s"] = 44.9


@spoil
def held_at_release__idle_session(run):
    run.decisions[:] = [line for line in run.decisions if line.get("session") != "s0" or line["event"] == "place"]
    run.decisions.append({"time_s": 10.0, "event": "worker_release", "worker": "w0"})


@spoil
def steps_floor__one_step(run):
    run.chunk("s1", 30)["steps"] = 1


@spoil
def report__fewer_hours(run):
    run.report = {"worker_hours": 0.01}


@spoil
def report__better_share(run):
    run.report = {"on_time_share": 1.0}


@spoil
def report__lower_worst_case(run):
    run.report = {"service_s": {"max": 0.3}}


@spoil
def report__more_chunks(run):
    run.report = {"delivered": 1000}


def test_the_clean_run_breaks_no_rule(tmp_path):
    answer = audit(ScriptedRun(), tmp_path)
    assert answer["violations"] == [] and answer["violation_counts"] == {}


@pytest.mark.parametrize(("change", "rule"), PLANTED)
def test_planted_violation_is_found(change, rule, tmp_path):
    run = ScriptedRun()
    change(run)
    answer = audit(run, tmp_path)
    assert rule in answer["violation_counts"], answer["violation_counts"]
    assert any(violation["rule"] == rule and violation["message"] for violation in answer["violations"])


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ({"provision_s": 31.0}, "provision"),
        ({"steps_floor": 3}, "steps_floor"),
        ({"max_workers": 2}, "max_workers"),
        ({"initial_workers": 1}, "provision"),
        ({"workers": 1}, "provision"),
        ({"pace": "closed"}, "release"),
    ],
)
def test_the_flags_are_rules_too(flags, rule, tmp_path):
    assert rule in audit(ScriptedRun(), tmp_path, **flags)["violation_counts"]


def test_both_ends_of_a_transfer_hold_the_session(tmp_path):
    """resident_max 2; s0 and s1 fill w0, s1 leaves at 6.5 s: a newcomer at 6.51 s is one too many, at 6.53 s not."""
    for arrives_s, allowed in ((6.51, False), (6.53, True)):
        run = ScriptedRun()
        run.decision("suspend").update(time_s=9.0, end_s=9.075)
        place = run.decision("place", session="s2")
        place.update(time_s=arrives_s, worker="w0")
        found = audit(run, tmp_path / str(arrives_s))["violation_counts"]
        assert ("resident_max" not in found) == allowed


def test_a_hair_within_the_tolerance_is_allowed(tmp_path):
    run = ScriptedRun()
    run.chunk("s1", 20)["finish_s"] -= 1e-6
    run.decision("migrate")["end_s"] -= 1e-6
    assert audit(run, tmp_path)["violation_counts"] == {}


def test_a_thousand_violations_are_counted_and_twenty_shown(tmp_path):
    run = ScriptedRun()
    for row in run.chunks:
        row["steps"] = 1
    answer = audit(run, tmp_path)
    assert answer["violation_counts"]["steps_floor"] == len(run.chunks)
    assert sum(v["rule"] == "steps_floor" for v in answer["violations"]) == 20
