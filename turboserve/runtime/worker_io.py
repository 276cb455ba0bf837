"""A worker's sockets and timers: carries out what `WorkerLogic` says. One asyncio thread.

Chunks leave by `worker_emits.py`. Both channels reconnect for ever; the lease decides what may happen meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboserve.errors import AuthFailed, Overloaded, ProtocolError
from turboserve.runtime import channel, ports
from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.failpoints import failpoint
from turboserve.runtime.point_links import PointLinks, own_address, points_held
from turboserve.runtime.worker_books import (
    CONTROLLER,
    GATEWAY,
    Action,
    Beat,
    Drop,
    Emit,
    PointAction,
    PointEvent,
    Send,
    Stop,
)
from turboserve.runtime.worker_config import WorkerConfig
from turboserve.runtime.worker_emits import Emitter, FrameSink
from turboserve.runtime.worker_logic import WorkerLogic

if TYPE_CHECKING:
    from turboserve.runtime.recovery_store import RecoveryStore

RECONNECT_MIN_S = 0.05
RECONNECT_MAX_S = 1.0
WORK_REPORT_S = 0.05
"""How often the controller hears at most what the engine is at."""
REFUSED_MAX = 5
"""Handshakes in a row that fail before a worker that joined gives up: a restarted server has a new token."""
PROGRESS_MAX = 1024
"""Sessions that one heartbeat reports on."""
_PAGE_BYTES = 4096
_SAY: dict[type[m.Message], str] = {
    kind: f"worker.say.{kind.__name__}"
    for kind in (m.SessionOpened, m.SessionSuspended, m.SessionPrepared, m.HandedOver, m.SessionReleased)
}


@dataclass(slots=True)
class Figures:
    """What a heartbeat reports, as totals since the start; the engine's thread writes them, any thread may read."""

    passes: int = 0
    segments: int = 0
    chunks: int = 0
    busy_s: float = 0.0
    chunk_latency_s: float = 0.0
    active: int = 0
    resident: int = 0
    slots_free: int = 0
    device_bytes: int = 0
    points: int = 0
    points_refused: int = 0
    point_s: float = 0.0


