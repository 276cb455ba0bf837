"""The rules about chunks, batches and memory, one function each, over columns.

A row of `chunks` is one chunk of one session in one batch. All rules allow `TOLERANCE_S`.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from turboserve.audit.findings import TOLERANCE_S, Findings
from turboserve.audit.fleet import Lifetime
from turboserve.audit.run_files import Run, TracePeriods
from turboserve.audit.whereabouts import Whereabouts

MICROS_PER_SESSION = 1 << 42
"""Room for 50 days in microseconds: (session, time) as one sortable integer."""


def _where(run: Run, trace: TracePeriods, row: int) -> dict:
    chunks = run.chunks
    code = int(chunks["session_id"][row])
    return {
        "session": trace.names[code] if code >= 0 else "not in the trace",
        "index": chunks["index"][row],
        "worker": run.worker_names[chunks["worker"][row]],
        "time_s": chunks["start_s"][row],
    }


def each_chunk_once(run: Run, trace: TracePeriods, findings: Findings) -> np.ndarray:
    """Every chunk the trace asks for is delivered once or shed once, in the period that asked for it.

    Answers which chunk rows name a chunk the trace has; only those can be judged further.
    """
    offset = np.concatenate([[0], np.cumsum(trace.chunk_total)])
    count = np.zeros(offset[-1], np.int64)
    valid_chunks = np.zeros(0, bool)
    for kind, table in (("delivered", run.chunks), ("shed", run.shed)):
        session, index = table["session_id"], table["index"]
        total = np.where(session >= 0, trace.chunk_total[session] if trace.chunk_total.size else 0, 0)
        valid = (session >= 0) & (index >= 0) & (index < total)
        findings.add_rows(
            "chunk_once",
            np.flatnonzero(~valid),
            lambda row, kind=kind, index=index: (f"{kind} chunk {index[row]} is not in the trace", {}),
        )
        number = offset[session[valid]] + index[valid]
        count += np.bincount(number, minlength=len(count))
        # Period rows are sorted by session, then by first chunk, so chunk numbers find their period row.
        period_row = np.searchsorted(offset[trace.session] + trace.first_index, number, side="right") - 1
        wrong = trace.period[period_row] != table["period"][valid] if number.size else np.zeros(0, bool)
        findings.add_rows(
            "period",
            np.flatnonzero(valid)[wrong],
            lambda row, table=table, kind=kind: (
                f"{kind} chunk {table['index'][row]} is said to be of period {table['period'][row]}; "
                "the trace asks for it in another",
                {"session": trace.names[table["session_id"][row]]},
            ),
        )
        if kind == "delivered":
            valid_chunks = valid
    for words, rows in (("neither delivered nor shed", count == 0), ("delivered or shed twice", count > 1)):
        findings.add_rows(
            "chunk_once",
            np.flatnonzero(rows),
            lambda number, words=words: (
                f"chunk {number - offset[np.searchsorted(offset, number, side='right') - 1]} is {words}",
                {"session": trace.names[np.searchsorted(offset, number, side="right") - 1]},
            ),
        )
    return valid_chunks


def releases(run: Run, trace: TracePeriods, pace: str, chunk_s: float, findings: Findings) -> None:
    """release_s is what the trace and the pace say, and no batch starts before the release of its chunks.

    realtime: t_active + max(0, i - 1) * chunk_s with i counted in the period. closed: the finish of the chunk
    before, or t_active. Rows must name chunks of the trace.
    """
    chunks = run.chunks
    row = trace.first_period[chunks["session_id"]] + chunks["period"]
    ordinal = chunks["index"] - trace.first_index[row]
    active_s = trace.active_s[row]
    if pace == "realtime":
        wrong = np.abs(chunks["release_s"] - active_s - np.maximum(ordinal - 1, 0) * chunk_s) > TOLERANCE_S
    else:
        order = np.lexsort((chunks["index"], chunks["session_id"]))
        session, index = chunks["session_id"][order], chunks["index"][order]
        earliest = active_s.copy()
        follows = np.flatnonzero((session[1:] == session[:-1]) & (index[1:] == index[:-1] + 1)) + 1
        before_s = chunks["finish_s"][order[follows - 1]]
        inner = ordinal[order[follows]] > 0
        earliest[order[follows[inner]]] = before_s[inner]
        wrong = chunks["release_s"] < earliest - TOLERANCE_S
    findings.add_rows(
        "release",
        np.flatnonzero(wrong),
        lambda r: (f"release_s {chunks['release_s'][r]:.6f} is not what the trace says", _where(run, trace, r)),
    )
    findings.add_rows(
        "release",
        np.flatnonzero(chunks["start_s"] < chunks["release_s"] - TOLERANCE_S),
        lambda r: ("its batch starts before its release", _where(run, trace, r)),
    )


def order_of_chunks(run: Run, trace: TracePeriods, findings: Findings) -> None:
    """A session's chunks in order, one at a time, never in two workers' batches at once."""
    chunks = run.chunks
    order = np.lexsort((chunks["index"], chunks["session_id"]))
    session, worker = chunks["session_id"][order], chunks["worker"][order]
    start, finish = chunks["start_s"][order], chunks["finish_s"][order]
    early = np.flatnonzero((session[1:] == session[:-1]) & (start[1:] < finish[:-1] - TOLERANCE_S)) + 1
    both = (worker[early] != worker[early - 1]) & (finish[early] > start[early - 1] + TOLERANCE_S)
    for rule, rows, words in (
        ("two_workers", early[both], "it runs on two workers at once"),
        ("chunk_order", early[~both], "it starts before the chunk before it has finished"),
    ):
        findings.add_rows(rule, order[rows], lambda r, words=words: (words, _where(run, trace, r)))


def batches(
    run: Run, trace: TracePeriods, fleet: dict[str, Lifetime], profile: dict, floor: int, findings: Findings
) -> None:
    """Batches: their rows agree, last long enough, do not overlap on a worker, and lie within its life."""
    chunks = run.chunks
    if not chunks["n"].size:
        return
    latency = np.array(profile["batch_latency_s"], float)
    n, steps = chunks["n"], chunks["steps"]
    duration = chunks["finish_s"] - chunks["start_s"]
    allowed = (n >= 1) & (n <= len(latency))
    findings.add_rows(
        "batch_latency",
        np.flatnonzero(~allowed),
        lambda r: (f"a batch of {n[r]}; the profile knows 1 to {len(latency)}", _where(run, trace, r)),
    )
    full = latency[np.clip(n, 1, len(latency)) - 1]
    least = full * (1 - profile["step_latency_share"] * (1 - steps / profile["denoise_steps"]))
    findings.add_rows(
        "batch_latency",
        np.flatnonzero(allowed & (duration < least - TOLERANCE_S)),
        lambda r: (
            f"a batch of {n[r]} at {steps[r]} steps took {duration[r]:.6f} s; at least {least[r]:.6f} s",
            _where(run, trace, r),
        ),
    )
    findings.add_rows(
        "steps_floor",
        np.flatnonzero(steps < floor),
        lambda r: (f"{steps[r]} steps; at least {floor}", _where(run, trace, r)),
    )

    order = np.lexsort((chunks["batch"], chunks["worker"]))
    same = np.ones(len(order), bool)
    same[0] = False
    for name in ("worker", "batch"):
        same[1:] &= chunks[name][order][1:] == chunks[name][order][:-1]
    differs = np.zeros(len(order), bool)
    for name in ("n", "start_s", "finish_s"):
        column = chunks[name][order]
        differs[1:] |= same[1:] & (column[1:] != column[:-1])
    first = np.flatnonzero(~same)
    rows_in = np.diff(np.append(first, len(order)))
    findings.add_rows(
        "batch_rows",
        order[differs],
        lambda r: ("rows of one batch disagree about n, start or finish", _where(run, trace, r)),
    )
    findings.add_rows(
        "batch_rows",
        order[first[rows_in != n[order[first]]]],
        lambda r: (f"batch {chunks['batch'][r]} says n={n[r]} but has another number of rows", _where(run, trace, r)),
    )

    heads = order[first]
    heads = heads[np.lexsort((chunks["start_s"][heads], chunks["worker"][heads]))]
    worker, start, finish = (chunks[name][heads] for name in ("worker", "start_s", "finish_s"))
    clash = np.flatnonzero((worker[1:] == worker[:-1]) & (start[1:] < finish[:-1] - TOLERANCE_S)) + 1
    findings.add_rows(
        "batch_overlap",
        heads[clash],
        lambda r: ("its batch overlaps the worker's batch before", _where(run, trace, r)),
    )
    lives = [fleet.get(name, Lifetime()) for name in run.worker_names]
    ready = np.array([life.ready_s for life in lives])[worker]
    gone = np.array([life.gone_s for life in lives])[worker]
    outside = (start < ready - TOLERANCE_S) | (finish > gone + TOLERANCE_S)
    findings.add_rows(
        "worker_lifetime",
        heads[outside],
        lambda r: ("its batch does not lie between its worker's ready and release or loss", _where(run, trace, r)),
    )


def places_of_chunks(run: Run, trace: TracePeriods, where: Whereabouts, findings: Findings) -> None:
    """Every batch of a session runs where its state is, and outside the session's transfers."""
    chunks = run.chunks
    names = {name: code for code, name in enumerate(run.worker_names)}
    stays = [stay for stay in where.stays if stay[0] in trace.code]
    key = np.array([trace.code[s] * MICROS_PER_SESSION + round(f * 1e6) for s, _, f, _ in stays], np.int64)
    order = np.argsort(key, kind="stable")
    key = key[order]
    stay_worker = np.array([names.get(worker, -1) for _, worker, _, _ in stays], np.int64)[order]
    stay_to = np.array([to_s for *_, to_s in stays], float)[order]
    wanted = chunks["session_id"] * MICROS_PER_SESSION + np.rint(chunks["start_s"] * 1e6).astype(np.int64) + 2
    at = np.searchsorted(key, wanted, side="right") - 1
    found = at >= 0
    at = np.maximum(at, 0)
    if key.size:
        found &= key[at] // MICROS_PER_SESSION == chunks["session_id"]
    else:
        found &= False
        at[:] = -1
        stay_worker, stay_to = np.array([-1]), np.array([0.0])
    moved = found & (stay_worker[at] != chunks["worker"])
    cut = found & ~moved & (chunks["finish_s"] > stay_to[at] + TOLERANCE_S)
    for rule, rows, words in (
        ("worker_change", ~found, "it runs on a worker before the session was placed or brought there"),
        ("worker_change", moved, "its state is not on this worker: no migrate or resume brought it there"),
        ("transfer_overlap", cut, "its batch overlaps a transfer of the session or the loss of its worker"),
    ):
        findings.add_rows(rule, np.flatnonzero(rows), lambda r, words=words: (words, _where(run, trace, r)))


