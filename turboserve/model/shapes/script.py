"""Random scripts to train on: what a stream is asked for, with prompts that change at chunk boundaries."""

from __future__ import annotations

import torch

from turboserve.model.shapes import vocabulary as v
from turboserve.model.shapes.world import Script

_PALETTE = len(v.COLOURS)


def start_cells(scenes: int, generator: torch.Generator) -> torch.Tensor:
    """Start cells [scenes, 2 objects, 2]: the second lies far from the first along both axes."""
    first = torch.randint(v.START_CELLS, (scenes, 2), generator=generator)
    span = v.START_CELLS - 2 * v.APART_CELLS_MIN + 1
    apart = v.APART_CELLS_MIN + torch.randint(span, (scenes, 2), generator=generator)
    return torch.stack([first, (first + apart) % v.START_CELLS], 1)


def random_script(scenes: int, chunks: int, generator: torch.Generator, lose: bool = False) -> Script:
    """Scripts of `chunks` chunks. At each boundary 35% get a new motion, fewer another look, some a new
    scene.
    """

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    def chance(share: float, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < share

    def motions(rows: int) -> torch.Tensor:
        # Drifts are what viewers ask for most: half of the draws are one of the four directions.
        return torch.where(chance(0.5, rows), draw(len(v.DRIFTS), rows), draw(len(v.MOTIONS), rows))

    def pair(values: torch.Tensor, other: torch.Tensor, differ: torch.Tensor) -> torch.Tensor:
        return torch.stack([values, torch.where(differ, other, values)], -1)

    def scene() -> dict[str, torch.Tensor]:
        unlike, apart = chance(0.6, scenes), chance(0.2, scenes)
        return {
            "count": draw(2, scenes),
            "background": draw(len(v.BACKGROUNDS), scenes),
            "shape": pair(draw(len(v.SHAPES), scenes), draw(len(v.SHAPES), scenes), unlike),
            "colour": pair(draw(_PALETTE, scenes), draw(_PALETTE, scenes), unlike),
            "size": pair(draw(len(v.SIZES), scenes), draw(len(v.SIZES), scenes), unlike & chance(0.4, scenes)),
            "motion": pair(motions(scenes), motions(scenes), apart),
            "speed": pair(draw(len(v.SPEEDS), scenes), draw(len(v.SPEEDS), scenes), apart & chance(0.4, scenes)),
        }

    # How often one attribute changes alone at a boundary; "all" asks for a whole new scene.
    share = {
        "motion": 0.35,
        "colour": 0.1,
        "shape": 0.08,
        "size": 0.06,
        "speed": 0.08,
        "count": 0.1,
        "background": 0.07,
    }
    steps = [scene()]
    for _ in range(1, chunks):
        new, everything = scene(), chance(0.06, scenes)
        merged = {}
        for name, value in steps[-1].items():
            change = chance(share[name], scenes) | everything
            merged[name] = torch.where(change[:, None] if value.ndim == 2 else change, new[name], value)
        steps.append(merged)
    start = start_cells(scenes, generator)
    near = chance(0.15, scenes)  # two that have come too close: they go apart again
    start[:, 1] = torch.where(near[:, None], draw(v.START_CELLS, scenes, 2), start[:, 1])
    columns = {name: torch.stack([step[name] for step in steps], 1) for name in steps[0]}
    return Script(start=start, lost=_lost(columns["count"], generator) if lose else None, **columns)


def _lost(count: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[B, C, 2]: in 10% of the scripts one object or both are missing from chunk 1 on, until one chunk brings them
    back. Without such context an empty picture would stay empty for ever."""
    scenes, chunks = count.shape
    back = torch.randint(3, chunks, (scenes, 1), generator=generator)
    chunk = torch.arange(chunks)
    span = (chunk >= 1) & (chunk < back) & (torch.rand(scenes, 1, generator=generator) < 0.1)
    kind = torch.randint(3, (scenes, 1), generator=generator)  # the first, the second, both
    first, second = span & (kind != 1), span & (kind != 0)
    two = (count == 1).all(1, keepdim=True)
    return torch.stack([torch.where(two, first, span), second & two], -1)
