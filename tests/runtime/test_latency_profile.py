"""`turboserve calibrate`: what it writes is what placement and the simulator read; latents at fewer steps are told."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from click.testing import CliRunner

from turboserve.cli.main import main
from turboserve.model.interface import ChunkRequest, Control, SessionTensors, pack
from turboserve.model.registry import load_model
from turboserve.model.shapes.model import ShapesModel
from turboserve.model.step_error import latent_error_by_steps
from turboserve.sim.profile_files import load_profile

pytestmark = pytest.mark.usefixtures("deterministic")


@pytest.mark.parametrize("model", ["shapes", "wan-tiny"])
def test_calibrate_writes_a_profile_that_its_readers_take(tmp_path, model):
    path = tmp_path / "profile.json"
    arguments = ["calibrate", model, "--device", "cpu", "--segments", "3", "--repeats", "2", "-o", str(path)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    profile = load_profile(path)
    assert profile.batch_max == 3 and profile.denoise_steps == 4 and 0 < profile.step_latency_share < 1
    spec = load_model(model).spec
    assert profile.chunk_s == spec.chunk_s and profile.capacity >= 1 and profile.resident_max >= 3
    data = json.loads(path.read_text())
    measured = data["measured"]
    assert measured["model"] == model and measured["size"] == f"{spec.width}x{spec.height}"
    rows = {(one["kind"], one["segments"]): one for one in measured["passes"]}
    assert set(rows) == {(kind, count) for kind in ("denoise", "context") for count in (1, 2, 3)}
    assert rows["denoise", 3]["tokens"] == 3 * spec.slot.page_tokens
    # A chunk is its passes and its decode: at the full step count, the table itself.
    assert measured["chunk_s_by_steps"]["4"][0] == pytest.approx(profile.batch_latency_s[0], abs=2e-6)
    fewest = measured["chunk_s_by_steps"][str(profile.denoise_steps_floor)]
    assert fewest[0] == pytest.approx(profile.batch_latency(1, profile.denoise_steps_floor), rel=0.01)
    assert "steps latents are" in done.output


def test_another_size_is_another_profile(tmp_path):
    path = tmp_path / "profile.json"
    arguments = ["calibrate", "wan-tiny", "--size", "64x32", "--segments", "1", "--repeats", "1", "-o", str(path)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    measured = json.loads(path.read_text())["measured"]
    assert measured["size"] == "64x32"
    assert measured["passes"][0]["tokens"] == 2 * load_model("wan-tiny").spec.slot.page_tokens
    assert CliRunner().invoke(main, ["calibrate", "shapes", "--size", "64x32"]).exit_code == 2


def test_a_written_profile_simulates(tmp_path):
    path, trace = tmp_path / "profile.json", tmp_path / "trace.csv.gz"
    runner = CliRunner()
    calibrated = runner.invoke(main, ["calibrate", "wan-tiny", "--segments", "2", "--repeats", "1", "-o", str(path)])
    assert calibrated.exit_code == 0, calibrated.output
    lines = ["time_s,session_id,event,chunks", "0,a,arrive,", "0,a,active,3", "10,a,idle,", "20,a,depart,"]
    trace.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n", mtime=0))
    run = runner.invoke(
        main,
        ["simulate", "--trace", str(trace), "--profile", str(path), "--policy", "static-least", "--workers", "1",
         "--warmup-s", "0", "--out", str(tmp_path / "out"), "--json"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert json.loads((tmp_path / "out" / "report.json").read_text())["delivered"] == 4


def test_latents_at_fewer_steps_are_measured_not_guessed():
    """Against the numbers worked out here for one chunk; an equal step count would be 0."""
    model = load_model("wan-tiny")
    errors = latent_error_by_steps(model, chunks=1, seed=4, prompt="a fox")
    assert set(errors) == {1, 2, 3} and all(0 < one < 10 for one in errors.values())

    def latents(steps):
        state = SessionTensors(
            session_id="x", seed=4, slot=0, tensors={f.name: torch.zeros(f.shape) for f in model.state_layout()}
        )
        model.begin(state, Control("a fox"))
        for segment in model.next_passes(state, ChunkRequest(0, steps, Control("a fox"))):
            model.advance(segment, model.forward(pack([segment])))
        return state.tensors["work"]

    full = latents(4)
    for steps, error in errors.items():
        assert error == pytest.approx(float((latents(steps) - full).norm() / full.norm()), rel=1e-4)


def test_the_trained_model_is_nearer_at_three_steps_than_at_two():
    errors = latent_error_by_steps(ShapesModel.load())
    assert 0 < errors[3] < errors[2] < 1
