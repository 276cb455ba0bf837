"""A worker process: the real `WorkerLogic`, an engine that hashes instead of computing, and the I/O between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sim_model import Oracle, first_state, make_chunk
from sim_store import POINT_BYTES, Arena, Point
from sim_world import Channel, Process, Violation, World

from turboserve.digest import next_digest
from turboserve.errors import ArenaFull
from turboserve.geometry import SlotGeometry
from turboserve.model.interface import ChunkRequest, ModelSpec
from turboserve.runtime import messages as m
from turboserve.runtime import worker_books as b
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_books import CONTROLLER, GATEWAY, Action, Beat, Drop, Emit, Send, Stop
from turboserve.runtime.worker_events import KEPT_CHUNKS
from turboserve.runtime.worker_logic import WorkerLogic

NO_EPOCH = -1
SIZE = 4
CHUNK_S = 0.4
KEEP_S = 8.0
"""Longer than a move between nodes may take: two of the controller's deadlines."""
TOLD_S = 2.0
SPEC = ModelSpec(
    name="toy",
    model_hash="toy",
    width=SIZE,
    height=SIZE,
    fps=10.0,
    chunk_frames_first=4,
    chunk_frames_rest=4,
    slot=SlotGeometry(chunk_latent_frames=1, tokens_per_latent_frame=1, sink_latent_frames=1, window_latent_frames=3),
    denoise_steps=4,
    denoise_steps_floor=1,
)


@dataclass
class Held:
    """One session in the toy engine. `work` is the chunk being made."""

    epoch: int
    seed: int
    state: bytes
    next_index: int = 0
    digest: str = ""
    made: list[e.FinishedChunk] = field(default_factory=list)
    queue: deque[ChunkRequest] = field(default_factory=deque)
    work: ChunkRequest | None = None
    stop: e.Stop | None = None
    broken: bool = False
    turn: int = 0


