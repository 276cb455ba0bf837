"""What the controller shows of the cluster: workers, sessions, moves under way, decisions. JSON-ready, bounded.

Times are seconds of the controller's monotonic clock; `clock` holds the same moment on that clock and as Unix time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from turboserve.orchestrator import view as views
from turboserve.session import OWNED, SessionState, public_state

if TYPE_CHECKING:
    from turboserve.runtime.controller_books import ControllerBooks, Live, Worker

SESSIONS_SHOWN = 2000
"""More than these are counted, not listed: the picture must fit into one message."""

_TIERS = {SessionState.HOST: "host", SessionState.SPILLING: "host", SessionState.DISK: "disk"}


def picture(books: ControllerBooks) -> dict[str, Any]:
    """Everything that GET /v1/cluster, the operations page and `top` are made of."""
    counts: dict[str, int] = {}
    for live in books.sessions.values():
        name = public_state(live.record.state).value
        counts[name] = counts.get(name, 0) + 1
    held: dict[str, list[Live]] = {}
    for live in books.sessions.values():
        if live.record.owner is not None:
            held.setdefault(live.record.owner, []).append(live)
    shown = list(books.sessions.values())[:SESSIONS_SHOWN]
    return {
        "clock": {"time_s": round(time.monotonic(), 3), "unix_s": round(time.time(), 3)},
        "workers": [
            *(_worker(books, name, worker, held.get(name, [])) for name, worker in sorted(books.workers.items())),
            *(_starting(name, asked_s) for name, asked_s in sorted(books.expected.items())),
        ],
        "sessions": counts,
        "session_list": [_session(books, live) for live in shown],
        "sessions_not_listed": len(books.sessions) - len(shown),
        "storage": dict(books.storage),
        "points": dict(books.point_counts),
        "decisions": list(books.decisions),
    }


def _worker(books: ControllerBooks, worker_id: str, worker: Worker, held: list[Live]) -> dict[str, Any]:
    stats, hello, columns = worker.stats, worker.hello, books.view.workers
    sessions = books.view.sessions
    active = sessions.active & (sessions.state == views.HELD) & (sessions.worker == worker.row)
    return {
        "id": worker_id,
        "pid": hello.pid,
        "node": hello.node,
        "state": worker.state,
        "device": hello.device,
        "gpu_count": hello.gpu_count,
        "group": hello.group or worker_id,
        "model": hello.model,
        "epoch": hello.worker_epoch,
        "numerics_id": hello.numerics_id,
        "active": int(np.count_nonzero(active)),
        "resident": len(held),
        "capacity": hello.capacity,
        "slots": hello.slot_count,
        "requested_s": round(float(columns.request_s[worker.row]), 3),
        "ready_s": round(float(columns.ready_at_s[worker.row]), 3),
        "chunk_latency_ms": round(stats.chunk_latency_ms, 3) if stats else 0.0,
        "batch_size": round(stats.batch_size_mean, 3) if stats else 0.0,
        "busy_share": round(stats.busy_share, 3) if stats else 0.0,
        "chunks": stats.chunks if stats else 0,
        "device_bytes": stats.device_bytes if stats else 0,
        "rss_bytes": stats.rss_bytes if stats else 0,
        "sessions": [
            {
                "id": live.record.session_id,
                "state": public_state(live.record.state).value,
                "active": bool(sessions.active[live.row]),
            }
            for live in held[:SESSIONS_SHOWN]
        ],
    }


def _starting(worker_id: str, asked_s: float) -> dict[str, Any]:
    """A worker that was asked for and has not said hello."""
    nothing = {"active": 0, "resident": 0, "capacity": 0, "slots": 0, "chunk_latency_ms": 0.0, "sessions": []}
    return {"id": worker_id, "pid": 0, "node": "", "state": "starting", "requested_s": round(asked_s, 3), **nothing}


def _session(books: ControllerBooks, live: Live) -> dict[str, Any]:
    record, sessions, move = live.record, books.view.sessions, live.move
    owner = books.workers.get(record.owner or "")
    row: dict[str, Any] = {
        "id": record.session_id,
        "state": public_state(record.state).value,
        "stage": record.state.value,
        "active": bool(sessions.active[live.row]),
        "worker": record.owner,
        "point_node": live.point_node,
        "tier": _TIERS.get(record.state, "device" if record.state in OWNED else "none"),
        "epoch": record.epoch,
        "steps": int(sessions.steps[live.row]),
        "reason": record.reason[:256],
        "bytes": {
            "device": owner.hello.session_bytes if owner is not None else 0,
            "host": live.point_bytes,
            "disk": live.disk_bytes,
        },
    }
    if move is not None:
        row["move"] = {
            "kind": move.kind.value,
            "phase": move.phase.value,
            "source": move.source,
            "target": move.target,
            "began_s": round(move.began_s, 3),
        }
    return row
