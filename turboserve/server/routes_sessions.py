"""/v1/sessions: open, look at, steer and end sessions; the card; the WebSocket."""

from __future__ import annotations

import secrets
import time
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse
from starlette.websockets import WebSocket

from turboserve.card import Card, CardInput, StepsRun
from turboserve.errors import Conflict, InvalidRequest, NotFound
from turboserve.model.interface import PromptReport
from turboserve.runtime import messages
from turboserve.server.attach_tokens import new_token
from turboserve.server.auth import Identity, Role
from turboserve.server.bodies import CreateSessionBody, json_schema, read_body
from turboserve.server.catalogue import Catalogue, Choice
from turboserve.server.gateway import Gateway
from turboserve.server.gateway_logic import NewSession
from turboserve.server.http_errors import error_response
from turboserve.server.protocol import clean_prompt
from turboserve.server.session_stream import SessionStream
from turboserve.server.stream import ViewerSocket
from turboserve.session import ID_ALPHABET, ID_LENGTH, new_session_id

router = APIRouter()
_ID = frozenset(ID_ALPHABET + "0123456789")


def check_id(text: str) -> str:
    """An id of ours, or NotFound: nothing else is ever looked up."""
    if len(text) != ID_LENGTH or not set(text) <= _ID:
        raise NotFound("no such session", hint="it may have ended a while ago, or belong to another key")
    return text


def owner(request: Request) -> str | None:
    """The tenant whose sessions this caller sees; an operator's commands go through /v1/admin."""
    identity: Identity = request.state.identity
    return identity.tenant


def new_session(
    *,
    identity: Identity,
    choice: Choice,
    prompt: str,
    seed: int | None,
    format: str,
    allow_reduced_steps: bool = True,
) -> NewSession:
    return NewSession(
        sid=new_session_id(),
        token=new_token(),
        tenant=identity.tenant,
        tenant_weight=identity.weight,
        wide=identity.wide,
        shape=choice.shape,
        clock=choice.clock,
        seed=secrets.randbelow(1 << 31) if seed is None else seed,
        steps=choice.steps,
        format=format,
        prompt=prompt,
        prompt_switch=choice.prompt_switch,
        decoder=choice.decoder,
        allow_reduced_steps=allow_reduced_steps,
        max_chunks=choice.max_chunks,
        created_unix_s=time.time(),
    )


@router.post("/v1/sessions", status_code=201, openapi_extra=json_schema(CreateSessionBody))
async def create_session(request: Request) -> JSONResponse:
    """Open a session. It runs at once, or waits in the queue; its stream is opened with the token."""
    gateway: Gateway = request.app.state.gateway
    catalogue: Catalogue = request.app.state.catalogue
    body = await read_body(request, CreateSessionBody)
    prompt = clean_prompt(body.prompt)
    choice = catalogue.choose(
        model=body.model,
        size=body.size,
        steps=body.steps,
        prompt_switch=body.prompt_switch,
        decoder=body.decoder,
        max_duration_s=body.max_duration_s,
    )
    wish = new_session(
        identity=request.state.identity,
        choice=choice,
        prompt=prompt,
        seed=body.seed,
        format=body.format,
        allow_reduced_steps=body.allow_reduced_steps,
    )
    report = catalogue.check_prompt(prompt, wish.seed)
    done: messages.OpDone = await gateway.create(wish)
    session = gateway.find(wish.sid, None)
    answer = {**facts(request, session), "token": wish.token, "state": session.public()}
    answer |= remarks(report)
    if done.queue_position >= 0:
        answer["queue_position"] = done.queue_position
    location = f"{gateway.config.root_path}/v1/sessions/{wish.sid}"
    return JSONResponse(answer, 201, headers={"Location": location})


def remarks(report: PromptReport) -> dict[str, object]:
    """What the model made of a prompt, for whoever sent it; empty when it understood all of it."""
    found: dict[str, object] = {}
    if report.ignored_words:
        found["ignored_words"] = list(report.ignored_words)
    if report.random_scene:
        found["random_scene"] = True
    return found


def facts(request: Request, session: SessionStream) -> dict[str, Any]:
    """What never changes of a session."""
    gateway: Gateway = request.app.state.gateway
    shape = session.shape
    return {
        "id": session.sid,
        "stream_url": f"{gateway.config.root_path}/v1/sessions/{session.sid}/stream",
        "model": shape.model,
        "seed": session.seed,
        "fps": shape.fps,
        "width": shape.width,
        "height": shape.height,
        "format": session.format,
        "steps": session.steps,
        "prompt_switch": session.prompt_switch,
        "decoder": session.decoder or None,
        "chunk_frames": {"first": shape.chunk_frames_first, "rest": shape.chunk_frames_rest},
        "playback_rate": gateway.config.playback_rate,
    }


def standing(gateway: Gateway, session: SessionStream) -> dict[str, Any]:
    """Where a session stands."""
    counts = session.counts
    live = counts.on_time + counts.late
    answer: dict[str, Any] = {
        "state": session.public(),
        "epoch": session.epoch,
        "worker": session.worker_id or None,
        "next_index": session.next_index,
        "delivered": session.delivered,
        "prompt_version": session.prompts.at(max(0, session.next_index - 1))[0],
        "bytes": session_bytes(gateway, session),
        "attached": session.viewer is not None,
        "paused": session.paused,
        "on_time_share": round(counts.on_time / live, 4) if live else None,
        "numerics_id": session.numerics_id or None,
        "age_s": round(gateway.now() - session.created_s, 3),
    }
    if session.queue_position >= 0:
        answer["queue_position"] = session.queue_position
    if session.ended_s is not None:
        answer["reason"] = session.end_reason
    return answer


