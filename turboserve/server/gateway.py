"""I/O around the gateway's logic: it gives every event to `GatewayLogic` and carries out the effects.

Everything here runs on the event loop and never blocks it: the log commits in its own thread, encoders run in a pool,
large digests are checked in a thread before their chunk reaches the logic.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol

from turboserve.errors import ConfigError, Overloaded, TurboServeError
from turboserve.metrics import Metrics
from turboserve.runtime import messages
from turboserve.server.attach_tokens import new_token
from turboserve.server.effects import (
    Append,
    CloseViewer,
    Deliver,
    Effect,
    Measure,
    Resolve,
    ToController,
    ToViewer,
    ToWorker,
)
from turboserve.server.gateway_config import GatewayConfig
from turboserve.server.gateway_logic import GatewayLogic, NewSession
from turboserve.server.history import History
from turboserve.server.input_log import InputLog, read_log, rewrite_log
from turboserve.server.log_records import Ended, LoggedSession, Opened, Record, Rotated, replay
from turboserve.server.pacing import StreamClock
from turboserve.server.session_stream import SessionStream, StoredChunk, StreamShape
from turboserve.server.trace_recorder import WRITE_EVERY_S, TraceRecorder

OP_WAIT_S = 15.0

Send = Callable[[messages.Message], None]


class Viewer(Protocol):
    """Where a connection's effects go: a WebSocket, or a file that is being made."""

    def message(self, message: dict[str, Any]) -> None: ...
    def chunk(self, chunk: StoredChunk) -> None: ...
    def close(self, code: int, reason: str) -> None: ...


