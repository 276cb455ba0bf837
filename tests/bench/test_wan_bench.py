"""The Wan bench on the tiny preset: that it measures what it says, checked; speed is for a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from turboserve.bench.wan import pass_flop
from turboserve.cli.main import main
from turboserve.model.presets import find_preset
from turboserve.model.wan.layout import transformer_config


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("decoder", ["light", "full"])
def test_every_case_is_measured_and_checked_on_the_tiny_preset(decoder):
    done = CliRunner().invoke(
        main,
        ["bench", "wan", "--preset", "wan-tiny", "--device", "cpu", "--sessions", "1,2", "--rounds", "2",
         "--decoder", decoder, "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [one["case"] for one in rows] == ["wan/pass", "wan/chunk", "wan/pass", "wan/chunk", "wan/first-chunk"]
    for row in rows:
        assert row["checked"] and row["median_ms"] > 0 and row["floor_ms"] > 0
        assert row["max_rel_err"] <= 2e-5, row["case"]
    assert rows[-1]["baseline"].startswith("diffusers")


def test_the_count_of_flop_is_the_reference_s():
    """28.3 TFLOP a pass for 1.3B and 185.6 for 14B at 480x832 with a window of 12 frames."""
    for preset, tflop in (("longlive-1.3b", 28.3), ("causal-wan-14b", 185.6)):
        slot = find_preset(preset).slot()
        found = pass_flop(transformer_config(find_preset(preset)), slot.page_tokens, slot.slot_tokens) / 1e12
        assert found == pytest.approx(tflop, rel=0.03)
