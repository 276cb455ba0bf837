"""What operators see and do: the cluster, drains, moves. What this fleet cannot do yet is refused by name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from turboserve import metrics as metrics_module
from turboserve.errors import NotFound
from turboserve.server.bodies import AddWorkersBody, MigrateBody, json_schema, read_body
from turboserve.server.gateway import Gateway
from turboserve.server.routes_sessions import check_id

router = APIRouter()


@router.get("/v1/cluster")
async def cluster(request: Request) -> dict[str, Any]:
    """Workers, sessions by state, and the last 100 decisions with their reasons."""
    gateway: Gateway = request.app.state.gateway
    picture = gateway.logic.cluster
    # Counts are the gateway's: it alone knows which sessions a viewer is attached to.
    return {
        "workers": picture.get("workers", []),
        "sessions": gateway.logic.states(),
        "decisions": picture.get("decisions", []),
    }


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
    workers = gateway.logic.cluster.get("workers", [])
    figures.room.set(sum(max(0, one["capacity"] - one["active"]) for one in workers if one["state"] == "ready"))


@router.post("/v1/admin/sessions/{session_id}/migrate", openapi_extra=json_schema(MigrateBody))
async def migrate(session_id: str, request: Request) -> dict[str, Any]:
    gateway: Gateway = request.app.state.gateway
    body = await read_body(request, MigrateBody)
    session = gateway.find(check_id(session_id), None)
    done = await gateway.command("migrate", session_id=session.sid, worker_id=body.target)
    return {"id": session.sid, "state": done.state, "message": done.message}


@router.post("/v1/admin/sessions/{session_id}/suspend")
async def suspend(session_id: str, request: Request) -> dict[str, Any]:
    gateway: Gateway = request.app.state.gateway
    session = gateway.find(check_id(session_id), None)
    done = await gateway.command("suspend", session_id=session.sid)
    return {"id": session.sid, "state": done.state, "message": done.message}


@router.post("/v1/admin/workers/{worker_id}/drain")
async def drain(worker_id: str, request: Request) -> dict[str, Any]:
    """Place nothing new on the worker; it ends when its last session has ended."""
    gateway: Gateway = request.app.state.gateway
    if len(worker_id) > 64:
        raise NotFound("no such worker")
    done = await gateway.command("drain", worker_id=worker_id)
    return {"id": worker_id, "state": done.state, "message": done.message}


@router.post("/v1/admin/workers", openapi_extra=json_schema(AddWorkersBody))
async def add_workers(request: Request) -> dict[str, Any]:
    gateway: Gateway = request.app.state.gateway
    body = await read_body(request, AddWorkersBody)
    done = await gateway.command("add_workers", count=body.add)
    return {"state": done.state, "message": done.message}
