"""The scorer: right on painted truth, and it does fail on what is wrong."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from turboserve.model.shapes import vocabulary as v
from turboserve.model.shapes.score import Expectation, components, find_blobs, judge, name_colour
from turboserve.model.shapes.score_prompts import random_prompt
from turboserve.model.shapes.text import read_prompt
from turboserve.model.shapes.world import Script, play, render


def paint(prompt: str, seed: int, chunks: int) -> np.ndarray:
    """Ground truth of a prompt, uint8 [chunks, 4, 96, 96, 3]."""
    scene, _ = read_prompt(prompt, seed)
    pair = [scene.objects[0], scene.objects[-1]]

    def column(values: tuple[str, ...], name: str) -> torch.Tensor:
        return torch.tensor([[[values.index(getattr(one, name)) for one in pair]] * chunks])

    script = Script(
        count=torch.full((1, chunks), len(scene.objects) - 1),
        background=torch.full((1, chunks), list(v.BACKGROUNDS).index(scene.background)),
        shape=column(v.SHAPES, "shape"),
        colour=column(tuple(v.COLOURS), "colour"),
        size=column(tuple(v.SIZES), "size"),
        motion=column(v.MOTIONS, "motion"),
        speed=column(tuple(v.SPEEDS), "speed"),
        start=torch.tensor([scene.start]),
    )
    frames = (render(script, play(script))[0] * 255).round().to(torch.uint8)
    return frames.permute(0, 2, 3, 1).numpy().reshape(chunks, v.CHUNK_FRAMES, v.SIZE_PX, v.SIZE_PX, 3)


def test_painted_truth_is_right():
    rng = random.Random(7)
    for _ in range(40):
        prompt, seed = random_prompt(rng), rng.getrandbits(32)
        for frames in paint(prompt.text, seed, 4):
            verdict = judge(frames, prompt.expected)
            assert verdict.right, (prompt.text, seed, verdict)
            assert verdict.shape is not False, (prompt.text, seed, [find_blobs(one) for one in frames[[0, -1]]])


TRUTH = "two red circles drifting left on a black background"


@pytest.mark.parametrize(
    ("expected", "wrong"),
    [
        (Expectation(("green", "green"), None, "left"), "colour"),
        (Expectation(("red",), None, "left"), "count"),
        (Expectation(("red", "red"), None, "right"), "direction"),
        (Expectation(("red", "red"), None, "up"), "direction"),
        (Expectation(("red", "red"), ("square", "square"), "left"), "shape"),
    ],
)
def test_a_wrong_expectation_fails_in_its_own_respect(expected, wrong):
    verdict = judge(paint(TRUTH, 3, 2)[1], expected)
    for name in ("colour", "count", "direction"):
        assert getattr(verdict, name) == (name != wrong)
    assert verdict.shape is (None if wrong != "shape" else False)


@pytest.mark.parametrize("spoil", ["frozen", "empty", "noise", "third", "one gone"])
def test_spoilt_frames_fail(spoil):
    frames = paint(TRUTH, 3, 1)[0].copy()
    expected = Expectation(("red", "red"), None, "left")
    assert judge(frames, expected).right
    if spoil == "frozen":
        frames[:] = frames[0]
    elif spoil == "empty":
        frames[:] = 12
    elif spoil == "noise":
        frames[:] = np.random.default_rng(0).integers(0, 256, frames.shape)
    elif spoil == "third":
        blob = find_blobs(frames[-1])[0]
        y, x = (int(blob.y) + 48) % 90, int(blob.x) % 90
        frames[-1, y : y + 6, x : x + 6] = (228, 48, 48)
    else:
        blob = find_blobs(frames[-1])[0]
        rows = (np.arange(96)[:, None] - blob.y + 48) % 96 - 48
        columns = (np.arange(96)[None] - blob.x + 48) % 96 - 48
        frames[-1][np.hypot(rows, columns) < 20] = 12
    assert not judge(frames, expected).right


def test_regions_wrap_around_both_edges():
    mask = np.zeros((8, 8), dtype=bool)
    mask[0, 0] = mask[7, 7] = mask[0, 7] = mask[7, 0] = True
    mask[3:5, 3:5] = True
    assert len(np.unique(components(mask))) == 3


def test_an_empty_mask_has_no_region():
    assert not components(np.zeros((8, 8), dtype=bool)).any()


def test_colours_are_named():
    for rgb, name in [((255, 0, 0), "red"), ((250, 250, 245), "white"), ((5, 5, 9), "black"), ((0, 0, 255), "blue")]:
        assert name_colour(np.array(rgb)) == name
