"""/v1/videos: the one-shot API that OpenAI's clients speak."""

from __future__ import annotations

import contextlib
import math
import secrets
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, JSONResponse, Response

from turboserve.errors import Conflict, InvalidRequest, NotFound
from turboserve.server.auth import Identity
from turboserve.server.bodies import CreateVideoBody, json_schema, read_body
from turboserve.server.catalogue import Catalogue
from turboserve.server.pipeline_videos import PipelineJob, PipelineVideos
from turboserve.server.protocol import clean_prompt
from turboserve.server.routes_sessions import check_id, new_session
from turboserve.server.videos import VideoJob, VideoJobs

router = APIRouter()
SECONDS_DEFAULT = 4.0
SECONDS_MAX = 120.0


def _seconds(given: str | float | None) -> float:
    try:
        seconds = SECONDS_DEFAULT if given is None else float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= SECONDS_MAX:
        error = InvalidRequest("seconds is out of range", expected=f"above 0, at most {SECONDS_MAX:g}")
        error.param = "seconds"  # type: ignore[attr-defined]
        raise error
    return seconds


@router.post("/v1/videos", openapi_extra=json_schema(CreateVideoBody))
async def create_video(request: Request) -> JSONResponse:
    """Make one video. Ask GET /v1/videos/{id} until its status is completed."""
    videos: VideoJobs = request.app.state.videos
    catalogue: Catalogue = request.app.state.catalogue
    identity: Identity = request.state.identity
    body = await read_body(request, CreateVideoBody)
    seconds = _seconds(body.seconds)
    prompt = clean_prompt(body.prompt)
    pipeline: PipelineVideos | None = request.app.state.pipeline
    if pipeline is not None and body.model == pipeline.name:
        made = await pipeline.create(
            tenant=identity.tenant,
            prompt=prompt,
            seed=secrets.randbelow(1 << 31) if body.seed is None else body.seed,
            size=body.size,
            steps=body.steps,
            seconds=seconds,
        )
        return JSONResponse(made.as_json(_kept_s(request)))
    choice = catalogue.choose(
        model=body.model, size=body.size, steps=body.steps, prompt_switch=None, decoder=None, max_duration_s=seconds
    )
    wish = new_session(identity=identity, choice=choice, prompt=prompt, seed=body.seed, format="mp4")
    catalogue.check_prompt(prompt, wish.seed)
    job = await videos.create(identity, wish, choice, seconds)
    return JSONResponse(job.as_json(_kept_s(request)))


def _kept_s(request: Request) -> float:
    return float(request.app.state.config.limits.videos_kept_s)


def _tenant(request: Request) -> str:
    identity: Identity = request.state.identity
    return identity.tenant


def _id(text: str) -> str:
    try:
        return check_id(text)
    except NotFound:
        raise NotFound("no such video", hint="it may have expired, or belong to another key") from None


def _kinds(request: Request) -> list[VideoJobs | PipelineVideos]:
    """Where videos are made: by the live model, and by a pipeline where there is one."""
    state = request.app.state
    return [one for one in (state.videos, state.pipeline) if one is not None]


def _find(request: Request, video_id: str) -> tuple[VideoJobs | PipelineVideos, VideoJob | PipelineJob]:
    """A video and who makes it; NotFound."""
    found_id, tenant = _id(video_id), _tenant(request)
    *others, last = _kinds(request)
    for kind in others:
        with contextlib.suppress(NotFound):
            return kind, kind.find(found_id, tenant)
    return last, last.find(found_id, tenant)


@router.get("/v1/videos")
async def list_videos(request: Request, limit: int = 20, order: str = "desc", after: str = "") -> dict[str, Any]:
    tenant = _tenant(request)
    jobs = sorted((one for kind in _kinds(request) for one in kind.list(tenant)), key=lambda one: one.created_unix_s)
    if order != "asc":
        jobs.reverse()
    ids = [one.id for one in jobs]
    if after in ids:
        jobs = jobs[ids.index(after) + 1 :]
    page = jobs[: max(1, min(limit, 100))]
    return {
        "object": "list",
        "data": [one.as_json(_kept_s(request)) for one in page],
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": len(jobs) > len(page),
    }


@router.get("/v1/videos/{video_id}")
async def get_video(video_id: str, request: Request) -> dict[str, Any]:
    _, job = _find(request, video_id)
    return job.as_json(_kept_s(request))


@router.get("/v1/videos/{video_id}/content")
async def video_content(video_id: str, request: Request) -> Response:
    _, job = _find(request, video_id)
    if job.status != "completed":
        raise Conflict(f"the video is {job.status}", expected="completed", hint="ask GET /v1/videos/{id} first")
    return FileResponse(job.path, media_type="video/mp4", filename=f"{job.id}.mp4")


@router.delete("/v1/videos/{video_id}")
async def delete_video(video_id: str, request: Request) -> dict[str, Any]:
    """Remove a video; one that is being made is stopped."""
    kind, job = _find(request, video_id)
    kind.remove(job.id, _tenant(request))
    return {"id": job.id, "object": "video.deleted", "deleted": True}
