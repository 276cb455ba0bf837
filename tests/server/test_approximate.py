"""A session that an operator lets go on under other numerics: real workers whose torch uses other instructions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from real_server import REPOSITORY, received, start_server
from test_fleet import ready, until, workers
from test_real_server import open_session

pytestmark = pytest.mark.timeout(200)
OTHER_BITS = """
import os
if os.path.exists({flag!r}):
    os.environ["ATEN_CPU_CAPABILITY"] = "default"
"""
"""Python runs this in every process that starts; torch reads the variable when it is loaded. So workers that start
after the flag was set are another kind of machine."""


class Headers:
    """A viewer that keeps the headers of its chunks; each attach is one `take`."""

    def __init__(self, url: str, opened: dict[str, Any]) -> None:
        self.url = url.replace("http", "ws", 1) + f"/v1/sessions/{opened['id']}/stream"
        self.token = opened["token"]
        self.chunks: list[dict[str, Any]] = []
        self.numerics_id = ""

    async def take(self, count: int) -> None:
        async with websockets.connect(self.url, max_size=None, compression=None) as socket:
            attach = {"type": "attach", "token": self.token, "next_index": len(self.chunks), "pace": "free"}
            await socket.send(json.dumps(attach))
            while count:
                message = json.loads(await received(socket))
                assert message["type"] not in ("error", "end"), message
                if message["type"] == "attached":
                    self.token, self.numerics_id = message["token"], message["numerics_id"]
                if message["type"] == "chunk":
                    await socket.recv()
                    self.chunks.append(message)
                    count -= 1
                    await socket.send(json.dumps({"type": "ack", "index": message["index"]}))

    def marked(self) -> list[int]:
        return [one["index"] for one in self.chunks if "continuity" in one]

    def holds(self) -> bool:
        before = [one["digest"] for one in self.chunks]
        return [one["digest_prev"] for one in self.chunks] == ["", *before[:-1]]


async def test_there_and_only_when_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = tmp_path / "other-bits"
    (tmp_path / "sitecustomize.py").write_text(OTHER_BITS.format(flag=str(flag)))
    monkeypatch.setattr("real_server.REPOSITORY", f"{tmp_path}:{REPOSITORY}")  # what goes into PYTHONPATH
    assert "ATEN_CPU_CAPABILITY" not in os.environ
    with start_server(tmp_path / "server", "--workers", "1") as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            reference = Headers(server.url, await open_session(server.url))
            moved = Headers(server.url, await open_session(server.url))
            sid = moved.url.split("/")[-2]
            await moved.take(4)
            flag.touch()
            assert (await http.post("/v1/admin/workers", json={"add": 1})).status_code == 200
            found = await ready(http, 2)
            assert found["w0"]["numerics_id"] != found["w1"]["numerics_id"]
            await reference.take(12)
            assert reference.marked() == []

            url = f"/v1/admin/sessions/{sid}/migrate"
            refused = await http.post(url, json={"target": "w1"})
            assert refused.status_code == 409
            assert "allow_approximate" in refused.json()["error"]["message"]
            assert (await http.get(f"/v1/sessions/{sid}")).json()["worker"] == "w0"
            answer = await http.post(url, json={"target": "w1", "allow_approximate": True})
            assert answer.status_code == 200, answer.text

            async def there() -> bool:
                state = (await http.get(f"/v1/sessions/{sid}")).json()
                return state["worker"] == "w1" and state["state"] != "migrating"

            await until(there)
            await moved.take(8)
            assert moved.numerics_id == found["w1"]["numerics_id"]
            assert (await http.get(f"/v1/sessions/{sid}")).json()["numerics_id"] == moved.numerics_id
            (first,) = moved.marked()
            assert 4 <= first <= 8, "up to four chunks were made ahead of the viewer before it moved"
            assert moved.chunks[first]["continuity"] == "approximate" and moved.holds()
            ours, theirs = ([one["digest"] for one in each.chunks] for each in (moved, reference))
            assert ours[:first] == theirs[:first], "the same stream until then"
            # Whether the bytes differ after that is rounding's to say: pixels have eight bits.

            # Its worker is lost: it waits for one like it, and is not put onto the other kind.
            os.kill((await workers(http))["w1"]["pid"], 9)
            await moved.take(3)
            assert (await http.get(f"/v1/sessions/{sid}")).json()["worker"] == "w1"
            assert moved.marked() == [first] and moved.holds()
