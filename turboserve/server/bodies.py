"""Request bodies: JSON with bounds on its shape, then a strict model. What was sent is never repeated in an answer."""

from __future__ import annotations

import json
import math
import re
from asyncio import to_thread
from typing import Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from turboserve.errors import InvalidRequest, Malformed, TooLarge

INLINE_BYTES = 32 << 10
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
SEED_MAX = (1 << 53) - 1
"""What JSON numbers carry exactly."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CreateSessionBody(Body):
    """POST /v1/sessions."""

    prompt: StrictStr
    model: StrictStr | None = None
    seed: StrictInt | None = Field(default=None, ge=0, le=SEED_MAX)
    format: Literal["h264", "jpeg", "mp4", "raw"] = "h264"
    max_duration_s: float | None = Field(default=None, gt=0, le=86_400, allow_inf_nan=False)
    steps: StrictInt | None = Field(default=None, ge=1, le=64)
    size: StrictStr | None = Field(default=None, max_length=16)
    prompt_switch: Literal["swap", "recache", "blend"] | None = None
    decoder: StrictStr | None = Field(default=None, min_length=1, max_length=32)
    allow_reduced_steps: StrictBool = True


class CreateVideoBody(Body):
    """POST /v1/videos, as OpenAI's clients send it; `seconds` may be text there."""

    prompt: StrictStr
    model: StrictStr | None = None
    seconds: StrictStr | float | None = None
    size: StrictStr | None = Field(default=None, max_length=16)
    seed: StrictInt | None = Field(default=None, ge=0, le=SEED_MAX)
    steps: StrictInt | None = Field(default=None, ge=1, le=64)


class MigrateBody(Body):
    target: StrictStr = Field(max_length=64)
    allow_approximate: StrictBool = False


class AddWorkersBody(Body):
    add: StrictInt = Field(ge=1, le=64)


class ProfileBody(Body):
    chunks: StrictInt = Field(default=20, ge=1, le=1000)


AnyBody = TypeVar("AnyBody", bound=Body)


async def read_body(request: Request, kind: type[AnyBody]) -> AnyBody:
    """The request's body as `kind`: 400 when it is not JSON, 413 when nested too deep, 422 when it does not fit."""
    data = await request.body()
    depth_max = request.app.state.config.limits.body_depth
    # No body we accept is large; reading a large one on the loop would hold up every stream.
    value = parse_json(data, depth_max) if len(data) < INLINE_BYTES else await to_thread(parse_json, data, depth_max)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _invalid(error) from None


def parse_json(data: bytes, depth_max: int) -> Any:
    """JSON in, bounded in depth before it is parsed; NaN and infinities are refused."""
    if nesting(data) > depth_max:
        raise TooLarge("the body is nested too deep", expected=f"at most {depth_max} levels")
    try:
        return json.loads(data, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_once)
    except (ValueError, UnicodeDecodeError, RecursionError):
        raise Malformed("the body is not JSON", expected="one JSON object") from None


def nesting(data: bytes) -> int:
    """The deepest nesting of brackets outside strings."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", data)):
        if bracket in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
    return deepest


def _no_constant(_name: str) -> float:
    raise ValueError("not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may disagree on which of two equal keys counts, so there must not be two."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _invalid(error: ValidationError) -> InvalidRequest:
    """Field paths of our own schema only: an unknown key is counted, not repeated."""
    known, unknown = [], 0
    for one in error.errors(include_input=False, include_url=False, include_context=False):
        if one["type"] == "extra_forbidden":
            unknown += 1
        else:
            path = ".".join(str(part) for part in one["loc"]) or "the body"
            known.append(f"{path}: {one['msg'].lower()}")
    if unknown:
        known.append(f"{unknown} unknown {'key' if unknown == 1 else 'keys'}")
    invalid = InvalidRequest(
        f"the body does not fit ({'; '.join(known)[:400]})", hint="GET /openapi.json has the schema"
    )
    first = error.errors(include_input=False)[0]
    if first["type"] != "extra_forbidden" and first["loc"]:
        invalid.param = str(first["loc"][0])  # type: ignore[attr-defined]
    return invalid


def json_schema(kind: type[Body]) -> dict[str, Any]:
    """For a route's `openapi_extra`: bodies are read by hand, so FastAPI does not know them."""
    content = {"application/json": {"schema": kind.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
