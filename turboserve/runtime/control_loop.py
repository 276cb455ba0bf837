"""The controller process: observe, tick, apply.

    python -m turboserve.runtime.control_loop --config-fd N

It listens on the socket that the launcher handed down, gives every message to `ControllerLogic`, and sends what the
logic answers. Four times a second at most it publishes what the cluster looks like.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from turboserve.errors import Overloaded, ProtocolError
from turboserve.orchestrator.scheduler import Memory
from turboserve.runtime import channel, lifeline, logs
from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import (
    GATEWAY,
    LAUNCHER,
    Drop,
    DropFile,
    DropHost,
    Effect,
    Load,
    Send,
    Spill,
    Touch,
)
from turboserve.runtime.controller_config import ControllerConfig
from turboserve.runtime.controller_logic import ControllerLogic
from turboserve.runtime.controller_points import ControllerPoints
from turboserve.runtime.controller_storage import StoredBytes
from turboserve.runtime.directory import Directory
from turboserve.runtime.failpoints import failpoint, set_process
from turboserve.runtime.fleet_link import FleetLink
from turboserve.runtime.live_tick import LIVE_TICK, decide, live_profile
from turboserve.runtime.recording import TickRecorder

SNAPSHOT_S = 0.25
FIGURES_S = 2.0
"""How often the bytes in the arena and on disk are counted."""
FIGURES_SOON_S = 0.2
"""The same while somebody finds no room."""
WRITE_S, WRITE_AT_ONCE_S = 5.0, 2.0
"""A controller that ends waits so long for points that are being written; the second after a second signal."""
Stored = Callable[[str, int, float, str], list[Effect]]
"""`ControllerLogic.spilled` or `.loaded`."""


class ControlLoop:
    """I/O around the logic."""

    def __init__(self, config: ControllerConfig, log: Any) -> None:
        self._config = config
        self._log = log
        self._directory = Directory(Path(config.data_dir) / "directory.sqlite")
        self._recorder = TickRecorder(Path(config.record_dir), LIVE_TICK, log) if config.record_dir else None
        self._logic = ControllerLogic(
            self._directory,
            decide if self._recorder is None else self._recorder.around(decide),
            live_profile(config),
            lease_s=config.lease_s,
            queue_max=config.queue_max,
            queue_age_max_s=config.queue_age_max_s,
            steps_floor=config.steps_floor,
            workers=config.workers,
            workers_max=config.workers_max or config.workers,
            memory=Memory(),
            can_move=config.arena_fd >= 0,
            may_kill=config.may_kill,
            node=config.node,
        )
        self._logic.generation = self._directory.next_epoch("controller")
        self._failed = ""
        self._fleet: FleetLink | None = None
        self._points: ControllerPoints | None = None
        self._channels: dict[str, channel.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()

    async def run(self) -> int:
        """Serve until SIGTERM; the exit code."""
        loop = asyncio.get_running_loop()
        config = self._config
        if config.arena_fd >= 0:
            self._points = ControllerPoints(
                config.arena_fd,
                self._logic.generation,
                Path(config.data_dir) / "points",
                config.disk_bytes,
                lambda *call: loop.call_soon_threadsafe(*call),
                self._log,
            )
        self._take_over()
        failpoint("controller.started")
        if config.fleet_fd >= 0:
            self._fleet = FleetLink(socket.socket(fileno=config.fleet_fd))
            loop.add_reader(self._fleet, self._on_fleet)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        sock = socket.socket(fileno=self._config.listen_fd)
        server = await channel.listen("", 0, bytes.fromhex(self._config.token), self._serve, sock=sock)
        self._log.info("controller listens", port=channel.bound_port(server))
        timers = asyncio.create_task(self._timers())
        try:
            await self._stop.wait()
        finally:
            timers.cancel()
            await asyncio.gather(timers, return_exceptions=True)
            server.close()
            for one in list(self._channels.values()):
                await one.close()
            if self._fleet is not None:
                loop.remove_reader(self._fleet)
                self._fleet.close()
            await self._finish_writing()
            self._directory.close()
            if self._recorder is not None:
                self._recorder.close()
        return 1 if self._failed else 0

    async def _finish_writing(self) -> None:
        """Points on their way to disk get a moment; the log says of which sessions there is none."""
        points = self._points
        if points is None:
            return
        within_s = WRITE_S if self._logic.take_away_at_s is None else WRITE_AT_ONCE_S
        for _ in range(round(within_s / 0.01)):
            if self._failed or not self._logic.spilling:
                break
            await asyncio.sleep(0.01)
        await asyncio.to_thread(points.close)
        self._points = None
        await asyncio.sleep(0)  # what was posted last is still written down
        if self._logic.stopping and (left := self._logic.not_on_disk()):
            self._log.warning("not on disk: made again from the input log", count=len(left), sessions=left[:20])

    def _take_over(self) -> None:
        """What the directory has of an earlier controller."""
        stored = []
        moves, numerics, nodes = {}, {}, {}
        for one in self._directory.stored():
            numerics[one.record.session_id] = (one.numerics_id, one.approximate_from)
            if one.move_id:
                moves[one.record.session_id] = (one.move_id, one.move_target)
            try:
                request = m.decode(one.request)
            except ProtocolError as error:
                request = None
                self._log.warning("session cannot be taken over", session=one.record.session_id, error=str(error))
            nodes[one.record.session_id] = one.point_node
            if isinstance(request, m.CreateSession):
                stored.append((one.record, request))
            else:
                # Its gateway still has it, and creates it anew.
                self._directory.forget(one.record.session_id)
        on_disk = self._points.on_disk() if self._points is not None else {}
        self._logic.take_over(stored, time.monotonic(), moves, on_disk, numerics, nodes)
        if stored:
            self._log.info("sessions of an earlier controller", count=len(stored))

    async def _serve(self, peer: channel.Channel) -> None:
        """One peer: its first message says who it is."""
        name = ""
        try:
            async for message in peer:
                if not name:
                    name = self._name(message)
                    if not name:
                        self._log.warning("peer did not say hello", peer=peer.peer)
                        return
                    old = self._channels.pop(name, None)
                    if old is not None:
                        await old.close()
                    self._channels[name] = peer
                    self._log.info("connected", who=name)
                with self._fatal():
                    self._apply(self._logic.on_message(name, message, time.monotonic()))
        except ProtocolError as error:
            self._log.warning("peer broke the protocol", who=name or peer.peer, error=str(error))
        finally:
            if name and self._channels.get(name) is peer and not self._stop.is_set():
                del self._channels[name]
                self._log.info("disconnected", who=name)
                with self._fatal():
                    self._apply(self._logic.on_disconnect(name, time.monotonic()))

    @contextlib.contextmanager
    def _fatal(self) -> Iterator[None]:
        """What goes wrong in the logic or the directory ends the process: the next controller reads what is durable,
        a controller that goes on after a failed write would tell others what is not."""
        try:
            yield
        except ProtocolError:
            raise
        except Exception as error:
            self._failed = f"{type(error).__name__}: {error}"
            self._log.critical("the controller cannot go on", error=self._failed, exc_info=True)
            self._stop.set()
            raise

    @staticmethod
    def _name(message: m.Message) -> str:
        if isinstance(message, m.WorkerHello):
            return message.worker_id
        return GATEWAY if isinstance(message, m.GatewayHello) else ""

    def _apply(self, effects: list[Effect]) -> None:
        if effects:
            failpoint("controller.event.written")
        for effect in effects:
            if not isinstance(effect, Send | Drop):
                self._touch_points(effect)
                continue
            if effect.to == LAUNCHER:
                if self._fleet is not None and isinstance(effect, Send) and not self._fleet.send(effect.message):
                    self._log.error("the launcher does not hear", message=type(effect.message).__name__)
                continue
            peer = self._channels.get(effect.to)
            if peer is None:
                continue  # it will say hello again, and the logic then tells it everything
            if isinstance(effect, Drop):
                self._log.warning("dropped", who=effect.to, reason=effect.reason)
                self._close_soon(effect.to)
            elif isinstance(effect, Send):
                try:
                    peer.send(effect.message)
                except (ProtocolError, Overloaded) as error:
                    self._log.warning("cannot send", who=effect.to, error=str(error))
                    self._close_soon(effect.to)

    def _touch_points(self, effect: Touch) -> None:
        points, session_id = self._points, effect.session_id
        if points is None:
            if isinstance(effect, Spill):
                self._soon(self._logic.spilled, session_id)
            elif isinstance(effect, Load):
                self._soon(self._logic.loaded, session_id)
        elif isinstance(effect, Spill):
            points.spill(session_id, lambda *done: self._now(self._logic.spilled, *done))
        elif isinstance(effect, Load):
            points.load(session_id, lambda *done: self._now(self._logic.loaded, *done))
        elif isinstance(effect, DropHost):
            points.drop_host(session_id)
        elif isinstance(effect, DropFile):
            points.drop_file(session_id)
        else:
            points.drop(session_id)

    def _take_figures(self, found: StoredBytes) -> None:
        with self._fatal():
            self._apply(self._logic.stored_bytes(found, time.monotonic()))

    def _soon(self, tell: Stored, session_id: str) -> None:
        asyncio.get_running_loop().call_soon(self._now, tell, session_id, 0, "failed")

    def _now(self, tell: Stored, session_id: str, bytes_: int, why: str) -> None:
        with self._fatal():
            self._apply(tell(session_id, bytes_, time.monotonic(), why))

    def _on_fleet(self) -> None:
        """Word from the launcher."""
        assert self._fleet is not None
        with self._fatal():
            for event in self._fleet.receive():
                self._apply(self._logic.on_message(LAUNCHER, event, time.monotonic()))
            if self._fleet.closed:
                asyncio.get_running_loop().remove_reader(self._fleet)

    def _close_soon(self, name: str) -> None:
        peer = self._channels.get(name)
        if peer is not None:
            task = asyncio.get_running_loop().create_task(peer.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _timers(self) -> None:
        """Leases and wake-ups at 20 Hz, the cluster's picture at SNAPSHOT_S when it changed."""
        published_s = figures_s = 0.0
        while True:
            await asyncio.sleep(0.05)
            now_s = time.monotonic()
            with self._fatal():
                self._apply(self._logic.on_timer(now_s))
            if self._points is not None:
                self._points.sweep(self._logic.sessions, now_s)
                if now_s >= figures_s or (self._logic.count_soon and now_s >= figures_s - FIGURES_S + FIGURES_SOON_S):
                    figures_s = now_s + FIGURES_S
                    self._logic.count_soon = False
                    self._points.figures(self._take_figures)
            if self._logic.changed and now_s - published_s >= SNAPSHOT_S and GATEWAY in self._channels:
                self._logic.changed = False
                published_s = now_s
                body = json.dumps(self._logic.snapshot(), separators=(",", ":"))
                self._apply([Send(GATEWAY, m.ClusterSnapshot(body=body))])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="turboserve-controller")
    parser.add_argument("--config-fd", type=int, required=True)
    config = ControllerConfig.from_json(lifeline.read_fd(parser.parse_args(argv).config_fd))
    lifeline.hold_to_parent(config.parent_fd)
    set_process("controller")
    log = logs.set_up_logs("controller", log_format=config.log_format, level=config.log_level)

    async def run() -> int:
        return await ControlLoop(config, log).run()

    try:
        import uvloop
    except ImportError:
        runner: Any = asyncio.run
    else:
        runner = uvloop.run
    sys.exit(runner(run()))


if __name__ == "__main__":
    main()
