"""`turboserve compare` on tiny synthetic windows: rows, resuming, averages, knobs, page."""

import hashlib
import json
from importlib import resources

import pytest
from click.testing import CliRunner

from turboserve.cli import main as root
from turboserve.cli.compare import command
from turboserve.errors import ConfigError
from turboserve.sim import studies
from turboserve.sim.averages import average, paired
from turboserve.sim.cases import Case, group_of, parse_policy
from turboserve.sim.grid import gives_service, run_case
from turboserve.sim.grid_rows import read_rows
from turboserve.sim.trace import write_trace
from turboserve.sim.workload import Workload, generate


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    paths = []
    for name, seed in (("one_a", 1), ("two_b", 2)):
        path = folder / f"{name}.csv.gz"
        write_trace(generate(Workload(kind="modulated", horizon_s=900, mean_active=6, seed=seed)), path)
        paths.append(str(path))
    return paths


def run(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments], standalone_mode=False, catch_exceptions=False)


def trace_flags(traces):
    return [part for path in traces for part in ("--trace", path)]


@pytest.mark.timeout(300)
def test_a_service_study_from_end_to_end(traces, tmp_path):
    flags = [*trace_flags(traces), "--policy", "static-least", "--policy", "hpa:target=0.6", "--audit", "--jobs", "1"]
    first = run(*flags, "--seeds", "2", "--out", tmp_path, "--json")
    summary = json.loads(first.stdout)
    assert first.return_value == 0 and summary["runs"] == 8 and summary["violations"] == 0
    assert summary["audited_runs"] == 8
    found = summary["studies"]["k4 D=30"]["service"]
    assert found["static-least"]["runs_at_equal_service"] == 4
    assert found["hpa:target=0.6"]["over_clairvoyant"]["groups"] == 2
    # The same grid again runs nothing; another study joins the same page.
    before = (tmp_path / "rows.jsonl").read_text()
    run(*flags, "--seeds", "2", "--out", tmp_path)
    assert (tmp_path / "rows.jsonl").read_text() == before
    run(
        *trace_flags(traces),
        "--policy",
        "static-least",
        "--policy",
        "slack",
        "--study",
        "latency",
        "--out",
        tmp_path,
        "--jobs",
        "1",
    )
    page = (tmp_path / "report.html").read_text()
    for words in ("Cost at equal service", "Latency at equal fleets: 1.3x", "hpa:target=0.6", "<svg", "8 of 20 runs"):
        assert words in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert len(read_rows(tmp_path / "rows.jsonl")) == 8 + 12


@pytest.mark.timeout(300)
def test_tuning_keeps_the_cheapest_setting_that_serves(traces, tmp_path):
    summary = json.loads(
        run(
            *trace_flags(traces), "--study", "tune", "--policy", "hpa", "--out", tmp_path, "--jobs", "2", "--json"
        ).stdout
    )
    chosen = summary["tuned"]["k4"]["30"]["hpa"]["target"]
    rows = [row for row in read_rows(tmp_path / "rows.jsonl") if row["equal_service"]]
    served = {row["knobs"]["target"] for row in rows}
    assert chosen in served
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    assert studies.with_knobs("hpa", tuned, "k4", 30.0) == f"hpa:target={chosen:g}"
    assert studies.with_knobs("hpa:target=0.3", tuned, "k4", 30.0) == "hpa:target=0.3"
    assert studies.with_knobs("kpa", tuned, "k4", 30.0) == "kpa"


def test_the_least_fleet_serves_and_one_less_does_not(traces):
    row = run_case(Case(trace=traces[0], policy="static-least", fleet="least"))
    assert row["equal_service"] and row["least_found"]
    less = run_case(Case(trace=traces[0], policy="static-least", fleet=str(row["fixed_workers"] - 1)))
    assert not gives_service(less)


def test_another_seeds_least_fleet_is_only_where_the_search_begins(traces):
    run_case(Case(trace=traces[0], policy="static-least", fleet="least"))
    row = run_case(Case(trace=traces[0], policy="static-least", fleet="least", seed=1))
    less = run_case(Case(trace=traces[0], policy="static-least", fleet=str(row["fixed_workers"] - 1), seed=1))
    assert row["equal_service"] and row["least_found"] and not gives_service(less)


def a_row(policy, delay_s, **more):
    row = {
        "trace": "one_a",
        "group": "one",
        "profile": "k4",
        "seed": 1,
        "unit_workers": 1,
        "knobs": {},
        "fleet": "scale",
    }
    row |= {"policy": policy, "provision_s": delay_s, "reference_worker_hours": 1.0 + delay_s / 100}
    row |= {"fixed_workers": None, "worker_hours": 2.0, "on_time_share": 1.0, "reduced_step_share": 0.0}
    return row | {"equal_service": True} | more


