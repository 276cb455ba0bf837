"""Rows become a page with a plot each; the same rows give the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from turboserve.bench.results_report import command
from turboserve.errors import ConfigError


def row(case: str, median_ms: float) -> dict[str, object]:
    return {
        "case": case,
        "shape": "2x3",
        "device": "a machine",
        "commit": "abc",
        "load_1min": 0.5,
        "median_ms": median_ms,
        "p20_ms": 0.9 * median_ms,
        "p80_ms": 1.2 * median_ms,
        "floor_ms": 1.0,
        "of_floor": 1.0 / median_ms,
        "baseline": "a|b",
        "baseline_ms": 8.0,
        "speedup": 8.0 / median_ms,
    }


def test_tables_and_plots(tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text(json.dumps({"rows": [row("one", 2.0), row("two", 4.0)]}))
    (tmp_path / "score.json").write_text(json.dumps({"accuracy": 1.0}))
    for _ in range(2):
        result = CliRunner().invoke(command, [str(tmp_path)], catch_exceptions=False)
        assert result.exit_code == 0
        page = (tmp_path / "README.md").read_text()
        drawn = (tmp_path / "plots" / "some.svg").read_bytes()
    assert "| two | 2x3 | 4 | 3.6 - 4.8 | 25% | 2.00x | a\\|b (8 ms) |" in page
    assert "load 0.5 to 0.5" in page and "score" not in page.split("##", 1)[1]
    assert b"two 2x3" in drawn and b"baseline" in drawn
    CliRunner().invoke(command, [str(tmp_path)], catch_exceptions=False)
    assert (tmp_path / "plots" / "some.svg").read_bytes() == drawn


def test_a_folder_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rows with times"):
        CliRunner().invoke(command, [str(tmp_path)], catch_exceptions=False)
