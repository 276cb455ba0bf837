"""A hub on this machine: the few routes of the Hugging Face API that `models pull` uses, with cuts on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`files` are served as repository `name`; `spoil` answers a file with other bytes, `cut_after` ends the first
    download of a file in mid-air. `requests` records (method, path, Range)."""

    def __init__(self, name: str, files: dict[str, bytes], licence: str) -> None:
        self.name, self.files, self.licence = name, files, licence
        self.spoil: set[str] = set()
        self.cut_after: dict[str, int] = {}
        self.requests: list[tuple[str, str, str | None]] = []

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            one: dict[str, Any] = {"rfilename": name, "size": len(data)}
            one["blobId"] = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            if name.endswith(".safetensors"):
                one["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(one)
        return {
            "_id": "1", "id": self.name, "modelId": self.name, "sha": REVISION, "private": False, "tags": [],
            "downloads": 0, "likes": 0, "cardData": {"license": self.licence}, "siblings": siblings,
        }  # fmt: skip


@contextmanager
def fake_hub(hub: FakeHub) -> Iterator[str]:
    """Serve it; the base URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(head=True)

        def do_GET(self) -> None:
            self._answer(head=False)

        def _answer(self, head: bool) -> None:
            path = self.path.split("?")[0]
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if path in (f"/api/models/{hub.name}", f"/api/models/{hub.name}/revision/main"):
                self._send(200, json.dumps(hub.info()).encode(), head, {"Content-Type": "application/json"})
                return
            prefix = f"/{hub.name}/resolve/{REVISION}/"
            name = path.removeprefix(prefix)
            if not path.startswith(prefix) or name not in hub.files:
                self._send(404, b"{}", head, {"X-Error-Code": "RepoNotFound"})
                return
            data = hub.files[name]
            etag = hashlib.sha256(data).hexdigest()
            if name in hub.spoil:
                data = bytes(len(data))
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
            span, status = self.headers.get("Range"), 200
            if span and not head:
                start = int(span.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                data, status = data[start:], 206
            self._send(status, data, head, headers, None if head else hub.cut_after.pop(name, None))

        def _send(
            self, status: int, data: bytes, head: bool, headers: dict[str, str], cut_after: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not head:
                self.wfile.write(data if cut_after is None else data[:cut_after])
            if cut_after is not None:
                self.wfile.flush()
                self.connection.shutdown(2)
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
