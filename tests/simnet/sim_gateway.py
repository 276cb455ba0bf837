"""The gateway process around the real `GatewayLogic`, and viewers that check what they get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sim_model import Oracle
from sim_store import SimLog
from sim_world import Channel, Process, Violation, World

from turboserve.errors import TurboServeError
from turboserve.runtime import messages as m
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
from turboserve.server.gateway_config import Limits, Quotas
from turboserve.server.gateway_logic import GatewayLogic, NewSession
from turboserve.server.log_records import LoggedSession
from turboserve.server.pacing import Pace, StreamClock
from turboserve.server.session_stream import RING_CHUNKS, StreamShape

LIMITS = Limits(attach_grace_s=25.0, slow_close_s=6.0, queue_length=64)
QUOTAS = Quotas(sessions=1000, creates_per_min=1_000_000, attaches_per_min=1_000_000, session_s=10_000.0)
FAILURES = frozenset({"session_poisoned", "x"})
"""What a session may fail for: it broke twice, or workers died with it."""
SESSION_FORMAT = "mp4"
FORMATS = ("h264", "raw", None, "jpeg", "h264")
SHAPE = StreamShape("toy", "toy", 4, 4, 10.0, 4, 4)
CLOCK = StreamClock(0.4, 0.4)


class SimGateway(Process):
    """One gateway, restarted on the same log."""

    def __init__(self, world: World, log: SimLog) -> None:
        super().__init__(world, "gateway")
        self.log = log
        self.connect: Callable[[], Channel | None] = lambda: None
        self.on_accept: Callable[[str, int, str], None] = lambda sid, epoch, worker: None
        self.viewers: dict[int, SimViewer] = {}
        self.measured: list[tuple[str, float]] = []
        self.answers: dict[int, Callable[[Any], None]] = {}
        self._committing = False
        self._controller: Channel | None = None
        self._workers: dict[str, Channel] = {}
        self._connections = 0
        self._tokens = 0
        self._wake_s = 0.0

    def start(self) -> None:
        self.born()
        self.viewers, self.answers, self._workers = {}, {}, {}
        self._committing, self._controller = False, None
        self._wake_s = float("inf")
        self.logic = GatewayLogic(LIMITS, QUOTAS, QUOTAS, self._token, gateway_epoch=self.life)
        known: list[tuple[LoggedSession, StreamShape, StreamClock]] = [(one, SHAPE, CLOCK) for one in self.log.read()]
        self.apply(self.logic.restore(known, self.world.now_s, 0.0))
        self._reconnect()

    def _token(self) -> str:
        self._tokens += 1
        return f"token-{self.life}-{self._tokens}"

    def die(self) -> None:
        super().die()
        self.log.crash()
        for viewer in list(self.viewers.values()):
            viewer.closed(1006)
        self.viewers = {}

    # ------------------------------------------------------------------ peers

    def _reconnect(self) -> None:
        channel = self.connect()
        if channel is None:
            self.later(0.2, self._reconnect)
            return
        self._controller = channel
        channel.on_message[self] = lambda message: self.apply(self.logic.from_controller(message, self.world.now_s))
        channel.on_close[self] = lambda: self._controller_lost(channel)
        channel.send(self, m.GatewayHello(gateway_epoch=self.life, pid=1, data_host="h", data_port=1))
        self.apply(self.logic.controller_connected(self.world.now_s))

    def _controller_lost(self, channel: Channel) -> None:
        if self._controller is channel:
            self._controller = None
            self.apply(self.logic.controller_lost())
            self.later(0.2, self._reconnect)

    def accept_worker(self, channel: Channel) -> None:
        """A worker's data channel; its first message is the hello."""
        name = ""

        def hear(message: Any) -> None:
            nonlocal name
            if isinstance(message, m.WorkerHello):
                name = message.worker_id
                self._workers[name] = channel
                self.apply(self.logic.worker_connected(name, self.world.now_s))
            elif isinstance(message, tuple):
                self._chunk(name, message[0], message[1])
            elif isinstance(message, m.ChunkRefused):
                self.world.cover(f"refused:{message.code}")
                self.apply(self.logic.refused(message, self.world.now_s))

        def closed() -> None:
            if self._workers.get(name) is channel:
                del self._workers[name]

        channel.on_message[self] = hear
        channel.on_close[self] = closed

    def _chunk(self, worker: str, ready: m.ChunkReady, frames: bytes) -> None:
        session = self.logic.sessions.get(ready.session_id)
        before = session.next_index if session is not None else -1
        misfit = session._misfit() if session is not None else None
        effects = self.logic.chunk(ready, frames, self.world.now_s)
        if session is not None and session.next_index == before + 1:
            self.on_accept(ready.session_id, session.epoch, worker)
        if session is not None and misfit == ready.chunk_index and session._misfit() != misfit:
            self.world.cover("chunk in another format")
        self.apply(effects)

    # ------------------------------------------------------------------ viewers and operators

    def add_viewer(self, viewer: SimViewer) -> int:
        self._connections += 1
        self.viewers[self._connections] = viewer
        return self._connections

    def act(self, act: Callable[[GatewayLogic, float], list[Effect]]) -> None:
        """One request; a typed error is the caller's business."""
        try:
            self.apply(act(self.logic, self.world.now_s))
        except TurboServeError as error:
            self.world.cover(f"refused:{error.code}")
            self.apply(self.logic.tick(self.world.now_s))

    def create(self, wish: NewSession, answer: Callable[[Any], None]) -> None:
        try:
            op_id, effects = self.logic.create(wish, self.world.now_s)
        except TurboServeError as error:
            answer(error)
            return
        self.answers[op_id] = answer
        self.apply(effects)

    def command(self, kind: str, answer: Callable[[Any], None] = lambda done: None, **fields: Any) -> None:
        op_id, effects = self.logic.command(kind, self.world.now_s, **fields)
        self.answers[op_id] = answer
        self.apply(effects)

    # ------------------------------------------------------------------ effects and time

    def apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Append():
                    self.log.append(effect.record)
                    self._commit_soon()
                case ToWorker():
                    if channel := self._workers.get(effect.worker_id):
                        channel.send(self, effect.message)
                case ToController():
                    if self._controller is not None:
                        self._controller.send(self, effect.message)
                case ToViewer():
                    if viewer := self.viewers.get(effect.connection):
                        viewer.hear(effect.connection, effect.message)
                case Deliver():
                    if viewer := self.viewers.get(effect.connection):
                        viewer.chunk(effect.connection, effect.chunk)
                case CloseViewer():
                    if viewer := self.viewers.pop(effect.connection, None):
                        viewer.closed_soon(effect.connection, effect.code)
                case Resolve():
                    if answer := self.answers.pop(effect.op_id, None):
                        answer(effect.answer)
                case Measure():
                    self.measured.append((effect.name, effect.value))
        self._arm()

    def _commit_soon(self) -> None:
        if self._committing:
            return
        self._committing = True
        self.later(0.001 + self.world.rng.random() * 0.01, self._commit)

    def _commit(self) -> None:
        self._committing = False
        self.apply(self.logic.durable(self.log.commit(), self.world.now_s))

    def _arm(self) -> None:
        wake_s = self.logic.wake_s()
        if wake_s is None or wake_s >= self._wake_s:
            return
        self._wake_s = wake_s
        self.later(wake_s - self.world.now_s, self._tick)

    def _tick(self) -> None:
        self._wake_s = float("inf")
        self.apply(self.logic.tick(self.world.now_s))


