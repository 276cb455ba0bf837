"""The public port: bodies, bounds, errors, health, metrics, videos."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from gateway_harness import Harness, serving
from prometheus_client.parser import text_string_to_metric_families

from turboserve.errors import TurboServeError
from turboserve.server.bodies import nesting
from turboserve.server.error_codes import BY_CODE, as_markdown
from turboserve.server.gateway_config import Limits

ERRORS_MD = Path(__file__).parents[2] / "docs" / "errors.md"


@pytest.fixture
async def server(tmp_path: Path):
    async with serving(tmp_path) as harness:
        yield harness


async def test_create_answers_as_the_contract_says(server: Harness) -> None:
    answer = await server.open("a red circle and a fizzbuzz", seed=5, format="jpeg", max_duration_s=2.5)
    assert {"id", "token", "state", "stream_url", "model", "seed", "fps", "width", "height", "chunk_frames"} <= set(
        answer
    )
    assert len(answer["id"]) == 26 and answer["seed"] == 5 and len(answer["token"]) >= 43
    assert answer["chunk_frames"] == {"first": 4, "rest": 4}
    assert "fizzbuzz" in answer["ignored_words"]
    state = (await server.http.get(f"/v1/sessions/{answer['id']}")).json()
    assert {"id", "state", "epoch", "worker", "next_index", "delivered", "prompt_version", "bytes"} <= set(state)
    assert set(state["bytes"]) == {"device", "host", "disk"} and "token" not in state
    for _ in range(2):
        gone = await server.http.delete(f"/v1/sessions/{answer['id']}")
        assert gone.status_code == 200 and gone.json()["state"] == "closed"
    assert (await server.http.post(f"/v1/sessions/{answer['id']}/pause")).status_code == 409


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ("{", 400, "malformed"),
        ("", 400, "malformed"),
        ('{"prompt": NaN}', 400, "malformed"),
        ('{"prompt": "x", "prompt": "y"}', 400, "malformed"),
        ('{"prompt": "x", "max_duration_s": 1e999}', 400, "malformed"),
        ("\xff", 400, "malformed"),
        ("[" * 17 + "]" * 17, 413, "too_large"),
        ("[]", 422, "invalid_request"),
        ("{}", 422, "invalid_request"),
        ('{"prompt": 7}', 422, "invalid_request"),
        ('{"prompt": "x", "seed": true}', 422, "invalid_request"),
        ('{"prompt": "x", "seed": -1}', 422, "invalid_request"),
        ('{"prompt": "x", "seed": 1.5}', 422, "invalid_request"),
        ('{"prompt": "x", "format": "avi"}', 422, "invalid_request"),
        ('{"prompt": "x", "steps": 99}', 422, "invalid_request"),
        ('{"prompt": "x", "steps": 1}', 422, "invalid_request"),
        ('{"prompt": "x", "size": "4000x4000"}', 422, "invalid_request"),
        ('{"prompt": "x", "prompt_switch": "blend"}', 422, "invalid_request"),
        ('{"prompt": "x", "decoder": "light"}', 422, "invalid_request"),
        ('{"prompt": "x", "decoder": ""}', 422, "invalid_request"),
        ('{"prompt": "x", "max_duration_s": 0}', 422, "invalid_request"),
        ('{"prompt": "x", "sekret_key": "sekret_value"}', 422, "invalid_request"),
        ('{"prompt": "x", "model": "nope"}', 422, "unknown_model"),
        ('{"prompt": "   "}', 422, "invalid_prompt"),
        ('{"prompt": "a\\u0007b"}', 422, "invalid_prompt"),
        ('{"prompt": "a\\ud800b"}', 422, "invalid_prompt"),
        (json.dumps({"prompt": "x" * 5000}), 422, "invalid_prompt"),
    ],
)
async def test_bodies_that_do_not_fit(server: Harness, body: str, status: int, code: str) -> None:
    answer = await server.http.post("/v1/sessions", content=body.encode("latin-1"))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code and error["retryable"] is False
    assert error["request_id"] == answer.headers["X-Request-Id"]
    assert "sekret" not in answer.text and not server.gateway.logic.sessions


async def test_large_bodies_are_refused_by_length_and_by_count(server: Harness) -> None:
    answer = await server.http.post("/v1/sessions", content=b"x" * ((1 << 20) + 1))
    assert answer.status_code == 413

    async def endless():
        for _ in range(40):
            yield b" " * 65536

    answer = await server.http.post("/v1/sessions", content=endless())
    assert answer.status_code == 413


async def test_a_slow_body_is_given_up(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(body_s=0.3)) as server:

        async def slow():
            yield b'{"prompt":'
            await asyncio.sleep(2)
            yield b'"x"}'

        answer = await server.http.post("/v1/sessions", content=slow())
        assert answer.status_code == 408 and answer.json()["error"]["code"] == "too_slow"


async def raw(server: Harness, data: bytes, wait_s: float = 5.0) -> bytes:
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(), wait_s)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_headers_are_bounded_in_size_number_and_time(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(header_s=0.3)) as server:
        large = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 20_000 + b"\r\n\r\n"
        assert b" 431 " in (await raw(server, large)).split(b"\r\n")[0]
        many = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: a\r\n" * 70 + b"\r\n"
        assert b" 431 " in (await raw(server, many)).split(b"\r\n")[0]
        assert b" 408 " in (await raw(server, b"GET /healthz HTTP/1.1\r\nHost: loc")).split(b"\r\n")[0]
        assert await raw(server, b"") == b""
        assert (await server.http.get("/healthz")).status_code == 200


async def test_unknown_paths_and_methods_have_the_same_shape(server: Harness) -> None:
    for method, path, status, code in [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("PUT", "/v1/sessions", 405, "method_not_allowed"),
        ("GET", "/assets/../app.py", 404, "not_found"),
        ("GET", "/assets/%2e%2e/%2e%2e/app.py", 404, "not_found"),
    ]:
        answer = await server.http.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), path


async def test_readiness_tells_the_truth(server: Harness) -> None:
    assert (await server.http.get("/readyz")).status_code == 200
    for state in ("draining", "lost"):
        server.cluster.tell(
            __import__("turboserve.runtime.messages", fromlist=["m"]).WorkerChanged(
                worker_id="w0", worker_epoch=1, state=state
            )
        )
        answer = await server.http.get("/readyz")
        assert answer.status_code == 503 and "no_worker_ready" in answer.text and answer.headers["Retry-After"]
    server.cluster.add_worker("w1")
    assert (await server.http.get("/readyz")).status_code == 200
    server.gateway.controller_lost()
    assert "controller_unreachable" in (await server.http.get("/readyz")).text
    assert (await server.http.get("/healthz")).status_code == 200


async def test_a_full_queue_answers_503_with_a_hint(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(queue_length=2)) as server:
        server.cluster.room = 1
        for _ in range(3):
            await server.open()
        answer = await server.http.post("/v1/sessions", json={"prompt": "x"})
        assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["error"]["retryable"] is True
        assert "queue_full" in (await server.http.get("/readyz")).text


async def test_metrics_name_what_the_contract_asks_for_and_no_session(server: Harness) -> None:
    opened = await server.open()
    async with server.viewer(opened, pace="live") as viewer:
        await viewer.take(5)
        text = (await server.http.get("/metrics")).text
    families = {one.name: one for one in text_string_to_metric_families(text)}
    for name in (
        "chunk_latency_seconds",
        "first_chunk_latency_seconds",
        "on_time_share",
        "batch_size",
        "sessions",
        "sent_bytes",
        "loop_lag_seconds",
        "encode_seconds",
        "ring_bytes",
    ):
        assert f"turboserve_{name}" in families
    assert opened["id"] not in text
    states = {sample.labels["state"]: sample.value for sample in families["turboserve_sessions"].samples}
    assert set(states) == {"queued", "active", "idle", "suspended", "migrating", "recovering", "closed", "failed"}
    assert sum(states.values()) == 1


async def test_admin_commands_that_this_fleet_cannot_do_say_so(server: Harness) -> None:
    opened = await server.open()
    answer = await server.http.post(f"/v1/admin/sessions/{opened['id']}/migrate", json={"target": "w1"})
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "conflict"
    answer = await server.http.post("/v1/admin/workers", json={"add": 0})
    assert answer.status_code == 422


async def test_a_video(server: Harness) -> None:
    made = (await server.http.post("/v1/videos", json={"prompt": "a red circle", "seconds": 0.1})).json()
    for _ in range(100):
        video = (await server.http.get(f"/v1/videos/{made['id']}")).json()
        if video["status"] == "completed":
            break
        await asyncio.sleep(0.02)
    assert video["progress"] == 100 and video["expires_at"] > video["created_at"]
    content = await server.http.get(f"/v1/videos/{made['id']}/content")
    assert content.status_code == 200 and content.content[4:8] == b"ftyp"
    listed = (await server.http.get("/v1/videos")).json()
    assert [one["id"] for one in listed["data"]] == [made["id"]]
    assert (await server.http.delete(f"/v1/videos/{made['id']}")).json()["deleted"] is True
    missing = await server.http.get(f"/v1/videos/{made['id']}")
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "invalid_request_error"
    bad = await server.http.post("/v1/videos", json={"prompt": "x", "seconds": "many"})
    assert bad.status_code == 422 and bad.json()["error"]["param"] == "seconds"
    assert not list((Path(server.gateway.config.data_dir) / "videos").iterdir())


async def test_openapi_describes_bodies(server: Harness) -> None:
    schema = (await server.http.get("/openapi.json")).json()
    body = schema["paths"]["/v1/sessions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] is False and "prompt" in body["properties"]


async def test_root_path(tmp_path: Path) -> None:
    async with serving(tmp_path, root_path="/video") as server:
        opened = await server.open()
        assert opened["stream_url"] == f"/video/v1/sessions/{opened['id']}/stream"
        async with server.viewer(opened) as viewer:
            await viewer.take(2)


def test_every_error_has_a_row() -> None:
    def kinds(kind: type[TurboServeError]) -> list[type[TurboServeError]]:
        return [kind, *(one for child in kind.__subclasses__() for one in kinds(child))]

    for kind in kinds(TurboServeError):
        assert kind.code in BY_CODE, f"{kind.__name__}'s code {kind.code!r} is missing from error_codes.py"
        assert BY_CODE[kind.code].http in (kind.http_status, None) or kind.code == "unauthenticated"


def test_errors_md_is_current() -> None:
    assert ERRORS_MD.read_text() == as_markdown(), "run: python -m turboserve.server.error_codes > docs/errors.md"


def test_nesting_ignores_brackets_in_strings() -> None:
    assert nesting(b'{"a": "[[[[\\"[[", "b": [1, [2]]}') == 3
