"""Controller, launcher, and all processes of one server wired together."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from typing import Any

from sim_gateway import SimGateway
from sim_model import Oracle
from sim_moments import Moments
from sim_store import POINT_BYTES, Arena, CrashNow, SimDirectory, SimLog
from sim_worker import CHUNK_S, SimWorker
from sim_world import Channel, Links, Process, Violation, World

from turboserve.orchestrator.eviction import Partition
from turboserve.orchestrator.latency import LatencyProfile
from turboserve.orchestrator.scheduler import Memory, TickConfig, tick
from turboserve.runtime import messages as m
from turboserve.runtime.cluster import SeenWishes
from turboserve.runtime.controller_books import GATEWAY, Drop, DropFile, DropHost, DropPoints, Load, Send, Spill
from turboserve.runtime.controller_logic import ControllerLogic
from turboserve.runtime.controller_storage import StoredBytes
from turboserve.runtime.controller_suspects import QUARANTINED

LAUNCHER = "launcher"
HOME = "node"
"""The server's node: the arena that the controller maps."""
LEASE_S = 1.0
HEARTBEAT_S = 0.25
SWEEP_S = 2.0
COUNT_S = 0.5
SLOTS = 8
CAPACITY = 4
TICK = TickConfig(migrate=True, scale=False)


def profile() -> LatencyProfile:
    return LatencyProfile(
        name="toy",
        about="simulated network",
        chunk_s=CHUNK_S,
        chunk_target_s=CHUNK_S,
        batch_latency_s=tuple(0.05 + 0.08 * n for n in range(1, SLOTS + 1)),
        capacity=CAPACITY,
        resident_max=SLOTS,
        denoise_steps=4,
        denoise_steps_floor=4,
        step_latency_share=0.8,
    )


