"""The files of a run: chunks.csv.gz, decisions.jsonl, shed.csv, report.json, timing.json (contracts section 4).

Equal runs give equal bytes, timing.json apart: gzip without a time stamp, keys in a fixed order, six decimals.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from turboserve.sim.batch_steps import (
    R_BATCH,
    R_FINISH,
    R_INDEX,
    R_N,
    R_PERIOD,
    R_RELEASE,
    R_SESSION,
    R_START,
    R_STEPS,
    R_WORKER,
)
from turboserve.sim.replay import Run
from turboserve.sim.report import timing

CHUNK_HEADER = b"session_id,index,period,worker,batch,n,steps,release_s,start_s,finish_s\n"
# Negative: a time in microseconds; NAME_*: an entry of a table of names.
_COLUMNS = np.array(
    [R_SESSION, R_INDEX, R_PERIOD, R_WORKER, R_BATCH, R_N, R_STEPS, R_RELEASE, R_START, R_FINISH],
    np.int64,
)
_KINDS = np.array([1, 0, 0, 2, 0, 0, 0, 3, 3, 3], np.int64)  # 0 number, 1 session name, 2 worker name, 3 time
_BLOCK = 100_000


def write_run(run: Run, report: dict[str, Any], out: str | Path) -> None:
    """All files of `run` into the directory `out` (made if need be)."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_chunks(run, out / "chunks.csv.gz")
    with (out / "decisions.jsonl").open("w") as f:
        for d in sorted(run.log.decisions, key=lambda d: d["time_s"]):  # a release may be logged ahead of its time
            f.write(json.dumps(rounded(d), separators=(",", ":")) + "\n")
    with (out / "shed.csv").open("w", newline="") as f:
        rows = csv.writer(f, lineterminator="\n")
        rows.writerow(["session_id", "index", "period", "time_s", "reason"])
        for x in run.log.shed:
            rows.writerow([x.session, x.index, x.period, f"{x.time_us / 1e6:.6f}", x.reason])
    write_report(report, out)
    (out / "timing.json").write_text(json.dumps(timing(run), indent=1) + "\n")


def write_report(report: dict[str, Any], out: str | Path) -> None:
    """`report.json` alone (what the clairvoyant writes)."""
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def write_chunks(run: Run, path: Path) -> None:
    """One line per delivered chunk, in order of delivery."""
    sessions = _names(list(run.trace.session_ids))
    workers = _names(run.log.worker_names)
    data = io.BytesIO()
    with gzip.GzipFile(fileobj=data, mode="wb", compresslevel=1, mtime=0) as f:
        f.write(CHUNK_HEADER)
        for start in range(0, len(run.rows), _BLOCK):
            block = run.rows[start : start + _BLOCK]
            text = np.empty(len(block) * (sessions.shape[1] + workers.shape[1] + 10 * 21), np.uint8)
            size = _format(block, _COLUMNS, _KINDS, sessions, workers, text)
            f.write(text[:size].tobytes())
    path.write_bytes(data.getvalue())


def rounded(decision: dict[str, Any]) -> dict[str, Any]:
    """Times with at most six decimals, as in the other files."""
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in decision.items()}


def _names(names: list[str]) -> npt.NDArray[np.uint8]:
    """Names as rows of bytes, each ended by a 0."""
    encoded = [n.encode() for n in names] or [b""]
    table = np.zeros((len(encoded), max(len(n) for n in encoded) + 1), np.uint8)
    for i, n in enumerate(encoded):
        table[i, : len(n)] = np.frombuffer(n, np.uint8)
    return table


@njit(cache=True)
def _number(text, at, value, digits_min):  # type: ignore[no-untyped-def]
    """Write a non-negative number with at least `digits_min` digits; returns the next position."""
    digits = 1
    rest = value // 10
    while rest > 0:
        digits += 1
        rest //= 10
    digits = max(digits, digits_min)
    for k in range(digits - 1, -1, -1):
        text[at + k] = 48 + value % 10
        value //= 10
    return at + digits


@njit(cache=True)
def _format(rows, columns, kinds, sessions, workers, text):  # type: ignore[no-untyped-def]
    at = 0
    for i in range(rows.shape[0]):
        for c in range(columns.shape[0]):
            value = rows[i, columns[c]]
            if kinds[c] == 0:
                at = _number(text, at, value, 1)
            elif kinds[c] == 3:
                at = _number(text, at, value // 1_000_000, 1)
                text[at] = 46
                at = _number(text, at + 1, value % 1_000_000, 6)
            else:
                names = sessions if kinds[c] == 1 else workers
                k = 0
                while names[value, k] != 0:
                    text[at] = names[value, k]
                    at += 1
                    k += 1
            text[at] = 44 if c < columns.shape[0] - 1 else 10
            at += 1
    return at
