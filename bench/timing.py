"""How a benchmark measures: contenders in turn, median and spread, a floor from the same run.

Contenders take turns (`alternate`), because a neighbour's burst on a shared machine would otherwise fall on one of
them alone. Times are wall clock unless a caller passes another clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Timing:
    """Repeated measurements of one thing, in milliseconds."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def p20_ms(self) -> float:
        return float(np.percentile(self.samples_ms, 20))

    @property
    def p80_ms(self) -> float:
        return float(np.percentile(self.samples_ms, 80))


def alternate(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times every contender once a round, in an order that turns with the rounds. `clock` answers in seconds."""
    names = list(contenders)
    for name in names:
        for _ in range(warmup):
            contenders[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began_s = clock()
            contenders[name]()
            samples[name].append((clock() - began_s) * 1e3)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def memory_copy(payload_bytes: int) -> Callable[[], None]:
    """A contender that copies this many bytes once, between buffers whose pages are there: the memory's own speed."""
    source = np.ones(payload_bytes, np.uint8)
    target = np.zeros(payload_bytes, np.uint8)

    def copy() -> None:
        np.copyto(target, source)

    return copy


def max_rel_err(actual: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference, relative to the reference's largest magnitude. Shapes must agree."""
    if actual.shape != reference.shape:
        raise ValueError(f"shape {actual.shape}, the reference has {reference.shape}")
    difference = np.abs(actual.astype(np.float64) - reference.astype(np.float64)).max()
    return float(difference / max(float(np.abs(reference.astype(np.float64)).max()), 1e-300))
