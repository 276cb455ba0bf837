"""One controller logic, scripted workers, and what gateway and launcher hear: for tests of the controller's moves."""

from __future__ import annotations

import itertools

import msgspec
from scripted_worker import ScriptedWorker
from test_controller_logic import CAPACITY, GATEWAY, MemoryStore, create, hello, make, sid

from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import LAUNCHER, Drop, DropPoints, Effect, Send
from turboserve.session import SessionState

_ops = itertools.count(10_000)


class Cluster:
    """One controller, scripted workers on one node, and what the gateway hears. Messages wait until `settle`."""

    def __init__(self, *workers: str, store: MemoryStore | None = None, local: bool = False, **options) -> None:
        self.local = local
        """Workers have a launcher, which says how they end (`die`)."""
        self.deaths: list[m.FleetEvent] = []
        self.store = store or MemoryStore()
        self.options = {"lease_s": 1000.0, **options}
        self.logic = make(store=self.store, **self.options)
        self.workers: dict[str, ScriptedWorker] = {}
        self.points: dict[str, int] = {}
        self.nodes = {"n": self.points}
        self.gateway: list[m.Message] = []
        self.launcher: list[m.FleetWish] = []
        self.dropped: list[str] = []
        self.now_s = 1.0
        self.epochs: dict[str, int] = {}
        for worker_id in workers:
            self.start(worker_id)
        self.settle()

    def start(self, worker_id: str) -> None:
        self.epochs[worker_id] = self.epochs.get(worker_id, 0) + 1
        said = hello(worker_id, self.epochs[worker_id])
        if self.local:
            said = msgspec.structs.replace(said, ring_fd=3, pid=100 * self.epochs[worker_id] + int(worker_id[1:]))
        said, points = msgspec.structs.replace(said, arena_bytes=1 << 20), self.points
        if worker_id[0] == "j":  # joined: a node of its own, whose arena ends with it
            points = self.nodes[worker_id] = {}
            said = msgspec.structs.replace(said, node=worker_id, own_arena=True, ring_fd=-1)
        self.workers[worker_id] = worker = ScriptedWorker(said, points, slots=CAPACITY, nodes=self.nodes)
        worker.connect()

    def kill(self, worker_id: str) -> None:
        del self.workers[worker_id]
        self.carry_out(self.logic.on_disconnect(worker_id, self.now_s))

    def die(self, worker_id: str, exit_code: int, at_work: tuple[str, ...] = (), *, told: bool = True) -> None:
        """The process ends: its connection first, then (`told`, or `tell_death`) the launcher's word."""
        event = m.FleetEvent(
            worker_id=worker_id,
            kind="backing_off",
            pid=self.workers[worker_id].hello.pid,
            exit_code=exit_code,
            at_work=at_work,
            reason=f"exit code {exit_code}",
        )
        self.deaths.append(event)
        self.kill(worker_id)
        if told:
            self.tell_death()

    def tell_death(self) -> None:
        self.tell(LAUNCHER, self.deaths.pop())

    def restart_controller(self) -> None:
        self.logic = make(store=self.store, **self.options)
        self.logic.take_over(
            self.store.stored(),
            self.now_s,
            self.store.moves(),
            numerics=self.store.numerics,
            nodes=self.store.points,
        )
        for worker in self.workers.values():
            worker.connect()

    def carry_out(self, effects: list[Effect]) -> None:
        for one in effects:
            if isinstance(one, DropPoints):
                self.dropped.append(one.session_id)
            elif isinstance(one, Send) and one.to == GATEWAY:
                self.gateway.append(one.message)
            elif isinstance(one, Send) and one.to == LAUNCHER:
                self.launcher.append(one.message)
            elif isinstance(one, Send) and one.to in self.workers:
                self.workers[one.to].heard.append(one.message)
            else:
                assert isinstance(one, Send | Drop) or one.session_id

    def tell(self, source: str, message: m.Message) -> m.OpDone | None:
        before = len(self.gateway)
        self.carry_out(self.logic.on_message(source, message, self.now_s))
        done = [one for one in self.gateway[before:] if isinstance(one, m.OpDone)]
        return done[-1] if done else None

    def admin(self, kind: str, **fields) -> m.OpDone:
        done = self.tell(GATEWAY, m.AdminCommand(op_id=next(_ops), kind=kind, **fields))
        assert done is not None
        return done

    def active(self, number: int, wanted: bool) -> None:
        self.tell(GATEWAY, m.SessionActivity(session_id=sid(number), active=wanted, attached=wanted))

    def step(self) -> bool:
        """Deliver one message each way; False when nothing was under way."""
        moved = False
        for worker_id, worker in list(self.workers.items()):
            if worker.said:
                moved = True
                self.carry_out(self.logic.on_message(worker_id, worker.said.pop(0), self.now_s))
            if worker.heard:
                moved = True
                worker.take(worker.heard.pop(0))
            if worker.stopped and not worker.said:
                del self.workers[worker_id]
                self.carry_out(self.logic.on_disconnect(worker_id, self.now_s))
        return moved

    def settle(self) -> None:
        for _ in range(1000):
            if not self.step():
                return
        raise AssertionError("the messages do not end")

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.25)):
            self.now_s += 0.25
            for worker in self.workers.values():
                worker.work()
            self.carry_out(self.logic.on_timer(self.now_s))
            self.settle()

    def state(self, number: int) -> SessionState:
        return self.logic.sessions[sid(number)].record.state

    def owner(self, number: int) -> str | None:
        return self.logic.sessions[sid(number)].record.owner

    def check(self) -> None:
        """Records, directory, view and workers agree."""
        logic = self.logic
        assert set(self.store.rows) == set(logic.sessions) == {one.id for one in logic.view.open_sessions()}
        for key, live in logic.sessions.items():
            epoch, owner, state = self.store.rows[key][:3]
            record = live.record
            assert (epoch, owner) == (record.epoch, record.owner)
            memory_only = {SessionState.RUNNING, SessionState.STALLED}
            assert state is record.state or {state, record.state} <= memory_only, (state, record.state)
            brought = live.move is not None and live.move.carried and record.owner is None
            assert (
                brought
                or (live.move is not None)
                == (record.owner is not None and state not in memory_only | {SessionState.CLOSING})
                or live.adopt_by_s is not None
            ), (record, live.move)
            shown = logic.view.session(live.row)
            if record.state in memory_only and live.adopt_by_s is None:
                assert shown.state == "held" and logic.view.workers.ids[shown.worker] == owner
            if owner is None:
                assert shown.worker is None and (brought or shown.target is None)
            elif live.adopt_by_s is None:
                assert owner in logic.workers
        owners = [
            (key, held.epoch, name)
            for name, worker in self.workers.items()
            for key, held in worker.held.items()
            if not held.stopped_by
        ]
        for key, epoch, name in owners:
            live = logic.sessions.get(key)
            if live is not None and live.record.epoch == epoch:
                assert live.record.owner == name or live.record.owner is None, "two owners of one epoch"


def running(*workers: str, sessions: int = 1, **options) -> Cluster:
    cluster = Cluster(*workers, **options)
    for number in range(1, sessions + 1):
        cluster.tell(GATEWAY, create(number))
    cluster.settle()
    cluster.wait(1.0)
    assert all(cluster.state(number) is SessionState.RUNNING for number in range(1, sessions + 1))
    cluster.gateway.clear()
    return cluster


def heard(cluster: Cluster, kind: type[m.Message]) -> list:
    return [one for one in cluster.gateway if isinstance(one, kind)]


def beat(cluster: Cluster, worker_id: str) -> None:
    worker = cluster.workers[worker_id]
    figures = dict.fromkeys(
        ("active", "resident", "slots_free", "busy_share", "chunk_latency_ms", "batch_size_mean", "chunks", "passes"), 0
    )
    progress = {key: held.next_index for key, held in worker.held.items()}
    epoch = worker.hello.worker_epoch
    cluster.tell(
        worker_id,
        m.Heartbeat(worker_id=worker_id, worker_epoch=epoch, device_bytes=0, progress=progress, **figures),
    )
