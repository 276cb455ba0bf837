"""The studies of `turboserve compare`: which cases each runs, and what is concluded from their rows.

service   worker-hours at equal service: scaling policies as they are, static ones with their smallest sufficient fleet
latency   chunk latency at equal fleets of ceil(peak active / capacity) workers times 1.0, 1.3 and 1.6
tune      every knob setting that a scaling baseline declares; the best one is kept, for all traces and for each
ablation  our policy with one part turned off at a time
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from turboserve.sim.averages import average, paired
from turboserve.sim.cases import Case, parse_policy, profile_name
from turboserve.sim.policies import POLICIES, policy_class

STUDIES = ("service", "latency", "tune", "ablation")
FLEET_FACTORS = ("1.0", "1.3", "1.6")
WARMUP_S = 600.0
BALANCED_ALREADY = "azure"
"""Sessions there never pause: least-loaded is perfect, so the group is shown apart in the latency study."""
PARTS = ("migrate", "scale", "volatility", "slack", "brownout", "forecast")

STEPS_NOTE = "steps_note"

Row = dict[str, Any]
Tuned = dict[str, dict[str, dict[str, dict[str, float]]]]  # profile -> delay -> policy -> knobs


def cases_of(
    study: str,
    traces: list[str],
    profiles: list[str],
    policies: list[str],
    delays_s: list[float],
    seeds: list[int],
    *,
    tuned: Tuned | None = None,
    steps_floor: int | None = None,
    unit_workers: int = 1,
    audit: bool = False,
    factors: Sequence[str] = FLEET_FACTORS,
    warmup_s: float = WARMUP_S,
) -> list[Case]:
    """The cases of a study, small things first within each policy."""
    cases = []
    for delay_s in delays_s:
        for profile in profiles:
            for policy, fleet in _policies_of(study, policies, factors):
                spec = with_knobs(policy, tuned, profile, delay_s) if study != "tune" else policy
                for trace in traces:
                    for seed in seeds:
                        cases.append(
                            Case(
                                trace=trace,
                                policy=spec,
                                profile=profile,
                                fleet=fleet,
                                provision_s=delay_s,
                                seed=seed,
                                steps_floor=steps_floor if parse_policy(spec)[0] == "turboserve" else None,
                                unit_workers=unit_workers,
                                audit=audit,
                                warmup_s=warmup_s,
                                curve=seed == seeds[0],
                            )
                        )
    return cases


def _policies_of(study: str, policies: list[str], factors: Sequence[str]) -> list[tuple[str, str]]:
    """(policy spec, fleet) pairs of a study."""
    if study == "latency":
        return [(spec, f"peak*{factor}") for factor in factors for spec in policies]
    if study == "tune":
        found = []
        for spec in policies:
            for knobs in getattr(policy_class(parse_policy(spec)[0]), "tuning", ()):
                found.append((spec_of(parse_policy(spec)[0], knobs), "scale"))
        return found
    if study == "ablation":
        off = [f"turboserve:{part}=0" for part in PARTS]
        # Without scaling the fleet must have a size: the smallest that serves.
        return [(spec, "least" if "scale=0" in spec else "scale") for spec in ("turboserve", *off, "published")]
    return [(spec, "scale" if policy_class(parse_policy(spec)[0]).scales else "least") for spec in policies]


def spec_of(name: str, knobs: dict[str, float]) -> str:
    return name + (":" + ",".join(f"{k}={v:g}" for k, v in knobs.items()) if knobs else "")


def with_knobs(spec: str, tuned: Tuned | None, profile: str, delay_s: float) -> str:
    """The spec with its tuned knobs; knobs that it names itself win."""
    name, knobs = parse_policy(spec)
    found = (tuned or {}).get(profile_name(profile), {}).get(f"{delay_s:g}", {}).get(name, {})
    return spec_of(name, found | knobs)


def default_policies(study: str) -> list[str]:
    """What a study compares when nobody says."""
    if study == "tune":
        return [name for name in POLICIES if getattr(policy_class(name), "tuning", ())]
    return list(POLICIES)


def at_every_delay(rows: list[Row]) -> list[Row]:
    """Rows of least fixed fleets once more for each other delay that the same trace, profile and seed were run with:
    nothing is provisioned there, so all but the clairvoyant's bill is the same."""
    references: dict[tuple[Any, ...], dict[float, float]] = defaultdict(dict)
    for row in rows:
        references[_setting(row)][row["provision_s"]] = row["reference_worker_hours"]
    found = list(rows)
    present = {(_setting(r), label(r), r["fleet"], r["provision_s"]) for r in rows}
    for row in rows:
        if row["fleet"] != "least" or part_off(row):
            continue
        for delay_s, hours in references[_setting(row)].items():
            place = (_setting(row), label(row), row["fleet"], delay_s)
            if place not in present:
                present.add(place)
                found.append(row | {"provision_s": delay_s, "reference_worker_hours": hours})
    return found


