"""`turboserve status` against canned answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner

from turboserve.cli.main import main

CLUSTER = {
    "workers": [
        {
            "id": "w0",
            "pid": 7,
            "node": "local",
            "state": "ready",
            "device": "cpu",
            "active": 3,
            "resident": 5,
            "capacity": 8,
            "chunk_latency_ms": 61.4,
        },
        {"id": "w1", "state": "lost"},
    ],
    "sessions": {"active": 3, "queued": 0, "idle": 2},
    "decisions": [{"event": "place", "session": "abc", "worker": "w0", "reason": "least latency"}],
}


class Canned(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answers: dict[str, tuple[int, Any]] = self.server.answers  # type: ignore[attr-defined]
        self.server.keys.append(self.headers.get("Authorization"))  # type: ignore[attr-defined]
        status, body = answers[self.path]
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    one = ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    one.answers = {"/readyz": (200, {"ready": True}), "/v1/cluster": (200, CLUSTER)}  # type: ignore[attr-defined]
    one.keys = []  # type: ignore[attr-defined]
    one.url = f"http://127.0.0.1:{one.server_address[1]}"  # type: ignore[attr-defined]
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


def status(server: Any, *args: str, **env: str) -> Any:
    return CliRunner(env={"TURBOSERVE_URL": server.url, **env}).invoke(main, ["status", *args])


def test_ready(server: Any) -> None:
    result = status(server, TURBOSERVE_API_KEY="k")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    for words in ("ready", "3 active, 2 idle", "w0", "61 ms", "w1", "lost", "place abc w0: least latency"):
        assert words in result.stderr
    assert server.keys == ["Bearer k", "Bearer k"]


def test_json(server: Any) -> None:
    body = json.loads(status(server, "--json", "--url", server.url).stdout)
    assert body == {"url": server.url, "ready": True, "cluster": CLUSTER}


def test_not_ready_says_why(server: Any) -> None:
    error = {"code": "not_ready", "message": "no worker is ready yet", "retryable": True}
    server.answers["/readyz"] = (503, {"error": error})
    result = status(server)
    assert result.exit_code == 1
    assert "not ready: no worker is ready yet" in result.stderr
    assert json.loads(status(server, "--json").stdout)["reason"] == "no worker is ready yet"


def test_no_key_and_no_server(server: Any) -> None:
    error = {"code": "unauthenticated", "message": "a key is needed", "hint": "set TURBOSERVE_API_KEY"}
    server.answers["/v1/cluster"] = (401, {"error": error})
    result = status(server)
    assert result.exit_code == 1
    assert "a key is needed" in result.stderr
    assert "set TURBOSERVE_API_KEY" in result.stderr
    gone = CliRunner().invoke(main, ["status", "--url", "http://127.0.0.1:9"])
    assert gone.exit_code == 1
    assert "cannot reach http://127.0.0.1:9" in gone.stderr
