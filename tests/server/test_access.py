"""Every route x role x tenant, generated from the router: a new route without a row fails here."""

from __future__ import annotations

import hashlib
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute, APIWebSocketRoute
from gateway_harness import Harness, Viewer, serving

from turboserve.errors import ConfigError
from turboserve.server.access import TABLE, Access
from turboserve.server.auth import KeyRing, parse_keys
from turboserve.server.gateway_config import GatewayConfig

KEYS = {"alice": "user", "bob": "user", "root": "admin"}
BODIES = {
    "/v1/sessions": {"prompt": "a red circle"},
    "/v1/videos": {"prompt": "a red circle", "seconds": "0.04"},
    "/v1/admin/workers": {"add": 1},
    "/v1/admin/workers/{worker_id}/profile": {"chunks": 2},
    "/v1/admin/sessions/{session_id}/migrate": {"target": "w1"},
}
"""What a route needs to get as far as its own work; other routes need no body."""
KEYLESS = "/v1/admin/workers/{worker_id}/kill"
"""Closed to everybody as soon as there are keys."""
OWNED = ("{session_id}", "{video_id}")


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key-of-{name}"}


@pytest.fixture
async def server(tmp_path: Path):
    keys = tmp_path / "keys"
    lines = [
        f"{name} role={role} sha256={hashlib.sha256(f'key-of-{name}'.encode()).hexdigest()}"
        for name, role in KEYS.items()
    ]
    keys.write_text("# tenants\n\n" + "\n".join(lines) + "\n")
    async with serving(tmp_path / "data", api_key_file=str(keys)) as harness:
        yield harness


def routes_of(server: Harness) -> list[tuple[str, str]]:
    found = []
    waiting = list(server.process.app.routes)
    while waiting:
        route = waiting.pop()
        if (included := getattr(route, "original_router", None)) is not None:
            waiting += included.routes
        elif isinstance(route, APIWebSocketRoute):
            found.append(("WEBSOCKET", route.path))
        else:
            assert isinstance(route, APIRoute), f"{route} is no API route, so the access table does not guard it"
            found += [(method, route.path) for method in route.methods if method != "HEAD"]
    return sorted(found)


async def test_the_table_names_every_route_and_no_other(server: Harness) -> None:
    assert routes_of(server) == sorted(TABLE)


def expected(access: Access, role: str | None) -> set[int]:
    """Statuses of a refusal for that caller; empty when the route's own work decides."""
    if access is Access.OPEN or role == "admin":
        return set()
    if role is None:
        return {401}
    return {403} if access is Access.ADMIN else set()


async def test_matrix(server: Harness) -> None:
    opened = (await server.http.post("/v1/sessions", json={"prompt": "x"}, headers=bearer("alice"))).json()
    video = (await server.http.post("/v1/videos", json=BODIES["/v1/videos"], headers=bearer("alice"))).json()
    for (method, template), access in TABLE.items():
        if method == "WEBSOCKET":
            continue
        path = template.replace("{session_id}", opened["id"]).replace("{video_id}", video["id"])
        path = path.replace("{worker_id}", "w0").replace("{path:path}", "style.css")
        for name, role in [(None, None), ("nobody", None), ("bob", "user"), ("root", "admin")]:
            headers = bearer(name) if name else {}
            answer = await server.http.request(method, path, headers=headers, json=BODIES.get(template))
            where = f"{method} {template} as {name}: {answer.status_code} {answer.text[:200]}"
            refusals = {403} if template == KEYLESS and role == "admin" else expected(access, role)
            if refusals:
                assert answer.status_code in refusals, where
            else:
                assert answer.status_code not in (401, 403), where
            # Another tenant's things do not exist, to operators neither: they have /v1/admin for that.
            if access is Access.USER and role and any(part in template for part in OWNED):
                assert answer.status_code == 404, where
            if answer.status_code >= 400:
                error = answer.json()["error"]
                assert {"code", "message", "retryable", "request_id"} <= set(error), where
                assert opened["token"] not in answer.text
    assert (await server.http.get(f"/v1/sessions/{opened['id']}", headers=bearer("alice"))).status_code == 200


