"""Looks at frames and says what is in them: how many things, of which colour and shape, moving which way.

It shares no code and no numbers with what made the training pictures: backgrounds are estimated from the
frame, colours are named by hue, things are connected regions, motion is that of their centres. The picture is
a torus, so regions and centres wrap around.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

# How far (RGB, 0..255) a pixel lies from the background before it counts as part of a thing, and a thing's
# least area.
FOREGROUND_DISTANCE = 64.0
AREA_MIN_PX = 24
# Least motion between a chunk's first and last frame that has a direction, and how far it may lean off the
# axis.
MOTION_MIN_PX = 1.0
LEAN_MAX = 0.6
# (upper hue in degrees, name), going round the colour circle.
HUES = (
    (14, "red"),
    (40, "orange"),
    (68, "yellow"),
    (165, "green"),
    (202, "cyan"),
    (248, "blue"),
    (300, "purple"),
    (345, "pink"),
    (361, "red"),
)
_AXES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


_Delta = TypeVar("_Delta", float, np.ndarray)


@dataclass(frozen=True)
class Blob:
    """One thing: centre (x, y) in pixels, area in pixels, the name of its colour and of its outline."""

    x: float
    y: float
    area: int
    colour: str
    shape: str


@dataclass(frozen=True)
class Expectation:
    """What a prompt asks for. `direction` is None where nothing drifts; `shapes` where outlines turn."""

    colours: tuple[str, ...]  # one per thing
    shapes: tuple[str, ...] | None
    direction: str | None

    @property
    def count(self) -> int:
        return len(self.colours)


@dataclass(frozen=True)
class Verdict:
    """What of a chunk is right; None where the prompt leaves it open."""

    colour: bool
    count: bool
    direction: bool | None
    shape: bool | None

    @property
    def right(self) -> bool:
        return self.colour and self.count and self.direction is not False


def name_colour(rgb: np.ndarray) -> str:
    """Name of a colour [3] in 0..255, by its hue; pale ones are white."""
    red, green, blue = (float(one) for one in rgb)
    high, low = max(red, green, blue), min(red, green, blue)
    if high < 40:
        return "black"
    if (high - low) / high < 0.18:
        return "white" if high > 150 else "grey"
    span = high - low
    if high == red:
        hue = 60 * (((green - blue) / span) % 6)
    elif high == green:
        hue = 60 * ((blue - red) / span + 2)
    else:
        hue = 60 * ((red - green) / span + 4)
    return next(name for limit, name in HUES if hue < limit)


def backdrop(pixels: np.ndarray) -> np.ndarray:
    """The background of a frame, float32 [H, 1, 3]: a straight vertical gradient, fitted so that things do not count.

    Medians of rows, their median slope and their median offset: two wide things side by side move none of the three.
    """
    rows = np.median(pixels, axis=1)
    height = len(rows)
    slope = np.median(rows[height // 2 :] - rows[: height - height // 2], axis=0) / (height // 2)
    y = np.arange(height, dtype=np.float32)[:, None]
    return (np.median(rows - slope * y, axis=0) + slope * y)[:, None]


def distance_map(frame: np.ndarray) -> np.ndarray:
    """How far each pixel's colour lies from the background, [H, W]. frame: uint8 [H, W, 3]."""
    pixels = frame.astype(np.float32)
    return np.sqrt(((pixels - backdrop(pixels)) ** 2).sum(-1))


def components(mask: np.ndarray) -> np.ndarray:
    """Labels [H, W] of regions connected along edges or corners on the torus; 0 is no region."""
    height, width = mask.shape
    parent: list[int] = [0]

    def root(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    labels = np.zeros(mask.shape, dtype=np.int32)
    rows: list[list[tuple[int, int, int]]] = []
    for y in range(height):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask[y], [False]]).astype(np.int8)))
        runs = []
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            parent.append(len(parent))
            runs.append((start, stop, len(parent) - 1))
            labels[y, start:stop] = len(parent) - 1
        rows.append(runs)
        if runs and runs[0][0] == 0 and runs[-1][1] == width:
            parent[root(runs[-1][2])] = root(runs[0][2])
    for y in range(height):
        for start, stop, label in rows[y]:
            for other_start, other_stop, other in rows[y - 1]:  # row 0 touches the last row
                near = other_start <= stop and start <= other_stop
                around = (start == 0 and other_stop == width) or (stop == width and other_start == 0)
                if near or around:
                    parent[root(label)] = root(other)
    roots = np.array([root(one) for one in range(len(parent))], dtype=np.int32)
    return roots[labels]


