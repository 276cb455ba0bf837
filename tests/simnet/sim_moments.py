"""Faults at a moment of their own: a worker that dies while it makes a chunk of one session, once or whenever a worker
takes that session (a poison), and one that stands still between having made a chunk and sending it. With them, what a
controller may hold a session responsible for.

All of it is drawn from a generator of its own, so that a schedule's other draws do not depend on it.
"""

from __future__ import annotations

import random
import signal
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from sim_world import Violation, World

from turboserve.runtime.controller_suspects import STRIKES_IN_COMPANY, STRIKES_MAX
from turboserve.session import SessionState

if TYPE_CHECKING:
    from sim_cluster import Cluster
    from sim_worker import SimWorker

MOMENTS = ("kill_in_chunk", "stop_before_send")
ENDLESS = 1 << 30
_NOT_AT_WORK = frozenset(
    {SessionState.QUEUED, SessionState.RECOVERING, SessionState.HOST, SessionState.DISK, SessionState.CLOSING}
)


class Death(NamedTuple):
    """A worker's, as one of its sessions had part in it."""

    by: str
    """The session that brought it about; "" from outside."""
    in_work: bool
    """A chunk of this one was in work, or of none."""
    life: int
    """The controller's, at that moment."""


class Moments:
    """The faults, and the books of deaths (I8)."""

    def __init__(self, world: World, cluster: Cluster) -> None:
        self.world = world
        self.cluster = cluster
        self.rng = rng = random.Random(f"moments {world.seed}")
        self.every_s = rng.choice([0.0, 1.5, 3.0])
        """0: this schedule has none of these faults."""
        self.weights = (rng.choice([0.0, 1.0, 1.0]), rng.choice([0.0, 1.0]))
        self.deadly: dict[str, int] = {}
        """Session -> how many more workers die in a chunk of it."""
        self.poisons: set[str] = set()
        """Those of which every worker died, until the faults ended."""
        self.stops_s: dict[str, float] = {}
        """Worker -> how long it will stand still when it has made its next chunk."""
        self.deaths: dict[str, list[Death]] = defaultdict(list)
        """Session -> the deaths of workers that had a chunk of it in work, or held it, where they were not killed by
        SIGKILL; since the directory has the session."""
        self.quarantined_once: dict[str, int] = {}
        """Session -> the controller's life in which it was."""
        self.forgotten = False
        """A poison came again as a new session: the controller that gave it up died before anybody heard of it, and
        the next one counts from nothing (a known gap). It may take others with it."""
        self.plain: Counter[tuple[int, str]] = Counter()
        """(controller's life, poison) -> deaths that left no doubt."""
        self.active = True
        if self.every_s and any(self.weights):
            world.at(1.0 + rng.expovariate(1 / self.every_s), self._next)

    # ------------------------------------------------------------------ faults

    def _next(self) -> None:
        if not self.active:
            return
        kind = self.rng.choices(MOMENTS, self.weights)[0]
        self.world.note("moment", kind)
        self.world.cover(kind)
        getattr(self, f"_{kind}")()
        self.world.at(self.rng.expovariate(1 / self.every_s), self._next)

    def _kill_in_chunk(self) -> None:
        rows = self.cluster.directory.rows
        if rows and not self.deadly:
            sid = self.rng.choice(sorted(rows))
            self.deadly[sid] = self.rng.choice([1, 1, 2, ENDLESS, ENDLESS])
            if self.deadly[sid] == ENDLESS:
                self.poisons.add(sid)
                self.cluster.controller.dies_at_quarantine = self.rng.random() < 0.4

    def _stop_before_send(self) -> None:
        worker = self.rng.choice(self.cluster.serving)
        self.stops_s[worker.name] = self.rng.uniform(0.2, 3.0)

    def end(self) -> None:
        """No fault from here on."""
        self.active = False
        self.deadly.clear()
        self.stops_s.clear()
        self.cluster.controller.dies_at_quarantine = False

    def begun(self, worker: SimWorker, sid: str) -> None:
        """A worker begins a chunk: of a deadly session, it dies before the chunk is done."""
        if self.deadly.get(sid):
            worker.later(self.rng.uniform(0.0, 0.02), lambda: self._die(worker, sid))

    def _die(self, worker: SimWorker, sid: str) -> None:
        held = worker.engine.held.get(sid)
        if not self.deadly.get(sid) or held is None or held.work is None:
            return
        self.deadly[sid] -= 1
        if not self.deadly[sid]:
            del self.deadly[sid]
        # The kernel's out-of-memory killer, or a fault of its own.
        code = -signal.SIGKILL if self.rng.random() < 0.5 else -signal.SIGSEGV
        self.cluster.kill(worker, code, sid)

    def made(self, worker: SimWorker, go: Callable[[], None]) -> None:
        """A chunk is made and goes: or its worker is stopped first."""
        seconds = self.stops_s.pop(worker.name, 0.0)
        if not seconds or worker.paused:
            go()
            return
        self.world.cover("stopped before a chunk is sent")
        worker.stop()
        worker.later(0.0, go)
        life = worker.life

        def cont() -> None:
            if worker.alive and worker.life == life:
                worker.cont()

        self.world.at(seconds, cont)

    # ------------------------------------------------------------------ who is to blame

    def died(self, worker: SimWorker, code: int, by: str) -> tuple[str, ...]:
        """A worker was killed, by a chunk of session `by` or from outside (""); the sessions that were in work."""
        held = worker.engine.held
        at_work = tuple(sid for sid, one in held.items() if one.work is not None)
        touched = at_work if code == -signal.SIGKILL else tuple(held)
        for sid in touched:
            in_work = sid in at_work or not at_work
            self.deaths[sid].append(Death(by, in_work, self.cluster.controller.life))
        if by in self.poisons and self._leaves_no_doubt(worker, by, touched):
            self._plain_death(by)
        return at_work

    def _leaves_no_doubt(self, worker: SimWorker, sid: str, touched: tuple[str, ...]) -> bool:
        """Whether the controller can know that this worker died of that session alone."""
        controller, row = self.cluster.controller, self.cluster.directory.rows.get(sid)
        if not controller.alive or controller.paused or row is None or row.record.owner != worker.name:
            return False
        known, live = controller.logic.workers.get(worker.name), controller.logic.sessions.get(sid)
        return (
            touched == (sid,)
            and known is not None
            and known.blamed
            and known.hello.worker_epoch == worker.life
            and live is not None
            and live.wanted
            and live.record.epoch == row.record.epoch == worker.engine.held[sid].epoch
            and live.record.state not in _NOT_AT_WORK
        )

    def _plain_death(self, sid: str) -> None:
        controller = self.cluster.controller
        life = controller.life

        def heard() -> None:
            """The controller has lived on, and has heard how the worker ended."""
            if controller.alive and controller.life == life and not controller.paused:
                self.plain[life, sid] += 1
                if self.plain[life, sid] >= STRIKES_MAX and sid in self.cluster.directory.rows:
                    raise Violation(f"I8 {self.plain[life, sid]} workers died of a session alone, and it goes on")

        self.world.at(0.05, heard)

    def inserted(self, sid: str) -> None:
        """The directory has the session as a new one: what was known of its deaths is forgotten."""
        self.forgotten |= sid in self.quarantined_once
        self.deaths.pop(sid, None)
        for key in [one for one in self.plain if one[1] == sid]:
            del self.plain[key]

    def quarantined(self, sid: str) -> None:
        """I8: a session that is given up for killing workers had part in as many deaths, that are not explained by
        another one that was given up; it was in work at the last, and has brought about one of them."""
        self.world.cover("a poison is quarantined" if sid in self.poisons else "quarantined without being one")
        life = self.cluster.controller.life
        deaths = self.deaths[sid]
        left = [one for one in deaths if one.by == sid or not self.quarantined_once.get(one.by) == one.life == life]
        if len(left) < STRIKES_MAX:
            raise Violation(f"I8 a session is quarantined after {len(left)} deaths in its chunks", deaths)
        if not deaths[-1].in_work:
            raise Violation("I8 a session is quarantined at a death of others that were in work", deaths)
        innocent = all(one.by not in ("", sid) for one in deaths)
        if innocent and not self.forgotten and len(left) < STRIKES_IN_COMPANY:
            raise Violation("I8 a session is quarantined for what another one did", deaths)
        self.quarantined_once[sid] = life


__all__ = ["MOMENTS", "Moments"]