class WorkerIO:
    """I/O around the logic. All methods but `post_soon` are for its own thread."""

    def __init__(
        self,
        config: WorkerConfig,
        logic: WorkerLogic,
        producer: FrameSink | None,
        *,
        command: Callable[[e.EngineCommand], None],
        stop: Callable[[int], None],
        figures: Callable[[], Figures],
        at_work: Callable[[], e.AtWork],
        log: Any,
        store: RecoveryStore | None = None,
    ) -> None:
        self._config = config
        self._points: PointLinks | None = None
        if store is not None:
            self._points = PointLinks(
                store,
                bytes.fromhex(config.token),
                lambda: own_address(config, self._channels.get(CONTROLLER)),
                self._on_point,
                lambda held: self._send(CONTROLLER, points_held(config, held)),
                log,
            )
        self._logic = logic
        self._emitter = Emitter(
            config.worker_epoch,
            logic,
            producer,
            peer=lambda: self._channels.get(GATEWAY),
            send=lambda message: self._send(GATEWAY, message),
            apply=self._apply,
            log=log,
        )
        self._gateway_at = (config.gateway_host, config.gateway_port)
        self._command = command
        self._stop = stop
        self._figures = figures
        self._at_work = at_work
        self._told_work: tuple[bool, dict[str, tuple[int, int, bool]]] = (False, {})
        self._before = Figures()
        self._before_s = time.monotonic()
        self._log = log
        self._channels: dict[str, channel.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._timer_changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    # ------------------------------------------------------------------ from other threads

    def post_soon(self, event: e.EngineEvent, epoch: int) -> None:
        """Hand over something the engine did."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._on_engine, event, epoch)

    # ------------------------------------------------------------------ life

    async def run(self, signals: socket.socket) -> None:
        """Until cancelled. A byte on `signals` is the number of a signal that the process got."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._on_failure)
        signals.setblocking(False)
        self._loop.add_reader(signals, self._on_signals, signals)
        config, token = self._config, bytes.fromhex(self._config.token)
        async with asyncio.TaskGroup() as tasks:
            controller_at = (config.controller_host, config.controller_port)
            tasks.create_task(self._keep_connected(CONTROLLER, lambda: controller_at, token))
            tasks.create_task(self._keep_connected(GATEWAY, lambda: self._gateway_at, token))
            tasks.create_task(self._timers())
            tasks.create_task(self._report_work())

    async def _keep_connected(self, name: str, address: Callable[[], tuple[str, int]], token: bytes) -> None:
        pause_s = RECONNECT_MIN_S
        refused = 0
        while True:
            host, port = address()
            if port == 0:  # the controller has not said yet where that is
                await asyncio.sleep(RECONNECT_MIN_S)
                continue
            try:
                peer = await channel.connect(host, port, token)
            except (OSError, TimeoutError, ProtocolError) as error:
                refused = refused + 1 if isinstance(error, AuthFailed) else 0
                if refused:
                    self._log.error("handshake failed", peer=name, error=str(error))
                if self._config.joined and refused >= REFUSED_MAX:
                    self._log.error("giving up: the server has another token; join it again", peer=name)
                    self._stop(1)
                    return
                # Jitter: all workers lose a dead controller in the same instant.
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, RECONNECT_MAX_S)
                continue
            pause_s, refused = RECONNECT_MIN_S, 0
            await self._serve(name, peer)

    async def _serve(self, name: str, peer: channel.Channel) -> None:
        self._log.info("connected", peer=name)
        self._channels[name] = peer
        try:
            self._apply(self._logic.on_connect(name, time.monotonic()))
            async for message in peer:
                if name == CONTROLLER and isinstance(message, m.GatewayAt) and self._config.joined:
                    self._gateway_is_at(message)
                    continue
                self._apply(self._logic.on_message(name, message, time.monotonic()))
        except ProtocolError as error:
            self._log.warning("peer broke the protocol", peer=name, error=str(error))
        finally:
            del self._channels[name]
            self._log.info("disconnected", peer=name)
            self._apply(self._logic.on_disconnect(name, time.monotonic()))
            await peer.close()

    def _gateway_is_at(self, told: m.GatewayAt) -> None:
        """A gateway that listens on loopback is on the controller's machine, so by its address from here."""
        host = self._config.controller_host if ports.is_loopback(told.host) else told.host
        if (host, told.port) != self._gateway_at:
            self._gateway_at = (host, told.port)
            self._close_soon(GATEWAY)

    async def _timers(self) -> None:
        while True:
            self._timer_changed.clear()
            # At least twice a second: after a suspended machine wakes up, time has jumped.
            wait_s = min(0.5, max(0.0, self._logic.wake_at_s - time.monotonic()))
            try:
                async with asyncio.timeout(wait_s):
                    await self._timer_changed.wait()
            except TimeoutError:
                self._apply(self._logic.on_timer(time.monotonic()))

    async def _report_work(self) -> None:
        """What the engine is at, when that is something else than was told last."""
        while True:
            await asyncio.sleep(WORK_REPORT_S)
            now = self._at_work()
            if CONTROLLER in self._channels and self._told_work != (now.until_s > 0, now.sessions):
                self._send(CONTROLLER, self._work_report(now))

    def _work_report(self, now: e.AtWork) -> m.WorkReport:
        self._told_work = (now.until_s > 0, now.sessions)
        named = itertools.islice(now.sessions.items(), m.WORK_MAX)
        return m.WorkReport(
            worker_id=self._config.worker_id,
            worker_epoch=self._config.worker_epoch,
            busy_s=max(0.0, now.until_s - time.monotonic()),
            sessions={session_id: m.SessionWork(*work) for session_id, work in named},
        )

    def _on_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback raised, where no task would carry it: a worker that is gone is noticed, a wrong one is not."""
        if isinstance(context.get("exception"), OSError):
            loop.default_exception_handler(context)  # a socket's last words
            return
        self._log.error("the talking thread failed", message=context.get("message"), exc_info=context.get("exception"))
        self._stop(1)

    def _on_signals(self, signals: socket.socket) -> None:
        for number in signals.recv(64):
            if number in (signal.SIGTERM, signal.SIGINT):
                self._apply(self._logic.on_terminate(time.monotonic()))

    # ------------------------------------------------------------------ carrying out

    def _on_engine(self, event: e.EngineEvent, epoch: int) -> None:
        if isinstance(event, e.BrokenSession):
            self._log.error(
                "session broken",
                session=event.session_id,
                chunk=event.chunk_index,
                code=event.code,
                message=event.message,
            )
        elif isinstance(event, e.OpenFailed):
            self._log.warning("session not opened", session=event.session_id, code=event.code, message=event.message)
        self._apply(self._logic.on_engine(event, epoch, time.monotonic()))

    def _on_point(self, event: PointEvent) -> None:
        self._apply(self._logic.on_point(event, time.monotonic()))

    def _apply(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self._send(action.to, action.message)
            elif isinstance(action, Emit):
                self._emitter.add(action)
            elif isinstance(action, Beat):
                self._send(CONTROLLER, self._heartbeat())
                self._send(CONTROLLER, self._work_report(self._at_work()))
                self._emitter.forget_closed()
            elif isinstance(action, Drop):
                self._log.warning("dropped", peer=action.to, reason=action.reason)
                self._close_soon(action.to)
            elif isinstance(action, PointAction):
                assert self._points is not None  # the logic asks nothing of the kind without an arena
                self._points.do(action)
            elif isinstance(action, Stop):
                self._log.info("stopping", reason=action.reason)
                self._stop(action.code)
            else:
                self._command(action)
        self._emitter.pump()
        self._timer_changed.set()

    def _send(self, to: str, message: m.Message) -> None:
        if (place := _SAY.get(type(message))) is not None:
            failpoint(place)
        peer = self._channels.get(to)
        if peer is None:
            return  # it says hello again when it is back, and the logic then repeats what matters
        try:
            peer.send(message)
        except (ProtocolError, Overloaded) as error:
            self._log.warning("cannot send", peer=to, error=str(error))
            self._close_soon(to)

    def _close_soon(self, name: str) -> None:
        peer = self._channels.get(name)
        if peer is not None:
            task = asyncio.get_running_loop().create_task(peer.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _heartbeat(self) -> m.Heartbeat:
        """Means are over the time since the last heartbeat; 0 where nothing was made in it."""
        now_s, figures, before = time.monotonic(), self._figures(), self._before
        passes, chunks = figures.passes - before.passes, figures.chunks - before.chunks
        latency_s = figures.chunk_latency_s - before.chunk_latency_s
        busy_share = (figures.busy_s - before.busy_s) / max(1e-9, now_s - self._before_s)
        self._before, self._before_s = figures, now_s
        return m.Heartbeat(
            worker_id=self._config.worker_id,
            worker_epoch=self._config.worker_epoch,
            active=figures.active,
            resident=figures.resident,
            slots_free=figures.slots_free,
            busy_share=min(1.0, max(0.0, busy_share)),
            chunk_latency_ms=1e3 * latency_s / chunks if chunks else 0.0,
            batch_size_mean=(figures.segments - before.segments) / passes if passes else 0.0,
            chunks=figures.chunks,
            passes=figures.passes,
            device_bytes=figures.device_bytes,
            rss_bytes=resident_bytes(),
            points=figures.points,
            points_refused=figures.points_refused,
            point_ms=1e3 * (figures.point_s - before.point_s) / max(1, figures.points - before.points),
            progress=self._progress(),
        )

    def _progress(self) -> dict[str, int]:
        sessions = itertools.islice(self._logic.sessions.items(), PROGRESS_MAX)
        return {session_id: max(one.made) + 1 for session_id, one in sessions if one.made}


def resident_bytes() -> int:
    """This process's resident memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0
