"""What the `shapes` model can draw, and the fixed token slots a scene is written in.

A scene is SLOT_COUNT tokens in a fixed order: the object count, the background, then shape, colour, size,
motion, speed of each of two objects. An absent object's slots hold "none". Words that a
prompt leaves open are filled before a scene gets here (`prompt.py`), so a scene is always complete.

Lengths are pixels of a 96 x 96 picture, speeds pixels a frame, angles degrees a frame.
"""

from __future__ import annotations

SIZE_PX = 96
FPS = 12
CHUNK_FRAMES = 4
TOKEN_PX = 16
TOKENS_PER_SIDE = SIZE_PX // TOKEN_PX
OBJECTS_MAX = 2
# A start cell fixes the first position to the pixel, so that the first chunk has one right answer and comes
# out crisp.
START_CELLS = 12
CELL_PX = SIZE_PX // START_CELLS

# Least distance of two start cells along each axis: large pulsing objects then never touch.
APART_CELLS_MIN = 5
# How fast two that move alike go back to that distance, pixels a frame for each.
APART_SPEED = 0.25

NONE = "none"
COUNTS = ("one", "two")
SHAPES = ("circle", "square", "triangle", "star", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (228, 48, 48),
    "green": (56, 200, 84),
    "blue": (62, 112, 246),
    "yellow": (246, 220, 62),
    "purple": (160, 72, 226),
    "orange": (248, 138, 34),
    "cyan": (70, 222, 228),
    "white": (240, 240, 240),
    "pink": (252, 128, 190),
}
SIZES: dict[str, float] = {"small": 8.0, "medium": 12.0, "large": 17.0}
MOTIONS = ("left", "right", "up", "down", "bouncing", "growing", "spinning", "still")
DRIFTS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS: dict[str, float] = {"slow": 1.0, "normal": 2.0, "fast": 3.5}
SPIN_DEGREES: dict[str, float] = {"slow": 5.0, "normal": 10.0, "fast": 16.0}
PULSE_FRAMES: dict[str, float] = {"slow": 36.0, "normal": 24.0, "fast": 14.0}
PULSE_DEPTH = 0.35
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (10, 10, 14),
    "dark blue": (16, 28, 74),
    "dark green": (12, 52, 34),
    "dark red": (66, 16, 24),
    "grey": (58, 60, 66),
    "dark purple": (46, 20, 70),
}

# (slot name, its values). The order is part of the trained weights.
_OBJECT_SLOTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("shape", (*SHAPES, NONE)),
    ("colour", (*COLOURS, NONE)),
    ("size", (*SIZES, NONE)),
    ("motion", (*MOTIONS, NONE)),
    ("speed", (*SPEEDS, NONE)),
)
SLOTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("count", COUNTS),
    ("background", tuple(BACKGROUNDS)),
    *_OBJECT_SLOTS,
    *_OBJECT_SLOTS,
)
SLOT_COUNT = len(SLOTS)
OBJECT_SLOT_COUNT = len(_OBJECT_SLOTS)
FIRST_OBJECT_SLOT = 2


def _offsets() -> tuple[dict[str, int], int]:
    """First token id of every kind of slot; both objects share the words of a kind."""
    offsets: dict[str, int] = {}
    total = 0
    for name, values in SLOTS:
        if name not in offsets:
            offsets[name] = total
            total += len(values)
    return offsets, total


TOKEN_OFFSET, TOKEN_COUNT = _offsets()


def slot_offsets() -> list[int]:
    """Token id of value 0, for each of the SLOT_COUNT slots."""
    return [TOKEN_OFFSET[name] for name, _ in SLOTS]