class ToyEngine:
    """Carries out engine commands as runtime/engine_loop.py does: at chunk boundaries, each answer under the epoch that
    the session was opened under."""

    def __init__(self, worker: SimWorker, slots: int) -> None:
        self.worker = worker
        self.world = worker.world
        self.slots = slots
        self.held: dict[str, Held] = {}
        self.prepared: dict[str, int] = {}
        self.paused = True
        self._taken_s = self._posted_s = 0.0

    @property
    def used(self) -> int:
        return len(self.held) + len(self.prepared)

    def command(self, command: e.EngineCommand) -> None:
        """Queue a command; the engine's thread takes it a moment later."""
        self._taken_s = max(self._taken_s, self.world.now_s + self.world.rng.random() * 0.004)
        self.worker.later(self._taken_s - self.world.now_s, lambda: self._obey(command))

    def _post(self, event: e.EngineEvent, epoch: int) -> None:
        self._posted_s = max(self._posted_s, self.world.now_s + self.world.rng.random() * 0.002)
        self.worker.later(self._posted_s - self.world.now_s, lambda: self.worker.engine_event(event, epoch))

    def _obey(self, command: e.EngineCommand) -> None:
        match command:
            case e.Hold():
                self.paused = command.hold
                if not self.paused:
                    for sid in list(self.held):
                        self._work(sid)
            case e.Open():
                self._open(command)
            case e.Prepare():
                if command.session_id not in self.prepared:
                    if self.used >= self.slots:
                        failed = e.PrepareFailed(command.session_id, command.move_id, "pool_exhausted", "no slot")
                        self._post(failed, NO_EPOCH)
                        return
                    self.prepared[command.session_id] = command.move_id
                self._post(e.Prepared(command.session_id, command.move_id), NO_EPOCH)
            case e.DropPrepared():
                self.prepared.pop(command.session_id, None)
            case _:
                self._about_held(command)

    def _about_held(self, command: Any) -> None:
        held = self.held.get(command.session_id)
        if held is None or held.epoch != command.epoch:
            if isinstance(command, e.Close):
                self._post(e.Closed(command.session_id), command.epoch)
            return
        if isinstance(command, e.Close):
            del self.held[command.session_id]
            self._post(e.Closed(command.session_id), command.epoch)
        elif isinstance(command, e.Stop):
            held.queue.clear()
            held.stop = command
            self._stop_at_boundary(command.session_id, held)
        elif not held.broken:
            request = command.request
            expected = held.next_index + len(held.queue) + (held.work is not None)
            if request.chunk_index != expected:
                raise Violation(f"engine: chunk {request.chunk_index} submitted, {expected} is next")
            held.queue.append(request)
            self._work(command.session_id)

    def _open(self, command: e.Open) -> None:
        sid = command.session_id
        held = self.held.get(sid)
        if command.adopt_epoch is not None:
            if held is not None and held.broken:
                del self.held[sid]
                self._post(e.OpenFailed(sid, "session_poisoned", "it is broken"), command.epoch)
                return
            if held is not None and held.epoch == command.adopt_epoch:
                held.epoch, held.stop, held.work = command.epoch, None, None
                held.turn += 1
                held.queue.clear()
                self._post(e.Opened(sid, held.next_index, adopted=True), command.epoch)
                return
            if not command.restore:
                self._post(e.OpenFailed(sid, "not_found", "not on this worker any more"), command.epoch)
                return
        if held is not None:
            raise Violation("engine: a session is opened that is held already", command, held)
        reserved = self.prepared.pop(sid, None) is not None
        if not reserved and self.used >= self.slots:
            self._post(e.OpenFailed(sid, "pool_exhausted", "no slot"), command.epoch)
            return
        point = self.worker.arena.latest(sid) if command.restore else None
        if point is None:
            self.held[sid] = Held(command.epoch, command.seed, first_state(command.seed))
            self._post(e.Opened(sid), command.epoch)
            return
        self.held[sid] = Held(
            command.epoch, command.seed, point.state, point.next_index, point.digest, list(point.made)
        )
        self._post(e.Opened(sid, point.next_index, restored=True, made=point.made), command.epoch)

    def _work(self, sid: str) -> None:
        held = self.held.get(sid)
        if held is None or held.work is not None or not held.queue or self.paused or held.stop or held.broken:
            return
        request = held.work = held.queue.popleft()
        control = request.control
        self.worker.oracle.check_begin(sid, request.chunk_index, request.steps, control.version, control.prompt)
        held.turn += 1
        turn = held.turn
        self.worker.on_begin(self.worker, sid)
        took_s = 0.03 + self.world.rng.random() * 0.05 + 0.02 * len(self.held)
        self.worker.later(took_s * self.worker.slowness, lambda: self._finish(sid, turn))

    def _finish(self, sid: str, turn: int) -> None:
        held = self.held.get(sid)
        if held is None or held.work is None or held.turn != turn:
            return
        if self.paused:  # the chunk in work waits for the lease
            self.worker.later(0.05, lambda: self._finish(sid, turn))
            return
        request, held.work = held.work, None
        if self.worker.breaks(sid, request.chunk_index):
            held.broken = True
            held.queue.clear()
            self._post(
                e.BrokenSession(session_id=sid, chunk_index=request.chunk_index, code="x", message="m"), held.epoch
            )
            return
        control = request.control
        frames, held.state = make_chunk(
            held.state, held.seed, request.chunk_index, request.steps, control.version, control.prompt
        )
        digest = next_digest(held.digest, frames)
        chunk = e.FinishedChunk(
            session_id=sid,
            chunk_index=request.chunk_index,
            frames=frames,  # type: ignore[arg-type]
            digest=digest,
            digest_prev=held.digest,
            steps=request.steps,
            prompt_version=control.version,
            wait_s=0.0,
            denoise_s=0.0,
            decode_s=0.0,
            batch_size=1.0,
        )
        held.digest = digest
        held.next_index += 1
        held.made = [*held.made, chunk][-KEPT_CHUNKS:]
        self._post(chunk, held.epoch)
        if self.worker.write_through and held.stop is None:
            self._write_point(sid, held)
        self._stop_at_boundary(sid, held)
        self._work(sid)

    def _write_point(self, sid: str, held: Held) -> bool:
        return self.worker.arena.put(sid, Point(held.epoch, held.next_index, held.state, held.digest, tuple(held.made)))

    def _stop_at_boundary(self, sid: str, held: Held) -> None:
        stop = held.stop
        if stop is None or held.work is not None:
            return
        held.stop = None
        if held.broken or not self._write_point(sid, held):
            code, message = ("session_poisoned", "broken") if held.broken else (ArenaFull.code, "no room")
            self._post(e.StopFailed(sid, held.next_index, code, message), held.epoch)
            self._work(sid)
            return
        if stop.release:
            del self.held[sid]
        self._post(e.Stopped(sid, held.next_index, POINT_BYTES), held.epoch)