def transfers_at_once(where: Whereabouts, findings: Findings) -> None:
    """A worker has at most one inbound and one outbound transfer at a time."""
    lanes: dict[tuple[str, str], list[tuple[float, float, str]]] = defaultdict(list)
    for event, session, source, target, from_s, to_s in where.transfers:
        for direction, worker in (("outbound", source), ("inbound", target)):
            if worker is not None:
                lanes[worker, direction].append((from_s, to_s, f"{event} of {session}"))
    for (worker, direction), lane in lanes.items():
        lane.sort()
        until_s, last = -1.0, ""
        for from_s, to_s, what in lane:
            if from_s < until_s - TOLERANCE_S:
                findings.add(
                    "transfers_at_once",
                    f"{worker} has two {direction} transfers at once: {last} and {what}",
                    time_s=from_s,
                    worker=worker,
                )
            if to_s > until_s:
                until_s, last = to_s, what


def memory(where: Whereabouts, fleet: dict[str, Lifetime], resident_max: int, findings: Findings) -> None:
    """At most resident_max sessions held by a worker at once, and none when it is released."""
    by_worker: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for session, worker, from_s, to_s in where.holds:
        if to_s - from_s > TOLERANCE_S:
            by_worker[worker].append((session, from_s, to_s))
    for worker, holds in by_worker.items():
        release_s = fleet.get(worker, Lifetime()).release_s
        for session, from_s, to_s in holds:
            if to_s > release_s + TOLERANCE_S:
                findings.add(
                    "held_at_release",
                    f"{worker} is released at {release_s:.6f} s holding session {session}",
                    time_s=max(release_s, from_s),
                    worker=worker,
                    session=session,
                )
        times = np.array([h[1] for h in holds] + [h[2] - TOLERANCE_S for h in holds])
        change = np.array([1] * len(holds) + [-1] * len(holds))
        order = np.lexsort((change, times))
        held = np.cumsum(change[order])
        over = np.flatnonzero((held > resident_max) & (change[order] > 0))
        findings.add_rows(
            "resident_max",
            over,
            lambda i, order=order, times=times, held=held, worker=worker: (
                f"{worker} holds {held[i]} sessions; at most {resident_max}",
                {"time_s": times[order[i]], "worker": worker},
            ),
        )
