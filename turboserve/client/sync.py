"""The synchronous session: the asynchronous one on a loop in a background thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, TypeVar, Unpack

from turboserve.client.aio import AsyncSession
from turboserve.client.chunk import Chunk, PromptUpdate
from turboserve.client.retry import RetryPolicy
from turboserve.errors import Conflict

_T = TypeVar("_T")


class _LoopThread:
    """An event loop that runs in a daemon thread until it is stopped."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="turboserve-session", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run on the loop and wait. Ctrl-C here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            self._loop.close()


class Options(TypedDict, total=False):
    """Options of a session; see AsyncSession."""

    seed: int | None
    model: str | None
    format: str
    pace: str | None
    max_duration_s: float | None
    steps: int | None
    size: str | None
    prompt_switch: str | None
    decoder: str | None
    allow_reduced_steps: bool | None
    base_url: str | None
    api_key: str | None
    retry: RetryPolicy | None


class Session:
    """A video stream that is made while it is watched. It is open once it exists; `with` ends it.

    Options and attributes are those of AsyncSession.
    """

    def __init__(self, prompt: str, **options: Unpack[Options]) -> None:
        self._start(lambda: AsyncSession.open(prompt, **options))

    @classmethod
    def attach(cls, session_id: str, token: str, **options: Any) -> Session:
        """Go on with a session that was opened elsewhere; the options are those of `AsyncSession.attach`."""
        session = cls.__new__(cls)
        session._start(lambda: AsyncSession.attach(session_id, token, **options))
        return session

    def _start(self, opening: Callable[[], Coroutine[Any, Any, AsyncSession]]) -> None:
        self._thread: _LoopThread | None = None
        thread = _LoopThread()
        try:
            self._inner = thread.call(opening())
        except BaseException:
            thread.stop()
            raise
        self._thread = thread

    def __getattr__(self, name: str) -> Any:
        """Everything that is plain data on the asynchronous session: id, seed, fps, state, digest, ..."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self._thread is None:
            raise StopIteration
        try:
            return self._thread.call(self._next())
        except _End:
            raise StopIteration from None

    async def _next(self) -> Chunk:
        # StopAsyncIteration cannot pass through a future.
        try:
            return await self._inner.__anext__()
        except StopAsyncIteration:
            raise _End from None

    def update(self, prompt: str, *, from_index: int | None = None, timeout_s: float = 30.0) -> PromptUpdate:
        """Change the prompt; see `AsyncSession.update`."""
        return self._call(self._inner.update(prompt, from_index=from_index, timeout_s=timeout_s))

    def pause(self) -> None:
        self._call(self._inner.pause())

    def resume(self) -> None:
        self._call(self._inner.resume())

    def info(self) -> dict[str, Any]:
        answer: dict[str, Any] = self._call(self._inner.info())
        return answer

    def save(self, path: str | Path, *, seconds: float | None = None) -> int:
        """Write what comes from here on into an mp4 file; see `AsyncSession.save`."""
        return self._call(self._inner.save(path, seconds=seconds))

    def close(self) -> None:
        """End the session and the thread behind it. Idempotent."""
        self._finish(self._inner.close)

    def detach(self) -> dict[str, Any]:
        """Leave the session alive on the server; see `AsyncSession.detach`."""
        return self._finish(self._inner.detach)

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._thread is None:
            work.close()
            raise Conflict("the session is closed", expected="an open session")
        return self._thread.call(work)

    def _finish(self, leave: Any) -> Any:
        thread, self._thread = self._thread, None
        if thread is None:
            return None
        try:
            return thread.call(leave())
        except CancelledError:
            return None
        finally:
            thread.stop()


class _End(Exception):
    """The stream's end, on its way through a future."""
