"""Session traces: gzip CSV `time_s,session_id,event,chunks[,tenant]` (traces/README.md), read into columns.

Also what can be said of demand from a trace alone: the number of active sessions over time, swept with ends before
starts at equal times.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from turboserve.errors import TraceError
from turboserve.sim.events import US

ARRIVE, ACTIVE, IDLE, DEPART = range(4)
EVENT_NAMES = ("arrive", "active", "idle", "depart")
_CODE = {name: code for code, name in enumerate(EVENT_NAMES)}
HEADER = "time_s,session_id,event,chunks[,tenant]"

DAYS_MAX = 31
TIME_MAX_S = DAYS_MAX * 86_400
"""Times are seconds from the window's start. Statistics sample every second, so the bound also bounds memory."""
CHUNKS_MAX = TIME_MAX_S
"""Of one period: a chunk is a second of video, and no period is longer than the longest window."""
CHUNKS_IN_ALL_MAX = 100_000_000
"""Of one trace: a simulation keeps 96 bytes for each."""
NAME_MAX = 200
NAME_RULE = f"1 to {NAME_MAX} printable characters, none of them a comma or a double quote"
TIME_RULE = f"seconds from 0 to {TIME_MAX_S} ({DAYS_MAX} days)"
TIME_HINT = "shift the times to begin at 0, or cut the window"


@dataclass(frozen=True, slots=True)
class Trace:
    """Events in time order; `session` indexes `session_ids`, `tenant` is per session."""

    name: str
    time_us: npt.NDArray[np.int64]
    session: npt.NDArray[np.int64]
    event: npt.NDArray[np.int8]
    chunks: npt.NDArray[np.int64]  # trace chunks (1 s of video each) asked for by an `active`, else 0
    session_ids: tuple[str, ...]
    tenant: npt.NDArray[np.int64]
    tenants: tuple[str, ...] = ("default",)

    @property
    def horizon_us(self) -> int:
        return int(self.time_us[-1]) if self.time_us.size else 0

    def chunk_counts(self, chunk_s: float) -> npt.NDArray[np.int64]:
        """Chunks of `chunk_s` video seconds that each event asks for: ceil(chunks * 1.0 / chunk_s)."""
        return np.ceil(self.chunks / chunk_s - 1e-9).astype(np.int64)


def is_name(text: str) -> bool:
    """Whether a session or tenant may be called so: names stand unquoted in our files."""
    return 0 < len(text) <= NAME_MAX and text.isprintable() and "," not in text and '"' not in text


def check_total(chunks: int, name: str | Path) -> None:
    """Refuse a trace that asks for more chunks than a simulation can keep."""
    if chunks > CHUNKS_IN_ALL_MAX:
        raise TraceError(f"{name}: {chunks} chunks in all", expected=f"at most {CHUNKS_IN_ALL_MAX}")


