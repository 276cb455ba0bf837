"""Prompts to score with, each with what must be seen. The words are this file's own; the model's are not consulted."""

from __future__ import annotations

import random
from dataclasses import dataclass

from turboserve.model.shapes.score import Expectation

_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white", "pink")
_SHAPES = ("circle", "square", "triangle", "star", "ring")
_SIZES = ("small", "medium", "large", "")
_DIRECTIONS = ("left", "right", "up", "down")
_VERBS = ("drifting", "moving", "floating", "gliding")
_OTHER_MOTIONS = ("bouncing", "growing", "spinning", "standing still")
_PACES = ("", "", "slowly ", "quickly ")
_PLACES = (
    "on a black background",
    "over a dark blue sky",
    "on a dark green background",
    "on a grey background",
    "against a dark red background",
    "in space",
    "",
)


@dataclass(frozen=True)
class ScoredPrompt:
    text: str
    expected: Expectation


def _thing(rng: random.Random, colour: str, shape: str, plural: bool = False) -> str:
    words = [rng.choice(_SIZES), colour, shape + ("s" if plural else "")]
    return " ".join(word for word in words if word)


def random_prompt(rng: random.Random, drifting: bool | None = None) -> ScoredPrompt:
    """One prompt: one thing, two alike, or two unlike; two thirds drift unless `drifting` says."""
    if drifting is None:
        drifting = rng.random() < 0.67
    direction = rng.choice(_DIRECTIONS) if drifting else None
    pace = rng.choice(_PACES)
    action = f"{rng.choice(_VERBS)} {pace}{direction}" if direction else rng.choice(_OTHER_MOTIONS)
    kind = rng.choice(("one", "twins", "pair"))
    colours = rng.sample(_COLOURS, 2)
    shapes = [rng.choice(_SHAPES) for _ in range(2)]
    if kind == "one":
        things, colours, shapes = f"a {_thing(rng, colours[0], shapes[0])}", colours[:1], shapes[:1]
    elif kind == "twins":
        things = f"two {_thing(rng, colours[0], shapes[0], plural=True)}"
        colours, shapes = [colours[0]] * 2, [shapes[0]] * 2
    else:
        first, second = (_thing(rng, c, s) for c, s in zip(colours, shapes, strict=True))
        things = f"a {first} and a {second}"
    place = rng.choice(_PLACES)
    parts = [things, action, place]
    if place and rng.random() < 0.25:  # free word order
        parts = [f"{place},", things, action]
    text = " ".join(part for part in parts if part)
    upright = action != "spinning"
    return ScoredPrompt(text, Expectation(tuple(colours), tuple(shapes) if upright else None, direction))