def session_bytes(gateway: Gateway, session: SessionStream) -> dict[str, int]:
    """Bytes held for the session, as the controller said last. Where it says none of the device, an owner's bytes are
    shared evenly by the sessions it holds."""
    device = session.device_bytes
    if session.owned and not device:
        for worker in gateway.logic.cluster.get("workers", ()):
            if worker.get("id") == session.worker_id and worker.get("resident"):
                device = int(worker.get("session_bytes") or worker.get("device_bytes", 0) // worker["resident"])
    return {"device": device, "host": session.host_bytes, "disk": session.disk_bytes}


@router.get("/v1/sessions")
async def list_sessions(request: Request) -> dict[str, Any]:
    """The caller's sessions, newest last."""
    gateway: Gateway = request.app.state.gateway
    tenant = owner(request)
    mine = [one for one in gateway.logic.sessions.values() if one.tenant == tenant]
    return {"sessions": [{"id": one.sid, **standing(gateway, one)} for one in mine]}


@router.get("/v1/sessions/{session_id}")
async def get_session(session_id: str, request: Request) -> dict[str, Any]:
    gateway: Gateway = request.app.state.gateway
    session = gateway.find(check_id(session_id), owner(request))
    return {**facts(request, session), **standing(gateway, session)}


@router.delete("/v1/sessions/{session_id}")
async def delete_session(session_id: str, request: Request) -> dict[str, Any]:
    """End a session. Asking twice is as good as asking once."""
    gateway: Gateway = request.app.state.gateway
    session = gateway.find(check_id(session_id), owner(request))
    gateway.end(session.sid, None, "deleted")
    return {"id": session.sid, **standing(gateway, session)}


@router.post("/v1/sessions/{session_id}/pause")
async def pause_session(session_id: str, request: Request) -> dict[str, Any]:
    """No further chunk begins until `resume`; the one in work is still delivered."""
    gateway: Gateway = request.app.state.gateway
    session = gateway.find(check_id(session_id), owner(request))
    gateway.pause(session.sid, None)
    return {"id": session.sid, **standing(gateway, session)}


@router.post("/v1/sessions/{session_id}/resume")
async def resume_session(session_id: str, request: Request) -> dict[str, Any]:
    gateway: Gateway = request.app.state.gateway
    session = gateway.find(check_id(session_id), owner(request))
    gateway.resume(session.sid, None)
    return {"id": session.sid, **standing(gateway, session)}


@router.get("/v1/sessions/{session_id}/explain")
async def explain_chunk(session_id: str, request: Request) -> dict[str, Any]:
    """Where the time of one chunk (`?chunk=I`; the newest without) went, and the decisions behind it."""
    gateway: Gateway = request.app.state.gateway
    identity: Identity = request.state.identity
    tenant = None if identity.role is Role.ADMIN else identity.tenant
    session = gateway.find(check_id(session_id), tenant)
    asked = request.query_params.get("chunk")
    kept, index = session.times.kept(), session.times.newest()
    if asked is not None:
        if not asked.isascii() or not asked.isdigit() or len(asked) > 9:
            raise InvalidRequest("chunk is no chunk index", expected="a whole number from 0 on")
        index = int(asked)
    found = session.times.timings(index) if index is not None else None
    if found is None:
        expected = f"{kept[0]} to {kept[1]}" if kept else "a session that has made a chunk"
        raise NotFound("the times of this chunk are not kept", expected=expected)
    return {"id": session.sid, "state": session.public(), "chunk_s": session.clock.chunk_s, "kept": kept, **found}


@router.get("/v1/sessions/{session_id}/card")
async def session_card(session_id: str, request: Request) -> Response:
    """All that is needed to make the stream again, up to the newest chunk; `turboserve replay` verifies it."""
    gateway: Gateway = request.app.state.gateway
    session = gateway.find(check_id(session_id), owner(request))
    return Response(card_of(session).to_json(), media_type="application/json")


def card_of(session: SessionStream) -> Card:
    count = session.next_index
    if session.delivered > count:
        raise Conflict("the session is being made again after a restart", hint="ask again in a moment")
    inputs = [one for one in session.prompts.inputs if one[0] < count] or session.prompts.inputs[:1]
    steps = [one for one in session.prompts.steps if one[0] < count] or session.prompts.steps[:1]
    return Card(
        model=session.shape.model,
        model_hash=session.shape.model_hash,
        seed=session.seed,
        size=f"{session.shape.width}x{session.shape.height}",
        inputs=tuple(CardInput(first, prompt, version) for first, version, prompt in inputs),
        steps=tuple(StepsRun(first, number) for first, number in steps),
        chunk_count=count,
        digest=session.digest,
        digests=session.digests.all(count),
        numerics_id=session.numerics_id,
        prompt_switch=session.prompt_switch,
        decoder=session.decoder,
    )


@router.websocket("/v1/sessions/{session_id}/stream")
async def stream(socket: WebSocket, session_id: str) -> None:
    """The stream. Its first message must be `attach` with the session's token."""
    gateway: Gateway = socket.app.state.gateway
    catalogue: Catalogue = socket.app.state.catalogue

    def check_prompt(sid: str, text: str) -> dict[str, object]:
        session = gateway.logic.sessions.get(sid)
        return remarks(catalogue.check_prompt(text, session.seed if session is not None else 0))

    address = socket.client.host if socket.client is not None else ""
    if not socket.app.state.addresses.enter(address):
        refusal = error_response(
            "quota_exceeded",
            "too many connections from this address",
            request_id=socket.scope.get("request_id", ""),
            retry_after_s=10.0,
        )
        await socket.send_denial_response(refusal)
        return
    try:
        await ViewerSocket(gateway, socket, session_id, check_prompt).run()
    finally:
        socket.app.state.addresses.leave(address)
