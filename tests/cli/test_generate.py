"""`generate` and `replay` on the real model: files, chains, cards, and what is said when they differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner, Result

from turboserve.card import Card
from turboserve.cli import _making as making
from turboserve.cli.main import main
from turboserve.model.registry import load_spec


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in args])


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == load_spec("shapes").fps
        return np.stack([one.to_ndarray(format="rgb24") for one in container.decode(stream)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Two seconds with a new prompt at one second, its card beside it."""
    folder = tmp_path_factory.mktemp("generate")
    options = ("--seconds", 2, "--seed", 5, "--at", "1s=a blue square", "--card", folder / "card.json", "--json")
    result = run("generate", "a red circle and a xylophone", "-o", folder / "out.mp4", *options)
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


def test_the_file_holds_the_video(made: tuple[Path, dict]) -> None:
    folder, result = made
    spec = load_spec("shapes")
    frames = frames_of(folder / "out.mp4")
    assert frames.shape == (24, spec.height, spec.width, 3)
    assert frames.std() > 5, "a flat picture is no video"
    assert np.abs(np.diff(frames.astype(int), axis=0)).max() > 20, "nothing moves"
    assert (result["frames"], result["seconds"], result["seed"], result["chunks"]) == (24, 2.0, 5, 6)
    assert result["ignored_words"] == ["xylophone"]


def test_the_card_says_how_it_was_made(made: tuple[Path, dict]) -> None:
    folder, result = made
    card = Card.read(folder / "card.json")
    assert [(one.from_index, one.prompt, one.prompt_version) for one in card.inputs] == [
        (0, "a red circle and a xylophone", 1),
        (3, "a blue square", 2),
    ]
    assert card.digest == result["digest"]
    assert card.digests is not None
    assert len(card.digests) == card.chunk_count == 6


def test_replay_makes_the_same_again(made: tuple[Path, dict], tmp_path: Path) -> None:
    folder, result = made
    replayed = run("replay", folder / "card.json", "--json", "-o", tmp_path / "again.mp4")
    assert replayed.exit_code == 0, replayed.output
    verdict = json.loads(replayed.stdout)
    assert (verdict["verdict"], verdict["digest"]) == ("match", result["digest"])
    # The chain says that the frames are the same; the files agree as far as x264 repeats itself.
    again, first = (frames_of(path).astype(np.int16) for path in (tmp_path / "again.mp4", folder / "out.mp4"))
    assert again.shape == first.shape
    assert np.abs(again - first).mean() < 1.0


def test_a_pipe_gets_words_and_no_bar(made: tuple[Path, dict]) -> None:
    folder, result = made
    replayed = run("replay", folder / "card.json")
    assert replayed.stdout == f"match: 6 chunks, chain {result['digest']}\n"
    assert replayed.stderr == ""


@pytest.fixture
def changed(made: tuple[Path, dict], tmp_path: Path) -> Callable[..., Path]:
    def change(**values: object) -> Path:
        body = json.loads((made[0] / "card.json").read_text()) | values
        path = tmp_path / "card.json"
        path.write_text(json.dumps(body))
        return path

    return change


def test_a_card_whose_seed_was_changed_does_not_match(changed: Callable[..., Path]) -> None:
    result = run("replay", changed(seed=6))
    assert result.exit_code == 1
    assert result.stdout.startswith("mismatch at chunk 0: ")
    assert "the card was changed, or this is a bug" in result.stdout


def test_a_mismatch_is_named_by_its_chunk(changed: Callable[..., Path]) -> None:
    inputs = [
        {"from_index": 0, "prompt": "a red circle and a xylophone", "prompt_version": 1},
        {"from_index": 3, "prompt": "a green square", "prompt_version": 2},
    ]
    result = run("replay", changed(inputs=inputs), "--json")
    assert result.exit_code == 1
    verdict = json.loads(result.stdout)
    assert (verdict["verdict"], verdict["first_wrong_index"]) == ("mismatch", 3)


def test_other_numerics_and_other_weights_are_told_apart(changed: Callable[..., Path]) -> None:
    path = changed(seed=6, numerics_id="another-machine")
    assert "other numerics: the card was made under another-machine" in run("replay", path).stdout
    path = changed(model_hash="older")
    refused = run("replay", path)
    assert refused.exit_code == 1
    assert "other weights of shapes (older)" in refused.stderr
    forced = run("replay", path, "--force", "--json")
    assert json.loads(forced.stdout)["same_model"] is False


def test_usage_errors(tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out.mp4")
    for args, words in (
        (("--at", "soon=a square"), "expected a time and a prompt"),
        (("--at", "9s=a square", "--seconds", 2), "beyond the video's 2 s"),
        (("--steps", 1), "expected 2 to 4"),
        (("--seconds", 0), "--seconds"),
        (("--prompt-switch", "blend"), "expected one of swap, recache"),
        (("--decoder", "light"), "this model has one alone"),
        (("--decoder", "big", "--model", "wan-tiny"), "expected one of full, light"),
        (("-o", tmp_path / "absent" / "out.mp4"), "no folder"),
        (("-o", tmp_path / "out.gif"), "out.gif"),
        (("--card", tmp_path / "absent" / "card.json"), "no folder"),
    ):
        result = run("generate", "a red circle", *out, *args)
        assert result.exit_code == 2, (args, result.output)
        assert words in result.stderr.replace("\n", " "), (args, result.stderr)
    unknown = run("generate", "x", *out, "--model", "shape")
    assert unknown.exit_code == 1
    assert run("generate", " ", *out).exit_code == 1, "an empty prompt"
    assert "did you mean 'shapes'?" in unknown.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_no_file_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "turboserve", "generate", "a red circle", "-o", "out.mp4", "--seconds", "900"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        deadline_s = time.monotonic() + 90
        while not list(tmp_path.iterdir()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        process.send_signal(2)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("time_s", "index"), [(0.0, 0), (0.01, 1), (1 / 3, 1), (0.34, 2), (1.0, 3), (2.0, 6), (100.0, 300)]
)
def test_a_time_falls_on_the_first_chunk_that_begins_then_or_later(time_s: float, index: int) -> None:
    spec = load_spec("shapes")
    assert making.chunk_at(spec, time_s) == index
    assert spec.frames_before(index) / spec.fps >= time_s - 1e-6


@pytest.mark.parametrize("frames", range(1, 30))
def test_chunks_hold_the_frames_and_no_chunk_is_wasted(frames: int) -> None:
    spec = load_spec("shapes")
    count = spec.chunks_for(frames)
    assert spec.frames_before(count) >= frames > spec.frames_before(count - 1)


def test_models() -> None:
    result = run("models", "--json")
    assert result.exit_code == 0, result.output
    shapes = json.loads(result.stdout)["models"][0]
    assert (shapes["name"], shapes["model_hash"]) == ("shapes", load_spec("shapes").model_hash)
    assert shapes["state_bytes"]["device"] > 0
    table = run("models")
    assert table.stdout == ""
    assert "shapes" in table.stderr
