"""The connection under a session: one task keeps a socket attached and comes back after every mendable loss.

    socket -> Stream (checks) -> queue of at most QUEUE_CHUNKS -> the caller
                                         taking a chunk acks it, which lets the server make another

So a caller that stops taking chunks stops their generation after four, and nothing grows without bound.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

import websockets
from websockets.asyncio.client import ClientConnection, connect

from turboserve.client import failures, wire
from turboserve.client.chunk import Chunk, PromptUpdate
from turboserve.client.failures import Ended, Resumable
from turboserve.client.http import retry_after_s
from turboserve.client.retry import Retries, RetryPolicy
from turboserve.errors import Conflict

QUEUE_CHUNKS = 8
"""The server lets four stand unacked; four more may come after a reconnection."""
PENDING_UPDATES = 16
MEDIA_BYTES_MAX = 1 << 30
PROMPT_ERRORS = frozenset({"invalid_prompt", "index_passed", "event_id_conflict", "overloaded", "malformed"})
"""Errors that a prompt is answered with; messages are answered in order, so they need not name it."""

log = logging.getLogger("turboserve.client")


class _Lost(Exception):
    """A socket is gone that is worth replacing."""

    def __init__(self, verdict: Resumable) -> None:
        super().__init__(verdict.why)
        self.verdict = verdict


@dataclass(slots=True)
class _Pending:
    """A prompt that waits for the server's answer."""

    text: str
    from_index: int | None
    answer: asyncio.Future[PromptUpdate]
    sent_count: int = 0


