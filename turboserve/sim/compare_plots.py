"""Inline SVG for the comparison page: a cost-latency frontier, fleets against demand, latency curves.

A policy has one colour on the whole page. Ours is drawn last and thicker; every other line is also named in the legend,
so that colour alone never carries the meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 320
LEFT, RIGHT, TOP, BOTTOM = 78, 16, 14, 44
COLOURS = {
    "static-rr": "#b08d57",
    "static-least": "#8a8f98",
    "static-memory": "#b9bec7",
    "static-least-resume": "#5f6b7a",
    "hpa": "#2f9e6e",
    "kpa": "#8fbf3f",
    "llumnix": "#c65fb0",
    "slack": "#e0a100",
    "lcp": "#d9642c",
    "published": "#7a5fd0",
    "turboserve": "#1767c9",
    "demand": "#c9d3df",
}


@dataclass(frozen=True)
class Line:
    """Points of one policy; `marks` draws each as a dot with its hover text instead of a plain line."""

    policy: str
    name: str
    x: Sequence[float]
    y: Sequence[float]
    marks: Sequence[str] = ()
    steps: bool = False
    area: bool = False


def plot(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_log: bool = False,
    x_low: float = 0.0,
    y_low: float = 0.0,
    height: int = HEIGHT,
    guides: Sequence[tuple[float, str]] = (),
) -> str:
    """A figure with axes, grid, legend; `guides` are named horizontal lines."""
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y] + [y for y, _ in guides]
    if not xs:
        return ""
    x_ticks = ticks(x_low, max(xs))
    x_high = max(x_ticks[-1], max(xs))
    if y_log:
        y_low = max(y_low, 1e-12)
        top = 10 ** math.ceil(math.log10(max(max(ys), y_low * 10)))
        y_ticks = [y_low * 10**k for k in range(round(math.log10(top / y_low)) + 1)]
        y_high = top
    else:
        y_ticks = ticks(y_low, max(ys))
        y_high = max(y_ticks[-1], max(ys))

    def px(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - x_low) / max(1e-12, x_high - x_low)

    def py(y: float) -> float:
        if y_log:
            share = math.log(max(y, y_low) / y_low) / math.log(y_high / y_low)
        else:
            share = (y - y_low) / max(1e-12, y_high - y_low)
        return height - BOTTOM - (height - TOP - BOTTOM) * share

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{py(y) + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{px(x):.1f}" y="{height - BOTTOM + 17}" text-anchor="middle">{short(x)}</text>')
    for y, name in guides:
        parts.append(f'<line class="guide" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT - 4}" y="{py(y) - 4:.1f}" text-anchor="end">{escape(name)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text transform="translate(13 {height / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    for line in sorted(lines, key=lambda one: one.policy == "turboserve"):
        parts.append(_draw(line, px, py, py(max(y_low, 0.0))))
    parts.append("</svg>")
    keys = "".join(
        f'<span class="key"><i style="background:{COLOURS.get(line.policy, "#888")}"></i>{escape(line.name)}</span>'
        for line in lines
    )
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}<div>{keys}</div></figure>"


def _draw(line: Line, px: Callable[[float], float], py: Callable[[float], float], floor: float) -> str:
    colour = COLOURS.get(line.policy, "#888")
    width = 2.6 if line.policy == "turboserve" else 1.5
    points: list[tuple[float, float]] = []
    for x, y in zip(line.x, line.y, strict=True):
        if line.steps and points:
            points.append((px(x), points[-1][1]))
        points.append((px(x), py(y)))
    path = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    if line.area:
        return f'<path d="M{points[0][0]:.1f},{floor:.1f}L{path}L{points[-1][0]:.1f},{floor:.1f}Z" fill="{colour}"/>'
    out = f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>' if len(points) > 1 else ""
    size = 6 if line.policy == "turboserve" else 4
    for (x, y), mark in zip(points, line.marks, strict=False):
        out += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{colour}"><title>{escape(mark)}</title></circle>'
    return out


def ticks(low: float, high: float) -> list[float]:
    """Round values from low to at least high, about five."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span))
    for part in (0.1, 0.2, 0.5, 1.0, 2.0):
        if span / (step * part) <= 6:
            step *= part
            break
    first = math.floor(low / step + 1e-9)
    return [k * step for k in range(first, math.ceil(high / step - 1e-9) + 1) if k * step >= low - 1e-9] or [low, high]


def short(value: float) -> str:
    return f"{value:.4g}"
