"""Run seeded schedules, or see that every mutant is caught.

python tests/simnet/simnet.py --schedules 10000 --jobs 2     the real logic: no violation may be found
python tests/simnet/simnet.py --mutants --seeds 1000         each deliberate bug: found within so many seeds
python tests/simnet/simnet.py --seed 4182 --tail 80          one schedule, with the end of its trace

The last line on stdout is one JSON object. Exit code 1: a violation, a mutant that survived, or a run whose schedules
did not reach what they must (`sim_coverage.py`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sim_coverage import MOMENTS, missing
from sim_mutants import MUTANTS
from sim_run import Schedule


def one(seed: int) -> tuple[int, str, Any]:
    """(seed, what was violated or "", outcome)."""
    schedule = Schedule(seed)
    try:
        return seed, "", schedule.run()
    except Exception as error:
        return seed, f"{type(error).__name__}: {error}"[:600], None


def schedules(first: int, count: int, jobs: int) -> dict[str, Any]:
    """Run them; a summary."""
    started_s = time.monotonic()
    bad: dict[int, str] = {}
    faults: Counter[str] = Counter()
    coverage: Counter[str] = Counter()
    events = chunks = 0
    with multiprocessing.Pool(jobs) as pool:
        for number, (seed, violation, outcome) in enumerate(pool.imap_unordered(one, range(first, first + count), 8)):
            if violation:
                bad[seed] = violation
                print(f"seed {seed}: {violation[:300]}", file=sys.stderr, flush=True)
            else:
                faults.update(outcome.faults)
                coverage.update(outcome.coverage)
                events += outcome.events
                chunks += outcome.chunks
            if number % 1000 == 999:
                print(f"{number + 1} of {count}, {len(bad)} bad", file=sys.stderr, flush=True)
    return {
        "schedules": count,
        "first_seed": first,
        "violations": {str(seed): bad[seed] for seed in sorted(bad)},
        "faults": dict(sorted(faults.items())),
        "fault_count": sum(faults.values()),
        "events": events,
        "chunks_checked": chunks,
        "moments": {name: coverage[name] for name in MOMENTS},
        "transitions": dict(sorted((name, n) for name, n in coverage.items() if " -> " in name)),
        "fault_state_pairs": dict(sorted((name, n) for name, n in coverage.items() if " x " in name)),
        "not_reached": missing(coverage, count),
        "seconds": round(time.monotonic() - started_s, 1),
    }


def hunt(name: str, seeds: int) -> tuple[str, int | None, str]:
    """The first seed that catches a mutant."""
    with MUTANTS[name]():
        for seed in range(seeds):
            _, violation, _ = one(seed)
            if violation:
                return name, seed, violation[:160]
    return name, None, "survived"


def _hunt(args: tuple[str, int]) -> tuple[str, int | None, str]:
    return hunt(*args)


def mutants(seeds: int, jobs: int) -> dict[str, Any]:
    started_s = time.monotonic()
    found = {}
    with multiprocessing.Pool(jobs, maxtasksperchild=1) as pool:
        for name, seed, violation in pool.imap_unordered(_hunt, [(name, seeds) for name in MUTANTS], 1):
            found[name] = {"seed": seed, "violation": violation}
            print(
                f"{'seed ' + str(seed) if seed is not None else 'SURVIVED':>10}  {name}: {violation[:90]}",
                file=sys.stderr,
            )
    caught = sum(one["seed"] is not None for one in found.values())
    return {
        "mutants": len(found),
        "caught": caught,
        "seeds_each": seeds,
        "found": dict(sorted(found.items())),
        "seconds": round(time.monotonic() - started_s, 1),
    }


def show(seed: int, tail: int) -> int:
    schedule = Schedule(seed)
    print(schedule.options)
    try:
        outcome = schedule.run()
        print(f"no violation; {outcome.events} events, {outcome.chunks} chunks, trace {outcome.trace_hash}")
        return 0
    except Exception:
        traceback.print_exc()
        print("\n".join(list(schedule.world.tail)[-tail:]))
        return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--tail", type=int, default=60)
    parser.add_argument("--mutants", action="store_true")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="also write the summary to this file")
    asked = parser.parse_args()
    if asked.seed is not None:
        return show(asked.seed, asked.tail)
    if asked.mutants:
        summary = mutants(asked.seeds, asked.jobs)
        good = summary["caught"] == summary["mutants"]
    else:
        summary = schedules(asked.first, asked.schedules, asked.jobs)
        good = not summary["violations"] and not summary["not_reached"]
    if asked.out:
        asked.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
