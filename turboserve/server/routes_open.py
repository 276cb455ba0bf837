"""What anybody may see: health that tells the truth, the pages; and the models, for any key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, JSONResponse, Response

from turboserve.errors import NotFound
from turboserve.server.gateway import Gateway
from turboserve.server.http_errors import error_response

router = APIRouter()
WEB = Path(__file__).parent / "web"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".json": "application/json",
    ".woff2": "font/woff2",
}


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """200 for as long as the event loop turns."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 when a worker is ready and the queue is not full, else 503 with the reason."""
    gateway: Gateway = request.app.state.gateway
    ready, reason = gateway.logic.ready()
    if ready:
        return JSONResponse({"status": "ready"})
    response = error_response(
        "overloaded", f"not ready: {reason}", request_id=request.scope["request_id"], status=503, retry_after_s=1.0
    )
    return response


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """What can be asked of this server."""
    entries = [request.app.state.catalogue.as_json()]
    pipeline = request.app.state.pipeline
    also = [] if pipeline is None else [pipeline.as_model()]
    return {"object": "list", "data": entries + also, "models": entries}


@router.get("/", include_in_schema=False)
async def page() -> Response:
    return _file(WEB / "index.html")


@router.get("/ops", include_in_schema=False)
async def operations_page() -> Response:
    return _file(WEB / "ops.html")


@router.get("/assets/{path:path}", include_in_schema=False)
async def asset(path: str) -> Response:
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise NotFound("no such file")
    return _file(WEB / "assets" / path)


def _file(path: Path) -> Response:
    """A file of the page. They are small and on the local disk; Starlette reads them in a thread."""
    kind = _TYPES.get(path.suffix)
    if kind is None or not path.is_file():
        raise NotFound("no such file")
    return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})
