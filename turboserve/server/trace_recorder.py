"""`serve --record-trace F`: what users really did, as a trace (traces/README.md) that the simulator runs on.

A period is a time in which a session wanted chunks; its length in the trace is what it was given, in seconds of play.
Times are by the wall clock from the start of the server, so that at --playback-rate below 1 the trace is slower, too.
The file is written whole, every WRITE_EVERY_S and at the end; no prompts and no tenants are in it.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from turboserve.errors import ConfigError

WRITE_EVERY_S = 30.0
SESSIONS_MAX = 100_000
"""After so many the trace is full: what comes later is left out, and the log says so once."""


@dataclass(slots=True)
class _Period:
    start_s: float
    first_index: int
    end_s: float | None = None
    chunks: int = 0


@dataclass(slots=True)
class _Session:
    arrive_s: float
    periods: list[_Period] = field(default_factory=list)
    depart_s: float | None = None


def trace_path(asked: str, gateway_epoch: int) -> Path:
    """A gateway that was restarted writes beside what the one before it wrote: users.csv.gz, users.2.csv.gz, ..."""
    path = Path(asked)
    if gateway_epoch <= 1:
        return path
    stem, dot, rest = path.name.partition(".")
    return path.with_name(f"{stem}.{gateway_epoch}{dot}{rest}")


class TraceRecorder:
    """Collects events; times are of any one clock. `path` must be writable now, not only at the end."""

    def __init__(self, path: Path, started_s: float, chunk_s: float) -> None:
        self._path = path
        self._started_s = started_s
        self._chunk_s = chunk_s
        self._sessions: dict[str, _Session] = {}
        self.full = False
        self._changed = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.write(started_s)
        except OSError as error:
            raise ConfigError(
                f"--record-trace {path}: {error.strerror}", expected="a file that can be written"
            ) from None

    def arrive(self, session_id: str, now_s: float) -> None:
        if len(self._sessions) >= SESSIONS_MAX:
            self.full = True
            return
        self._changed = True
        self._sessions.setdefault(session_id, _Session(now_s - self._started_s))

    def activity(self, session_id: str, active: bool, next_index: int, now_s: float) -> None:
        """The session began or stopped to want chunks; `next_index` is the chunk that comes next."""
        session = self._sessions.get(session_id)
        if session is None:  # of an earlier gateway: for this trace it comes now
            self.arrive(session_id, now_s)
            session = self._sessions.get(session_id)
        if session is None or session.depart_s is not None:
            return
        if active and session.periods and session.periods[-1].end_s is None:
            return  # only the viewer came or went
        self._changed = True
        self._close(session, next_index, now_s)
        if active:
            session.periods.append(_Period(now_s - self._started_s, next_index))

    def depart(self, session_id: str, next_index: int, now_s: float) -> None:
        session = self._sessions.get(session_id)
        if session is not None and session.depart_s is None:
            self._changed = True
            self._close(session, next_index, now_s)
            end_s = session.periods[-1].end_s if session.periods else None
            session.depart_s = max(now_s - self._started_s, end_s or 0.0)

    def cut(self, next_index: Mapping[str, int], now_s: float) -> None:
        """The recording ends: periods that are not over end here, their sessions stay open."""
        for session_id, session in self._sessions.items():
            if session.periods and session.periods[-1].end_s is None:
                self._changed = True
                self._close(session, next_index.get(session_id, 0), now_s)

    def _close(self, session: _Session, next_index: int, now_s: float) -> None:
        period = session.periods[-1] if session.periods else None
        if period is None or period.end_s is not None:
            return
        # At least a millisecond, the file's resolution: an idle stands behind its active.
        period.end_s = max(now_s - self._started_s, period.start_s + 0.001)
        period.chunks = next_index - period.first_index
        if period.chunks <= 0:
            session.periods.pop()  # it wanted chunks and went before one was made

    def rows(self, now_s: float) -> list[tuple[float, str, str, str]]:
        """(time_s, session_id, event, chunks) by time; periods that are not over are left out."""
        found: list[tuple[float, int, str, str, str]] = []
        for session_id, session in self._sessions.items():
            found.append((session.arrive_s, 0, session_id, "arrive", ""))
            for place, period in enumerate(session.periods):
                if period.end_s is None:
                    continue
                seconds = max(1, math.ceil(period.chunks * self._chunk_s - 1e-9))
                found.append((period.start_s, 1, session_id, "active", str(seconds)))
                last = place == len(session.periods) - 1
                if not (last and session.depart_s == period.end_s):
                    found.append((period.end_s, 2, session_id, "idle", ""))
            if session.depart_s is not None:
                found.append((session.depart_s, 3, session_id, "depart", ""))
        # Of one session's events at one moment the order of its life; sorting by time is stable for the rest.
        found.sort(key=lambda row: (round(row[0], 3), row[1] if row[1] != 2 else 0.5, row[2]))
        return [(time_s, session_id, event, chunks) for time_s, _, session_id, event, chunks in found]

    def write(self, now_s: float) -> None:
        """The whole file, put in place in one step. Nothing when nothing changed."""
        if not self._changed:
            return
        self._changed = False
        lines = [f"{time_s:.3f},{sid},{event},{chunks}" for time_s, sid, event, chunks in self.rows(now_s)]
        text = "\n".join(["time_s,session_id,event,chunks", *lines, ""])
        data = text.encode()
        scratch = self._path.with_name(f".{self._path.name}.new")
        scratch.write_bytes(gzip.compress(data, 6, mtime=0) if self._path.suffix == ".gz" else data)
        os.replace(scratch, self._path)