def test_a_least_fleet_stands_at_every_delay_with_that_delays_reference():
    least = a_row("static-least", 30.0, fleet="least", fixed_workers=5, worker_hours=5.0)
    peak = a_row("static-least", 30.0, fleet="peak*1.0", fixed_workers=4)
    found = studies.at_every_delay([a_row("turboserve", 30.0), a_row("turboserve", 120.0), least, peak])
    added = [row for row in found if row["policy"] == "static-least" and row["provision_s"] == 120.0]
    assert [(row["fleet"], row["reference_worker_hours"], row["worker_hours"]) for row in added] == [
        ("least", 2.2, 5.0)
    ]
    assert studies.at_every_delay(found) == found


def test_ablations_stand_beside_the_whole_on_the_same_runs():
    rows = [
        a_row("turboserve", 30.0),
        a_row("turboserve", 30.0, seed=2, worker_hours=9.0),  # no part was turned off there
        a_row("turboserve", 30.0, knobs={"migrate": 0.0}, worker_hours=3.0, equal_service=False, on_time_share=0.9),
        a_row("published", 30.0, worker_hours=1.0),
        a_row("hpa", 30.0, knobs={"target": 0.7}),
    ]
    found = {one["off"]: one for one in studies.ablations(rows)}
    assert set(found) == {"migrate", "published"}
    assert found["migrate"]["cost"]["mean"] == 1.5 and found["migrate"]["least_on_time"] == 0.9
    assert (found["migrate"]["runs"], found["migrate"]["runs_at_equal_service"]) == (1, 0)
    assert [studies.part_off(row) for row in rows] == [False, False, True, False, False]


def test_rows_are_equal_for_equal_cases(traces):
    case = Case(trace=traces[0], policy="llumnix", seed=3, curve=True)
    first, second = run_case(case), run_case(case)
    assert first == second
    assert first["service_quantiles_s"][-1] == first["service_s"]["max"]
    assert len(first["curve"]["billed"]) == len(first["curve"]["time_s"])


