"""`turboserve compare` on tiny synthetic windows: rows, resuming, averages, knobs, page."""

import json

import pytest
from click.testing import CliRunner

from turboserve.cli.compare import command
from turboserve.errors import ConfigError
from turboserve.sim import studies
from turboserve.sim.averages import average, paired
from turboserve.sim.grid import Case, gives_service, group_of, parse_policy, read_rows, run_case
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
