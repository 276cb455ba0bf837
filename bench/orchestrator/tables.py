"""The tables of bench/results/simulation/README.md, from a grid's rows.

    python -m bench.orchestrator.tables OUT

Prints Markdown. Every figure with an interval is a mean over source groups with a bootstrap 95% interval over groups,
windows and seeds (`sim/averages.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from turboserve.sim.averages import average, paired
from turboserve.sim.grid_rows import read_rows
from turboserve.sim.policies import POLICIES
from turboserve.sim.studies import BALANCED_ALREADY, at_every_delay, label, policy_of, told_apart

Row = dict[str, Any]


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def interval(found: dict[str, Any], scale: float = 1.0, digits: int = 2) -> str:
    """`mean [low, high]`, or a dash."""
    if found["mean"] is None:
        return "-"
    m, low, high = (scale * found[k] for k in ("mean", "low", "high"))
    return f"{m:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def over(rows: list[Row], value: Callable[[Row], float]) -> dict[str, Any]:
    return average((r["group"], r["trace"], value(r)) for r in rows)


def table(heads: list[str], lines: list[list[str]]) -> None:
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def ours(rows: list[Row]) -> list[Row]:
    return [r for r in rows if label(r) == "turboserve" and r["fleet"] == "scale"]


def cost_by_trace(rows: list[Row]) -> None:
    """One line a window and delay; bills are means over seeds."""
    lines = []
    free = [r for r in rows if r["fleet"] in ("scale", "least")]
    for trace, delay_s in sorted({(r["trace"], r["provision_s"]) for r in ours(rows)}):
        here = [r for r in free if (r["trace"], r["provision_s"]) == (trace, delay_s)]
        mine = ours(here)
        reference = mean(r["reference_worker_hours"] for r in mine)
        bill = mean(r["worker_hours"] for r in mine)
        served = sum(r["equal_service"] for r in mine)
        rivals: dict[str, float] = {}
        for name in sorted({label(r) for r in here if r["policy"] != "turboserve"}):  # of equals always the same one
            runs = [r for r in here if label(r) == name]
            if all(r["equal_service"] for r in runs):
                rivals[name] = mean(r["worker_hours"] / r["reference_worker_hours"] for r in runs)
        best = min(rivals, key=lambda name: rivals[name], default=None)
        least = rivals.get("static-least")
        ratio = mean(r["worker_hours"] / r["reference_worker_hours"] for r in mine)
        saved = [] if least is None else [1 - ratio / least, 1 - 1 / least]
        lines.append(
            [
                trace,
                f"{delay_s:g}",
                f"{reference:.2f}",
                f"{bill:.2f} ({ratio:.2f}x)",
                f"{min(100 * r['on_time_share'] for r in mine):.2f}",
                f"{max(100 * r['reduced_step_share'] for r in mine):.2f}",
                f"{served}/{len(mine)}",
                f"{best} {rivals[best]:.2f}x" if best else "-",
                f"{least:.2f}x" if least else "-",
                " / ".join(f"{100 * x:.0f}%" for x in saved) or "-",
            ]
        )
    heads = ["window", "D s", "clairvoyant", "turboserve", "least on time %", "most reduced %", "runs at service"]
    table([*heads, "cheapest baseline", "least static-least", "saved: ours / clairvoyant"], lines)


def cost_by_group(rows: list[Row]) -> None:
    lines = []
    for delay_s in sorted({r["provision_s"] for r in rows}):
        here = [r for r in rows if r["provision_s"] == delay_s]
        base = [r for r in here if r["fleet"] == "least" and r["policy"] == "static-least" and r["equal_service"]]
        for name in sorted({label(r) for r in here if r["fleet"] in ("scale", "least")}, key=_order):
            mine = [r for r in here if label(r) == name and r["fleet"] in ("scale", "least")]
            served = [r for r in mine if r["equal_service"]]
            lines.append(
                [
                    f"{delay_s:g}",
                    name,
                    f"{len(served)}/{len(mine)}",
                    str(len({r["trace"] for r in mine})),
                    interval(over(mine, lambda r: r["worker_hours"] / r["reference_worker_hours"])),
                    interval(average(paired(served, base, "worker_hours")), 100, 1),
                    interval(over(mine, lambda r: 100 * r["on_time_share"]), 1, 2),
                    interval(
                        over(
                            [r for r in mine if r["cost_per_on_time_video_hour"]],
                            lambda r: r["cost_per_on_time_video_hour"],
                        ),
                        1,
                        3,
                    ),
                ]
            )
        bound = [r | {"worker_hours": r["reference_worker_hours"]} for r in ours(here)]
        if bound and base:
            saved = interval(average(paired(bound, base, "worker_hours")), 100, 1)
            lines.append(
                [f"{delay_s:g}", "(clairvoyant)", "", str(len({r["trace"] for r in bound})), "1", saved, "", ""]
            )
    heads = ["D s", "policy", "runs at service", "windows", "over clairvoyant", "saved against static-least %"]
    table([*heads, "on time %", "$ per on-time video hour"], lines)


def _order(name: str) -> tuple[int, str]:
    return list(POLICIES).index(policy_of(name)), name


def latency(rows: list[Row]) -> None:
    lines = []
    for fleet in sorted({r["fleet"] for r in rows if r["fleet"].startswith("peak")}):
        here = [r for r in rows if r["fleet"] == fleet and r["group"] != BALANCED_ALREADY]
        bases = {name: [r for r in here if r["policy"] == name] for name in ("static-least", "static-rr")}
        for name in sorted({label(r) for r in here}, key=_order):
            mine = [r for r in here if label(r) == name]

            def part(figure: str, which: str, rows_of: list[Row] = mine) -> str:
                return f"{over(rows_of, lambda row: row[figure][which])['mean']:.2f}"

            lines.append(
                [
                    fleet.removeprefix("peak*") + "x",
                    name,
                    str(len(mine)),
                    *(
                        interval(average(paired(mine, base, "service_s", part="max")), 100, 1)
                        for base in bases.values()
                    ),
                    " / ".join(part("service_s", w) for w in ("p50", "mean", "p99", "max")),
                    " / ".join(part("latency_s", w) for w in ("p50", "mean", "p99", "max")),
                    interval(over(mine, lambda r: r["balance_excess"]), 1, 3),
                    interval(over(mine, lambda r: r["moves_per_session_hour"])),
                ]
            )
    heads = ["fleet", "policy", "runs", "worst service below static-least %", "below static-rr %"]
    tail = ["service p50 / mean / p99 / worst s", "latency p50 / mean / p99 / worst s", "balance excess"]
    table([*heads, *tail, "moves / session-hour"], lines)


def worst_by_trace(rows: list[Row], fleet: str = "peak*1.0") -> None:
    here = [r for r in rows if r["fleet"] == fleet]
    names = sorted({label(r) for r in here}, key=_order)
    lines = []
    for trace in sorted({r["trace"] for r in here}):
        mine = [r for r in here if r["trace"] == trace]
        cells = []
        for name in names:
            values = [r["service_s"]["max"] for r in mine if label(r) == name]
            cells.append(f"{mean(values):.2f}" if values else "-")
        lines.append([trace, "/".join(str(n) for n in sorted({r["fixed_workers"] for r in mine})), *cells])
    table(["window", "workers", *names], lines)


def by_trace_and_policy(rows: list[Row]) -> None:
    """Small studies: every window and policy, means over seeds."""
    lines = []
    keys = sorted({(r["trace"], _order(label(r)), r["fleet"]) for r in rows})
    for trace, (_, name), fleet in keys:
        mine = [r for r in rows if (r["trace"], label(r), r["fleet"]) == (trace, name, fleet)]
        lines.append(
            [
                trace,
                name,
                fleet,
                "/".join(str(n) for n in sorted({r["fixed_workers"] for r in mine if r["fixed_workers"]})) or "scales",
                f"{mean(r['worker_hours'] for r in mine):.2f}",
                f"{mean(r['worker_hours'] / r['reference_worker_hours'] for r in mine):.2f}",
                f"{100 * min(r['on_time_share'] for r in mine):.2f}",
                f"{100 * mean(r['reduced_step_share'] for r in mine):.2f}",
                f"{mean(r['service_s']['max'] for r in mine):.2f}",
                f"{mean(r['balance_excess'] for r in mine):.3f}",
                f"{mean(r['moves_per_session_hour'] for r in mine):.2f}",
                f"{sum(r['equal_service'] for r in mine)}/{len(mine)}",
            ]
        )
    heads = ["window", "policy", "fleet", "workers", "worker-hours", "/ clairvoyant", "least on time %", "reduced %"]
    table([*heads, "worst service s", "balance excess", "moves / session-hour", "at service"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    rows = at_every_delay(told_apart(read_rows(out / "rows.jsonl")))
    parts = [r for r in rows if r["policy"] == "turboserve" and r["knobs"]]
    whole = [r for r in rows if not (r["policy"] == "turboserve" and r["knobs"])]
    for profile in sorted({r["profile"] for r in whole}, reverse=True):
        mine = [r for r in whole if r["profile"] == profile]
        print(f"## {profile}\n\n### Cost by window\n")
        cost_by_trace(mine)
        print("### Cost by group\n")
        cost_by_group(mine)
        print("### Latency at equal fleets\n")
        latency(mine)
        print("### Worst service by window\n")
        worst_by_trace(mine)
    if parts:
        print("## Ablations\n")
        beside = {(r["trace"], r["seed"]) for r in parts}
        same = [r for r in ours(rows) if (r["trace"], r["seed"]) in beside and r["provision_s"] == 30.0]
        by_trace_and_policy([*(r for r in same if r["profile"] == "k4"), *parts])
    for name in ("units", "sweep", "fleets"):
        more = told_apart(read_rows(out / name / "rows.jsonl"))
        if more:
            print(f"## {name}\n")
            by_trace_and_policy(more)


if __name__ == "__main__":
    main()
