"""The auditor's own readers: trace, profile and the four files of a run.

Every error names the file and line, what was expected and what to do. Chunk rows are read as columns in
blocks, because a long window has millions of them.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TextIO

import numpy as np

from turboserve.errors import ConfigError, TraceError

BLOCK_BYTES = 1 << 24
CHUNK_INTS = ("index", "period", "batch", "n", "steps")
CHUNK_TIMES = ("release_s", "start_s", "finish_s")
FLEET_EVENTS = ("worker_request", "worker_ready", "worker_release", "worker_lost", "drain")
SESSION_EVENTS = ("place", "migrate", "suspend", "resume", "set_steps", "queue")
DECISION = 'an object with "time_s", "event" and "reason", times in seconds'
PROFILE_KEYS = (
    *("chunk_s", "chunk_target_s", "batch_latency_s", "capacity", "resident_max", "denoise_steps"),
    *("denoise_steps_floor", "step_latency_share", "offload_s", "resume_s", "migrate_s"),
)
DAY_S = 86_400
TRACE_DAYS = 31
RUN_DAYS = 50
"""A run may go on after its trace; (session, microsecond) must stay one sortable integer (rules.py)."""
PERIOD_CHUNKS = TRACE_DAYS * DAY_S
CHUNK_ROOM = 100_000_000
"""Chunks that a trace may ask for in all."""


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


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which file cannot be read and why; a cut gzip stream would else end as an interruption."""
    try:
        yield
    except EOFError as bad:
        raise TraceError(
            f"{path} is truncated: its gzip stream stops early", expected="a whole file", hint="copy or write it again"
        ) from bad
    except gzip.BadGzipFile as bad:
        raise TraceError(f"{path} is not gzip, or is damaged: {bad}", expected="gzip-compressed CSV") from bad
    except (zlib.error, UnicodeDecodeError, csv.Error) as bad:
        raise TraceError(f"{path} is damaged: {bad}", expected="UTF-8 text, gzip-compressed if named .gz") from bad
    except OSError as bad:
        raise TraceError(f"{path} cannot be read: {bad.strerror or bad}", expected="a file that can be read") from bad


def _json(text: str) -> object:
    """Strict JSON: Python would take NaN and Infinity too."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_number(value: object) -> bool:
    """A finite number, one that a float can hold; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def read_profile(path_or_name: str) -> dict:
    """A latency profile from a file, or by the name of one that ships with the package."""
    path = Path(path_or_name)
    if not path.is_file():
        shipped = resources.files("turboserve.sim") / "profiles" / f"{path_or_name}.json"
        if not shipped.is_file():
            raise ConfigError(f"no profile {path_or_name!r}", expected="a JSON file or the name of a shipped profile")
        path = Path(str(shipped))
    try:
        profile = _json(path.read_text())
    except OSError as bad:
        raise ConfigError(f"{path} cannot be read: {bad.strerror}", expected="a latency profile") from bad
    except ValueError as bad:
        raise ConfigError(f"{path} is not JSON: {bad}", expected="the JSON that `calibrate` writes") from bad
    if not isinstance(profile, dict):
        raise ConfigError(f"{path} is no JSON object", expected="the JSON that `calibrate` writes")
    missing = [key for key in PROFILE_KEYS if key not in profile]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}", expected="a complete latency profile")
    table = profile["batch_latency_s"]
    if not isinstance(table, list) or not table or not all(is_number(value) for value in table):
        raise ConfigError(
            f"{path}: batch_latency_s is not a list of numbers", expected="seconds for a batch of 1, 2, ..."
        )
    for key in (*PROFILE_KEYS, "provision_s", "price_per_worker_hour"):
        if key != "batch_latency_s" and key in profile and not is_number(profile[key]):
            raise ConfigError(f"{path}: {key} is {profile[key]!r}", expected="a number")
    for key in ("chunk_s", "denoise_steps"):
        if profile[key] <= 0:
            raise ConfigError(f"{path}: {key} is {profile[key]!r}", expected="a number above 0")
    return profile


