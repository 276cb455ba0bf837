"""What operators see and do: the cluster, drains, moves. What this fleet cannot do yet is refused by name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from turboserve import metrics as metrics_module
from turboserve.errors import Forbidden, InvalidRequest, NotFound
from turboserve.server.bodies import AddWorkersBody, MigrateBody, ProfileBody, json_schema, read_body
from turboserve.server.gateway import Gateway
from turboserve.server.gateway_config import LOOPBACK
from turboserve.server.history import SECONDS_KEPT
from turboserve.server.routes_sessions import check_id

router = APIRouter()


@router.get("/v1/cluster")
async def cluster(request: Request) -> Response:
    """Workers, sessions, totals, and the last 100 decisions with their reasons; `clock` dates their times."""
    return Response(request.app.state.cluster_view.text(), media_type="application/json")


@router.get("/v1/admin/history")
async def history(request: Request) -> dict[str, Any]:
    """The last minutes second by second, as columns; `?seconds=N` for fewer."""
    gateway: Gateway = request.app.state.gateway
    asked = request.query_params.get("seconds", str(SECONDS_KEPT))
    if not asked.isascii() or not asked.isdigit() or not 1 <= int(asked[:6]) <= SECONDS_KEPT:
        raise InvalidRequest("seconds is no number this server keeps", expected=f"1 to {SECONDS_KEPT}")
    return {"interval_s": 1.0, **gateway.history.columns(int(asked))}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    gateway: Gateway = request.app.state.gateway
    refresh(request.app.state, gateway)
    return Response(gateway.metrics.text(), media_type=metrics_module.CONTENT_TYPE)


def refresh(state: Any, gateway: Gateway) -> None:
    """Gauges that are read off the state rather than counted along."""
    figures = gateway.metrics
    figures.set_states(gateway.logic.states())
    held = sum(
        session.shape.chunk_bytes(chunk.index) for session in gateway.logic.sessions.values() for chunk in session.ring
    )
    figures.ring_bytes.set(held)
    figures.frame_ring_bytes.set(state.frame_ring_bytes())
    for name, bytes_ in gateway.logic.cluster.get("storage", {}).items():
        figures.storage_bytes.labels(name.removesuffix("_bytes")).set(bytes_)
    for name, count in gateway.logic.cluster.get("points", {}).items():
        figures.points.labels(name).set(count)
    workers = gateway.logic.cluster.get("workers", [])
    figures.room.set(sum(max(0, one["capacity"] - one["active"]) for one in workers if one["state"] == "ready"))


@router.post("/v1/admin/sessions/{session_id}/migrate", openapi_extra=json_schema(MigrateBody))
async def migrate(session_id: str, request: Request) -> dict[str, Any]:
    gateway: Gateway = request.app.state.gateway
    body = await read_body(request, MigrateBody)
    session = gateway.find(check_id(session_id), None)
    done = await gateway.command(
        "migrate", session_id=session.sid, worker_id=body.target, allow_approximate=body.allow_approximate
    )
    return {"id": session.sid, "state": done.state, "message": done.message}


@router.post("/v1/admin/sessions/{session_id}/suspend")
async def suspend(session_id: str, request: Request) -> dict[str, Any]:
    gateway: Gateway = request.app.state.gateway
    session = gateway.find(check_id(session_id), None)
    done = await gateway.command("suspend", session_id=session.sid)
    return {"id": session.sid, "state": done.state, "message": done.message}


@router.post("/v1/admin/sessions/{session_id}/resume")
async def resume(session_id: str, request: Request) -> dict[str, Any]:
    """Bring a suspended session back to a worker now, not at its next credit."""
    gateway: Gateway = request.app.state.gateway
    session = gateway.find(check_id(session_id), None)
    done = await gateway.command("resume", session_id=session.sid)
    return {"id": session.sid, "state": done.state, "message": done.message}


@router.post("/v1/admin/workers/{worker_id}/drain")
async def drain(worker_id: str, request: Request) -> dict[str, Any]:
    """Place nothing new on the worker; it ends when its last session is gone from it."""
    gateway: Gateway = request.app.state.gateway
    done = await gateway.command("drain", worker_id=check_worker(worker_id))
    return {"id": worker_id, "state": done.state, "message": done.message}


@router.post("/v1/admin/workers/{worker_id}/kill")
async def kill(worker_id: str, request: Request) -> dict[str, Any]:
    """Kill the worker's process as a crash would, to see what becomes of its sessions. Only on a loopback server
    without keys: there whoever asks could kill it from a shell as well."""
    gateway: Gateway = request.app.state.gateway
    client = request.client.host if request.client is not None else ""
    if not gateway.config.open or client not in LOOPBACK:
        raise Forbidden(
            "workers are killed only on a loopback server without keys",
            expected="a server started without --api-key and --api-key-file, asked from its own machine",
            hint="use drain: it loses nothing either, and waits",
        )
    done = await gateway.command("kill_worker", worker_id=check_worker(worker_id))
    return {"id": worker_id, "state": done.state, "message": done.message}


@router.post("/v1/admin/workers/{worker_id}/profile", openapi_extra=json_schema(ProfileBody))
async def profile(worker_id: str, request: Request) -> dict[str, Any]:
    """Record the worker's next chunks with torch.profiler. The answer says where the trace will be when they are made:
    in the data folder of the worker's machine."""
    gateway: Gateway = request.app.state.gateway
    body = await read_body(request, ProfileBody)
    done = await gateway.command("profile", worker_id=check_worker(worker_id), count=body.chunks)
    return {"id": worker_id, "state": done.state, "chunks": body.chunks, "path": done.message}


def check_worker(worker_id: str) -> str:
    if not 1 <= len(worker_id) <= 64:
        raise NotFound("no such worker")
    return worker_id


@router.post("/v1/admin/workers", openapi_extra=json_schema(AddWorkersBody))
async def add_workers(request: Request) -> dict[str, Any]:
    gateway: Gateway = request.app.state.gateway
    body = await read_body(request, AddWorkersBody)
    done = await gateway.command("add_workers", count=body.add)
    return {"state": done.state, "message": done.message}