class SimWorker(Process):
    """One worker process and its two channels. `wiring` is what the launcher gave it. Every other one encodes its
    chunks itself, as one that joined from another machine does, and takes its time over it."""

    def __init__(
        self, world: World, name: str, *, arena: Arena, oracle: Oracle, slots: int, heartbeat_s: float
    ) -> None:
        super().__init__(world, name)
        self.arena = arena
        self.oracle = oracle
        self.encodes = name[-1] in "13579"
        self.slots = slots
        self.heartbeat_s = heartbeat_s
        self.write_through = True
        self.slowness = 1.0
        self.poison: set[str] = set()
        self.ring_full_until_s = 0.0
        self.connect: Callable[[SimWorker, str], Channel | None] = lambda worker, to: None
        self.on_exit: Callable[[SimWorker, int, str], None] = lambda worker, code, reason: None
        self.on_begin: Callable[[SimWorker, str], None] = lambda worker, sid: None
        self.on_made: Callable[[SimWorker, Callable[[], None]], None] = lambda worker, go: go()
        self.on_emit: Callable[[SimWorker, e.FinishedChunk, int], None] = lambda worker, chunk, epoch: None
        self._channels: dict[str, Channel] = {}
        self._outgoing: deque[Emit] = deque()
        self._pumping = False
        self.heard_s = self.lease_heard_s = 0.0
        self.node = "node"
        self.new_arena: Callable[[SimWorker], Arena] | None = None
        """Of a worker that joined: every life of it is a node of its own, with an arena that ends with it."""
        self.peer_at: Callable[[SimWorker, str], SimWorker | None] = lambda worker, address: None
        """The worker that awaits points at an address, if it is there and can be reached."""
        self.awaited: dict[str, int] = {}
        self._sending: dict[str, b.SendPoint] = {}

    def start(self) -> None:
        self.born()
        self._channels.clear()
        self._outgoing.clear()
        self._pumping = False
        self.awaited = {}
        self._sending = {}
        if self.new_arena is not None:
            self.node = f"{self.name}-{self.life}"
            self.arena = self.new_arena(self)
        hello = m.WorkerHello(
            worker_id=self.name,
            worker_epoch=self.life,
            pid=self.life,
            node=self.node,
            model="toy",
            model_hash="toy",
            numerics_id="n",
            device="cpu",
            device_class="cpu",
            slot_count=self.slots,
            capacity=self.slots,
            session_bytes=POINT_BYTES,
            ring_fd=3,
            arena_bytes=POINT_BYTES * self.arena.capacity,
            own_arena=self.new_arena is not None,
        )
        self.engine = ToyEngine(self, self.slots)
        self.logic = WorkerLogic(hello, SPEC, heartbeat_s=self.heartbeat_s, leave_timeout_s=4.0, prepared_keep_s=KEEP_S)
        self.logic.points_told_s = TOLD_S
        self.apply(self.logic._flush())
        for to in (CONTROLLER, GATEWAY):
            self._reconnect(to)
        self._timer()

    def breaks(self, sid: str, index: int) -> bool:
        """A pass that fails: once for this life."""
        if sid in self.poison:
            self.poison.discard(sid)
            return True
        return False

    # ------------------------------------------------------------------ channels and time

    def _reconnect(self, to: str) -> None:
        channel = self.connect(self, to)
        if channel is None:
            self.later(0.05 + self.world.rng.random() * 0.2, lambda: self._reconnect(to))
            return
        self._channels[to] = channel
        channel.on_message[self] = lambda message: self._hear(to, message)
        channel.on_close[self] = lambda: self._closed(to, channel)
        self.apply(self.logic.on_connect(to, self.world.now_s))

    def _hear(self, to: str, message: Any) -> None:
        if to == GATEWAY:
            self.heard_s = self.world.now_s
        elif isinstance(message, m.Lease):
            self.lease_heard_s = self.world.now_s
        self.apply(self.logic.on_message(to, message, self.world.now_s))

    def _closed(self, to: str, channel: Channel) -> None:
        if self._channels.get(to) is channel:
            del self._channels[to]
            self.apply(self.logic.on_disconnect(to, self.world.now_s))
            self.later(0.05 + self.world.rng.random() * 0.2, lambda: self._reconnect(to))

    def _timer(self) -> None:
        self.apply(self.logic.on_timer(self.world.now_s))
        wait_s = self.logic.wake_at_s - self.world.now_s
        self.later(min(0.25, max(0.01, wait_s)), self._timer)

    def engine_event(self, event: e.EngineEvent, epoch: int) -> None:
        self.apply(self.logic.on_engine(event, epoch, self.world.now_s))

    def terminate(self) -> None:
        """SIGTERM."""
        self.apply(self.logic.on_terminate(self.world.now_s))

    # ------------------------------------------------------------------ actions

    def apply(self, actions: list[Action]) -> None:
        for action in actions:
            if not self.alive:
                return
            match action:
                case Send():
                    if channel := self._channels.get(action.to):
                        channel.send(self, action.message)
                case Emit() if self.encodes:
                    if self.logic.made(action) is not None:
                        self.later(0.005, lambda emit=action: self._go(emit))
                        self.on_made(self, lambda: None)
                case Emit():
                    self.on_made(self, lambda emit=action: self._go(emit))
                case Beat():
                    self._beat()
                case Drop():
                    raise Violation(f"worker drops {action.to}: {action.reason}")
                case Stop():
                    self._exit(action)
                case b.AwaitPoint() | b.RefusePoint() | b.SendPoint() | b.ForgetPoint() | b.TellPoints():
                    self._about_points(action)
                case _:
                    self.engine.command(action)

    def _about_points(self, action: b.PointAction) -> None:
        """As runtime/point_links.py does."""
        match action:
            case b.AwaitPoint():
                self.awaited[action.session_id] = action.move_id
                awaited = b.PointAwaited(action.session_id, action.move_id, f"{self.name}-{self.life}:1")
                self.later(0.002, lambda: self.apply(self.logic.on_point(awaited, self.world.now_s)))
            case b.RefusePoint():
                self.awaited.pop(action.session_id, None)
            case b.SendPoint():
                if self._sending.get(action.session_id) != action:
                    self._sending[action.session_id] = action
                    self.later(0.005 + self.world.rng.random() * 0.15, lambda: self._deliver(action))
            case b.ForgetPoint():
                self.arena.drop(action.session_id)
            case b.TellPoints():
                if channel := self._channels.get(CONTROLLER):
                    sessions = dict.fromkeys(self.arena.points, POINT_BYTES)
                    channel.send(self, m.PointsHeld(worker_id=self.name, worker_epoch=self.life, sessions=sessions))

    def _deliver(self, action: b.SendPoint) -> None:
        """All of the point at once, which a receiver commits or has nothing of; whether the sender hears of it is
        another matter."""
        sid = action.session_id
        if self._sending.get(sid) is not action:
            return
        point, peer, rng = self.arena.latest(sid), self.peer_at(self, action.address), self.world.rng
        whole = point is not None and peer is not None and peer.awaited.get(sid) == action.move_id
        arrived = whole and rng.random() >= 0.1 and peer.arena.put(sid, point)
        heard = arrived and rng.random() >= 0.05
        if arrived:
            self.world.cover("a point went to another node ahead" if action.ahead else "a point went to another node")
        if heard:
            event: b.PointEvent = b.PointSent(sid, action.move_id, action.ahead, POINT_BYTES)
        else:
            code = "not_found" if point is None else "worker_failed"
            event = b.PointNotSent(sid, action.move_id, action.ahead, code, "cut off")

        def say() -> None:
            if self._sending.get(sid) is action:
                del self._sending[sid]
                self.apply(self.logic.on_point(event, self.world.now_s))

        self.later(0.002 if heard else 0.002 + rng.random() * 2.0, say)

    def _beat(self) -> None:
        if channel := self._channels.get(CONTROLLER):
            beat = m.Heartbeat(
                worker_id=self.name,
                worker_epoch=self.life,
                active=0,
                resident=len(self.engine.held),
                slots_free=self.slots - self.engine.used,
                busy_share=0.0,
                chunk_latency_ms=0.0,
                batch_size_mean=1.0,
                chunks=0,
                passes=0,
                device_bytes=0,
                progress={sid: max(one.made) + 1 for sid, one in self.logic.sessions.items() if one.made},
            )
            channel.send(self, beat)
            held = self.engine.held.items()
            at_work = {sid: m.SessionWork(one.epoch, one.next_index, one.work is not None) for sid, one in held}
            channel.send(self, m.WorkReport(worker_id=self.name, worker_epoch=self.life, sessions=at_work))

    def _go(self, emit: Emit) -> None:
        self._outgoing.append(emit)
        self._pump()

    def _pump(self) -> None:
        """Chunks leave in order; a full ring makes them wait."""
        if self._pumping:
            return
        while self._outgoing:
            wait_s = self.ring_full_until_s - self.world.now_s
            if wait_s > 0:
                self._pumping = True
                self.later(wait_s, self._pump_again)
                return
            emit = self._outgoing.popleft()
            channel = self._channels.get(GATEWAY)
            chunk = self.logic.may_emit(emit, self.world.now_s)
            if chunk is None or channel is None:
                continue
            self.on_emit(self, chunk, emit.epoch)
            ready = m.ChunkReady(
                session_id=emit.session_id,
                epoch=emit.epoch,
                chunk_index=chunk.chunk_index,
                digest=chunk.digest,
                digest_prev=chunk.digest_prev,
                frames=4,
                steps=chunk.steps,
                prompt_version=chunk.prompt_version,
                format=emit.format if self.encodes else "raw",
            )
            channel.send(self, ready, chunk.frames)
            self.logic.did_emit(emit)

    def _pump_again(self) -> None:
        self._pumping = False
        self._pump()

    def _exit(self, action: Stop) -> None:
        self.world.note("exit", self.name, action.code, action.reason)
        for channel in list(self.channels):
            channel.shut(self)
        self.alive = False
        self.on_exit(self, action.code, action.reason)
