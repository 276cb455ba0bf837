"""The summary figures, computed again from chunks, decisions and trace; then held against report.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from turboserve.audit.findings import TOLERANCE_S, Findings
from turboserve.audit.fleet import Lifetime
from turboserve.audit.run_files import Run, TracePeriods, is_number
from turboserve.audit.whereabouts import Whereabouts

SECONDS_PER_HOUR = 3600.0
PLAYER_DELAY_CHUNKS = 2.5
"""The viewer's player starts this many chunk targets after the period becomes active."""

EXACT = ("chunks", "delivered", "shed", "batch_n_max")
CLOSE = ("on_time_share", "reduced_step_share", "worker_hours", "cost")
SPREADS = ("service_s", "latency_s", "first_chunk_s")


def spread(values: np.ndarray) -> dict[str, Any]:
    """mean, p50, p95, p99 (nearest rank) and max in seconds; None for nothing."""
    if not values.size:
        return dict.fromkeys(("mean", "p50", "p95", "p99", "max"))
    ranked = np.sort(values)
    at = {f"p{q}": float(ranked[max(0, math.ceil(q * ranked.size / 100) - 1)]) for q in (50, 95, 99)}
    return {"mean": float(values.mean()), **at, "max": float(ranked[-1])}


def run_end_s(run: Run, trace: TracePeriods) -> float:
    """max(horizon, last finish or shedding), where run and bill end."""
    ends = [trace.horizon_s, run.chunks["finish_s"].max(initial=0.0), run.shed["time_s"].max(initial=0.0)]
    return float(max(ends))


def recompute(
    run: Run,
    trace: TracePeriods,
    fleet: dict[str, Lifetime],
    where: Whereabouts,
    profile: dict,
    *,
    pace: str,
    warmup_s: float,
) -> dict:
    """The figures of report.json over [warmup_s, end]; rows must name chunks of the trace."""
    chunks, chunk_s, target_s = run.chunks, profile["chunk_s"], profile["chunk_target_s"]
    row = trace.first_period[chunks["session_id"]] + chunks["period"]
    ordinal = chunks["index"] - trace.first_index[row]
    active_s = trace.active_s[row]
    service = chunks["finish_s"] - chunks["start_s"]
    if pace == "realtime":
        on_time = chunks["finish_s"] <= active_s + PLAYER_DELAY_CHUNKS * target_s + ordinal * chunk_s + TOLERANCE_S
    else:
        on_time = service <= target_s + TOLERANCE_S
    order = np.lexsort((chunks["index"], chunks["session_id"]))
    previous = np.full(len(order), -np.inf)
    same = chunks["session_id"][order][1:] == chunks["session_id"][order][:-1]
    previous[order[1:][same]] = chunks["finish_s"][order[:-1][same]]
    latency = chunks["finish_s"] - np.maximum(chunks["release_s"], previous)
    counted = chunks["release_s"] >= warmup_s - TOLERANCE_S
    shed = int(np.sum(shed_release_s(run, trace, pace, chunk_s) >= warmup_s - TOLERANCE_S))
    delivered = int(counted.sum())
    end_s = run_end_s(run, trace)
    billed_s = sum(
        max(0.0, min(life.gone_s, end_s) - max(life.request_s, warmup_s))
        for life in fleet.values()
        if life.request_s < math.inf
    )
    events = [(line["event"], line["time_s"]) for line in run.decisions]

    def happened(event: str) -> int:
        return sum(1 for name, time_s in events if name == event and time_s >= warmup_s - TOLERANCE_S)

    return {
        "chunks": delivered + shed,
        "delivered": delivered,
        "shed": shed,
        "on_time_share": float((on_time & counted).sum() / max(1, delivered + shed)),
        "service_s": spread(service[counted]),
        "latency_s": spread(latency[counted]),
        "first_chunk_s": spread((chunks["finish_s"] - active_s)[counted & (ordinal == 0)]),
        "batch_n_max": int(chunks["n"][counted].max(initial=0)),
        "reduced_step_share": float((chunks["steps"] < profile["denoise_steps"])[counted].sum() / max(1, delivered)),
        "worker_hours": billed_s / SECONDS_PER_HOUR,
        "cost": billed_s / SECONDS_PER_HOUR * profile.get("price_per_worker_hour", 1.0),
        "workers": {"mean": billed_s / max(TOLERANCE_S, end_s - warmup_s), "max": _most_billed(fleet, warmup_s, end_s)},
        "migrations": happened("migrate"),
        "suspends": happened("suspend"),
        "resumes": happened("resume"),
        "scale_outs": happened("worker_request"),
        "scale_ins": happened("worker_release"),
        "balance_excess": balance_excess(run, trace, fleet, where, warmup_s, end_s),
        "end_s": end_s,
    }


def shed_release_s(run: Run, trace: TracePeriods, pace: str, chunk_s: float) -> np.ndarray:
    """When the shed chunks were released (closed: a chunk never begun counts from its period's start)."""
    shed = run.shed
    known = shed["session_id"] >= 0
    row = trace.first_period[shed["session_id"][known]] + shed["period"][known]
    ordinal = shed["index"][known] - trace.first_index[row]
    late = np.maximum(ordinal - 1, 0) * chunk_s if pace == "realtime" else 0.0
    return trace.active_s[row] + late


def _most_billed(fleet: dict[str, Lifetime], warmup_s: float, end_s: float) -> int:
    changes = []
    for life in fleet.values():
        from_s, to_s = max(life.request_s, warmup_s), min(life.gone_s, end_s)
        if to_s > from_s:
            changes += [(from_s, 1), (to_s, -1)]
    billed = most = 0
    for _, change in sorted(changes):
        billed += change
        most = max(most, billed)
    return most


