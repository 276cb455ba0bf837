"""The auditor's own readers: trace, profile and the four files of a run.

Every error names the file and line, what was expected and what to do. Chunk rows are read as columns in
blocks, because a long window has millions of them.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from turboserve.errors import ConfigError, TraceError

BLOCK_BYTES = 1 << 24
CHUNK_INTS = ("index", "period", "batch", "n", "steps")
CHUNK_TIMES = ("release_s", "start_s", "finish_s")
FLEET_EVENTS = ("worker_request", "worker_ready", "worker_release", "worker_lost", "drain")
SESSION_EVENTS = ("place", "migrate", "suspend", "resume", "set_steps", "queue")
PROFILE_KEYS = (
    *("chunk_s", "chunk_target_s", "batch_latency_s", "capacity", "resident_max", "denoise_steps"),
    *("denoise_steps_floor", "step_latency_share", "offload_s", "resume_s", "migrate_s"),
)


@dataclass(frozen=True)
class TracePeriods:
    """The demand: one row per active period, sorted by session and then by period."""

    code: dict[str, int]
    arrive_s: np.ndarray
    depart_s: np.ndarray
    session: np.ndarray
    period: np.ndarray
    active_s: np.ndarray
    chunks: np.ndarray
    first_index: np.ndarray
    """Index within the session of the period's first chunk."""
    first_period: np.ndarray
    """Row of each session's period 0; one more entry at the end."""
    chunk_total: np.ndarray
    """Chunks of each session."""
    horizon_s: float

    @property
    def names(self) -> list[str]:
        return list(self.code)


@dataclass(frozen=True)
class Run:
    """One run directory: chunk columns, shed columns, decision lines in file order, the report or None."""

    chunks: dict[str, np.ndarray]
    shed: dict[str, np.ndarray]
    decisions: list[dict]
    report: dict | None
    worker_names: list[str]


def read_profile(path_or_name: str) -> dict:
    """A latency profile from a file, or by the name of one that ships with the package."""
    path = Path(path_or_name)
    if not path.is_file():
        shipped = resources.files("turboserve.sim") / "profiles" / f"{path_or_name}.json"
        if not shipped.is_file():
            raise ConfigError(f"no profile {path_or_name!r}", expected="a JSON file or the name of a shipped profile")
        path = Path(str(shipped))
    try:
        profile = json.loads(path.read_text())
    except ValueError as bad:
        raise ConfigError(f"{path} is not JSON: {bad}", expected="the JSON that `calibrate` writes") from bad
    missing = [key for key in PROFILE_KEYS if key not in profile]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}", expected="a complete latency profile")
    return profile


def read_trace(path: Path, chunk_s: float) -> TracePeriods:
    """Arrivals, departures and active periods of a trace; a period asks for ceil(chunks / chunk_s) chunks."""
    code: dict[str, int] = {}
    arrive: list[float] = []
    depart: list[float] = []
    rows: list[tuple[int, float, int]] = []
    horizon_s = 0.0
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt") as lines:
        header = lines.readline().strip()
        if header.split(",")[:4] != ["time_s", "session_id", "event", "chunks"]:
            raise TraceError(f"{path} line 1 is {header!r}", expected="time_s,session_id,event,chunks[,tenant]")
        for number, line in enumerate(lines, start=2):
            try:
                time_text, name, event, chunks_text = line.rstrip("\r\n").split(",")[:4]
                time_s = float(time_text)
                if event == "arrive":
                    if name in code:
                        raise ValueError(f"session {name} arrives twice")
                    code[name] = len(code)
                    arrive.append(time_s)
                    depart.append(math.inf)
                elif event == "active":
                    rows.append((code[name], time_s, math.ceil(int(chunks_text) / chunk_s - 1e-9)))
                elif event == "depart":
                    depart[code[name]] = time_s
                elif event == "idle":
                    code[name]  # an unknown session is an error here too
                else:
                    raise ValueError(f"unknown event {event!r}")
            except (ValueError, KeyError) as bad:
                raise TraceError(
                    f"{path} line {number}: {bad}",
                    expected="time_s,session_id,arrive|active|idle|depart,chunks, each session's life in order",
                ) from bad
            horizon_s = max(horizon_s, time_s)
    rows.sort(key=lambda row: row[0])  # stable: a session's periods stay in time order
    session = np.array([row[0] for row in rows], np.int64)
    chunks = np.array([row[2] for row in rows], np.int64)
    first_period = np.searchsorted(session, np.arange(len(code) + 1))
    before = np.concatenate([[0], np.cumsum(chunks)])
    return TracePeriods(
        code=code,
        arrive_s=np.array(arrive),
        depart_s=np.array(depart),
        session=session,
        period=np.arange(len(rows)) - first_period[session],
        active_s=np.array([row[1] for row in rows]),
        chunks=chunks,
        first_index=before[:-1] - before[first_period[session]],
        first_period=first_period,
        chunk_total=before[first_period[1:]] - before[first_period[:-1]],
        horizon_s=horizon_s,
    )