def _setting(row: Row) -> tuple[Any, ...]:
    return row["trace"], row["profile"], row["seed"], row["unit_workers"]


def label(row: Row) -> str:
    """How a row's policy is called in tables: with its knobs, and its steps where `told_apart` noted them."""
    return spec_of(row["policy"], row["knobs"]) + (f", {row[STEPS_NOTE]}" if row.get(STEPS_NOTE) else "")


def policy_of(name: str) -> str:
    """The policy that a label begins with."""
    return re.split("[:,]", name)[0]


def told_apart(rows: list[Row]) -> list[Row]:
    """The rows with a note on those that were allowed other denoise steps than is usual, where both are there.

    Usual is the lowest floor at fleets that scale or were found (cost at equal service), and full steps at equal fleets
    (latency). Runs of both are different policies: no average holds the two.
    """
    floors: dict[tuple[str, bool], set[int | None]] = defaultdict(set)
    for row in rows:
        floors[_steps_group(row)].add(row.get("steps_floor"))
    found = []
    for row in rows:
        group, floor = _steps_group(row), row.get("steps_floor")
        given = [one for one in floors[group] if one is not None]
        equal_fleets = group[1]
        usual = None if equal_fleets and None in floors[group] else min(given, default=None)
        note = "full steps" if floor is None else f"down to {floor} steps"
        found.append(row if floor == usual else row | {STEPS_NOTE: note})
    return found


def _steps_group(row: Row) -> tuple[str, bool]:
    return row["policy"], row["fleet"].startswith("peak")


def settings_of(rows: list[Row]) -> list[tuple[str, float]]:
    return sorted({(row["profile"], row["provision_s"]) for row in rows})


def choose_knobs(rows: list[Row]) -> Tuned:
    """Per profile, delay and policy one setting for all traces: most traces at equal service, then least cost.

    Cost is the mean over traces of worker-hours over the clairvoyant's, so that large traces do not decide alone.
    """
    tuned: Tuned = {}
    for profile, delay_s in settings_of(rows):
        mine = [row for row in rows if (row["profile"], row["provision_s"]) == (profile, delay_s)]
        by_knobs: dict[str, list[Row]] = defaultdict(list)
        for row in mine:
            by_knobs[label(row)].append(row)
        for name in sorted({row["policy"] for row in mine}):
            options = [group for group in by_knobs.values() if group[0]["policy"] == name]
            best = min(options, key=lambda group: (-sum(row["equal_service"] for row in group), cost_ratio(group)))
            tuned.setdefault(profile, {}).setdefault(f"{delay_s:g}", {})[name] = best[0]["knobs"]
    return tuned


def cost_ratio(rows: list[Row]) -> float:
    """Mean of worker-hours over the clairvoyant's."""
    return sum(row["worker_hours"] / max(1e-9, row["reference_worker_hours"]) for row in rows) / len(rows)