class SimController(Process):
    """The controller process around the real `ControllerLogic`."""

    def __init__(self, world: World, directory: SimDirectory, arena: Arena, workers: int) -> None:
        super().__init__(world, "controller")
        self.directory = directory
        self.arena = arena
        self.worker_count = workers
        self.on_crash: Callable[[], None] = lambda: None
        self.on_start: Callable[[], None] = lambda: None
        self.on_quarantine: Callable[[str], None] = lambda sid: None
        self.to_launcher: Callable[[m.FleetWish], None] = lambda wish: None
        self.dies_at_wish = False
        """It dies once it has asked the launcher for a worker, and answers nobody."""
        self.dies_at_quarantine = False
        """It dies once the directory has a session's end for killing workers, and nobody has heard of it."""
        self.add_ops: set[int] = set()
        """Wishes for a worker that this controller or one before it has heard."""
        self._channels: dict[str, Channel] = {}

    def start(self) -> None:
        self.born()
        self._channels = {}
        self.logic = ControllerLogic(
            self.directory,
            lambda view, memory, now_s: tick(view, memory, now_s, TICK),
            profile(),
            lease_s=LEASE_S,
            queue_age_max_s=200.0,
            workers=self.worker_count,
            memory=Memory(),
            move_deadline_s=3.0,
            node=HOME,
        )
        self.logic.generation = self.directory.next_epoch("controller")
        stored, moves, nodes = [], {}, {}
        for row in self.directory.stored():
            nodes[row.record.session_id] = row.point_node
            if row.move_id:
                moves[row.record.session_id] = (row.move_id, row.move_target)
            stored.append((row.record, m.decode(row.request)))
        on_disk = dict.fromkeys(self.arena.disk, POINT_BYTES)
        self._guard(lambda: self.logic.take_over(stored, self.world.now_s, moves, on_disk, nodes=nodes) or [])
        self._sweep_at_s = self.world.now_s + SWEEP_S
        self._count_at_s = self.world.now_s
        self._timer()
        self.on_start()

    def _guard(self, act: Callable[[], Any]) -> None:
        """Carry out an event's effects; a crash in the directory ends the process there and then."""
        try:
            effects = act()
        except CrashNow:
            self.world.note("crash in the directory")
            self.directory.crash_in = 0
            self.on_crash()
            return
        for effect in effects:
            if self.alive:
                self._carry_out(effect)

    def _carry_out(self, effect: Any) -> None:
        match effect:
            case DropPoints():
                if effect.session_id in self.directory.rows:
                    raise Violation("I6 the copy of a session that goes on is freed")
                self.arena.drop(effect.session_id)
            case Spill():
                sid = effect.session_id
                self.later(0.05, lambda: self._spilled(sid))
            case Load():
                sid = effect.session_id
                self.later(0.03, lambda: self._loaded(sid))
            case DropHost():
                self.arena.drop_host(effect.session_id)
            case DropFile():
                self.arena.disk.pop(effect.session_id, None)
            case Drop():
                if channel := self._channels.get(effect.to):
                    channel.shut(self)
                    self._lost(effect.to, channel)
            case Send():
                if effect.to == LAUNCHER:
                    self.to_launcher(effect.message)
                    if effect.message.kind == "add" and self.dies_at_wish:
                        self.dies_at_wish = False
                        self.on_crash()
                    return
                if isinstance(effect.message, m.SessionState) and effect.message.reason.endswith(QUARANTINED):
                    self.on_quarantine(effect.message.session_id)
                    if self.dies_at_quarantine:
                        self.dies_at_quarantine = False
                        self.on_crash()
                        return
                if channel := self._channels.get(effect.to):
                    channel.send(self, effect.message)

    def _spilled(self, sid: str) -> None:
        size = self.arena.spill(sid)
        why = "" if size else "full" if sid in self.arena.points else "failed"
        self._guard(lambda: self.logic.spilled(sid, size, self.world.now_s, why))

    def _loaded(self, sid: str) -> None:
        size = self.arena.load(sid)
        why = "" if size else "full" if sid in self.arena.disk else "failed"
        self._guard(lambda: self.logic.loaded(sid, size, self.world.now_s, why))

    def _count(self) -> None:
        """As the controller's own thread does: what it counted may be old when the logic hears of it."""
        points, files = dict.fromkeys(self.arena.points, POINT_BYTES), dict.fromkeys(self.arena.disk, POINT_BYTES)
        total, disk = POINT_BYTES * self.arena.capacity, POINT_BYTES * self.arena.disk_capacity
        found = StoredBytes(
            (Partition(total, sum(points.values())),),
            {sid: {0: bytes_} for sid, bytes_ in points.items()},
            files,
            {"disk_total_bytes": disk, "disk_used_bytes": sum(files.values())},
            frozenset(sid for sid in files if self.arena.newer(sid)),
        )
        self.later(0.02, lambda: self._guard(lambda: self.logic.stored_bytes(found, self.world.now_s)))

    def _timer(self) -> None:
        self._guard(lambda: self.logic.on_timer(self.world.now_s))
        if self.world.now_s >= self._count_at_s or self.logic.count_soon:
            self._count_at_s, self.logic.count_soon = self.world.now_s + COUNT_S, False
            self._count()
        if self.world.now_s >= self._sweep_at_s:  # as runtime/controller_points.py does
            self._sweep_at_s = self.world.now_s + SWEEP_S
            for sid in {*self.arena.points, *self.arena.disk}:
                if sid not in self.logic.sessions:
                    self.arena.drop(sid)
        self.later(0.1, self._timer)

    def accept(self, channel: Channel) -> None:
        """A peer; its first message says who it is."""
        name = ""

        def hear(message: Any) -> None:
            nonlocal name
            if not name:
                name = GATEWAY if isinstance(message, m.GatewayHello) else message.worker_id
                old = self._channels.pop(name, None)
                self._channels[name] = channel
                if old is not None:
                    old.shut(self)
            if isinstance(message, m.AdminCommand) and message.kind == "add_workers":
                self.add_ops.add(message.op_id)
            self._guard(lambda: self.logic.on_message(name, message, self.world.now_s))

        channel.on_message[self] = hear
        channel.on_close[self] = lambda: self._lost(name, channel)

    def _lost(self, name: str, channel: Channel) -> None:
        if self._channels.get(name) is channel:
            del self._channels[name]
            self._guard(lambda: self.logic.on_disconnect(name, self.world.now_s))

    def hear(self, event: m.FleetEvent) -> None:
        """The launcher's word."""
        if self.alive:
            self._guard(lambda: self.logic.on_message(LAUNCHER, event, self.world.now_s))

    def hear_soon(self, event: m.FleetEvent) -> None:
        self.later(0.005, lambda: self.hear(event))