def _circular_mean(values: np.ndarray, period: int) -> float:
    angle = values * (2 * math.pi / period)
    return float(np.arctan2(np.sin(angle).mean(), np.cos(angle).mean()) % (2 * math.pi)) * period / (2 * math.pi)


def _wrapped(delta: _Delta, period: int) -> _Delta:
    return (delta + period / 2) % period - period / 2


def name_shape(xs: np.ndarray, ys: np.ndarray) -> str:
    """Name of an upright outline from its pixels, given relative to its centre."""
    width, height = np.ptp(xs) + 1, np.ptp(ys) + 1
    middle = (np.abs(xs - (xs.max() + xs.min()) / 2) <= 1.5) & (np.abs(ys - (ys.max() + ys.min()) / 2) <= 1.5)
    filled = len(xs) / (width * height)
    if middle.sum() < 5:
        return "ring"
    if filled > 0.88:
        return "square"
    if filled > 0.68:
        return "circle"
    # A triangle stands on its widest row; a star's widest row is the one of its arms, in the upper half.
    counts = np.bincount(np.round(ys - ys.min()).astype(int))
    return "triangle" if np.argmax(counts) > 0.7 * len(counts) else "star"


def find_blobs(frame: np.ndarray) -> list[Blob]:
    """The things in a frame uint8 [H, W, 3], largest first."""
    height, width = frame.shape[:2]
    distance = distance_map(frame)
    labels = components(distance > FOREGROUND_DISTANCE)
    blobs = []
    for label in np.unique(labels[labels > 0]):
        ys, xs = np.nonzero(labels == label)
        if len(xs) < AREA_MIN_PX:
            continue
        x, y = _circular_mean(xs, width), _circular_mean(ys, height)
        # An outline's pixels mix with the background: the purer half names the colour.
        purity = distance[ys, xs]
        pure = purity >= np.median(purity)
        colour = name_colour(np.median(frame[ys[pure], xs[pure]], axis=0))
        shape = name_shape(_wrapped(xs - x, width), _wrapped(ys - y, height))
        blobs.append(Blob(x, y, len(xs), colour, shape))
    return sorted(blobs, key=lambda blob: -blob.area)


def displacement(first: Sequence[Blob], last: Sequence[Blob], width: int, height: int) -> list[tuple[float, float]]:
    """Motion (dx, dy) in pixels of each thing of `first` to the nearest one of its colour in `last`."""
    moves = []
    for blob in first:
        near = [other for other in last if other.colour == blob.colour] or list(last)
        if not near:
            continue
        steps = [(_wrapped(o.x - blob.x, width), _wrapped(o.y - blob.y, height)) for o in near]
        moves.append(min(steps, key=lambda step: math.hypot(*step)))
    return moves


def judge(frames: np.ndarray, expected: Expectation) -> Verdict:
    """Verdict on one chunk, uint8 [n, H, W, 3]: its first and its last frame must both be right."""
    height, width = frames.shape[1:3]
    first, last = find_blobs(frames[0]), find_blobs(frames[-1])
    both = (first, last)
    colour = all({blob.colour for blob in blobs} == set(expected.colours) for blobs in both)
    count = all(len(blobs) == expected.count for blobs in both)
    direction = shape = None
    if expected.direction is not None:
        ax, ay = _AXES[expected.direction]
        moves = displacement(first, last, width, height)
        along = [dx * ax + dy * ay for dx, dy in moves]
        across = [abs(dx * ay) + abs(dy * ax) for dx, dy in moves]
        direction = bool(moves) and all(
            a >= MOTION_MIN_PX and b <= LEAN_MAX * a for a, b in zip(along, across, strict=True)
        )
    if expected.shapes is not None:
        shape = all(Counter(blob.shape for blob in blobs) == Counter(expected.shapes) for blobs in both)
    return Verdict(colour, count, direction, shape)
