"""The real gateway, controller and worker logic under a seeded network: a part of what `make simnet` and `make mutants`
run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sim_mutants import MUTANTS
from sim_run import Schedule, run_seed
from simnet import hunt

SEEDS = range(120)
ONCE_FAILED = (14, 30, 86, 118, 251, 427, 537, 1093, 1592, 1606, 4182, 5200, 30195)
"""Schedules that found a bug. A change of the logic or the world makes them other schedules; they stay anyway."""
QUICK = {
    "credit_before_inputs_are_durable": 3,
    "replayed_credit_carries_the_newest_prompt": 20,
    "sessions_of_a_lost_worker_are_left": 5,
    "epoch_does_not_grow": 5,
    "copy_is_freed_before_its_successor_is_there": 20,
    "point_without_what_nobody_has_accepted": 3,
    "chunk_in_another_format_is_not_asked_for": 20,
}
"""A few mutants, and within how many seeds each is caught."""


def test_schedules_break_no_promise() -> None:
    chunks = between_nodes = 0
    for seed in SEEDS:
        outcome = run_seed(seed)
        chunks += outcome.chunks
        between_nodes += outcome.coverage["a point went to another node"]
    assert between_nodes > len(SEEDS) / 4, "half of the schedules have joined workers"
    assert chunks > 50 * len(SEEDS), "schedules in which hardly anything is made prove nothing"


@pytest.mark.parametrize("seed", ONCE_FAILED)
def test_schedules_that_once_failed(seed: int) -> None:
    run_seed(seed)


@pytest.mark.parametrize("name", QUICK)
def test_mutants_are_caught(name: str) -> None:
    _, seed, violation = hunt(name, QUICK[name])
    assert seed is not None, f"{name} was not caught within {QUICK[name]} seeds"
    assert violation


def test_there_are_enough_mutants() -> None:
    assert len(MUTANTS) >= 25


def test_the_same_seed_is_the_same_schedule() -> None:
    """Also in another process, whose hashes of strings are others."""
    program = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from sim_run import run_seed\n"
        "print(json.dumps([run_seed(seed).trace_hash for seed in (3, 4)]))"
    )
    here = [Schedule(seed).run().trace_hash for seed in (3, 4)]
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(there.stdout) == here