class Cluster:
    """Everything of one server. What it holds beyond processes (arena, directory, log) survives them."""

    def __init__(self, world: World, workers: int, joined: int = 0) -> None:
        """`joined` more workers come from other nodes, each with an arena of its own."""
        self.world = world
        self.links = Links(world)
        self.oracle = Oracle()
        # Of its own, so that a schedule's other draws stay what they were.
        rng = random.Random(f"storage {world.seed}")
        self.arena = Arena(world, capacity=rng.choice([64, 64, 3, 2]), disk_capacity=rng.choice([64, 64, 1]))
        self.directory = SimDirectory(world)
        self.log = SimLog(world, self.oracle)
        self.gateway = SimGateway(world, self.log)
        self.controller = SimController(world, self.directory, self.arena, workers)
        self.workers: dict[str, SimWorker] = {}
        self.gone: set[str] = set()
        self.seen = SeenWishes()
        self.added = 0
        self.faults_on = True
        self._count = 0
        self.controller.on_crash = lambda: self.kill(self.controller)
        self.controller.to_launcher = self._wish
        self.controller.on_start = self._tell_present
        self.moments = Moments(world, self)
        self.controller.on_quarantine = self.moments.quarantined
        self.directory.on_insert = self.moments.inserted
        self.gateway.connect = self._gateway_to_controller
        self.gateway.on_accept = self._accepted
        self.arena.on_commit = self._point
        self.arena.elsewhere = self._elsewhere
        self.controller.start()
        for _ in range(workers):
            self.add_worker()
        for number in range(joined):
            self.add_worker(f"j{number}")
        self.gateway.start()

    def add_worker(self, name: str = "") -> SimWorker:
        if not name:
            name = f"w{self._count}"
        self._count += 1
        worker = SimWorker(self.world, name, arena=self.arena, oracle=self.oracle, slots=SLOTS, heartbeat_s=HEARTBEAT_S)
        worker.connect = self._worker_to
        worker.on_exit = self._exited
        worker.on_emit = self._emitted
        worker.on_begin = self.moments.begun
        worker.on_made = self.moments.made
        worker.peer_at = self._peer_at
        if name[0] == "j":
            worker.new_arena = self._new_arena
        self.workers[name] = worker
        self.world.at(0.2, lambda: self._start(worker))
        return worker

    def _start(self, worker: SimWorker) -> None:
        if not worker.alive and worker.name not in self.gone:
            worker.start()
            self._tell(worker.name, "started")

    # ------------------------------------------------------------------ nodes

    def _new_arena(self, worker: SimWorker) -> Arena:
        arena = Arena(self.world, capacity=64, disk_capacity=0)
        arena.on_commit = self._point
        return arena

    def _elsewhere(self, sid: str) -> bool:
        """The directory says that the newest point lies on another node: what the server's has is old, and may go."""
        row = self.directory.rows.get(sid)
        return row is not None and row.point_node not in ("", HOME)

    def _peer_at(self, worker: SimWorker, address: str) -> SimWorker | None:
        for peer in self.workers.values():
            if address == f"{peer.name}-{peer.life}:1" and peer.alive and not peer.paused:
                blocked = self.links.blocked_s(worker.name, peer.name) or self.links.blocked_s(peer.name, worker.name)
                return None if blocked else peer
        return None

    # ------------------------------------------------------------------ wiring

    def _worker_to(self, worker: SimWorker, to: str) -> Channel | None:
        peer: Any = self.gateway if to == "gateway" else self.controller
        if (
            not peer.alive
            or self.links.blocked_s(worker.name, peer.name)
            or self.links.blocked_s(peer.name, worker.name)
        ):
            return None
        channel = Channel(self.links, worker, peer)
        (peer.accept_worker if peer is self.gateway else peer.accept)(channel)
        return channel

    def _gateway_to_controller(self) -> Channel | None:
        gateway, controller = self.gateway, self.controller
        blocked = self.links.blocked_s("gateway", "controller") or self.links.blocked_s("controller", "gateway")
        if not controller.alive or blocked:
            return None
        channel = Channel(self.links, gateway, controller)
        controller.accept(channel)
        return channel

    # ------------------------------------------------------------------ launcher

    def _tell(self, worker_id: str, kind: str, code: int = 0, pid: int = 0, at_work: tuple[str, ...] = ()) -> None:
        if self.controller.alive:
            event = m.FleetEvent(worker_id=worker_id, kind=kind, pid=pid, exit_code=code, at_work=at_work)
            self.controller.hear_soon(event)

    def _tell_present(self) -> None:
        """What a new controller hears first: it lies in the link before the controller starts (runtime/cluster.py), and
        is read before any peer has shaken hands (runtime/control_loop.py)."""
        for one in self.serving:
            self.controller.hear(m.FleetEvent(worker_id=one.name, kind="started"))

    def kill(self, process: Process, code: int = -signal.SIGKILL, by: str = "") -> None:
        """It dies, from outside or by a chunk of session `by`, and the launcher starts it again."""
        if not process.alive:
            return
        self.world.note("kill", process.name)
        process.die()
        if isinstance(process, SimWorker):
            at_work = self.moments.died(process, code, by)
            self._tell(process.name, "backing_off", code, process.life, at_work)
            self.world.at(0.3 + self.world.rng.random(), lambda: self._start(process))
        else:
            restart: Any = process
            self.world.at(0.1 + self.world.rng.random() * 0.5, lambda: None if restart.alive else restart.start())

    def _exited(self, worker: SimWorker, code: int, reason: str) -> None:
        if code == 0 and "drained" in reason:
            for sid, held in worker.engine.held.items():  # a stale copy that it was about to close is nobody's
                row = self.directory.rows.get(sid)
                if row is not None and (row.record.owner, row.record.epoch) == (worker.name, held.epoch):
                    raise Violation("I12 a drained worker ends and owns something")
        if code == 0:
            self.gone.add(worker.name)
            self._tell(worker.name, "exited")
        else:
            self._tell(worker.name, "backing_off")
            self.world.at(0.5, lambda: self._start(worker))

    def _wish(self, wish: m.FleetWish) -> None:
        worker = self.workers.get(wish.worker_id)
        if not self.seen.is_new(wish.request_id):
            self._tell(wish.worker_id, "started" if worker in self.serving else "exited")
        elif wish.kind == "add":
            if worker is None:
                self._count_add()
                self.add_worker(wish.worker_id)
            elif wish.worker_id not in self.gone:
                raise Violation(f"I9 a wish for a worker names {wish.worker_id}, which is there: none is added")
            else:
                self._count_add()
                self.gone.discard(wish.worker_id)
                self.world.at(0.2, lambda: self._start(worker))
        elif wish.kind == "remove" and worker is not None and worker.alive:
            worker.call(worker.terminate)()
        elif wish.kind == "kill" and worker is not None:
            self.kill(worker)

    def _count_add(self) -> None:
        """I9: one worker for each wish for one, however often controllers heard it."""
        self.added += 1
        if self.added > len(self.controller.add_ops):
            raise Violation("I9 one wish for a worker was carried out twice")

    @property
    def serving(self) -> list[SimWorker]:
        """Workers that the launcher keeps up."""
        return [one for one in self.workers.values() if one.name not in self.gone]

    # ------------------------------------------------------------------ what is watched at every event of its kind

    def _accepted(self, sid: str, epoch: int, worker: str) -> None:
        owner = self.directory.owners.get((sid, epoch))
        if owner != worker:
            raise Violation(f"I1 a chunk of {worker} was accepted under epoch {epoch}, which is {owner}'s")

    def _point(self, sid: str, point: Any) -> None:
        frontier = self.log.frontier.get(sid, 0)
        if point.next_index - len(point.made) > frontier:
            raise Violation(
                f"I5 a recovery point at {point.next_index} with {len(point.made)} chunks; the viewer holds {frontier}"
            )
        if point.digest != (self.oracle.sessions[sid].digest(point.next_index - 1) if point.next_index else ""):
            raise Violation("I3 a recovery point is not that of the undisturbed run")

    def _emitted(self, worker: SimWorker, chunk: Any, epoch: int) -> None:
        session = worker.logic.sessions.get(chunk.session_id)
        if session is None or session.epoch != epoch:
            raise Violation("I1 a chunk leaves under an epoch that its worker does not hold")
        if self.world.now_s > max(worker.heard_s, worker.lease_heard_s) + LEASE_S + 1e-6:
            raise Violation("I13 a chunk leaves after its worker's lease")