class SimViewer:
    """A viewer with a bad network: it comes, acks, steers, goes and comes again, and checks every chunk."""

    def __init__(self, world: World, gateway: SimGateway, oracle: Oracle, sid: str, token: str, pace: Pace) -> None:
        self.world, self.gateway, self.oracle = world, gateway, oracle
        self.sid, self.token, self.pace = sid, token, pace
        self.tokens = [token]
        self.got: dict[int, str] = {}
        self.next_index = 0
        self.connection = 0
        self.attached = False
        self.wanted = True
        self.ended = ""
        self.slow_s = 0.0
        self.accepted: list[tuple[int, int]] = []
        self.waiting: dict[str, dict[str, Any]] = {}
        self.last_chunk_s = world.now_s
        self._life = 0
        self._events = 0
        self._attach_at = 0
        self._format: str | None = None

    # ------------------------------------------------------------------ connecting

    def come(self) -> None:
        """Attach, now and again after every loss, as long as it is wanted."""
        self.wanted = True
        if self.connection or self.ended:
            return
        if not self.gateway.alive:
            self.world.at(0.1 + self.world.rng.random() * 0.3, self._come_again)
            return
        self.connection = connection = self.gateway.add_viewer(self)
        self._life += 1
        life = self._life
        self._attach_at = self.next_index
        # Another format now and then; not drawn, so that everything else of a schedule stays what it was.
        self._format = FORMATS[(life + ord(self.sid[0])) % len(FORMATS)]
        format = self._format
        token = self.token

        def attach() -> None:
            if self._life == life:
                self.gateway.act(
                    lambda logic, now_s: logic.attach(
                        connection, self.sid, token, self._attach_at, format, self.pace, now_s
                    )
                )

        self.gateway.later(0.002, attach)
        self.world.at(2.0, lambda: self._give_up(life))

    def _come_again(self) -> None:
        if self.wanted:
            self.come()

    def _give_up(self, life: int) -> None:
        """No answer: a viewer tries again."""
        if self._life == life and self.connection and not self.attached:
            self.leave()
            self.come()

    def leave(self) -> None:
        """The connection is gone; the gateway learns it a little later."""
        connection, self.connection = self.connection, 0
        self.attached = self.wanted = False
        self._life += 1
        gateway = self.gateway
        if connection:

            def gone() -> None:
                gateway.viewers.pop(connection, None)
                gateway.act(lambda logic, now_s: logic.detach(connection, self.sid, now_s))

            gateway.later(0.002 + self.world.rng.random() * 0.2, gone)

    def closed_soon(self, connection: int, code: int) -> None:
        def close() -> None:
            if self.connection == connection:
                self.closed(code)

        self.world.at(0.003, close)

    def closed(self, code: int) -> None:
        wanted = self.wanted
        self.connection, self.attached = 0, False
        self._life += 1
        if code == 4500:
            session = self.gateway.logic.sessions.get(self.sid)
            reason = session.end_reason if session is not None else "gone"
            if reason not in FAILURES:
                raise Violation(f"I8 a session failed for no fault of its own: {reason}")
        if code in (1000, 4404, 4410, 4500):
            self.ended = self.ended or str(code)
            self.world.note("viewer ended", self.sid[:4], code)
        elif code == 4401:
            self._other_token()
        if wanted and not self.ended:
            self.world.at(0.05 + self.world.rng.random() * 0.3, self._come_again)

    def _other_token(self) -> None:
        """The answer with a newer token may have been lost, or the newer one was never durable."""
        known = self.tokens
        at = known.index(self.token) if self.token in known else 0
        if at == 0 and len(known) < 2:
            raise Violation("I8 the only token that a viewer was ever given does not open its session")
        self.token = known[(at - 1) % len(known)]

    # ------------------------------------------------------------------ what comes

    def hear(self, connection: int, message: dict[str, Any]) -> None:
        def take() -> None:
            if connection == self.connection:
                self._take(message)

        self.world.at(0.003, take)

    def _take(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "attached":
                self.attached = True
                self.token = message["token"]
                self.tokens = [*self.tokens[-3:], self.token]
                if message["next_index"] != self._attach_at:
                    raise Violation("I2 attached elsewhere than asked")
            case "prompt_accepted":
                self.accepted.append((message["prompt_version"], message["from_index"]))
                self.waiting.pop(message["event_id"], None)
            case "error":
                self.world.cover(f"viewer error:{message['code']}")
                self.waiting.pop(message.get("event_id", ""), None)
                if message["code"] == "index_out_of_range" and not self.attached:
                    raise Violation("I2 a viewer cannot go on where it is", message)
            case "end":
                self.ended = message["reason"]

    def chunk(self, connection: int, chunk: Any) -> None:
        life = self._life

        def take() -> None:
            if connection != self.connection or life != self._life:
                return
            if self.ended:
                raise Violation("I7 a chunk after the end")
            if chunk.index != self.next_index:
                raise Violation(f"I2 chunk {chunk.index} comes, {self.next_index} is next")
            if chunk.format not in ("raw", self._format or SESSION_FORMAT):
                raise Violation(f"I2 chunk {chunk.index} comes as {chunk.format} to a viewer of {self._format}")
            if chunk.format != "raw":
                self.world.cover("encoded chunk")
            digest = self.oracle.sessions[self.sid].digest(chunk.index)
            if chunk.digest != digest or self.got.setdefault(chunk.index, digest) != digest:
                raise Violation(f"I3 chunk {chunk.index} is not that of the undisturbed run")
            newest = max((version for version, index in self.accepted if index <= chunk.index), default=0)
            if chunk.prompt_version < newest:
                raise Violation(f"I8 an accepted prompt was lost: version {newest} by chunk {chunk.index}")
            self.next_index += 1
            self.last_chunk_s = self.world.now_s
            self.world.at(self.slow_s + self.world.rng.random() * 0.02, lambda: self._ack(chunk.index, life))

        self.world.at(0.003, take)

    def _ack(self, index: int, life: int) -> None:
        if life == self._life and self.attached:
            connection = self.connection
            self._send(lambda session, now_s: session.ack(connection, index, now_s))

    def _send(self, act: Callable[[Any, float], None], event_id: str | None = None) -> None:
        connection = self.connection
        self.gateway.later(
            0.002,
            lambda: self.gateway.act(
                lambda logic, now_s: logic.viewer(
                    connection, self.sid, lambda session: act(session, now_s), now_s, event_id
                )[1]
            ),
        )

    # ------------------------------------------------------------------ what it does

    def prompt(self, ahead: int | None) -> None:
        if not self.attached:
            return
        self._events += 1
        event_id = f"e{self._events}"
        text = f"p{self._events}"
        index = None if ahead is None else self.next_index + ahead
        connection = self.connection
        self._send(lambda session, now_s: session.prompt(connection, text, event_id, index, now_s), event_id)

    def pause(self, on: bool) -> None:
        if self.attached:
            self._send(lambda session, now_s: session.pause(now_s) if on else session.resume(now_s))

    def stop(self) -> None:
        if self.attached:
            self._send(lambda session, now_s: session.end("stopped", 1000, now_s))


def bounded(gateway: SimGateway) -> None:
    """I10: what the gateway holds for a session."""
    for session in gateway.logic.sessions.values():
        if len(session.ring) > RING_CHUNKS:
            raise Violation("I10 more chunks in the ring than may stand unacked")
        if session.ended_s is None and not session.sent <= session.durable <= session.bound:
            raise Violation("I4 a credit was sent for inputs that are not durable")
