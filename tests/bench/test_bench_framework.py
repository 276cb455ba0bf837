"""The benchmark framework: its rows, its clockwork, its command."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from turboserve.bench import frame_parts as frame_parts_bench
from turboserve.bench import frame_ring as frame_ring_bench
from turboserve.bench import report, timing
from turboserve.cli import bench as cli_bench
from turboserve.cli.main import main

CONTRACT = {
    *("case", "shape", "dtype", "device", "versions", "commit", "median_ms", "p20_ms", "p80_ms", "floor_ms"),
    *("floor", "of_floor", "baseline", "baseline_ms", "speedup", "max_rel_err", "checked"),
}


def row(median_ms=2.0, **changes):
    settings = {
        "case": "a",
        "shape": "1x2",
        "dtype": "uint8",
        "device": "test",
        "versions": {},
        "timing": timing.Timing((1.0, median_ms, 9.0)),
        "floor": "nothing",
        "floor_ms": 1.0,
        "baseline": "other",
        "baseline_ms": 6.0,
        "max_rel_err": 0.0,
    }
    return report.make_row(**(settings | changes))


def test_a_row_has_the_contracts_fields_and_its_ratios():
    made = report.report([row()])["rows"][0]
    assert set(made) >= CONTRACT
    assert (made["median_ms"], made["of_floor"], made["speedup"], made["checked"]) == (2.0, 0.5, 3.0, True)
    assert made["p20_ms"] < made["median_ms"] < made["p80_ms"]


def test_a_figure_that_is_no_number_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        report.write_report([row(floor_ms=float("nan"))], tmp_path / "rows.json")


def test_the_commit_marks_changed_sources():
    assert report.commit().removesuffix("-dirty").isalnum() or report.commit().startswith("v")


def test_contenders_take_turns_and_the_order_rotates():
    calls: list[str] = []
    now_s = iter(range(1000))
    contenders = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = timing.alternate(contenders, rounds=3, warmup=1, clock=lambda: next(now_s))
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert times["a"].samples_ms == (1000.0,) * 3


def test_errors_are_relative_to_the_reference():
    reference = np.array([0.0, 4.0])
    assert timing.max_rel_err(np.array([1.0, 4.0]), reference) == 0.25
    assert timing.max_rel_err(np.array([255], np.uint8), np.array([0], np.uint8)) > 1e100  # no unsigned wrap
    with pytest.raises(ValueError, match="shape"):
        timing.max_rel_err(np.zeros(3), reference)


def test_frame_ring_bench_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(frame_ring_bench, "SHAPES", [(2, 8, 8)])
    out = tmp_path / "rows.json"
    result = CliRunner().invoke(main, ["bench", "frame-ring", "--rounds", "3", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    saved = json.loads(out.read_text())
    assert json.loads(result.stdout) == saved
    cases = {one["case"] for one in saved["rows"]}
    assert {"frame-ring/between-processes/Python twin", "frame-ring/push-pop/Python twin"} <= cases
    assert all(one["max_rel_err"] == 0.0 and one["checked"] for one in saved["rows"])
    assert "against" in result.stderr


def test_frame_parts_bench_counts_what_crosses(tmp_path, monkeypatch):
    monkeypatch.setattr(frame_parts_bench, "SHAPES", [(4, 96, 96)])
    out = tmp_path / "rows.json"
    result = CliRunner().invoke(main, ["bench", "frame-parts", "--rounds", "3", "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [one["case"] for one in rows] == ["frame-parts/h264", "frame-parts/jpeg", "frame-parts/mp4"]
    for row in rows:
        crossed, raw = (int(word) for word in row["shape"].split() if word.isdigit())
        assert raw > 4 * 96 * 96 * 3 > 6 * crossed


def test_scheduler_loops_bench_holds_the_twins_equal(tmp_path):
    out = tmp_path / "rows.json"
    chosen = ["--rounds", "3", "--no-largest", "--out", str(out)]
    result = CliRunner().invoke(main, ["bench", "scheduler-loops", *chosen])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert {one["case"].partition("/")[2] for one in rows} == {"survey", "lightest", "best-cap", "movable"}
    assert all(one["max_rel_err"] == 0.0 and one["checked"] for one in rows)


def test_a_folder_gets_a_file_with_the_machines_name(tmp_path, monkeypatch):
    monkeypatch.setattr(frame_ring_bench, "SHAPES", [(1, 4, 4)])
    chosen = ["--case", "*/push-pop/Python*", "--rounds", "3", "--out", str(tmp_path)]
    assert CliRunner().invoke(main, ["bench", "frame-ring", *chosen]).exit_code == 0
    (saved,) = tmp_path.iterdir()
    assert saved.name == f"frame-ring.{report.machine_slug()}.json"
    assert [one["case"] for one in json.loads(saved.read_text())["rows"]] == ["frame-ring/push-pop/Python twin"]


def test_a_glob_that_fits_nothing_says_so():
    result = CliRunner().invoke(main, ["bench", "frame-ring", "--case", "nothing"])
    assert result.exit_code == 2
    assert "no case fits" in result.stderr


def test_every_listed_bench_exists_and_listing_them_imports_none():
    group = cli_bench.command
    for name in cli_bench.BENCHES:
        assert group.get_command(None, name).help
    code = (
        "import sys; from click.testing import CliRunner; from turboserve.cli.main import main;"
        "assert CliRunner().invoke(main, ['bench', '--help']).exit_code == 0;"
        "assert 'numpy' not in sys.modules and 'turboserve.bench' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
