"""The prompt reader: word order, synonyms, plurals, binding, what is ignored, what the seed fills in."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboserve.model.shapes import vocabulary as v
from turboserve.model.shapes.text import check_prompt, read_prompt, scene_from_json, scene_to_json


def objects(prompt: str, seed: int = 3):
    return read_prompt(prompt, seed)[0].objects


def test_the_example_of_the_readme():
    scene, report = read_prompt("two small red circles drifting left over a dark blue sky", 1)
    assert [(o.shape, o.colour, o.size, o.motion) for o in scene.objects] == [("circle", "red", "small", "left")] * 2
    assert scene.background == "dark blue"
    assert report.ignored_words == ()
    assert not report.random_scene


def test_attributes_bind_to_their_own_object():
    one, two = objects("a red circle drifting left and a large blue square drifting right")
    assert (one.colour, one.shape, one.motion) == ("red", "circle", "left")
    assert (two.colour, two.shape, two.motion, two.size) == ("blue", "square", "right", "large")


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle and a blue square drifting left",
        "drifting left, a red circle and a blue square",
        "a red circle drifting left and a blue square",
    ],
)
def test_what_one_does_the_other_does(prompt):
    assert {one.motion for one in objects(prompt)} == {"left"}


@pytest.mark.parametrize(
    "prompt", ["squares, two, green, going down", "two green squares going down", "down going green squares two"]
)
def test_word_order_is_free(prompt):
    found = objects(prompt)
    assert [(o.shape, o.colour, o.motion) for o in found] == [("square", "green", "down")] * 2
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("prompt", "background"),
    [
        ("a red circle on a black background", "black"),
        ("on a black background, a red circle", "black"),
        ("background: dark green, a red circle", "dark green"),
        ("a red circle on dark red", "dark red"),
        ("a red ball in space", "black"),
        ("a white star over the sea", "dark blue"),
        ("a yellow star against a violet sky", "dark purple"),
    ],
)
def test_backgrounds(prompt, background):
    scene, report = read_prompt(prompt, 0)
    assert scene.background == background
    assert len(scene.objects) == 1
    assert report.ignored_words == ()


def test_a_colour_of_the_background_is_not_the_object_s():
    scene, _ = read_prompt("a blue square on a red background", 0)
    assert (scene.objects[0].colour, scene.background) == ("blue", "dark red")


def test_two_colours_of_one_plural_are_two_objects():
    assert [one.colour for one in objects("red and green circles")] == ["red", "green"]


def test_unknown_words_come_back_once_and_in_order():
    report = check_prompt("a wild red circle eating a wild dragon", 0)
    assert report.ignored_words == ("wild", "eating", "dragon")
    assert not report.random_scene


def test_no_known_word_makes_a_random_scene_and_says_so():
    report = check_prompt("my cat on the sofa", 5)
    assert report.random_scene
    assert report.ignored_words == ("my", "cat", "sofa")
    assert len({check_prompt("my cat on the sofa", seed).canonical for seed in range(20)}) > 5


def test_a_third_object_is_ignored_and_named():
    scene, report = read_prompt("a red circle, a blue square and a green star", 0)
    assert len(scene.objects) == v.OBJECTS_MAX
    assert "star" in report.ignored_words


def test_open_attributes_stay_when_another_word_changes():
    before, after = objects("a red circle", 9)[0], objects("a green circle", 9)[0]
    assert (before.size, before.motion, before.speed) == (after.size, after.motion, after.speed)


def test_moving_without_a_direction_drifts():
    assert {objects("a red circle moving", seed)[0].motion for seed in range(30)} <= set(v.DRIFTS)


def test_objects_keep_their_places_when_named_in_another_order():
    scene, _ = read_prompt("a red circle and a blue square", 4)
    turned, _ = read_prompt("a blue square and a red circle drifting up", 4, scene)
    assert [one.colour for one in turned.objects] == ["red", "blue"]


def test_a_scene_survives_json():
    scene, _ = read_prompt("two stars and nothing else", 8)
    assert scene_from_json(scene_to_json(scene)) == scene


@given(st.text(max_size=60), st.integers(0, 2**63))
def test_any_text_gives_a_complete_scene(prompt, seed):
    scene, report = read_prompt(prompt, seed)
    tokens = scene.tokens()
    assert len(tokens) == v.SLOT_COUNT
    assert all(0 <= token < v.TOKEN_COUNT for token in tokens)
    assert read_prompt(prompt, seed) == (scene, report)


def test_the_gateway_s_modules_do_not_import_torch():
    code = (
        "import sys; import turboserve.model.shapes.text, turboserve.model.shapes.spec; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
