"""/v1/videos: the one-shot API that OpenAI's clients speak."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, JSONResponse, Response

from turboserve.errors import Conflict, InvalidRequest, NotFound
from turboserve.server.auth import Identity
from turboserve.server.bodies import CreateVideoBody, json_schema, read_body
from turboserve.server.catalogue import Catalogue
from turboserve.server.protocol import clean_prompt
from turboserve.server.routes_sessions import check_id, new_session
from turboserve.server.videos import VideoJobs

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
    choice = catalogue.choose(
        model=body.model, size=body.size, steps=body.steps, prompt_switch=None, max_duration_s=seconds
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


@router.get("/v1/videos")
async def list_videos(request: Request, limit: int = 20, order: str = "desc", after: str = "") -> dict[str, Any]:
    videos: VideoJobs = request.app.state.videos
    jobs = videos.list(_tenant(request))
    if order != "asc":
        jobs.reverse()
    ids = [one.wish.sid for one in jobs]
    if after in ids:
        jobs = jobs[ids.index(after) + 1 :]
    page = jobs[: max(1, min(limit, 100))]
    return {
        "object": "list",
        "data": [one.as_json(_kept_s(request)) for one in page],
        "first_id": page[0].wish.sid if page else None,
        "last_id": page[-1].wish.sid if page else None,
        "has_more": len(jobs) > len(page),
    }


@router.get("/v1/videos/{video_id}")
async def get_video(video_id: str, request: Request) -> dict[str, Any]:
    videos: VideoJobs = request.app.state.videos
    return videos.find(_id(video_id), _tenant(request)).as_json(_kept_s(request))


@router.get("/v1/videos/{video_id}/content")
async def video_content(video_id: str, request: Request) -> Response:
    videos: VideoJobs = request.app.state.videos
    job = videos.find(_id(video_id), _tenant(request))
    if job.status != "completed":
        raise Conflict(f"the video is {job.status}", expected="completed", hint="ask GET /v1/videos/{id} first")
    return FileResponse(job.path, media_type="video/mp4", filename=f"{job.wish.sid}.mp4")


@router.delete("/v1/videos/{video_id}")
async def delete_video(video_id: str, request: Request) -> dict[str, Any]:
    """Remove a video; one that is being made is stopped."""
    videos: VideoJobs = request.app.state.videos
    video_id = _id(video_id)
    videos.remove(video_id, _tenant(request))
    return {"id": video_id, "object": "video.deleted", "deleted": True}