class Link:
    """Runs from its creation to the stream's end, a failure or `leave`."""

    def __init__(self, stream: wire.Stream, url: str, *, use_proxy: bool, retry: RetryPolicy) -> None:
        self.stream = stream
        self.url = url
        self.state = "queued"
        self.queue_position: int | None = None
        self.attaches = 0
        self.end_reason: str | None = None
        self.failure: Exception | None = None
        self.events: deque[wire.Event] = deque(maxlen=64)
        self._use_proxy = use_proxy
        self._retries = Retries(retry)
        self._queue: asyncio.Queue[Chunk | wire.Init | None] = asyncio.Queue(QUEUE_CHUNKS)
        self._taken = asyncio.Event()
        self._pending: dict[str, _Pending] = {}
        self._socket: ClientConnection | None = None
        self._last_error: wire.ErrorNote | None = None
        self._left = False
        self._task = asyncio.create_task(self._run(), name="turboserve-stream")

    # ------------------------------------------------------------------ the caller's side

    async def take(self) -> Chunk | wire.Init | None:
        """The next piece, acknowledged; None at the end of the stream; raises what the stream failed with."""
        if self._left:
            return None
        one = await self._queue.get()
        if one is None:
            self._queue.put_nowait(None)  # for the next call, which must see the end, too
            if self.failure is not None and not self._left:
                raise self.failure
            return None
        self._taken.set()
        if isinstance(one, Chunk):
            await self._send(self.stream.ack(one.index))
        return one

    async def update(self, prompt: str, from_index: int | None, timeout_s: float) -> PromptUpdate:
        """Send a prompt and wait for its answer; sent again, under the same event id, after a lost connection."""
        if self._left or self._task.done():
            raise self.failure or Conflict("the session is over", expected="an open session")
        if len(self._pending) >= PENDING_UPDATES:
            raise Conflict(f"{PENDING_UPDATES} prompts still wait for an answer", hint="await the earlier ones")
        event_id = secrets.token_hex(8)
        pending = _Pending(prompt, from_index, asyncio.get_running_loop().create_future())
        self._pending[event_id] = pending
        try:
            await self._send_prompt(event_id, pending)
            async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 may swallow the caller's cancellation
                return await pending.answer
        except TimeoutError:
            raise failures.unreachable(self.url, f"no answer to a prompt within {timeout_s:g} s") from None
        finally:
            self._pending.pop(event_id, None)

    async def leave(self) -> None:
        """Drop the socket and wake whoever waits. Idempotent."""
        self._left = True
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._fail_pending(Conflict("the session was closed before the answer came"))
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    # ------------------------------------------------------------------ one socket after the other

    async def _run(self) -> None:
        """Attach, receive, come back; ends with the stream or with an error that no attempt can mend."""
        try:
            while self.end_reason is None:
                try:
                    self.end_reason = (await self._one_socket()).reason
                except _Lost as lost:
                    await self._wait_to_retry(lost.verdict)
            self.state = "closed"
        except Exception as error:  # raised again where the caller takes its next chunk
            self.failure = error
        self._fail_pending(self.failure or Conflict("the session ended before the answer came"))
        await self._queue.put(None)

    async def _wait_to_retry(self, verdict: Resumable) -> None:
        wait_s = self._retries.next_wait_s(verdict, time.monotonic())
        if wait_s is None:
            raise failures.unreachable(self.url, f"{verdict.why} (tried {self._retries.count} times)")
        log.info("%s; attaching again at chunk %d in %.2f s", verdict.why, self.stream.next_index, wait_s)
        if verdict.too_slow and not self._queue.empty():
            # We were too slow because our caller is: coming back before it takes a chunk would only repeat that.
            self._taken.clear()
            await self._taken.wait()
        await asyncio.sleep(wait_s)

    async def _connect(self) -> ClientConnection:
        try:
            return await connect(
                self.url,
                max_size=MEDIA_BYTES_MAX,
                compression=None,
                open_timeout=10,
                close_timeout=1,
                ping_interval=10,
                ping_timeout=20,
                proxy=True if self._use_proxy else None,
            )
        except websockets.InvalidStatus as error:
            raise _after_refusal(error) from None
        except (OSError, TimeoutError, websockets.InvalidHandshake) as error:
            raise _Lost(Resumable(f"{type(error).__name__}: {error}")) from None

    async def _one_socket(self) -> Ended:
        """One connection from its handshake to its close: returns at the stream's end, raises _Lost to try again."""
        async with await self._connect() as socket:
            self._socket = socket
            end: wire.End | None = None
            try:
                await socket.send(self.stream.attach())
                async for message in socket:
                    event = self.stream.receive(message)
                    if isinstance(event, wire.End):
                        end = event
                    elif event is not None:
                        await self._handle(event)
            except websockets.ConnectionClosed:
                pass  # the close code says more than the exception
            finally:
                self._socket = None
                self.stream.attached = False
            return self._verdict(socket, end)

    def _verdict(self, socket: ClientConnection, end: wire.End | None) -> Ended:
        """Why the socket closed: returned when that is the end, else raised."""
        verdict = failures.after_close(socket.close_code or 1006, socket.close_reason or "")
        if isinstance(verdict, Ended):
            return Ended((end.reason if end else None) or verdict.reason)
        if isinstance(verdict, Resumable):
            raise _Lost(verdict)
        if self._last_error is not None and self._last_error.message not in verdict.message:
            verdict.message += f" ({self._last_error.message})"
        raise verdict

    # ------------------------------------------------------------------ messages

    async def _handle(self, event: wire.Event) -> None:
        if isinstance(event, (Chunk, wire.Init)):
            self._retries.progress()
            await self._queue.put(event)
            return
        self.events.append(event)
        if isinstance(event, wire.Attached):
            self.attaches += 1
            self._last_error = None
            if self.stream.acked >= 0:  # acks may have been lost with the last socket, and credit with them
                await self._send(self.stream.ack(self.stream.acked))
            for event_id, pending in list(self._pending.items()):
                await self._send_prompt(event_id, pending)
        elif isinstance(event, wire.State):
            self.state, self.queue_position = event.state, event.queue_position
        elif isinstance(event, wire.PromptAccepted):
            self._answer(event.event_id, PromptUpdate(event.prompt_version, event.from_index))
        elif isinstance(event, wire.PromptSuperseded):
            self._answer(event.event_id, PromptUpdate(None, None, superseded=True))
        elif isinstance(event, wire.ErrorNote):
            self._note(event)

    def _answer(self, event_id: str | None, answer: PromptUpdate) -> None:
        pending = self._pending.get(event_id or "")
        if pending is not None and not pending.answer.done():
            pending.answer.set_result(answer)

    def _note(self, note: wire.ErrorNote) -> None:
        """An error message: of a prompt, or of the attach if that has not been answered yet."""
        self._last_error = note
        pending = self._prompt_of(note)
        if pending is None:
            if not self.stream.attached and not note.retryable:
                raise note.to_error()
            log.warning("the server says: %s (%s)", note.message, note.code)
        elif note.code == "event_id_conflict" and pending.sent_count > 1:
            # The first try had arrived; only its answer was lost with the connection.
            pending.answer.set_result(PromptUpdate(None, None))
        else:
            pending.answer.set_exception(note.to_error())

    def _prompt_of(self, note: wire.ErrorNote) -> _Pending | None:
        """The prompt that an error answers: the one it names, else the oldest that still waits for an answer."""
        waiting = [one for one in self._pending.values() if one.sent_count and not one.answer.done()]
        if note.event_id is not None:
            named = self._pending.get(note.event_id)
            return named if named in waiting else None
        return waiting[0] if waiting and note.code in PROMPT_ERRORS else None

    def _fail_pending(self, error: Exception) -> None:
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(error)

    async def _send_prompt(self, event_id: str, pending: _Pending) -> None:
        if self.stream.attached:
            pending.sent_count += 1
            await self._send(wire.encode("prompt", text=pending.text, event_id=event_id, from_index=pending.from_index))

    async def _send(self, message: str) -> None:
        """Send if there is an attached socket. What is lost here is made good by the next attach."""
        if self._socket is not None and self.stream.attached:
            with suppress(websockets.ConnectionClosed):
                await self._socket.send(message)


def _after_refusal(error: websockets.InvalidStatus) -> Exception:
    """A handshake that the server answered with an HTTP error."""
    status = error.response.status_code
    if status == 429 or status >= 500:
        wait_s = retry_after_s(error.response.headers.get("Retry-After"))
        return _Lost(Resumable(f"the server answered {status}", wait_s=wait_s))
    return failures.from_body({"message": f"the server refused the stream with {status}"}, status=status)