def test_a_cut_row_is_left_out(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"key": "a"}\n{"key": "b", "wor')
    assert read_rows(tmp_path / "rows.jsonl") == [{"key": "a"}]


def test_averages_count_a_source_once():
    rows = [("one", "a", 1.0), ("one", "b", 3.0), ("two", "c", 10.0), ("two", "c", 12.0)]
    found = average(rows)
    assert found["mean"] == pytest.approx((2 + 11) / 2)
    assert found["groups"] == 2 and found["traces"] == 3 and found["values"] == 4
    assert 1.0 <= found["low"] <= found["mean"] <= found["high"] <= 12.0
    assert average([])["mean"] is None
    narrow = average([("one", "a", 5.0), ("two", "b", 5.0)])
    assert (narrow["low"], narrow["high"]) == (5.0, 5.0)


def test_savings_are_paired_by_trace_and_seed():
    def row(trace, seed, hours):
        return {
            "group": "g", "trace": trace, "profile": "k4", "provision_s": 30.0, "seed": seed, "worker_hours": hours,
        }  # fmt: skip

    mine, base = [row("a", 1, 5.0), row("a", 2, 6.0), row("b", 1, 1.0)], [row("a", 1, 10.0), row("a", 2, 8.0)]
    assert [value for *_, value in paired(mine, base, "worker_hours")] == [0.5, 0.25]


def test_specs_and_wrong_options():
    assert parse_policy("llumnix:up=0.8,down=0.6") == ("llumnix", {"up": 0.8, "down": 0.6})
    assert group_of("mooncake_chat_q25") == "mooncake"
    with pytest.raises(ConfigError, match="policy 'hpa:target'"):
        parse_policy("hpa:target")
    with pytest.raises(ConfigError, match="no trace"):
        run("--trace", "nowhere.csv.gz", "--out", "x")


def asked(*arguments):
    """Through the root, as a user would: exit codes and errors on stderr."""
    return CliRunner().invoke(root.main, ["compare", *(str(a) for a in arguments)])


def a_window(path, seed, horizon_s=900):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_trace(generate(Workload(kind="modulated", horizon_s=horizon_s, mean_active=4, seed=seed)), path)
    return path


def hours(out):
    return {row["policy"]: row["worker_hours"] for row in read_rows(out / "rows.jsonl")}


def test_rows_of_another_file_of_the_same_name_are_made_again(tmp_path):
    first, other = a_window(tmp_path / "a" / "t1.csv.gz", 1), a_window(tmp_path / "b" / "t1.csv.gz", 2)
    flags = ["--policy", "hpa", "--jobs", "1", "--json"]
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    asked("--trace", first, "--policy", "kpa", *flags, "--out", out)
    before = hours(out)
    said = asked("--trace", other, *flags, "--out", out)
    expected = asked("--trace", other, *flags, "--out", fresh)
    assert said.exit_code == 0 and json.loads(said.stdout) == json.loads(expected.stdout)
    # The old row counts no more, nor does the other policy's row of the old file.
    assert hours(out) == hours(fresh) and hours(out)["hpa"] != before["hpa"] and "kpa" in before
    row = read_rows(out / "rows.jsonl")[0]
    assert row["trace_sha256"] == hashlib.sha256(other.read_bytes()).hexdigest()[:16]
    shipped = resources.files("turboserve.sim") / "profiles" / "k4.json"
    assert row["profile_sha256"] == hashlib.sha256(shipped.read_bytes()).hexdigest()[:16]
    assert json.loads(row["key"])["trace"] == "t1" and "sha" not in row["key"]
    # The file is written again in its place, within one process.
    other.write_bytes(first.read_bytes())
    asked("--trace", other, *flags, "--out", out)
    assert hours(out)["hpa"] == before["hpa"]


def test_rows_without_digests_and_of_other_profiles_are_made_again(tmp_path):
    trace, profile, out = a_window(tmp_path / "t1.csv.gz", 1), tmp_path / "mine.json", tmp_path / "out"
    shipped = json.loads((resources.files("turboserve.sim") / "profiles" / "k4.json").read_text())
    profile.write_text(json.dumps(shipped | {"name": "mine"}))
    flags = ["--trace", trace, "--profile", profile, "--policy", "hpa", "--jobs", "1", "--out", out]
    asked(*flags)
    (row,) = read_rows(out / "rows.jsonl")
    undated = {k: v for k, v in row.items() if not k.endswith("sha256")} | {"worker_hours": 99.0}
    (out / "rows.jsonl").write_text(json.dumps(undated) + "\n")
    asked(*flags)
    assert read_rows(out / "rows.jsonl") == [row]
    profile.write_text(json.dumps(shipped | {"name": "mine", "price_per_worker_hour": 7.0}))
    asked(*flags)
    (again,) = read_rows(out / "rows.jsonl")
    assert again["cost"] == pytest.approx(7.0 * again["worker_hours"])
    assert again["profile_sha256"] != row["profile_sha256"]


def test_two_files_of_one_name_are_refused_in_one_call(tmp_path):
    first, other = a_window(tmp_path / "a" / "t1.csv.gz", 1), a_window(tmp_path / "b" / "t1.csv.gz", 2)
    result = asked("--trace", first, "--trace", other, "--policy", "hpa", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"two different traces are called t1: {first} and {other}" in result.stderr
    shipped = json.loads((resources.files("turboserve.sim") / "profiles" / "k4.json").read_text())
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(shipped | {"price_per_worker_hour": 7.0}))
    result = asked("--trace", first, "--profile", "k4", "--profile", mine, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "two different profiles are called k4" in result.stderr
    (tmp_path / "c").mkdir()
    same = tmp_path / "c" / "t1.csv.gz"
    same.write_bytes(first.read_bytes())
    result = asked("--trace", first, "--trace", same, "--policy", "hpa", "--jobs", "1", "--out", tmp_path / "out")
    assert result.exit_code == 0 and len(read_rows(tmp_path / "out" / "rows.jsonl")) == 1


def test_a_new_row_does_not_stand_on_a_cut_line(tmp_path):
    trace, out = a_window(tmp_path / "t1.csv.gz", 1), tmp_path / "out"
    out.mkdir()
    (out / "rows.jsonl").write_text('{"key": "b", "wor')
    asked("--trace", trace, "--policy", "hpa", "--jobs", "1", "--out", out)
    assert [row["policy"] for row in read_rows(out / "rows.jsonl")] == ["hpa"]


def test_runs_with_and_without_a_steps_floor_stand_apart(tmp_path):
    trace, out = a_window(tmp_path / "t1.csv.gz", 1), tmp_path / "out"
    flags = ["--trace", trace, "--policy", "turboserve", "--policy", "hpa", "--jobs", "1", "--json", "--out", out]
    alone = json.loads(asked(*flags).stdout)["studies"]["k4 D=30"]["service"]
    assert set(alone) == {"turboserve", "hpa"}  # nothing to tell apart yet
    both = json.loads(asked(*flags, "--steps-floor", "2").stdout)
    found = both["studies"]["k4 D=30"]["service"]
    assert {name: one["runs"] for name, one in found.items()} == {
        "turboserve": 1,
        "turboserve, full steps": 1,
        "hpa": 1,
    }
    assert found["turboserve, full steps"] == alone["turboserve"]
    floor = next(row for row in read_rows(out / "rows.jsonl") if row["steps_floor"] == 2)
    assert both["by_trace"][0]["turboserve"] in (None, floor["worker_hours"])
    assert both["by_trace"][0]["best_baseline"] in (None, "hpa")
    assert "turboserve, full steps" in (out / "report.html").read_text()


def test_the_usual_steps_depend_on_the_study():
    def names(*rows):
        return [studies.label(row) for row in studies.told_apart(list(rows))]

    free, floor = {"steps_floor": None}, {"steps_floor": 2}
    cost = [a_row("turboserve", 30.0, **one) for one in (free, floor, {"steps_floor": 3})]
    assert names(*cost) == ["turboserve, full steps", "turboserve", "turboserve, down to 3 steps"]
    equal = [a_row("turboserve", 30.0, fleet="peak*1.0", **one) for one in (free, floor)]
    assert names(*equal) == ["turboserve", "turboserve, down to 2 steps"]
    # One of each, as the committed rows have it, needs no note.
    assert names(cost[1], equal[0]) == ["turboserve", "turboserve"]
    # A part turned off is held beside the whole policy with the same steps.
    rows = [one | {"worker_hours": 2.0 if one["steps_floor"] else 4.0} for one in cost[:2]]
    rows += [one | {"knobs": {"migrate": 0.0}, "worker_hours": 6.0} for one in rows]
    found = {one["off"]: one["cost"]["mean"] for one in studies.ablations(studies.told_apart(rows))}
    assert found == {"migrate": 3.0, "migrate, full steps": 1.5}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--provision-s nan", "--provision-s nan"),
        ("--provision-s inf", "--provision-s inf"),
        ("--warmup-s nan", "--warmup-s nan"),
        ("--policy clairvoyant", "the clairvoyant is no policy to compare: every row is measured against it"),
        ("--policy hpb", "no policy 'hpb'"),
        ("--policy hpa:target=0", "hpa: knob target=0"),
        ("--policy lcp:provision_s=3", "lcp has no knob provision_s"),
        ("--tuned HERE/words", "--tuned HERE/words cannot be read"),
        ("--tuned HERE/list", "--tuned HERE/list holds something else"),
        ("--tuned HERE/text", "--tuned HERE/text holds knobs that are no numbers"),
        ("--out HERE/words/below", "--out HERE/words/below cannot be made"),
    ],
)
def test_what_cannot_be_compared_is_a_usage_error(traces, tmp_path, flags, said):
    (tmp_path / "words").write_text("no JSON")
    (tmp_path / "list").write_text("[1]")
    (tmp_path / "text").write_text('{"k4": {"30": {"hpa": {"target": "high"}}}}')
    flags = flags.replace("HERE", str(tmp_path)).split()
    result = asked("--trace", traces[0], "--policy", "hpa", "--jobs", "1", "--out", tmp_path / "out", *flags)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {said.replace('HERE', str(tmp_path))}") and "expected:" in result.stderr
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_the_clairvoyant_is_not_offered(tmp_path, traces):
    result = asked("--trace", traces[0], "--policy", "hpb", "--out", tmp_path)
    assert "turboserve" in result.stderr and "clairvoyant" not in result.stderr


