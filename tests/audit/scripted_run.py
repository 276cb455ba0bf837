"""A small run written by script, not by the simulator: the clean case that every planted violation departs from.

Three sessions, three workers, one of each thing that may happen: a shared batch, a migrate, a suspend with its
resume, a worker asked for and released, a worker lost, reduced steps and a shed chunk.
"""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path

PROFILE = {
    "name": "scripted",
    "chunk_s": 1.0,
    "chunk_target_s": 1.0,
    "batch_latency_s": [0.4, 0.6, 0.8, 1.0],
    "capacity": 4,
    "resident_max": 2,
    "denoise_steps": 4,
    "denoise_steps_floor": 2,
    "step_latency_share": 0.8,
    "offload_s": 0.075,
    "resume_s": 0.075,
    "migrate_s": 0.03,
    "provision_s": 30.0,
    "price_per_worker_hour": 2.0,
}

TRACE = [
    (0.0, "s0", "arrive", ""),
    (0.0, "s0", "active", 4),
    (0.0, "s1", "arrive", ""),
    (0.0, "s1", "active", 60),
    (4.0, "s0", "idle", ""),
    (20.0, "s0", "active", 3),
    (23.0, "s0", "depart", ""),
    (40.0, "s2", "arrive", ""),
    (40.0, "s2", "active", 5),
    (45.0, "s2", "depart", ""),
    (60.0, "s1", "depart", ""),
]

DECISIONS = [
    {"time_s": 0.0, "event": "worker_request", "worker": "w0"},
    {"time_s": 0.0, "event": "worker_ready", "worker": "w0"},
    {"time_s": 0.0, "event": "worker_request", "worker": "w1"},
    {"time_s": 0.0, "event": "worker_ready", "worker": "w1"},
    {"time_s": 0.0, "event": "place", "session": "s0", "worker": "w0"},
    {"time_s": 0.0, "event": "place", "session": "s1", "worker": "w0"},
    {"time_s": 5.0, "event": "worker_request", "worker": "w2"},
    {"time_s": 5.0, "event": "suspend", "session": "s0", "source": "w0", "end_s": 5.075},
    {"time_s": 6.5, "event": "migrate", "session": "s1", "source": "w0", "worker": "w1", "end_s": 6.53},
    {"time_s": 20.0, "event": "resume", "session": "s0", "worker": "w1", "end_s": 20.075},
    {"time_s": 35.0, "event": "worker_ready", "worker": "w2"},
    {"time_s": 40.0, "event": "place", "session": "s2", "worker": "w2"},
    {"time_s": 50.0, "event": "worker_release", "worker": "w2"},
    {"time_s": 55.5, "event": "worker_lost", "worker": "w1"},
    {"time_s": 55.5, "event": "resume", "session": "s1", "worker": "w0", "end_s": 55.575},
]

COLUMNS = ["session_id", "index", "period", "worker", "batch", "n", "steps", "release_s", "start_s", "finish_s"]


def _chunk_rows() -> list[dict]:
    """Chunks one by one, as soon as release, session and transfers allow; the first two share their batch."""
    rows = []

    def worker_of(session: str, time_s: float) -> str:
        if session == "s0":
            return "w0" if time_s < 20.0 else "w1"
        if session == "s2":
            return "w2"
        return "w0" if time_s < 6.5 or time_s >= 55.5 else "w1"

    blocked = {"s0": [(5.0, 5.075), (20.0, 20.075)], "s1": [(6.5, 6.53), (55.5, 55.575)], "s2": []}
    wanted = []
    for session, active_s, first, period, count in (
        ("s0", 0.0, 0, 0, 4),
        ("s0", 20.0, 4, 1, 3),
        ("s1", 0.0, 0, 0, 59),
        ("s2", 40.0, 0, 0, 5),
    ):
        for i in range(count):
            wanted.append((active_s + max(0, i - 1) * 1.0, session, first + i, period))
    free: dict[str, float] = {}
    done: dict[str, float] = {}
    batches: dict[str, int] = {}
    for release_s, session, index, period in sorted(wanted, key=lambda chunk: (chunk[0], chunk[2], chunk[1])):
        shared = release_s == 0.0 and index == 0
        steps = 2 if (session, index) == ("s1", 30) else 4
        seconds = 0.6 if shared else 0.4 * (1 - 0.8 * (1 - steps / 4))
        start_s = max(release_s, done.get(session, 0.0))
        for _ in range(3):
            worker = worker_of(session, start_s)
            if not shared:
                start_s = max(start_s, free.get(worker, 0.0))
            for from_s, to_s in blocked[session]:
                if start_s < to_s and start_s + seconds > from_s:
                    start_s = to_s
        first_of_batch = not shared or session == "s0"
        batches[worker] = batches.get(worker, -1) + first_of_batch
        free[worker] = done[session] = start_s + seconds
        rows.append(
            {
                "session_id": session,
                "index": index,
                "period": period,
                "worker": worker,
                "batch": batches[worker],
                "n": 2 if shared else 1,
                "steps": steps,
                "release_s": release_s,
                "start_s": start_s,
                "finish_s": start_s + seconds,
            }
        )
    return rows


@dataclass
class ScriptedRun:
    """The run as plain tables, so that a test can change one thing and write it out."""

    chunks: list[dict] = field(default_factory=_chunk_rows)
    shed: list[dict] = field(
        default_factory=lambda: [{"session_id": "s1", "index": 59, "period": 0, "time_s": 60.0, "reason": "no room"}]
    )
    decisions: list[dict] = field(default_factory=lambda: [dict(line) for line in DECISIONS])
    report: dict | None = None
    profile: dict = field(default_factory=lambda: dict(PROFILE))

    def chunk(self, session: str, index: int) -> dict:
        return next(row for row in self.chunks if (row["session_id"], row["index"]) == (session, index))

    def decision(self, event: str, **where: str) -> dict:
        return next(
            line
            for line in self.decisions
            if line["event"] == event and all(line.get(key) == value for key, value in where.items())
        )

    def write(self, directory: Path) -> tuple[Path, Path, Path]:
        """Write run, trace and profile; answer their paths."""
        out = directory / "run"
        out.mkdir(parents=True, exist_ok=True)
        with gzip.open(out / "chunks.csv.gz", "wt", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for row in self.chunks:
                writer.writerow([f"{row[c]:.6f}" if c.endswith("_s") else row[c] for c in COLUMNS])
        with (out / "shed.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["session_id", "index", "period", "time_s", "reason"])
            writer.writeheader()
            writer.writerows(self.shed)
        with (out / "decisions.jsonl").open("w") as file:
            for line in sorted(self.decisions, key=lambda line: line["time_s"]):
                file.write(json.dumps(line | {"reason": "scripted"}) + "\n")
        if self.report is not None:
            (out / "report.json").write_text(json.dumps(self.report))
        trace = directory / "trace.csv.gz"
        with gzip.open(trace, "wt") as file:
            file.write("time_s,session_id,event,chunks\n")
            for time_s, session, event, chunks in TRACE:
                file.write(f"{time_s:.3f},{session},{event},{chunks}\n")
        profile = directory / "profile.json"
        profile.write_text(json.dumps(self.profile))
        return out, trace, profile
