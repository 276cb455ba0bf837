"""Who may call which route. A route that is not in this table answers nobody: forgetting one fails safe, and a test."""

from __future__ import annotations

from enum import StrEnum


class Access(StrEnum):
    OPEN = "open"
    """Anybody: health, and pages that hold no data."""
    USER = "user"
    """Any key; a session or video belongs to its tenant, to others it does not exist."""
    ADMIN = "admin"
    TOKEN = "token"
    """The WebSocket: its attach message carries the right."""


TABLE: dict[tuple[str, str], Access] = {
    ("GET", "/"): Access.OPEN,
    ("GET", "/ops"): Access.OPEN,
    ("GET", "/assets/{path:path}"): Access.OPEN,
    ("GET", "/healthz"): Access.OPEN,
    ("GET", "/readyz"): Access.OPEN,
    ("GET", "/metrics"): Access.ADMIN,
    ("GET", "/openapi.json"): Access.USER,
    ("GET", "/v1/models"): Access.USER,
    ("GET", "/v1/cluster"): Access.ADMIN,
    ("POST", "/v1/sessions"): Access.USER,
    ("GET", "/v1/sessions"): Access.USER,
    ("GET", "/v1/sessions/{session_id}"): Access.USER,
    ("DELETE", "/v1/sessions/{session_id}"): Access.USER,
    ("GET", "/v1/sessions/{session_id}/card"): Access.USER,
    ("GET", "/v1/sessions/{session_id}/explain"): Access.USER,
    ("POST", "/v1/sessions/{session_id}/pause"): Access.USER,
    ("POST", "/v1/sessions/{session_id}/resume"): Access.USER,
    ("WEBSOCKET", "/v1/sessions/{session_id}/stream"): Access.TOKEN,
    ("POST", "/v1/videos"): Access.USER,
    ("GET", "/v1/videos"): Access.USER,
    ("GET", "/v1/videos/{video_id}"): Access.USER,
    ("GET", "/v1/videos/{video_id}/content"): Access.USER,
    ("DELETE", "/v1/videos/{video_id}"): Access.USER,
    ("POST", "/v1/admin/sessions/{session_id}/migrate"): Access.ADMIN,
    ("POST", "/v1/admin/sessions/{session_id}/suspend"): Access.ADMIN,
    ("POST", "/v1/admin/workers"): Access.ADMIN,
    ("POST", "/v1/admin/workers/{worker_id}/drain"): Access.ADMIN,
    ("POST", "/v1/admin/workers/{worker_id}/kill"): Access.ADMIN,
    ("POST", "/v1/admin/workers/{worker_id}/profile"): Access.ADMIN,
    ("POST", "/v1/admin/sessions/{session_id}/resume"): Access.ADMIN,
    ("GET", "/v1/admin/history"): Access.ADMIN,
}


def access_of(method: str, path_template: str) -> Access | None:
    """The rule for a route, or None: then it is refused."""
    return TABLE.get(("GET" if method == "HEAD" else method, path_template))
