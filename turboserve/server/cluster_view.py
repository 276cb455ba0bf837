"""GET /v1/cluster: the controller's picture with what only the gateway knows. Made at most four times a second, whoever
asks and however many: the operations page polls it twice a second, and a hundred open pages must cost little."""

from __future__ import annotations

import json
from typing import Any

from turboserve.server.gateway import Gateway
from turboserve.server.session_stream import SessionStream

FRESH_S = 0.25
_SHARE_S = 60


class ClusterView:
    """The newest answer as JSON text."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._made_s = -1e9
        self._text = b""

    def text(self) -> bytes:
        now_s = self._gateway.now()
        if now_s - self._made_s >= FRESH_S:
            self._made_s = now_s
            self._text = json.dumps(cluster_view(self._gateway), separators=(",", ":")).encode()
        return self._text


def cluster_view(gateway: Gateway) -> dict[str, Any]:
    """Workers, sessions, totals, and the last 100 decisions with their reasons."""
    picture, logic = gateway.logic.cluster, gateway.logic
    share = gateway.history.on_time_share(_SHARE_S)
    on_time, live = gateway.metrics.live_chunks
    return {
        **picture,
        "workers": picture.get("workers", []),
        # Counts are the gateway's: it alone knows which sessions a viewer is attached to.
        "sessions": logic.states(),
        "session_list": [row | _seen(logic.sessions.get(row["id"])) for row in picture.get("session_list", ())],
        "decisions": picture.get("decisions", []),
        "totals": {
            "viewers": len(gateway.viewers),
            "live_chunks": live,
            "on_time_share": round(on_time / live, 5) if live else None,
            "on_time_share_1m": None if share is None else round(share, 5),
            "controller": "connected" if logic.controller_up else "away",
            "may_kill": gateway.config.open,
        },
    }


def _seen(session: SessionStream | None) -> dict[str, Any]:
    """A session's stream as the gateway sees it."""
    if session is None:
        return {}
    counts = session.counts
    return {
        "state": session.public(),
        "next_index": session.next_index,
        "delivered": session.delivered,
        "attached": session.viewer is not None,
        "paused": session.paused,
        "on_time": counts.on_time,
        "late": counts.late,
        "queue_position": session.queue_position,
    }
