"""The ASGI app: routes, who may call them, and the layers around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from turboserve import __version__
from turboserve.errors import Forbidden
from turboserve.server import http_errors, routes_admin, routes_open, routes_sessions, routes_videos
from turboserve.server.access import Access, access_of
from turboserve.server.auth import KeyRing, Role
from turboserve.server.catalogue import Catalogue
from turboserve.server.cluster_view import ClusterView
from turboserve.server.gateway import Gateway
from turboserve.server.gateway_config import GatewayConfig
from turboserve.server.guard import Guard
from turboserve.server.pipeline_videos import PipelineVideos
from turboserve.server.videos import VideoJobs
from turboserve.session import PublicState


class Addresses:
    """How many connections each address holds."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: Counter[str] = Counter()

    def enter(self, address: str) -> bool:
        if self._counts[address] >= self._most:
            return False
        self._counts[address] += 1
        return True

    def leave(self, address: str) -> None:
        self._counts[address] -= 1
        if self._counts[address] <= 0:
            del self._counts[address]


async def authorize(connection: HTTPConnection) -> None:
    """Runs before every route. What the access table does not name is refused, whoever asks."""
    method = "WEBSOCKET" if connection.scope["type"] == "websocket" else connection.scope["method"]
    access = access_of(method, connection.scope["route"].path)
    if access is None:
        raise Forbidden("nobody may call this route", hint="it is missing from the access table: our mistake")
    if access in (Access.OPEN, Access.TOKEN):
        return
    keys: KeyRing = connection.app.state.keys
    identity = keys.identify(connection.headers.get("authorization"))
    if access is Access.ADMIN and identity.role is not Role.ADMIN:
        raise Forbidden("this key may not do that", expected="a key with role=admin")
    connection.state.identity = identity


def build_app(
    gateway: Gateway,
    catalogue: Catalogue,
    keys: KeyRing,
    *,
    frame_ring_bytes: Callable[[], int] = lambda: 0,
) -> FastAPI:
    """The app without its outermost layer; `guarded` puts that on."""
    config = gateway.config
    app = FastAPI(
        title="TurboServe",
        version=__version__,
        summary="Streaming video generation: sessions, streams, videos.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(authorize)],
    )
    state: Any = app.state
    state.gateway, state.catalogue, state.keys, state.config = gateway, catalogue, keys, config
    state.addresses = Addresses(config.limits.connections_per_address)
    state.frame_ring_bytes = frame_ring_bytes
    state.cluster_view = ClusterView(gateway)
    state.videos = VideoJobs(gateway, catalogue)
    state.pipeline = open_pipeline(config, gateway)
    http_errors.install(app, gateway.log)
    for module in (routes_open, routes_sessions, routes_videos, routes_admin):
        app.include_router(module.router)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(app.openapi())

    return app


def open_pipeline(config: GatewayConfig, gateway: Gateway) -> PipelineVideos | None:
    """The diffusers pipeline beside the live model, where one is served."""
    if not config.video_pipeline:
        return None
    return PipelineVideos(
        Path(config.video_pipeline),
        config.video_device,
        Path(config.data_dir) / "videos",
        live_busy=lambda: gateway.logic.states()[PublicState.ACTIVE.value] > 0,
        log=gateway.log,
        kept=config.limits.videos_kept,
        kept_s=config.limits.videos_kept_s,
    )


def guarded(app: ASGIApp, config: GatewayConfig, gateway: Gateway) -> ASGIApp:
    """The app as it is served."""
    return Guard(app, config, gateway.metrics, gateway.log)
