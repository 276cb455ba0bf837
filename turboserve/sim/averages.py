"""Averages that do not count one source twice: means over source groups, with a bootstrap interval.

Traces of one source share arrivals or sessions. A group's value is the mean over its traces (each the mean over its
seeds); the average is the mean over groups. The 95% interval draws groups, then traces within a group, then seeds
within a trace, each with replacement.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

DRAWS = 2000
SEED = 20260617

Tree = dict[str, dict[str, list[float]]]


def tree_of(values: Iterable[tuple[str, str, float]]) -> Tree:
    """(group, trace, value) rows as group -> trace -> values of its seeds."""
    tree: Tree = defaultdict(lambda: defaultdict(list))
    for group, trace, value in values:
        tree[group][trace].append(value)
    return {group: dict(traces) for group, traces in tree.items()}


def group_mean(tree: Tree) -> float | None:
    """Mean over groups of the mean over traces of the mean over seeds."""
    if not tree:
        return None
    return float(np.mean([np.mean([np.mean(seeds) for seeds in traces.values()]) for traces in tree.values()]))


def average(values: Iterable[tuple[str, str, float]]) -> dict[str, Any]:
    """{"mean", "low", "high", "groups", "traces", "values"}; mean None when there is no value."""
    tree = tree_of(values)
    mean = group_mean(tree)
    if mean is None:
        return {"mean": None, "low": None, "high": None, "groups": 0, "traces": 0, "values": 0}
    rng = np.random.default_rng(SEED)
    # One column of draws a group: seeds within each trace, then traces within the group, then the groups themselves.
    columns = np.empty((DRAWS, len(tree)))
    everyone = np.arange(DRAWS)[:, None]
    for number, traces in enumerate(tree.values()):
        drawn = np.stack(
            [
                np.array(seeds)[rng.integers(0, len(seeds), (DRAWS, len(seeds)))].mean(axis=1)
                for seeds in traces.values()
            ],
            axis=1,
        )
        columns[:, number] = drawn[everyone, rng.integers(0, len(traces), (DRAWS, len(traces)))].mean(axis=1)
    draws = columns[everyone, rng.integers(0, len(tree), (DRAWS, len(tree)))].mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "mean": mean,
        "low": float(low),
        "high": float(high),
        "groups": len(tree),
        "traces": sum(len(traces) for traces in tree.values()),
        "values": sum(len(seeds) for traces in tree.values() for seeds in traces.values()),
    }


def paired(
    rows: list[dict[str, Any]], base: list[dict[str, Any]], figure: str, *, part: str | None = None
) -> list[tuple[str, str, float]]:
    """1 - row / base for each row that has a base of the same trace, profile, delay and seed."""

    def value(row: dict[str, Any]) -> float:
        found = row[figure]
        return float(found[part] if part else found)

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["trace"], row["profile"], row["provision_s"], row["seed"]

    bases = {place(row): value(row) for row in base}
    return [(row["group"], row["trace"], 1 - value(row) / bases[place(row)]) for row in rows if bases.get(place(row))]
