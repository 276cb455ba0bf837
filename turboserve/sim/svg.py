"""Plots as inline SVG, for pages that must stand alone: no scripts, no fonts, no files beside them.

A plot is drawn in one fixed coordinate system and scales with the page. Colours come from the page's CSS (classes s0,
s1, ...), so that light and dark both read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40


@dataclass(frozen=True, slots=True)
class Series:
    """One line. `steps`: the value holds until the next point; `area`: filled down to zero."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    steps: bool = False
    area: bool = False


def line_plot(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str,
    y_max: float | None = None,
    x_max: float | None = None,
) -> str:
    """Lines over a common x axis with a legend; the y axis begins at zero."""
    x_high = x_max if x_max is not None else max((max(s.x, default=0.0) for s in series), default=1.0)
    y_high = y_max if y_max is not None else max((max(s.y, default=0.0) for s in series), default=1.0)
    x_ticks, y_ticks = ticks(x_high), ticks(y_high)
    x_high, y_high = max(x_high, 1e-9), max(y_ticks[-1], y_high, 1e-9)

    def px(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / x_high

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(y, y_high) / y_high

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts += [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{number(y)}</text>'
        for y in y_ticks
    ]
    parts += [
        f'<text x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(x)}</text>'
        for x in x_ticks
        if x <= x_high * 1.0001
    ]
    middle = 'text-anchor="middle" class="axis">'
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" {middle}{escape(x_label)}</text>')
    parts.append(f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" {middle}{escape(y_label)}</text>')
    for k, s in enumerate(series):
        points = _points(s, px, py)
        if s.area and points:
            floor = py(0)
            parts.append(
                f'<path class="s{k} area" d="M{px(s.x[0]):.1f},{floor:.1f}L{points}L{px(s.x[-1]):.1f},{floor:.1f}Z"/>'
            )
        elif points:
            parts.append(f'<path class="s{k}" d="M{points}"/>')
    parts.append("</svg>")
    legend = "".join(f'<span class="key s{k}">{escape(s.name)}</span>' for k, s in enumerate(series) if s.name)
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}<div>{legend}</div></figure>"


def _points(s: Series, px, py) -> str:  # type: ignore[no-untyped-def]
    """The path's points; those that fall on the same pixel column are left out."""
    out: list[str] = []
    last_x, last_y = -10.0, -10.0
    for x, y in zip(s.x, s.y, strict=True):
        at, height = px(x), py(y)
        if at - last_x < 0.3 and abs(height - last_y) < 0.3:
            continue
        if s.steps and out:
            out.append(f"{at:.1f},{last_y:.1f}")
        out.append(f"{at:.1f},{height:.1f}")
        last_x, last_y = at, height
    return "L".join(out)


def ticks(high: float) -> list[float]:
    """Round values from 0 to at least `high`, four to eight of them."""
    if high <= 0:
        return [0.0, 1.0]
    step = 10 ** math.floor(math.log10(high))
    for part in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0):
        if high / (step * part) <= 7:
            step *= part
            break
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def number(x: float) -> str:
    """Short and exact enough for an axis."""
    return f"{x:.10g}" if abs(x) < 1e5 else f"{x:.3g}"
