"""One seeded schedule: sessions, viewers, faults; then a while without faults in which everything must come to rest."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sim_cluster import Cluster
from sim_gateway import CLOCK, SESSION_FORMAT, SHAPE, SimViewer, bounded
from sim_worker import SimWorker
from sim_world import Violation, World

from turboserve.errors import TurboServeError
from turboserve.server.gateway_logic import NewSession
from turboserve.server.pacing import Pace
from turboserve.session import ID_ALPHABET, ID_LENGTH, OWNED, SessionRecord, SessionState

FAULTS = (
    *("kill_worker", "kill_gateway", "kill_controller", "crash_directory", "stop_worker", "stop_gateway"),
    *("stop_controller", "cut", "partition", "arena_full", "ring_full", "poison", "terminate", "slow_worker"),
)
DEEDS = (
    *(
        "migrate",
        "suspend",
        "resume",
        "drain",
        "prompt",
        "prompt_ahead",
        "pause",
        "leave",
        "slow_viewer",
        "stop_session",
    ),
    *("new_session",),
)
REST_S = 60.0
"""Virtual time that everything may take to come to rest once no fault happens any more."""


@dataclass
class Outcome:
    """What one schedule did."""

    seed: int
    trace_hash: str
    events: int
    chunks: int
    faults: Counter[str]
    coverage: Counter[str]
    pauses: list[tuple[str, float]]
    options: dict[str, Any] = field(default_factory=dict)


class Schedule:
    """The life of one seed."""

    def __init__(self, seed: int) -> None:
        self.world = world = World(seed)
        self._impatient = random.Random(f"impatient {seed}")
        rng = world.rng
        self.options = {
            "workers": rng.choice([2, 3, 3]),
            "sessions": rng.choice([1, 2, 3, 4]),
            "chaos_s": rng.uniform(4.0, 14.0),
            "fault_every_s": rng.choice([0.3, 0.7, 1.5, 3.0]),
            "deed_every_s": rng.choice([0.3, 0.8, 2.0]),
            "jitter": rng.choice([0.0, 0.0, 0.05, 0.3]),
            "jitter_s": rng.choice([0.02, 0.1, 0.4]),
            "write_through": rng.random() < 0.8,
        }
        # Of a generator of its own, so that what is drawn here changes no other draw.
        self.options["joined"] = random.Random(seed ^ 0x6E6F6465).choice([0, 0, 1, 2])
        self.weights = [rng.choice([0.0, 0.3, 1.0, 1.0, 4.0]) for _ in FAULTS]
        self.deed_weights = [rng.choice([0.0, 0.5, 1.0, 3.0]) for _ in DEEDS]
        self.faults: Counter[str] = Counter()
        self.viewers: list[SimViewer] = []
        self.cluster = Cluster(world, self.options["workers"], self.options["joined"])
        self.cluster.links.jitter = self.options["jitter"]
        self.cluster.links.jitter_s = self.options["jitter_s"]
        for worker in self.cluster.workers.values():
            worker.write_through = self.options["write_through"]
        self.calm = False
        self.creating = 0
        self.leaving: set[str] = set()
        world.checks.append(self._check)

    # ------------------------------------------------------------------ the schedule

    def run(self) -> Outcome:
        world = self.world
        with covered_moves(world):
            for _ in range(self.options["sessions"]):
                world.at(0.3 + world.rng.random(), self._create)
            world.at(1.0, self._next_fault)
            world.at(1.0, self._next_deed)
            world.run(world.now_s + 1.0 + self.options["chaos_s"])
            self._heal()
            self._settle()
            self._end()
        return Outcome(
            seed=world.seed,
            trace_hash=world.trace_hash,
            events=world.events,
            chunks=sum(len(one.got) for one in self.viewers),
            faults=self.faults,
            coverage=world.coverage,
            pauses=[one for one in self.cluster.gateway.measured if one[0].startswith("pause_")],
            options=self.options,
        )

    def _create(self) -> None:
        rng, gateway = self.world.rng, self.cluster.gateway
        sid = "".join(rng.choice(ID_ALPHABET) for _ in range(ID_LENGTH))
        self.creating += 1
        if not gateway.alive:
            self.creating -= 1
            self.world.at(0.3, self._create)
            return
        wish = NewSession(
            sid=sid,
            token=f"first-{sid}",
            tenant="t",
            tenant_weight=1.0,
            wide=True,
            shape=SHAPE,
            clock=CLOCK,
            seed=rng.randrange(1 << 30),
            steps=4,
            format=SESSION_FORMAT,
            prompt="p0",
        )
        pace = Pace.FREE if rng.random() < 0.2 else Pace.LIVE

        def answer(found: Any) -> None:
            self.creating -= 1
            if isinstance(found, TurboServeError):
                self.world.cover(f"create refused:{found.code}")
                self.world.at(1.0, self._create)
                return
            viewer = SimViewer(self.world, gateway, self.cluster.oracle, sid, wish.token, pace)
            self.viewers.append(viewer)
            viewer.come()

        def ask() -> None:
            gateway.create(wish, answer)

        gateway.later(0.0, ask)

    def _next_fault(self) -> None:
        if self.calm:
            return
        rng = self.world.rng
        if any(self.weights):
            kind = rng.choices(FAULTS, self.weights)[0]
            self.faults[kind] += 1
            self._cover_fault(kind)
            self.world.note("fault", kind)
            getattr(self, f"_fault_{kind}")()
        self.world.at(rng.expovariate(1 / self.options["fault_every_s"]), self._next_fault)

    def _next_deed(self) -> None:
        if self.calm:
            return
        rng = self.world.rng
        if any(self.deed_weights):
            kind = rng.choices(DEEDS, self.deed_weights)[0]
            self.world.note("deed", kind)
            getattr(self, f"_deed_{kind}")()
        self.world.at(rng.expovariate(1 / self.options["deed_every_s"]), self._next_deed)

    def _cover_fault(self, kind: str) -> None:
        for row in self.cluster.directory.rows.values():
            self.world.cover(f"{kind} x {row.record.state.value}")

    # ------------------------------------------------------------------ faults

    def _worker(self) -> SimWorker:
        return self.world.rng.choice(self.cluster.serving)

    def _staying(self) -> list[SimWorker]:
        return [one for one in self.cluster.serving if one.name not in self.leaving]

    def _fault_kill_worker(self) -> None:
        self.cluster.kill(self._worker())

    def _fault_kill_gateway(self) -> None:
        self.cluster.kill(self.cluster.gateway)
        self.creating = 0

    def _fault_kill_controller(self) -> None:
        self.cluster.kill(self.cluster.controller)

    def _fault_crash_directory(self) -> None:
        self.cluster.directory.crash_in = self.world.rng.randint(1, 6)

    def _stop(self, process: Any, longest_s: float) -> None:
        if process.alive and not process.paused:
            process.stop()
            self.world.at(self.world.rng.uniform(0.05, longest_s), process.cont)

    def _fault_stop_worker(self) -> None:
        self._stop(self._worker(), 4.0)

    def _fault_stop_gateway(self) -> None:
        self._stop(self.cluster.gateway, 2.0)

    def _fault_stop_controller(self) -> None:
        self._stop(self.cluster.controller, 3.0)

    def _fault_cut(self) -> None:
        process = self.world.rng.choice([*self.cluster.serving, self.cluster.gateway, self.cluster.controller])
        if process.channels:
            self.world.rng.choice(process.channels).cut()

    def _fault_partition(self) -> None:
        rng = self.world.rng
        names = [one.name for one in self.cluster.serving]
        a, b = rng.choice(
            [(rng.choice(names), "controller"), (rng.choice(names), "gateway"), ("gateway", "controller")]
        )
        joined = [name for name in names if name[0] == "j"]
        if joined and rng.random() < 0.3:
            a, b = rng.choice(joined), rng.choice([name for name in names if name[0] != "j"] or ["gateway"])
        seconds = rng.uniform(0.1, 4.0)
        self.cluster.links.block(a, b, seconds)
        if rng.random() < 0.6:
            self.cluster.links.block(b, a, seconds)

    def _fault_arena_full(self) -> None:
        arena = self.cluster.arena
        arena.full = True
        self.world.at(self.world.rng.uniform(0.2, 3.0), lambda: setattr(arena, "full", False))

    def _fault_ring_full(self) -> None:
        self._worker().ring_full_until_s = self.world.now_s + self.world.rng.uniform(0.05, 1.5)

    def _fault_poison(self) -> None:
        if self.viewers:
            sid = self.world.rng.choice(self.viewers).sid
            for worker in self.cluster.serving:
                if worker.alive and sid in worker.engine.held:
                    worker.poison.add(sid)

    def _fault_terminate(self) -> None:
        """SIGTERM to a worker, as an operator's upgrade does; the launcher is then asked for another one."""
        if len(self._staying()) > 2:
            worker = self.world.rng.choice(self._staying())
            if worker.alive:
                self.leaving.add(worker.name)
                worker.call(worker.terminate)()
                if self._impatient.random() < 0.4:
                    self.world.at(self._impatient.uniform(0.0, 1.5), worker.call(worker.terminate))

    def _fault_slow_worker(self) -> None:
        worker = self._worker()
        worker.slowness = 6.0
        self.world.at(self.world.rng.uniform(0.5, 3.0), lambda: setattr(worker, "slowness", 1.0))

    # ------------------------------------------------------------------ deeds of viewers and operators

    def _viewer(self) -> SimViewer | None:
        live = [one for one in self.viewers if not one.ended]
        return self.world.rng.choice(live) if live else None

    def _admin(self, kind: str, **fields: Any) -> None:
        gateway = self.cluster.gateway

        def answer(done: Any) -> None:
            code = getattr(done, "code", "")
            self.world.cover(f"admin {kind}: {code or 'ok'}")

        gateway.later(0.0, lambda: gateway.command(kind, answer, **fields))

    def _deed_migrate(self) -> None:
        if (viewer := self._viewer()) is not None:
            self._admin("migrate", session_id=viewer.sid, worker_id=self._worker().name)

    def _deed_suspend(self) -> None:
        if (viewer := self._viewer()) is not None:
            self._admin("suspend", session_id=viewer.sid)

    def _deed_resume(self) -> None:
        if (viewer := self._viewer()) is not None:
            self._admin("resume", session_id=viewer.sid)

    def _deed_drain(self) -> None:
        if len(self._staying()) > 2:
            worker = self.world.rng.choice(self._staying())
            self.leaving.add(worker.name)
            self._admin("drain", worker_id=worker.name)
            self._admin("add_workers", count=1)
            if self.weights[FAULTS.index("kill_controller")] and self.world.rng.random() < 0.3:
                self.cluster.controller.dies_at_wish = True

    def _deed_prompt(self) -> None:
        if (viewer := self._viewer()) is not None:
            viewer.prompt(None)

    def _deed_prompt_ahead(self) -> None:
        if (viewer := self._viewer()) is not None:
            viewer.prompt(self.world.rng.randint(0, 6))

    def _deed_pause(self) -> None:
        if (viewer := self._viewer()) is not None:
            viewer.pause(True)
            self.world.at(self.world.rng.uniform(0.1, 2.0), lambda: viewer.pause(False))

    def _deed_leave(self) -> None:
        if (viewer := self._viewer()) is not None:
            viewer.leave()
            self.world.at(self.world.rng.uniform(0.1, 4.0), viewer.come)

    def _deed_slow_viewer(self) -> None:
        if (viewer := self._viewer()) is not None:
            viewer.slow_s = self.world.rng.uniform(0.5, 4.0)
            self.world.at(self.world.rng.uniform(0.5, 6.0), lambda: setattr(viewer, "slow_s", 0.0))

    def _deed_stop_session(self) -> None:
        if self.world.rng.random() < 0.2 and (viewer := self._viewer()) is not None:
            viewer.stop()

    def _deed_new_session(self) -> None:
        if len([one for one in self.viewers if not one.ended]) + self.creating < 6:
            self._create()

    # ------------------------------------------------------------------ rest

    def _heal(self) -> None:
        """No fault from here on."""
        self.calm = True
        cluster = self.cluster
        cluster.links.blocked_until.clear()
        cluster.links.jitter = 0.0
        cluster.arena.full = False
        cluster.directory.crash_in = 0
        cluster.controller.dies_at_wish = False
        cluster.moments.end()
        for process in (*cluster.workers.values(), cluster.gateway, cluster.controller):
            process.cont()
        for worker in cluster.workers.values():
            worker.poison.clear()
            worker.slowness = 1.0
        self.world.note("calm")

    def _settle(self) -> None:
        """I14: every viewer that is there gets chunks again, and nothing is left half done."""
        world = self.world
        world.run(world.now_s + 3.0)
        for viewer in self.viewers:
            viewer.slow_s = 0.0
            viewer.come()
        world.run(world.now_s + 2.0)
        for viewer in self.viewers:
            viewer.pause(False)
        watched = {one.sid: (one, one.next_index) for one in self.viewers if not one.ended}
        until_s = world.now_s + REST_S
        while world.now_s < until_s:
            world.run(world.now_s + 1.0)
            for viewer, _ in watched.values():
                if viewer.attached:
                    viewer.pause(False)
            if all(one.ended or one.next_index >= start + 4 for one, start in watched.values()) and self._at_rest():
                return
        for sid, (viewer, start) in watched.items():
            if not viewer.ended and viewer.next_index < start + 4:
                raise Violation(f"I14 {sid[:4]} stands still at {viewer.next_index}", self.describe(sid))
        raise Violation("I14 a move does not end", [self.describe(one) for one in self.cluster.directory.rows])

    def _at_rest(self) -> bool:
        moving = (SessionState.LOADING, SessionState.OFFLOADING, SessionState.HANDOVER, SessionState.RESUMING)
        return all(row.record.state not in moving for row in self.cluster.directory.rows.values())

    def describe(self, sid: str) -> dict[str, Any]:
        """Where everybody believes a session to be."""
        cluster = self.cluster
        found: dict[str, Any] = {"row": cluster.directory.rows.get(sid)}
        session = cluster.gateway.logic.sessions.get(sid)
        if session is not None:
            names = ("state", "owned", "epoch", "worker_id", "next_index", "sent", "durable", "bound", "delivered")
            found["gateway"] = {name: getattr(session, name) for name in (*names, "in_flight", "ended_s", "paused")}
            found["gateway"] |= {"viewer": session.viewer, "period": session.period, "restored": session.restored}
        live = cluster.controller.logic.sessions.get(sid) if cluster.controller.alive else None
        found["controller"] = live
        for worker in cluster.workers.values():
            if worker.alive and (sid in worker.logic.sessions or sid in worker.engine.held):
                found[worker.name] = (worker.logic.sessions.get(sid), worker.engine.held.get(sid))
        found["workers"] = {
            name: (one.state, one.hello.worker_epoch) for name, one in cluster.controller.logic.workers.items()
        }
        found["viewers"] = [
            (one.attached, one.connection, one.wanted, one.next_index) for one in self.viewers if one.sid == sid
        ]
        return found

    def _end(self) -> None:
        """Everybody stops: I6, nothing of anybody is left anywhere."""
        world, cluster = self.world, self.cluster
        for session in list(cluster.gateway.logic.sessions.values()):
            if session.ended_s is None:
                sid = session.sid
                cluster.gateway.later(
                    0.0, lambda sid=sid: cluster.gateway.act(lambda one, now_s: one.end(sid, None, "deleted", now_s))
                )
        world.run(world.now_s + 8.0)
        left = {
            name: (list(one.engine.held), list(one.engine.prepared))
            for name, one in cluster.workers.items()
            if one.alive
        }
        if any(held or prepared for held, prepared in left.values()):
            raise Violation("I6 a worker holds something after the last close", left)
        if cluster.directory.rows:
            raise Violation("I6 the directory lists a session after the last close", list(cluster.directory.rows))
        if cluster.arena.points or cluster.arena.disk:
            raise Violation("I6 the arena holds a point after the last close", list(cluster.arena.points))
        for name, worker in cluster.workers.items():
            if worker.alive and worker.arena.points:
                raise Violation(f"I6 the arena of {name} holds a point after the last close", list(worker.arena.points))
        for viewer in self.viewers:
            if not viewer.ended and viewer.attached:
                raise Violation("I8 a viewer was not told that its session ended")

    # ------------------------------------------------------------------ after every event

    def _check(self) -> None:
        cluster = self.cluster
        bounded(cluster.gateway)
        for worker in cluster.workers.values():
            if worker.alive and worker.engine.used > worker.slots:
                raise Violation("I6 more sessions than slots")


class covered_moves:
    """Counts the moves of the session table that the controller makes."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __enter__(self) -> None:
        self._move = before = SessionRecord.move
        world = self.world

        def move(record: SessionRecord, to: SessionState, reason: str = "") -> None:
            if to is not record.state:
                world.cover(f"{record.state.value} -> {to.value}")
            before(record, to, reason)

        SessionRecord.move = move  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        SessionRecord.move = self._move  # type: ignore[method-assign]


def run_seed(seed: int) -> Outcome:
    return Schedule(seed).run()


__all__ = ["OWNED", "Outcome", "Schedule", "Violation", "run_seed"]
