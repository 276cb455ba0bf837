"""The REST side: one call, one typed answer or one typed error."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import msgspec

from turboserve.client.failures import from_body, unreachable
from turboserve.errors import InvalidRequest, ProtocolError

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "TURBOSERVE_URL"
KEY_VARIABLE = "TURBOSERVE_API_KEY"

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def server_url(given: str | None) -> str:
    """The server's address: what was given, else TURBOSERVE_URL, else this machine."""
    url = (given or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest(f"{url!r} is no server address", expected=f"like {DEFAULT_URL}")
    return url


def is_loopback(url: str) -> bool:
    """Whether the address is this machine; a proxy from the environment cannot serve that one."""
    return urlsplit(url).hostname in _LOOPBACK


def websocket_url(base_url: str, stream_url: str) -> str:
    """Where the stream lives: `stream_url` may be absolute or a path on the server."""
    base, stream = urlsplit(base_url), urlsplit(stream_url)
    scheme = stream.scheme or base.scheme
    scheme = {"http": "ws", "https": "wss"}.get(scheme, scheme)
    return urlunsplit((scheme, stream.netloc or base.netloc, stream.path, stream.query, ""))


class Api:
    """An asynchronous client of one server, with its key."""

    def __init__(self, base_url: str | None, api_key: str | None, *, timeout_s: float = 30.0) -> None:
        self.base_url = server_url(base_url)
        key = api_key or os.environ.get(KEY_VARIABLE)
        self._client = httpx.AsyncClient(
            timeout=timeout_s,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            trust_env=not is_loopback(self.base_url),
        )

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The decoded JSON answer (None for an empty one); anything but 2xx is raised."""
        try:
            answer = await self._client.request(method, f"{self.base_url}{path}", json=body)
        except httpx.TimeoutException:
            raise unreachable(self.base_url, "no answer in time") from None
        except httpx.HTTPError as error:
            raise unreachable(self.base_url, error or type(error).__name__) from None
        return read_answer(answer)

    async def close(self) -> None:
        await self._client.aclose()


def read_answer(answer: httpx.Response) -> Any:
    """JSON of a 2xx answer, else the error it carries."""
    try:
        body = answer.json() if answer.content else None
    except ValueError:
        body = None
        if answer.is_success:
            raise ProtocolError(
                f"{answer.url} did not answer with JSON", hint="is that address a TurboServe server?"
            ) from None
    if answer.is_success:
        return body
    detail = body.get("error") if isinstance(body, dict) else None
    if not isinstance(detail, dict):
        detail = {"message": f"{answer.url} answered {answer.status_code}"}
    raise from_body(detail, status=answer.status_code, retry_after_s=retry_after_s(answer.headers.get("Retry-After")))


def retry_after_s(value: str | None) -> float | None:
    """Seconds of a Retry-After header; a date (which our server never sends) counts as none."""
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:
        return None


class Opened(msgspec.Struct, frozen=True):
    """A session as the server describes it."""

    id: str
    token: str
    stream_url: str
    width: int
    height: int
    fps: float
    model: str = ""
    seed: int = 0
    state: str = "queued"
    chunk_frames: dict[str, int] = {}
    ignored_words: tuple[str, ...] = ()
    random_scene: bool = False
    queue_position: int | None = None


def read_opened(answer: Any) -> Opened:
    """What the server said of a session, checked."""
    try:
        return msgspec.convert(answer, Opened)
    except msgspec.ValidationError as error:
        raise ProtocolError(
            f"the server's description of the session does not fit: {error}",
            hint="is that address a TurboServe server of this version?",
        ) from None