async def test_unknown_and_foreign_sessions_look_the_same(server: Harness) -> None:
    opened = (await server.http.post("/v1/sessions", json={"prompt": "x"}, headers=bearer("alice"))).json()
    bodies = []
    for sid in (opened["id"], "a" * 26, "../../etc/passwd", "A" * 26, "x"):
        for method in ("GET", "DELETE"):
            answer = await server.http.request(method, f"/v1/sessions/{sid}", headers=bearer("bob"))
            if answer.status_code == 404 and "no such path" not in answer.text:
                body = answer.json()["error"]
                body.pop("request_id")
                bodies.append(body)
    assert len(bodies) >= 6 and all(body == bodies[0] for body in bodies)


async def test_the_socket_needs_its_token_even_with_a_key(server: Harness) -> None:
    opened = (await server.http.post("/v1/sessions", json={"prompt": "x"}, headers=bearer("alice"))).json()
    async with server.socket(opened["id"], additional_headers=bearer("root")) as socket:
        viewer = Viewer(socket)
        await viewer.send("attach", token="guess", next_index=0)
        assert await viewer.close_code() == 4401


async def test_quotas_of_a_user_key(server: Harness) -> None:
    statuses = []
    for _ in range(5):
        answer = await server.http.post("/v1/sessions", json={"prompt": "x"}, headers=bearer("bob"))
        statuses.append(answer.status_code)
    assert statuses == [201, 201, 201, 201, 429]
    assert answer.json()["error"]["code"] == "quota_exceeded" and int(answer.headers["Retry-After"]) >= 1
    # One tenant's quota is not another's.
    assert (await server.http.post("/v1/sessions", json={"prompt": "x"}, headers=bearer("alice"))).status_code == 201


async def test_keys_are_reloaded_and_a_wrong_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    line = f"alice sha256={hashlib.sha256(b'one').hexdigest()}"
    path.write_text(line)
    ring = KeyRing("", str(path))
    assert ring.identify("Bearer one").tenant == "alice"
    path.write_text(line.replace("alice", "carol") + " weight=2\n")
    assert ring.reload() and ring.identify("Bearer one").weight == 2
    path.write_text("alice password=hunter2\n")
    with pytest.raises(ConfigError) as wrong:
        ring.reload()
    assert "hunter2" not in str(wrong.value) and "line 1" in str(wrong.value)
    assert ring.identify("Bearer one").tenant == "carol"


def test_key_lines() -> None:
    digest = "0" * 64
    for bad in (
        "alice",
        "alice sha256=xyz",
        f"al/ice sha256={digest}",
        f"a role=god sha256={digest}",
        f"a weight=0 sha256={digest}",
        f"a sha256={digest} colour=red",
    ):
        with pytest.raises(ConfigError):
            parse_keys(bad, "keys")


def test_a_public_address_needs_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        GatewayConfig(data_dir=str(tmp_path), token="", controller_port=1, host="0.0.0.0")


async def test_without_keys_a_foreign_host_name_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        assert (await server.http.get("/v1/models")).status_code == 200
        answer = await server.http.get("/v1/models", headers={"Host": "evil.example"})
        assert answer.status_code == 421 and answer.json()["error"]["code"] == "host_not_allowed"
        answer = await server.http.post("/v1/sessions", json={"prompt": "x"}, headers={"Origin": "http://evil.example"})
        assert answer.status_code == 403
        answer = await server.http.post("/v1/sessions", json={"prompt": "x"}, headers={"Origin": server.url})
        assert answer.status_code == 201


async def test_single_key(tmp_path: Path) -> None:
    async with serving(tmp_path, api_key="secret") as server, httpx.AsyncClient(base_url=server.url) as http:
        for header in (
            {},
            {"Authorization": "Bearer secre"},
            {"Authorization": "secret"},
            {"Authorization": "Basic secret"},
        ):
            answer = await http.get("/v1/models", headers=header)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        assert (await http.get("/v1/cluster", headers={"Authorization": "bearer secret"})).status_code == 200
        for path in ("/healthz", "/readyz"):
            assert (await http.get(path)).status_code == 200