def read_trace(path: Path, chunk_s: float) -> TracePeriods:
    """Arrivals, departures and active periods of a trace; a period asks for ceil(chunks / chunk_s) chunks."""
    code: dict[str, int] = {}
    arrive: list[float] = []
    depart: list[float] = []
    rows: list[tuple[int, float, int]] = []
    horizon_s = 0.0
    asked_in_all = 0
    blank = 0
    with _trace_text(path) as text:
        lines = csv.reader(text)
        header = next(lines, [])
        if header[:4] != ["time_s", "session_id", "event", "chunks"]:
            raise TraceError(
                f"{path} line 1 is {','.join(header)[:80]!r}", expected="time_s,session_id,event,chunks[,tenant]"
            )
        for fields in lines:
            number = lines.line_num
            try:
                if not "".join(fields).strip():  # allowed at the end alone
                    blank = blank or number
                    continue
                if blank:
                    number = blank
                    raise ValueError("a blank line")
                if len(fields) < 4:
                    raise ValueError(f"{len(fields)} fields")
                time_text, name, event, chunks_text = fields[:4]
                time_s = float(time_text)
                if not 0 <= time_s <= TRACE_DAYS * DAY_S:
                    raise ValueError(f"time {time_text} is not within 0 to {TRACE_DAYS * DAY_S} s ({TRACE_DAYS} days)")
                if event not in ("arrive", "active", "idle", "depart"):
                    raise ValueError(f"unknown event {event!r}")
                if event == "arrive":
                    if name in code:
                        raise ValueError(f"session {name} arrives twice")
                    code[name] = len(code)
                    arrive.append(time_s)
                    depart.append(math.inf)
                elif name not in code:
                    raise ValueError(f"session {name} has not arrived")
                elif event == "active":
                    asked = int(chunks_text)
                    if not 1 <= asked <= PERIOD_CHUNKS:
                        raise ValueError(f"chunks {chunks_text} are not within 1 to {PERIOD_CHUNKS}")
                    asked_in_all += asked
                    rows.append((code[name], time_s, math.ceil(asked / chunk_s - 1e-9)))
                elif event == "depart":
                    depart[code[name]] = time_s
            except ValueError as bad:
                raise TraceError(
                    f"{path} line {number}: {bad}",
                    expected="time_s,session_id,arrive|active|idle|depart,chunks, each session's life in order",
                ) from bad
            horizon_s = max(horizon_s, time_s)
    if asked_in_all > CHUNK_ROOM:
        raise TraceError(f"{path} asks for {asked_in_all} chunks", expected=f"at most {CHUNK_ROOM}")
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


@contextmanager
def _trace_text(path: Path) -> Iterator[TextIO]:
    """The trace as text, unpacked where it begins as gzip does; a byte order mark is passed over."""
    with _named(path), path.open("rb") as raw:
        packed = path.suffix == ".gz" or raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        plain = gzip.GzipFile(fileobj=raw) if packed else raw
        with io.TextIOWrapper(plain, encoding="utf-8-sig") as text:
            yield text


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
    report = _read_report(directory / "report.json")
    for line in decisions:
        for key in ("worker", "source"):
            if line.get(key) is not None:
                workers.setdefault(str(line[key]), len(workers))
    return Run(chunks=chunks, shed=shed, decisions=decisions, report=report, worker_names=list(workers))


def _read_report(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        with _named(path):
            report = _json(path.read_text())
    except ValueError as bad:
        raise TraceError(f"{path} is not JSON: {bad}", expected="one JSON object") from bad
    if not isinstance(report, dict) or not isinstance(report.get("settings", {}), dict):
        raise TraceError(
            f"{path} is no report", expected='one JSON object, its "settings" an object', hint="simulate again"
        )
    return report


def _read_csv(
    path: Path, codes: dict[str, dict[str, int]], ints: tuple[str, ...], floats: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Named columns of a CSV file. `codes` columns become numbers; workers are numbered as they appear."""
    if not path.exists():
        raise TraceError(f"{path} is missing", expected="the --out of `turboserve simulate --batching chunk`")
    wanted = [*codes, *ints, *floats]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
    opener = gzip.open if path.suffix == ".gz" else open
    with _named(path), opener(path, "rt", newline="") as lines:
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
    """The texts as numbers. Times must lie within the longest run: not-a-number would pass every rule."""
    most = RUN_DAYS * DAY_S if kind is np.float64 else math.inf
    try:
        values: np.ndarray = np.array(texts).astype(kind)
        if kind is np.int64 or np.all(np.abs(values) <= most):
            return values
    except (ValueError, OverflowError):
        pass  # named below
    for offset, text in enumerate(texts):
        try:
            good = abs(kind(text)) <= most
        except (ValueError, OverflowError):
            good = False
        if not good:
            raise TraceError(
                f"{path} line {line_number + offset}: {name} is {text!r}",
                expected=f"a number within {RUN_DAYS} days" if kind is np.float64 else "a whole number",
            )
    raise TraceError(f"{path}: {name} holds no numbers", expected="a number a line")


def _read_decisions(path: Path) -> list[dict]:
    if not path.exists():
        raise TraceError(f"{path} is missing", expected="the --out of `turboserve simulate`")
    decisions = []
    with _named(path), path.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                decision = _json(line)
                if not isinstance(decision, dict):
                    raise ValueError("no object")
                event = decision["event"]
                if not _is_time(decision["time_s"]):
                    raise ValueError(f"time_s is {decision['time_s']!r}")
                decision["time_s"] = float(decision["time_s"])
                # null stands for a key left out, here as for worker, source and session
                if decision.get("end_s") is None:
                    decision.pop("end_s", None)
                elif not _is_time(decision["end_s"]):
                    raise ValueError(f"end_s is {decision['end_s']!r}")
            except KeyError as bad:
                raise TraceError(f"{path} line {number} lacks {bad}", expected=DECISION) from bad
            except ValueError as bad:
                raise TraceError(f"{path} line {number}: {bad}", expected=DECISION) from bad
            if event not in FLEET_EVENTS + SESSION_EVENTS:
                raise TraceError(
                    f"{path} line {number}: unknown event {event!r}", expected=" | ".join(FLEET_EVENTS + SESSION_EVENTS)
                )
            decisions.append(decision)
    return decisions


def _is_time(value: object) -> bool:
    return is_number(value) and abs(value) <= RUN_DAYS * DAY_S  # type: ignore[arg-type]