def shown(value: object) -> str:
    """A value as an error shows it: quoted, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_trace(path: str | Path) -> Trace:
    """Read and check a trace; a line that breaks the format is named."""
    path = Path(path)
    rows = _rows(path, _text(path))
    header = next(rows, (1, []))[1]
    if header[:4] != ["time_s", "session_id", "event", "chunks"]:
        raise TraceError(f"{path}: header {shown(','.join(header))}", expected=HEADER, hint="see traces/README.md")
    tenant_column = header.index("tenant") if "tenant" in header else None
    index: dict[str, int] = {}
    tenants: dict[str, int] = {}
    tenant_of: list[int] = []
    times: list[int] = []
    sessions: list[int] = []
    kinds: list[int] = []
    chunks: list[int] = []
    open_state: dict[int, int] = {}
    last = 0

    def bad(line: int, message: str, expected: str, hint: str | None = None) -> TraceError:
        return TraceError(f"{path}:{line}: {message}", expected=expected, hint=hint)

    for line, row in rows:
        if len(row) < 4:
            raise bad(line, f"{len(row)} fields" if row else "a blank line", HEADER)
        try:
            seconds = float(row[0])
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds <= TIME_MAX_S:  # not a number compares false
            if seconds < 0:
                raise bad(line, f"negative time {shown(row[0])}", TIME_RULE, TIME_HINT)
            raise bad(line, f"time {shown(row[0])}", TIME_RULE, TIME_HINT if seconds > TIME_MAX_S else None)
        t = round(seconds * US)
        if t < last:
            raise bad(line, f"time goes back to {row[0]}", "events sorted by time")
        last = t
        if not is_name(row[1]):
            raise bad(line, f"session_id {shown(row[1])}", NAME_RULE)
        kind = _CODE.get(row[2])
        if kind is None:
            raise bad(line, f"unknown event {shown(row[2])}", " | ".join(EVENT_NAMES))
        try:
            count = int(row[3] or 0)
        except ValueError:
            count = -1
        if not 0 <= count <= CHUNKS_MAX:
            raise bad(
                line, f"chunks {shown(row[3])}", f"a whole number from 1 to {CHUNKS_MAX}, one chunk a second of video"
            )
        session = index.setdefault(row[1], len(index))
        before = open_state.get(session)
        legal = {
            ARRIVE: before is None,
            ACTIVE: before in (ARRIVE, IDLE),
            IDLE: before == ACTIVE,
            DEPART: before is not None,
        }
        if not legal[kind] or before == DEPART:
            was = EVENT_NAMES[before] if before is not None else "nothing"
            raise bad(line, f"{row[2]} after {was} in session {row[1]}", "arrive, active/idle..., depart")
        if kind == ACTIVE and count < 1:
            raise bad(line, "active without chunks", "chunks of at least 1")
        open_state[session] = kind
        if kind == ARRIVE:
            name = row[tenant_column] if tenant_column is not None and len(row) > tenant_column else ""
            if name and not is_name(name):
                raise bad(line, f"tenant {shown(name)}", NAME_RULE)
            tenant_of.append(tenants.setdefault(name or "default", len(tenants)))
        times.append(t)
        sessions.append(session)
        kinds.append(kind)
        chunks.append(count if kind == ACTIVE else 0)
    check_total(sum(chunks), path)
    name = path.name.removesuffix(".gz").removesuffix(".csv")
    return Trace(
        name=name,
        time_us=np.array(times, np.int64),
        session=np.array(sessions, np.int64),
        event=np.array(kinds, np.int8),
        chunks=np.array(chunks, np.int64),
        session_ids=tuple(index),
        tenant=np.array(tenant_of, np.int64),
        tenants=tuple(tenants) or ("default",),
    )


def _text(path: Path) -> str:
    """The file's text, unpacked where its first bytes are gzip's."""
    try:
        data = path.read_bytes()
        packed = data.startswith(b"\x1f\x8b")
        if path.suffix == ".gz" and not packed:
            raise TraceError(
                f"{path}: the content is not gzip", expected="gzip CSV", hint="name plain text .csv, not .csv.gz"
            )
        return (gzip.decompress(data) if packed else data).decode("utf-8-sig")
    except EOFError as e:
        raise TraceError(f"{path}: the file is truncated", expected="a whole gzip file", hint="copy it again") from e
    except (OSError, zlib.error, UnicodeDecodeError) as e:
        raise TraceError(
            f"{path}: cannot read the trace ({e})", expected="gzip or plain CSV in UTF-8", hint="see traces/README.md"
        ) from e


def _rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of their line; blank lines at the end are left out."""
    rows = csv.reader(io.StringIO(text.rstrip(), newline=None))
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as e:
        raise TraceError(f"{path}:{rows.line_num}: {e}", expected=HEADER) from e


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace (gzip with mtime 0: equal traces, equal files); a tenant column only if there is more than one."""
    out = io.StringIO()
    many = len(trace.tenants) > 1
    out.write("time_s,session_id,event,chunks" + (",tenant" if many else "") + "\n")
    columns = zip(
        trace.time_us.tolist(), trace.session.tolist(), trace.event.tolist(), trace.chunks.tolist(), strict=True
    )
    for t, session, event, chunks in columns:
        row = f"{t / US:.3f},{trace.session_ids[session]},{EVENT_NAMES[event]},{chunks or ''}"
        out.write(row + (f",{trace.tenants[trace.tenant[session]]}" if many else "") + "\n")
    data = out.getvalue().encode()
    path = Path(path)
    path.write_bytes(gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)


@dataclass(frozen=True, slots=True)
class Demand:
    """Active sessions as steps: `count[i]` from `time_us[i]` until the next time (the last one until the horizon)."""

    time_us: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]

    @property
    def peak(self) -> int:
        return int(self.count.max(initial=0))

    def peak_in(self, start_us: int, end_us: int) -> int:
        """Largest count held anywhere in [start, end]."""
        first = max(0, int(np.searchsorted(self.time_us, start_us, side="right")) - 1)
        last = int(np.searchsorted(self.time_us, end_us, side="right"))
        return int(self.count[first:last].max(initial=0))


def periods(trace: Trace) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Nominal (start_s, end_s) of every active period: from its `active` to its `idle` or `depart`."""
    running: dict[int, int] = {}
    starts: list[int] = []
    ends: list[int] = []
    columns = zip(trace.time_us.tolist(), trace.session.tolist(), trace.event.tolist(), strict=True)
    for t, session, event in columns:
        if event == ACTIVE:
            running[session] = t
        elif event != ARRIVE and session in running:
            starts.append(running.pop(session))
            ends.append(t)
    for t in running.values():  # a trace cut without departures
        starts.append(t)
        ends.append(trace.horizon_us)
    return np.array(starts) / US, np.array(ends) / US


def demand(trace: Trace) -> Demand:
    """Nominal demand over time, swept with ends before starts at equal times."""
    starts_s, ends_s = periods(trace)
    times = np.round(np.concatenate([ends_s, starts_s]) * US).astype(np.int64)
    delta = np.concatenate([np.full(ends_s.size, -1), np.ones(starts_s.size, np.int64)]).astype(np.int64)
    order = np.argsort(times, kind="stable")
    times, counts = times[order], np.cumsum(delta[order])
    last_of_instant = np.append(times[1:] != times[:-1], True) if times.size else np.zeros(0, np.bool_)
    return Demand(times[last_of_instant], counts[last_of_instant])


def randomise_phases(trace: Trace, seed: int, chunk_s: float = 1.0) -> Trace:
    """Each session shifted as a whole by a uniform part of a chunk: breaks phase locking, changes nothing else."""
    rng = np.random.default_rng(seed)
    shift = np.round(rng.uniform(0, chunk_s, len(trace.session_ids)) * 1000).astype(np.int64) * 1000
    times = np.minimum(trace.time_us + shift[trace.session], trace.horizon_us + math.ceil(chunk_s) * US)
    order = np.argsort(times, kind="stable")
    return Trace(
        name=trace.name,
        time_us=times[order],
        session=trace.session[order],
        event=trace.event[order],
        chunks=trace.chunks[order],
        session_ids=trace.session_ids,
        tenant=trace.tenant,
        tenants=trace.tenants,
    )
