"""The asynchronous session: what a caller opens, iterates, steers and closes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from turboserve.client import wire
from turboserve.client.chunk import Chunk, PromptUpdate
from turboserve.client.http import Api, Opened, is_loopback, read_opened, websocket_url
from turboserve.client.link import Link
from turboserve.client.recording import save_chunks
from turboserve.client.retry import RetryPolicy
from turboserve.errors import Conflict, NotFound


class AsyncSession:
    """A video stream that is made while it is watched.

    `async with AsyncSession(prompt) as session` opens it and ends it; `await AsyncSession.open(prompt)` opens it and
    leaves it to the caller to `close` or `detach`.

    `format` is raw (exact frames), jpeg, h264 or mp4; `pace` live (as it would be watched; the default) or free (as
    fast as it can be made). `base_url` falls back to TURBOSERVE_URL, then http://127.0.0.1:8000; `api_key` to
    TURBOSERVE_API_KEY.
    """

    def __init__(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        model: str | None = None,
        format: str = "raw",
        pace: str | None = None,
        max_duration_s: float | None = None,
        steps: int | None = None,
        size: str | None = None,
        prompt_switch: str | None = None,
        decoder: str | None = None,
        allow_reduced_steps: bool | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        wish = {
            "prompt": prompt,
            "seed": seed,
            "model": model,
            "format": format,
            "max_duration_s": max_duration_s,
            "steps": steps,
            "size": size,
            "prompt_switch": prompt_switch,
            "decoder": decoder,
            "allow_reduced_steps": allow_reduced_steps,
        }
        self._wish = {name: value for name, value in wish.items() if value is not None}
        self._set_up(format, pace, base_url, api_key, retry, max_duration_s)

    def _set_up(
        self,
        format: str,
        pace: str | None,
        base_url: str | None,
        api_key: str | None,
        retry: RetryPolicy | None,
        max_duration_s: float | None = None,
    ) -> None:
        self._api = Api(base_url, api_key)
        self._retry = retry or RetryPolicy()
        self._pace = pace
        self._opened_link: Link | None = None
        self._closed = False
        self.format = format
        self.max_duration_s = max_duration_s

    def _start(self, opened: Opened, next_index: int, digest: str | None) -> None:
        """Begin to receive; from here on the session has its facts."""
        stream = wire.Stream(
            token=opened.token,
            width=opened.width,
            height=opened.height,
            format=self.format,
            pace=self._pace,
            next_index=next_index,
            digest=digest,
        )
        url = websocket_url(self._api.base_url, opened.stream_url)
        link = Link(stream, url, use_proxy=not is_loopback(self._api.base_url), retry=self._retry)
        link.state, link.queue_position = opened.state, opened.queue_position
        self._opened_link = link
        self.id = opened.id
        self.model = opened.model
        self.seed = opened.seed
        self.width = opened.width
        self.height = opened.height
        self.fps = opened.fps
        self.chunk_frames = opened.chunk_frames
        """Frames of the "first" chunk and of the "rest"."""
        self.ignored_words = opened.ignored_words
        self.random_scene = opened.random_scene
        """Whether the model knew no word of the prompt and chose a scene by itself."""
        self.next_index = next_index
        """Index of the chunk that will be taken next."""
        self.prompt_version = 0
        """Of the chunk taken last."""
        self.digest = stream.digest
        """The chain up to the chunk taken last."""

    # ------------------------------------------------------------------ opening

    @classmethod
    async def open(cls, prompt: str, **options: Any) -> AsyncSession:
        """An open session, to be closed by the caller; the options are those of the constructor."""
        session = cls(prompt, **options)
        await session._open()
        return session

    async def _open(self) -> None:
        try:
            self._start(read_opened(await self._api.call("POST", "/v1/sessions", self._wish)), 0, "")
        except BaseException:
            await self._api.close()
            raise

    @classmethod
    async def attach(
        cls,
        session_id: str,
        token: str,
        *,
        next_index: int = 0,
        digest: str | None = None,
        format: str = "raw",
        pace: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        retry: RetryPolicy | None = None,
    ) -> AsyncSession:
        """Go on with a session that was opened elsewhere; `detach` gives what is needed here."""
        session = cls.__new__(cls)
        session._set_up(format, pace, base_url, api_key, retry)
        path = f"/v1/sessions/{session_id}"
        try:
            found = await session._api.call("GET", path)
            session._start(read_opened({"stream_url": f"{path}/stream", **found, "token": token}), next_index, digest)
        except BaseException:
            await session._api.close()
            raise
        return session

    async def __aenter__(self) -> AsyncSession:
        if self._opened_link is None:
            await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _link(self) -> Link:
        if self._opened_link is None:
            raise Conflict(
                "the session is not open yet",
                expected="`async with AsyncSession(...)` or `await AsyncSession.open(...)`",
            )
        return self._opened_link

    # ------------------------------------------------------------------ what it is doing

    @property
    def state(self) -> str:
        """The public state: queued, active, idle, suspended, migrating, recovering, closed, failed."""
        return self._link.state

    @property
    def queue_position(self) -> int | None:
        return self._link.queue_position

    @property
    def reconnects(self) -> int:
        """How often a lost connection was replaced."""
        return max(0, self._link.attaches - 1)

    @property
    def end_reason(self) -> str | None:
        """Why the stream ended; None while it runs."""
        return self._link.end_reason

    @property
    def numerics_id(self) -> str:
        """The class of machines within which this stream has these very bits."""
        return self._link.stream.numerics_id

    @property
    def events(self) -> Sequence[wire.Event]:
        """The newest control messages, for those who want to look."""
        return tuple(self._link.events)

    async def info(self) -> dict[str, Any]:
        """GET /v1/sessions/{id}: state, epoch, worker, counts and bytes."""
        answer: dict[str, Any] = await self._api.call("GET", f"/v1/sessions/{self.id}")
        return answer

    # ------------------------------------------------------------------ taking chunks

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk; StopAsyncIteration when the stream has ended, a typed error when it failed."""
        while (one := await self._take()) is not None:
            if isinstance(one, Chunk):  # an mp4's first bytes are of use to `save` alone
                return one
        raise StopAsyncIteration

    async def pieces(self) -> AsyncIterator[Chunk | wire.Init]:
        """Chunks, and for `mp4` also the initialisation that each attach sends."""
        while (one := await self._take()) is not None:
            yield one

    async def _take(self) -> Chunk | wire.Init | None:
        one = await self._link.take()
        if isinstance(one, Chunk):
            self.next_index, self.prompt_version, self.digest = one.index + 1, one.prompt_version, one.digest
        return one

    async def save(self, path: str | Path, *, seconds: float | None = None) -> int:
        """Write what comes from here on into an mp4 file, to the stream's end or for `seconds` of video.

        Returns the number of frames written.
        """
        return await save_chunks(self, path, seconds)

    # ------------------------------------------------------------------ steering

    async def update(self, prompt: str, *, from_index: int | None = None, timeout_s: float = 30.0) -> PromptUpdate:
        """Change the prompt from the next chunk not yet begun on, or from `from_index`; returns what was bound."""
        return await self._link.update(prompt, from_index, timeout_s)

    async def pause(self) -> None:
        """No further chunk is begun until `resume`; the one in work still comes."""
        await self._api.call("POST", f"/v1/sessions/{self.id}/pause")

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._api.call("POST", f"/v1/sessions/{self.id}/resume")

    # ------------------------------------------------------------------ leaving

    async def close(self) -> None:
        """End the session on the server and let go of everything here. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._opened_link is None:
                return
            await self._link.leave()
            if self.end_reason is None:
                with suppress(NotFound):
                    await self._api.call("DELETE", f"/v1/sessions/{self.id}")
        finally:
            await self._api.close()

    async def detach(self) -> dict[str, Any]:
        """Let go of the stream and leave the session alive for a while; the answer is what `attach` takes.

        Chunks that were received but not taken will come again.
        """
        self._closed = True
        await self._link.leave()
        await self._api.close()
        return {
            "session_id": self.id,
            "token": self._link.stream.token,
            "next_index": self.next_index,
            "digest": self.digest,
        }