def read_run(directory: Path, trace: TracePeriods) -> Run:
    """The files of a run. A session that the trace does not have gets the code -1."""
    if not directory.is_dir():
        raise TraceError(f"{directory} is not a directory", expected="the --out of `turboserve simulate`")
    workers: dict[str, int] = {}
    columns = {"session_id": trace.code, "worker": workers}
    chunks = _read_csv(directory / "chunks.csv.gz", columns, CHUNK_INTS, CHUNK_TIMES)
    shed_path = directory / "shed.csv"
    if shed_path.exists():
        shed = _read_csv(shed_path, {"session_id": trace.code}, ("index", "period"), ("time_s",))
    else:
        shed = {key: np.zeros(0, np.int64) for key in ("session_id", "index", "period")}
        shed["time_s"] = np.zeros(0)
    decisions = _read_decisions(directory / "decisions.jsonl")
    report_path = directory / "report.json"
    try:
        report = json.loads(report_path.read_text()) if report_path.exists() else None
    except ValueError as bad:
        raise TraceError(f"{report_path} is not JSON: {bad}", expected="one JSON object") from bad
    for line in decisions:
        for key in ("worker", "source"):
            if line.get(key) is not None:
                workers.setdefault(str(line[key]), len(workers))
    return Run(chunks=chunks, shed=shed, decisions=decisions, report=report, worker_names=list(workers))


def _read_csv(
    path: Path, codes: dict[str, dict[str, int]], ints: tuple[str, ...], floats: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Named columns of a CSV file. `codes` columns become numbers; workers are numbered as they appear."""
    if not path.exists():
        raise TraceError(f"{path} is missing", expected="the --out of `turboserve simulate --batching chunk`")
    wanted = [*codes, *ints, *floats]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", newline="") as lines:
        header = lines.readline().strip().split(",")
        missing = [name for name in wanted if name not in header]
        if missing:
            raise TraceError(f"{path} line 1 lacks {', '.join(missing)}", expected=",".join(wanted))
        line_number = 2
        while block := lines.readlines(BLOCK_BYTES):
            text = "".join(block).replace("\r", "").rstrip("\n")
            if '"' in text:  # a quoted reason may hold commas; such files are short
                block = [",".join(field.replace(",", ";") for field in row) for row in csv.reader(text.split("\n"))]
                text = "\n".join(block)
            fields = text.replace("\n", ",").split(",")
            if len(fields) != len(block) * len(header):
                bad = next(i for i, line in enumerate(block) if line.count(",") != len(header) - 1)
                raise TraceError(
                    f"{path} line {line_number + bad} has {block[bad].count(',') + 1} fields",
                    expected=f"{len(header)}: {','.join(header)}",
                )
            for name in wanted:
                texts = fields[header.index(name) :: len(header)]
                if name in codes:
                    parts[name].append(_encode(texts, codes[name], grow=name == "worker"))
                else:
                    parts[name].append(
                        _numbers(texts, np.int64 if name in ints else np.float64, path, name, line_number)
                    )
            line_number += len(block)
    kinds = {name: np.float64 if name in floats else np.int64 for name in wanted}
    return {name: np.concatenate(blocks) if blocks else np.zeros(0, kinds[name]) for name, blocks in parts.items()}


def _encode(texts: list[str], code: dict[str, int], *, grow: bool) -> np.ndarray:
    """Codes of the texts; an unknown one is numbered next, or -1 where the set is closed."""
    if grow:
        for text in dict.fromkeys(texts):
            code.setdefault(text, len(code))
    return np.array([code.get(text, -1) for text in texts], np.int64)


def _numbers(texts: list[str], kind: type, path: Path, name: str, line_number: int) -> np.ndarray:
    try:
        return np.array(texts).astype(kind)
    except ValueError:
        for offset, text in enumerate(texts):
            try:
                kind(text)
            except ValueError:
                raise TraceError(
                    f"{path} line {line_number + offset}: {name} is {text!r}", expected="a number"
                ) from None
        raise


def _read_decisions(path: Path) -> list[dict]:
    if not path.exists():
        raise TraceError(f"{path} is missing", expected="the --out of `turboserve simulate`")
    decisions = []
    with path.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                decision = json.loads(line)
                decision["time_s"] = float(decision["time_s"])
                known = decision["event"] in FLEET_EVENTS or decision["event"] in SESSION_EVENTS
            except (ValueError, KeyError, TypeError) as bad:
                raise TraceError(
                    f"{path} line {number}: {bad}", expected='an object with "time_s", "event" and "reason"'
                ) from bad
            if not known:
                raise TraceError(
                    f"{path} line {number}: unknown event {decision['event']!r}",
                    expected=" | ".join(FLEET_EVENTS + SESSION_EVENTS),
                )
            decisions.append(decision)
    return decisions