def conclude(rows: list[Row]) -> dict[str, Any]:
    """Averages with intervals, by profile and delay, of whatever studies the rows hold."""
    out: dict[str, Any] = {}
    for profile, delay_s in settings_of(rows):
        mine = [row for row in rows if (row["profile"], row["provision_s"]) == (profile, delay_s)]
        out[f"{profile} D={delay_s:g}"] = {"service": _service(mine), "latency": _latency(mine)}
    return out


def _service(rows: list[Row]) -> dict[str, Any]:
    """Of each policy that scales or found its fleet: cost beside the clairvoyant and beside static least-loaded."""
    free = [row for row in rows if row["fleet"] in ("scale", "least")]
    base = [row for row in free if row["policy"] == "static-least" and row["fleet"] == "least" and row["equal_service"]]
    found: dict[str, Any] = {}
    for name in _labels(free):
        mine = [row for row in free if label(row) == name]
        served = [row for row in mine if row["equal_service"]]
        found[name] = {
            "runs": len(mine),
            "runs_at_equal_service": len(served),
            "traces_at_equal_service": sorted({row["trace"] for row in served}),
            "over_clairvoyant": average(
                (row["group"], row["trace"], row["worker_hours"] / row["reference_worker_hours"])
                for row in mine
                if row["reference_worker_hours"]
            ),
            "saved_against_static_least": average(paired(served, base, "worker_hours")),
            "on_time_share": average((row["group"], row["trace"], row["on_time_share"]) for row in mine),
            "reduced_step_share": average((row["group"], row["trace"], row["reduced_step_share"]) for row in mine),
            "dollars_per_on_time_video_hour": average(
                (row["group"], row["trace"], row["cost_per_on_time_video_hour"])
                for row in mine
                if row["cost_per_on_time_video_hour"] is not None
            ),
        }
    return found


def _latency(rows: list[Row]) -> dict[str, Any]:
    """At each fleet factor: latency beside static least-loaded and round robin, balance and moves."""
    found: dict[str, Any] = {}
    for fleet in sorted({row["fleet"] for row in rows if row["fleet"].startswith("peak")}):
        here = [row for row in rows if row["fleet"] == fleet]
        bases = {name: [row for row in here if row["policy"] == name] for name in ("static-least", "static-rr")}
        found[fleet] = {}
        for name in _labels(here):
            mine = [row for row in here if label(row) == name]
            swings = [row for row in mine if row["group"] != BALANCED_ALREADY]
            figures: dict[str, Any] = {"runs": len(mine)}
            for base, base_rows in bases.items():
                figures[f"worst_service_lower_than_{base}"] = average(
                    paired(swings, base_rows, "service_s", part="max")
                )
            for figure in ("service_s", "latency_s"):
                for part in ("p50", "mean", "p99", "max"):
                    figures[f"{figure.removesuffix('_s')}_{part}_s"] = average(
                        (row["group"], row["trace"], row[figure][part])
                        for row in swings
                        if row[figure][part] is not None
                    )
            for figure in ("balance_excess", "moves_per_session_hour", "on_time_share"):
                figures[figure] = average((row["group"], row["trace"], row[figure]) for row in swings)
            figures[f"worst_service_s_{BALANCED_ALREADY}"] = average(
                (row["group"], row["trace"], row["service_s"]["max"])
                for row in mine
                if row["group"] == BALANCED_ALREADY and row["service_s"]["max"] is not None
            )
            found[fleet][name] = figures
    return found


def part_off(row: Row) -> bool:
    """Whether the row is of our policy with something changed: an ablation, no rival."""
    return bool(row["policy"] == "turboserve" and row["knobs"])