def test_a_trace_that_ends_within_the_warm_up_needs_a_shorter_one(tmp_path):
    trace, out = a_window(tmp_path / "t1.csv.gz", 1, horizon_s=300), tmp_path / "out"
    flags = ["--trace", trace, "--policy", "hpa", "--jobs", "1", "--out", out]
    result = asked(*flags)
    assert result.exit_code == 2 and "warm-up of 600 s" in result.stderr and "--warmup-s" in result.stderr
    assert asked(*flags, "--warmup-s", "60").exit_code == 0
    (row,) = read_rows(out / "rows.jsonl")
    assert row["chunks"] > 0 and row["reference_worker_hours"] > 0 and json.loads(row["key"])["warmup_s"] == 60.0
    # Figures of two warm-ups cover different times; they do not stand on one page.
    result = asked("--trace", a_window(tmp_path / "t2.csv.gz", 2), "--policy", "hpa", "--out", out)
    assert result.exit_code == 2 and "holds runs with a warm-up of 60 s" in result.stderr
    empty = tmp_path / "empty.csv"
    empty.write_text("time_s,session_id,event,chunks\n")
    result = asked("--trace", empty, "--policy", "hpa", "--out", tmp_path / "other")
    assert result.exit_code in (1, 2) and result.stderr.startswith("error: ")
