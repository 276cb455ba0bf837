"""What colours a picture holds, by hue alone, for pictures from a real model."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

HUES = {"red": 0.0, "yellow": 0.15, "green": 0.36, "cyan": 0.505, "blue": 0.62, "purple": 0.76}


def vivid_shares(rgba: Sequence[int]) -> dict[str, float]:
    """Share of the picture that is vividly of each hue; the model's backgrounds are dark and do not count."""
    counts = dict.fromkeys(HUES, 0)
    for at in range(0, len(rgba), 4):
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgba[at : at + 3]))
        if saturation < 0.5 or value < 0.6:
            continue
        nearest = min(HUES, key=lambda name: min(abs(hue - HUES[name]), 1 - abs(hue - HUES[name])))
        counts[nearest] += 1
    return {name: 4 * count / len(rgba) for name, count in counts.items()}