def ablations(rows: list[Row]) -> list[dict[str, Any]]:
    """Each part turned off, and the published rule, beside the whole policy on the same windows, delays and seeds."""
    places = {_place(row) for row in rows if part_off(row)}
    here = [row for row in rows if row["fleet"] in ("scale", "least") and _place(row) in places]
    # Beside the whole policy with the same steps.
    wholes: dict[str, dict[tuple[Any, ...], Row]] = defaultdict(dict)
    for row in here:
        if row["policy"] == "turboserve" and not row["knobs"]:
            wholes[row.get(STEPS_NOTE, "")][_place(row)] = row
    found = []
    for name in _labels([row for row in here if part_off(row) or label(row) == "published"]):
        mine = [row for row in here if label(row) == name]
        note = mine[0].get(STEPS_NOTE, "")
        whole = wholes[note]
        mine = [row for row in mine if _place(row) in whole]
        if not mine:
            continue
        found.append(
            {
                "off": spec_of(mine[0]["policy"], mine[0]["knobs"]).removeprefix("turboserve:").removesuffix("=0")
                + (f", {note}" if note else ""),
                "runs": len(mine),
                "runs_at_equal_service": sum(row["equal_service"] for row in mine),
                "cost": average(
                    (row["group"], row["trace"], row["worker_hours"] / whole[_place(row)]["worker_hours"])
                    for row in mine
                ),
                "least_on_time": min(row["on_time_share"] for row in mine),
                "reduced": sum(row["reduced_step_share"] for row in mine) / len(mine),
            }
        )
    return found


def _place(row: Row) -> tuple[Any, ...]:
    return *_setting(row), row["provision_s"]


def _labels(rows: list[Row]) -> list[str]:
    """Policies in the order of POLICIES, each with its knobs."""
    order = {name: number for number, name in enumerate(POLICIES)}
    return sorted({label(row) for row in rows}, key=lambda name: (order[policy_of(name)], name))


def by_trace(rows: list[Row]) -> list[dict[str, Any]]:
    """Per trace, profile and delay: our bill, the cheapest baseline at equal service (its knobs chosen in hindsight
    for this trace), the least static fleet, and the clairvoyant; means over seeds."""
    found = []
    free = [row for row in rows if row["fleet"] in ("scale", "least")]
    for trace, profile, delay_s in sorted({(r["trace"], r["profile"], r["provision_s"]) for r in free}):
        mine = [r for r in free if (r["trace"], r["profile"], r["provision_s"]) == (trace, profile, delay_s)]
        hours: dict[str, float] = {}
        for name in _labels(mine):
            runs = [r for r in mine if label(r) == name]
            if all(r["equal_service"] for r in runs):
                hours[name] = sum(r["worker_hours"] for r in runs) / len(runs)
        rivals = {name: bill for name, bill in hours.items() if policy_of(name) != "turboserve"}
        best = min(rivals, key=lambda name: rivals[name], default=None)
        found.append(
            {
                "trace": trace,
                "profile": profile,
                "provision_s": delay_s,
                "clairvoyant": mine[0]["reference_worker_hours"],
                "turboserve": hours.get("turboserve"),
                "best_baseline": best,
                "best_baseline_worker_hours": rivals.get(best) if best else None,
                "static_least": hours.get("static-least"),
            }
        )
    return found


def cheaper_baselines(rows: list[Row]) -> list[dict[str, Any]]:
    """Where a baseline at equal service costs less than our policy, or ours does not give that service."""
    found = []
    free = [row for row in rows if row["fleet"] in ("scale", "least")]
    plain = [row for row in free if label(row) == "turboserve"]
    for own in plain:
        rivals = [
            row
            for row in free
            if row["policy"] != "turboserve"
            and row["equal_service"]
            and all(row[k] == own[k] for k in ("trace", "profile", "provision_s", "seed", "unit_workers"))
            and (row["worker_hours"] < own["worker_hours"] or not own["equal_service"])
        ]
        if rivals:
            best = min(rivals, key=lambda row: row["worker_hours"])
            found.append(
                {k: own[k] for k in ("trace", "profile", "provision_s", "seed")}
                | {
                    "ours": own["worker_hours"],
                    "ours_at_equal_service": own["equal_service"],
                    "rival": label(best),
                    "rival_worker_hours": best["worker_hours"],
                }
            )
    return found