class Gateway:
    """One gateway. `send` functions of controller and workers are put in by `links`, or by a test."""

    def __init__(
        self, config: GatewayConfig, metrics: Metrics, log: Any, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.metrics = metrics
        self.log = log
        self.now = now
        self.logic = GatewayLogic(
            config.limits, config.quotas, config.wide_quotas, new_token, gateway_epoch=config.gateway_epoch
        )
        self.encoders = ThreadPoolExecutor(config.encoder_threads, thread_name_prefix="encode")
        self.viewers: dict[int, Viewer] = {}
        self.stopped = asyncio.Event()
        self.failed = ""
        self.history = History()
        self.trace: TraceRecorder | None = None
        self._loop = asyncio.get_running_loop()
        self._connections = itertools.count(1)
        self._controller: Send | None = None
        self._workers: dict[str, Send] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        self._input_log: InputLog | None = None
        self._lock: IO[bytes] | None = None
        self._appended: deque[tuple[int, float]] = deque()

    # ------------------------------------------------------------------ start and stop

    def open_log(self, shape_of: Callable[[LoggedSession], tuple[StreamShape, StreamClock] | None]) -> int:
        """Read the log of an earlier gateway, restore its sessions, go on in a fresh log; how many were restored.

        `shape_of` answers None for a session that this server can no longer continue.
        """
        folder = Path(self.config.data_dir)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = lock_folder(folder)
        path = folder / "gateway.log"
        records, torn = read_log(path)
        if torn:
            self.log.warning("gateway log ended in a torn record", dropped_bytes=torn)
        known = [(one, *found) for one in replay(records).values() if (found := shape_of(one)) is not None]
        rewrite_log(path, itertools.chain.from_iterable(one.as_records() for one, _, _ in known))
        self._input_log = InputLog(path, on_durable=self._durable_soon, on_failed=self._log_failed_soon)
        self.apply(self.logic.restore(known, self.now(), time.time()))
        return len(known)

    def _durable_soon(self, seq: int) -> None:
        self._loop.call_soon_threadsafe(self._durable, seq)

    def _durable(self, seq: int) -> None:
        now_s = self.now()
        while self._appended and self._appended[0][0] <= seq:
            self.metrics.log_commit.observe(now_s - self._appended.popleft()[1])
        self.apply(self.logic.durable(seq, now_s))

    def _log_failed_soon(self, error: OSError) -> None:
        self._loop.call_soon_threadsafe(self._log_failed, error)

    def _log_failed(self, error: OSError) -> None:
        """No promise can be kept any more: stop, so that viewers go elsewhere or come back to a restarted gateway."""
        self.failed = f"input log: {error.strerror}"
        self.log.critical("the input log cannot be written; stopping", error=error.strerror)
        self.stopped.set()

    def drain(self) -> None:
        """Not ready from now on; viewers are told to come back: to the gateway that reads our log."""
        for viewer in list(self.viewers.values()):
            viewer.close(1012, "the server restarts; attach again")
        self.apply(self.logic.let_go(self.now()))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._input_log is not None:
            self._input_log.close()
            self._input_log = None
        if self._lock is not None:
            self._lock.close()
        self.encoders.shutdown(wait=False, cancel_futures=True)

    async def keep_history(self) -> None:
        """Close a second of the history every second, until cancelled."""
        while True:
            await asyncio.sleep(1.0)
            ready = sum(1 for one in self.logic.workers.values() if one.state == "ready")
            self.history.close_second(time.time(), self.logic.states(), ready)

    # ------------------------------------------------------------------ peers

    def controller_connected(self, send: Send) -> None:
        self._controller = send
        self.apply(self.logic.controller_connected(self.now()))

    def controller_lost(self) -> None:
        self._controller = None
        self.apply(self.logic.controller_lost())

    def from_controller(self, message: messages.AnyMessage) -> None:
        self.apply(self.logic.from_controller(message, self.now()))

    def worker_connected(self, worker_id: str, send: Send) -> None:
        self._workers[worker_id] = send
        self.apply(self.logic.worker_connected(worker_id, self.now()))

    def worker_lost(self, worker_id: str, send: Send) -> None:
        if self._workers.get(worker_id) is send:
            del self._workers[worker_id]

    def chunk_ready(self, message: messages.ChunkReady, data: Any) -> None:
        """A chunk: its frames, found to match its digest, or what the worker made of them."""
        self.apply(self.logic.chunk(message, data, self.now()))

    def chunk_corrupt(self, message: messages.ChunkReady, error: TurboServeError) -> None:
        self.log.error("corrupt chunk", session=message.session_id, index=message.chunk_index, error=error.message)
        self.apply(self.logic.chunk_corrupt(message, error, self.now()))

    def chunk_refused(self, message: messages.ChunkRefused) -> None:
        # An owner that stopped for a move says "moving" to the credit that comes too late: every move may have one.
        log = self.log.info if message.code == "moving" else self.log.warning
        log("credit refused", session=message.session_id, index=message.chunk_index, code=message.code)
        self.apply(self.logic.refused(message, self.now()))

    # ------------------------------------------------------------------ operations of the HTTP side

    async def create(self, wish: NewSession) -> messages.OpDone:
        op_id, effects = self.logic.create(wish, self.now())
        return await self._wait(op_id, effects)

    async def command(self, kind: str, **fields: Any) -> messages.OpDone:
        op_id, effects = self.logic.command(kind, self.now(), **fields)
        return await self._wait(op_id, effects)

    async def _wait(self, op_id: int, effects: list[Effect]) -> messages.OpDone:
        future = self._answers[op_id] = self._loop.create_future()
        try:
            self.apply(effects)
            async with asyncio.timeout(OP_WAIT_S):
                answer = await future
        except TimeoutError:
            raise Overloaded("the controller does not answer", retry_after_s=2.0) from None
        finally:
            self._answers.pop(op_id, None)
        if isinstance(answer, TurboServeError):
            raise answer
        return answer

    def find(self, sid: str, tenant: str | None) -> SessionStream:
        return self.logic.find(sid, tenant)

    def end(self, sid: str, tenant: str | None, reason: str) -> None:
        self.apply(self.logic.end(sid, tenant, reason, self.now()))

    def pause(self, sid: str, tenant: str | None) -> None:
        self.apply(self.logic.pause(sid, tenant, self.now()))

    def resume(self, sid: str, tenant: str | None) -> None:
        self.apply(self.logic.resume(sid, tenant, self.now()))

    # ------------------------------------------------------------------ viewers

    def add_viewer(self, viewer: Viewer) -> int:
        connection = next(self._connections)
        self.viewers[connection] = viewer
        self.metrics.viewers.set(len(self.viewers))
        return connection

    def remove_viewer(self, connection: int, sid: str) -> None:
        if self.viewers.pop(connection, None) is not None:
            self.metrics.viewers.set(len(self.viewers))
            self.apply(self.logic.detach(connection, sid, self.now()))

    def attach(self, connection: int, sid: str, token: str, next_index: int, format: str | None, pace: Any) -> None:
        self.apply(self.logic.attach(connection, sid, token, next_index, format, pace, self.now()))

    def act(
        self, connection: int, sid: str, act: Callable[[SessionStream, float], None], event_id: str | None = None
    ) -> bool:
        """A message of an attached viewer; False when it was answered with an error."""
        now_s = self.now()
        good, effects = self.logic.viewer(connection, sid, lambda session: act(session, now_s), now_s, event_id)
        self.apply(effects)
        return good

    # ------------------------------------------------------------------ effects and time

    def apply(self, effects: list[Effect]) -> None:
        """Carry effects out, in order."""
        for effect in effects:
            match effect:
                case Append():
                    assert self._input_log is not None
                    self._appended.append((self._input_log.append(effect.record), self.now()))
                    self.metrics.log_records.inc()
                    self._tell(effect.record)
                    self._trace(effect.record)
                case ToWorker():
                    self._send(self._workers.get(effect.worker_id), effect.message)
                case ToController():
                    self._send(self._controller, effect.message)
                    self._trace(effect.message)
                case ToViewer():
                    if viewer := self.viewers.get(effect.connection):
                        viewer.message(effect.message)
                case Deliver():
                    if viewer := self.viewers.get(effect.connection):
                        viewer.chunk(effect.chunk)
                case CloseViewer():
                    if viewer := self.viewers.get(effect.connection):
                        self.metrics.closes.labels(str(effect.code)).inc()
                        viewer.close(effect.code, effect.reason)
                case Resolve():
                    future = self._answers.get(effect.op_id)
                    if future is not None and not future.done():
                        future.set_result(effect.answer)
                case Measure():
                    self.metrics.measure(effect.name, effect.value)
                    self.history.measure(effect.name, effect.value)
        self._arm()

    def _tell(self, record: Record) -> None:
        """The log of a session's life: ids and reasons, never prompts or tokens."""
        match record:
            case Opened():
                self.log.info("session opened", session=record.sid, tenant=record.tenant, model=record.model)
            case Rotated():
                self.log.debug("viewer attached", session=record.sid)
            case Ended():
                self.log.info("session ended", session=record.sid, reason=record.reason, failed=record.failed)

    def _trace(self, seen: Record | messages.Message) -> None:
        """What users do, for `serve --record-trace`."""
        if self.trace is None:
            return
        match seen:
            case Opened():
                self.trace.arrive(seen.sid, self.now())
            case messages.SessionActivity():
                session = self.logic.sessions.get(seen.session_id)
                index = session.next_index if session is not None else 0
                self.trace.activity(seen.session_id, seen.active, index, self.now())
            case Ended():
                session = self.logic.sessions.get(seen.sid)
                self.trace.depart(seen.sid, session.next_index if session is not None else 0, self.now())

    async def keep_trace(self) -> None:
        """Write the trace now and then, and once more when cancelled."""
        trace = self.trace
        if trace is None:
            return
        was_full = False
        try:
            while True:
                await asyncio.sleep(WRITE_EVERY_S)
                await asyncio.to_thread(trace.write, self.now())
                if trace.full and not was_full:
                    was_full = True
                    self.log.warning("the recorded trace is full; later sessions are left out")
        except OSError as error:
            self.log.error("the trace is not recorded any more", error=error.strerror)
        finally:
            trace.cut({sid: one.next_index for sid, one in self.logic.sessions.items()}, self.now())
            with contextlib.suppress(OSError):
                trace.write(self.now())

    def _send(self, send: Send | None, message: messages.Message) -> None:
        """What a peer that is gone should have got is sent again by the logic when it is back."""
        if send is None:
            return
        try:
            send(message)
        except TurboServeError as error:
            self.log.warning("cannot send", message=type(message).__name__, error=str(error))

    def _arm(self) -> None:
        wake_s = self.logic.wake_s()
        if wake_s is None or (self._timer is not None and self._timer_s <= wake_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = wake_s
        self._timer = self._loop.call_later(max(0.0, wake_s - self.now()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.apply(self.logic.tick(self.now()))


def lock_folder(folder: Path) -> IO[bytes]:
    """Keep the data directory to this process: two writers of one log would ruin it. Held until closed, or death."""
    lock = open(folder / "gateway.lock", "wb")  # noqa: SIM115 - the lock lives as long as the file is open
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ConfigError(
            f"data directory {folder} is in use by another server", expected="one of its own", hint="use --data-dir"
        ) from None
    return lock