def balance_excess(
    run: Run, trace: TracePeriods, fleet: dict[str, Lifetime], where: Whereabouts, warmup_s: float, end_s: float
) -> float:
    """Time-weighted mean of (most active sessions on one worker - ceil(active / workers)).

    A session is active from its period's start to that period's last chunk, wherever it is. It counts on a worker
    while its state is there: on a migrate's source until its end, on a resume's target from its end. `workers` are
    those ready and neither drained nor gone. Moments with no worker ready count as 0.
    """
    spans = _active_spans(run, trace)
    # (time, change, worker), or the name of a total: "workers" that take sessions, "active" sessions anywhere.
    changes: list[tuple[float, int, str]] = [(t, c, "workers") for t, c in _taking_workers(run, fleet, end_s)]
    for mine in spans.values():
        for active_from_s, active_to_s in mine:
            changes += [(active_from_s, 1, "active"), (active_to_s, -1, "active")]
    for session, worker, from_s, to_s in _owned(where):
        code = trace.code.get(session)
        for active_from_s, active_to_s in spans.get(code, ()) if code is not None else ():
            begin_s, finish_s = max(from_s, active_from_s), min(to_s, active_to_s)
            if finish_s > begin_s:
                changes += [(begin_s, 1, f"worker {worker}"), (finish_s, -1, f"worker {worker}")]
    changes.sort(key=lambda change: (change[0], change[1]))
    load: dict[str, int] = {}
    workers_with: dict[int, int] = {}  # load -> how many workers have it
    active = workers = most = 0
    total = before_s = 0.0
    before_s = warmup_s
    for time_s, change, worker in changes:
        now_s = min(max(time_s, warmup_s), end_s)
        if now_s > before_s:
            if workers > 0:
                total += (most - -(-active // workers)) * (now_s - before_s)
            before_s = now_s
        if worker == "workers":
            workers += change
            continue
        if worker == "active":
            active += change
            continue
        old = load.get(worker, 0)
        load[worker] = old + change
        workers_with[old] = workers_with.get(old, 0) - 1
        workers_with[old + change] = workers_with.get(old + change, 0) + 1
        if old + change > most or (old == most and workers_with[old] == 0):
            most = old + change
    return total / max(TOLERANCE_S, end_s - warmup_s)


def _taking_workers(run: Run, fleet: dict[str, Lifetime], end_s: float) -> list[tuple[float, int]]:
    """Changes of the number of workers that are ready and not drained."""
    changes: list[tuple[float, int]] = []
    drains: dict[str, list[tuple[float, bool]]] = {}
    for line in run.decisions:
        if line["event"] == "drain" and line.get("worker") is not None:
            drains.setdefault(str(line["worker"]), []).append((line["time_s"], bool(line.get("undo"))))
    for worker, life in fleet.items():
        if life.ready_s == math.inf:
            continue
        changes.append((life.ready_s, 1))
        drained = False
        for time_s, undo in drains.get(worker, ()):
            if time_s <= life.gone_s and drained == undo:
                drained = not undo
                changes.append((time_s, 1 if undo else -1))
        if not drained:
            changes.append((min(life.gone_s, end_s), -1))
    return changes


def _owned(where: Whereabouts) -> list[tuple[str, str, float, float]]:
    """On whom a session counts when: its stays, each drawn out to the end of the transfer that ends it."""
    leaving = {(session, from_s): to_s for event, session, _, _, from_s, to_s in where.transfers if event != "resume"}
    return [
        (session, worker, from_s, leaving.get((session, to_s), to_s)) for session, worker, from_s, to_s in where.stays
    ]


def _active_spans(run: Run, trace: TracePeriods) -> dict[int, list[tuple[float, float]]]:
    """Per session: [period's start, its last chunk delivered or shed], overlapping ones joined."""
    last = np.full(len(trace.session), -np.inf)
    for table, column in ((run.chunks, "finish_s"), (run.shed, "time_s")):
        known = table["session_id"] >= 0
        row = trace.first_period[table["session_id"][known]] + table["period"][known]
        np.maximum.at(last, row, table[column][known])
    spans: dict[int, list[tuple[float, float]]] = {}
    for code, from_s, to_s in zip(trace.session.tolist(), trace.active_s.tolist(), last.tolist(), strict=True):
        mine = spans.setdefault(code, [])
        if mine and from_s <= mine[-1][1]:
            mine[-1] = (mine[-1][0], max(mine[-1][1], to_s))
        elif to_s > from_s:
            mine.append((from_s, to_s))
    return spans


def check_report(report: dict, figures: dict, findings: Findings) -> None:
    """The report must not claim other figures than its own files give."""

    def differs(claimed: object, found: float, scale: float) -> bool:
        return not is_number(claimed) or abs(claimed - found) > scale * max(1.0, abs(found))  # type: ignore[operator]

    for key in EXACT + CLOSE:
        scale = 1e-5 if key in CLOSE else 1e-9
        if key in report and differs(report[key], figures[key], scale):
            findings.add("report", f"report.json says {key} {report[key]}; its files give {figures[key]}")
    for key in SPREADS:
        for part in ("mean", "max"):
            if not isinstance(report.get(key), dict) or part not in report[key]:
                continue
            claimed = report[key][part]
            if figures[key][part] is None or claimed is None:
                if figures[key][part] is not claimed:
                    findings.add(
                        "report", f"report.json says {key}.{part} {claimed}; its files give {figures[key][part]}"
                    )
            elif differs(claimed, figures[key][part], 5e-6):
                findings.add("report", f"report.json says {key}.{part} {claimed}; its files give {figures[key][part]}")
