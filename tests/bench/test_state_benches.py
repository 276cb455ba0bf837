"""`bench offload` and `bench migrate`, small: every row is measured, checked and in the contract's form."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from turboserve.bench import migrate, offload
from turboserve.cli.main import main


def run(bench: str, tmp_path, *arguments: str) -> set[str]:
    out = tmp_path / "rows.json"
    result = CliRunner().invoke(main, ["bench", bench, "--rounds", "3", "--out", str(out), *arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert all(one["max_rel_err"] == 0.0 and one["checked"] and one["median_ms"] > 0 for one in rows)
    return {one["case"] for one in rows}


def test_offload_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "BATCHES", [(3, 5000)])
    cases = run("offload", tmp_path)
    assert {
        "offload/copy/cpu/Python twin",
        "offload/checksum/Python twin",
        "offload/reserve-commit/Python twin",
    } <= cases
    assert {"offload/suspend", "offload/write-through", "offload/restore"} <= cases


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_that_nothing_was_packed():
    result = CliRunner().invoke(main, ["bench", "offload", "--case", "offload/pack/*"])
    assert result.exit_code == 2 and "not run: offload/pack: there is no CUDA device" in result.stderr


@pytest.mark.timeout(110)
def test_migrate_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(migrate, "SIZES", [70_000])
    cases = run("migrate", tmp_path, "--case", "migrate/*")
    assert {"migrate/arena", "migrate/socket", "migrate/point/socket"} <= cases
