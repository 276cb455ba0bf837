"""The gateway's logic under random stories: credits, acks, drops, prompts, workers lost, a gateway restarted."""

from __future__ import annotations

import hashlib
import itertools

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from turboserve.errors import TurboServeError
from turboserve.runtime import messages as m
from turboserve.server.effects import Append, CloseViewer, Deliver, Resolve, ToController, ToViewer, ToWorker
from turboserve.server.gateway_config import WIDE_QUOTAS, Limits, Quotas
from turboserve.server.gateway_logic import GatewayLogic, NewSession
from turboserve.server.log_records import Asked, Bound, Opened, replay
from turboserve.server.pacing import Pace, StreamClock
from turboserve.server.session_stream import RING_CHUNKS, StreamShape

SID = "a" * 26
SHAPE = StreamShape("shapes", "h", 2, 2, 12.0, 1, 4)
CLOCK = StreamClock(0.25, 0.25)


def chunk_digest(prev: str, seed: int, prompt: str, steps: int, index: int) -> str:
    pixels = f"{seed}|{prompt}|{steps}|{index}".encode()
    return hashlib.sha256(bytes.fromhex(prev) + pixels).hexdigest()


class Story(RuleBasedStateMachine):
    """One session. The model beside the logic knows what was acked, what is on disk, and who owns the session."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self.tokens = (f"token-{number}" for number in itertools.count())
        self.disk: list = []
        self.durable = 0
        self.epoch = 0
        self.placed = False
        self.worker_next = 0
        self.worker_digest = ""
        self.out: m.Credit | None = None
        self.stale: list[m.ChunkReady] = []
        self.connections = itertools.count(1)
        self.attached: int | None = None
        self.awaiting: tuple[int, int] | None = None
        self.token = "first"
        self.got: dict[int, str] = {}
        self.expected_next = 0
        self.first: int | None = None
        self.acked = 0
        self.deleted = False
        self.logic = self.new_logic()
        self.logic.controller_connected(self.now_s)
        wish = NewSession(
            sid=SID,
            token="first",
            tenant="t",
            tenant_weight=1.0,
            wide=True,
            shape=SHAPE,
            clock=CLOCK,
            seed=7,
            steps=4,
            format="raw",
            prompt="p0",
        )
        self.op_id, effects = self.logic.create(wish, self.now_s)
        self.resolved = False
        self.take(effects)
        self.commit()
        self.answer_create(effects)
        self.place()

    def new_logic(self) -> GatewayLogic:
        limits = Limits(attach_grace_s=1000.0, slow_close_s=60.0)
        wide = Quotas(sessions=9, creates_per_min=10_000, attaches_per_min=100_000, session_s=1e6)
        return GatewayLogic(limits, WIDE_QUOTAS, wide, lambda: next(self.tokens))

    # ---------------------------------------------------------------- what effects mean

    def take(self, effects: list) -> None:
        for effect in effects:
            match effect:
                case Append():
                    self.disk.append(effect.record)
                case ToWorker(message=m.Credit() as credit):
                    self.on_credit(credit)
                case ToViewer(connection, message):
                    self.on_viewer(connection, message)
                case Deliver(connection, chunk):
                    assert connection == self.attached, "a chunk to a connection that is not attached"
                    assert chunk.index == self.expected_next, "not contiguous"
                    self.expected_next += 1
                    assert self.got.setdefault(chunk.index, chunk.digest) == chunk.digest, "other frames than before"
                case CloseViewer(connection, _, _):
                    if connection == self.attached:
                        self.attached = self.first = None
                case Resolve():
                    self.resolved = True

    def on_credit(self, credit: m.Credit) -> None:
        assert not self.ended, "a credit after the end"
        bound = [one for one in self.disk[: self.durable] if isinstance(one, Bound) and one.index == credit.chunk_index]
        assert bound, "a credit whose inputs are not on disk"
        assert bound[0].steps == credit.steps and bound[0].version == credit.prompt_version
        assert credit.epoch == self.epoch
        assert credit.chunk_index < self.acked + RING_CHUNKS, "a credit beyond four unacked"
        self.out = credit

    def on_viewer(self, connection: int, message: dict) -> None:
        if message["type"] == "attached":
            assert self.awaiting is not None and self.awaiting[0] == connection
            self.attached, self.expected_next = self.awaiting
            self.awaiting = None
            self.token = message["token"]
        if message["type"] == "prompt_accepted":
            durable = [one for one in self.disk[: self.durable] if isinstance(one, Asked)]
            assert any(one.version == message["prompt_version"] for one in durable)

    def answer_create(self, effects: list) -> None:
        for effect in effects:
            if isinstance(effect, ToController) and isinstance(effect.message, m.CreateSession):
                self.take(self.logic.from_controller(m.OpDone(op_id=effect.message.op_id, state="active"), self.now_s))

    def commit(self) -> None:
        while self.durable < len(self.disk):
            count = self.durable = len(self.disk)
            self.take(self.logic.durable(count - self.base, self.now_s))

    base = 0

    @property
    def session(self):
        return self.logic.sessions[SID]

    @property
    def ended(self) -> bool:
        session = self.logic.sessions.get(SID) if hasattr(self, "logic") else None
        return session is not None and session.ended_s is not None

    def alive(self) -> bool:
        return not self.ended

    # ---------------------------------------------------------------- rules

    @rule()
    def log_commits(self) -> None:
        self.commit()

    @rule(seconds=st.sampled_from([0.01, 0.2, 0.3, 1.0, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.take(self.logic.tick(self.now_s))

    @precondition(alive)
    @rule(back=st.integers(0, 5), pace=st.sampled_from(list(Pace)))
    def attach(self, back: int, pace: Pace) -> None:
        connection = next(self.connections)
        newest = max(self.session.next_index, self.session.restored)
        next_index = newest - back
        if next_index < 0:
            return
        allowed = self.acked <= next_index
        if allowed:
            self.awaiting = (connection, next_index)
            self.first = next_index
        effects = self.logic.attach(connection, SID, self.token, next_index, None, pace, self.now_s)
        errors = [one for one in effects if isinstance(one, ToViewer) and one.message["type"] == "error"]
        assert bool(errors) == (not allowed)
        if allowed and self.attached is not None:
            assert any(isinstance(one, CloseViewer) and one.code == 4409 for one in effects)
            self.attached = None
        self.released_behind()
        self.take(effects)
        self.answer_create(effects)
        if not self.placed:
            self.place()

    def released_behind(self) -> None:
        """All that stands unacked may lie behind what the viewer asked for: then it counts as received."""
        if self.first is not None and self.first == self.acked + RING_CHUNKS <= self.session.next_index:
            self.acked = self.first

    @precondition(alive)
    @rule()
    def somebody_elses_connection_ends(self) -> None:
        before = self.session.viewer
        self.take(self.logic.detach(next(self.connections), SID, self.now_s))
        assert self.session.viewer is before

    @precondition(lambda self: self.attached is not None)
    @rule()
    def detach(self) -> None:
        connection, self.attached, self.first = self.attached, None, None
        self.take(self.logic.detach(connection, SID, self.now_s))

    @precondition(lambda self: self.attached is not None)
    @rule(back=st.integers(-1, 4))
    def ack(self, back: int) -> None:
        connection, session = self.attached, self.session
        index = session.next_index - 1 - back
        if index < 0:
            return
        if index < session.next_index:
            self.acked = max(self.acked, index + 1)
        good, effects = self.logic.viewer(
            connection, SID, lambda one: one.ack(connection, index, self.now_s), self.now_s
        )
        assert good == (back >= 0)
        self.take(effects)

    @precondition(lambda self: self.attached is not None)
    @rule(ahead=st.one_of(st.none(), st.integers(-2, 6)), number=st.integers(0, 99))
    def prompt(self, ahead: int | None, number: int) -> None:
        connection = self.attached
        from_index = None if ahead is None else max(0, self.session.bound + ahead)
        good, effects = self.logic.viewer(
            connection, SID, lambda one: one.prompt(connection, f"p{number}", None, from_index, self.now_s), self.now_s
        )
        passed = from_index is not None and from_index < self.session.bound
        if passed:
            assert not good
        if good:
            told = [one for one in effects if isinstance(one, ToViewer) and one.message["type"] == "prompt_accepted"]
            assert not told, "an answer before the prompt is durable"
            accepted = next(one.record for one in effects if isinstance(one, Append) and isinstance(one.record, Asked))
            assert accepted.from_index >= self.session.bound
        self.take(effects)

    @precondition(alive)
    @rule(on=st.booleans())
    def pause_or_resume(self, on: bool) -> None:
        self.take((self.logic.pause if on else self.logic.resume)(SID, None, self.now_s))

    @precondition(lambda self: self.out is not None)
    @rule(times=st.sampled_from([1, 1, 2, 0]))
    def chunk_arrives(self, times: int) -> None:
        """Once, twice, or made and not sent: it may come when another worker owns the session."""
        credit, self.out = self.out, None
        if credit.epoch != self.epoch or credit.chunk_index > self.worker_next:
            return
        ready = self.made.get(credit.chunk_index) or m.ChunkReady(
            session_id=SID,
            epoch=credit.epoch,
            chunk_index=credit.chunk_index,
            digest=chunk_digest(self.worker_digest, 7, credit.prompt, credit.steps, credit.chunk_index),
            digest_prev=self.worker_digest,
            frames=4,
            steps=credit.steps,
            prompt_version=credit.prompt_version,
        )
        if credit.chunk_index == self.worker_next:
            self.worker_digest, self.worker_next = ready.digest, credit.chunk_index + 1
        self.made[credit.chunk_index] = ready
        self.stale.append(ready)
        for _ in range(times):
            effects = self.logic.chunk(ready, None, self.now_s)
            self.released_behind()
            self.take(effects)

    @rule(count=st.integers(1, 6))
    def things_go_well(self, count: int) -> None:
        """Log, clock and worker do their part for a while."""
        for _ in range(count):
            self.commit()
            self.time_passes(0.3)
            if self.out is not None:
                self.chunk_arrives(1)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def an_old_chunk_comes_again(self, data: st.DataObject) -> None:
        old = data.draw(st.sampled_from(self.stale))
        if old.epoch == self.epoch and old.chunk_index >= self.session.next_index:
            return  # its worker still owns the session: it is late, not stale
        before = self.session.next_index
        self.take(self.logic.chunk(old, None, self.now_s))
        assert self.session.next_index == before, "a chunk of an old epoch, or one that was there, was accepted"

    @precondition(alive)
    @rule()
    def worker_lost(self) -> None:
        """Another worker makes the session again from its inputs."""
        self.place()

    def place(self) -> None:
        self.epoch += 1
        self.placed = True
        self.worker_next, self.worker_digest, self.out, self.made = 0, "", None, {}
        placed = m.SessionPlaced(session_id=SID, epoch=self.epoch, worker_id="w0", numerics_id="n", next_index=0)
        self.take(self.logic.from_controller(placed, self.now_s))

    @precondition(alive)
    @rule()
    def gateway_restarts(self) -> None:
        """Only what is on disk survives; the viewer keeps what it has."""
        self.disk = self.disk[: self.durable]
        logged = replay(self.disk)
        self.base, self.attached, self.awaiting, self.out, self.first = self.durable, None, None, None, None
        self.stale, self.placed = [], False
        self.logic = self.new_logic()
        # An ack may have been lost with the gateway's memory; the viewer asks the server where it stands.
        self.acked = logged[SID].delivered
        self.logic.outbox.take()
        self.take(self.logic.restore([(logged[SID], SHAPE, CLOCK)], self.now_s, 0.0))
        effects = self.logic.controller_connected(self.now_s)
        self.take(effects)
        asked = [one.message for one in effects if isinstance(one, ToController)]
        assert any(isinstance(one, m.CreateSession) and one.adopt for one in asked), "nobody was asked to adopt it"
        self.answer_create(effects)
        # Tokens not yet on disk were not given out; the newest one that was is valid.

    @precondition(alive)
    @rule(chance=st.integers(0, 9))
    def end(self, chance: int) -> None:
        if chance == 0:
            self.take(self.logic.end(SID, None, "deleted", self.now_s))
            self.deleted = True

    # ---------------------------------------------------------------- invariants

    @invariant()
    def counters_never_cross(self) -> None:
        if SID not in self.logic.sessions:
            return
        session = self.session
        if session.ended_s is None:
            assert session.delivered == self.acked
            assert session.delivered <= session.next_index
            assert session.sent <= session.durable <= session.bound
            assert session.bound <= max(session.delivered + RING_CHUNKS, session.restored)
            if not session.restored:
                assert session.next_index <= session.bound <= session.next_index + 1
        assert len(session.ring) <= RING_CHUNKS
        assert [one.index for one in session.ring] == list(range(session.delivered, session.next_index))[
            : len(session.ring)
        ]

    @invariant()
    def an_ended_session_is_silent(self) -> None:
        if self.ended:
            assert self.attached is None and not self.session.ring and not self.session.in_flight

    @invariant()
    def the_log_tells_one_story(self) -> None:
        assert isinstance(self.disk[0], Opened)
        by_index: dict[int, tuple] = {}
        for one in self.disk:
            if isinstance(one, Bound):
                facts = (one.steps, one.version)
                assert by_index.setdefault(one.index, facts) == facts, "inputs of a chunk were bound twice"

    def teardown(self) -> None:
        """Faults over: with a reader that acks, the stream moves on."""
        try:
            if self.ended:
                return
            self.commit()
            if self.session.paused:
                self.take(self.logic.resume(SID, None, self.now_s))
            connection = next(self.connections)
            start = self.session.delivered
            self.awaiting, self.attached, self.first = (connection, start), None, start
            effects = self.logic.attach(connection, SID, self.token, start, None, Pace.FREE, self.now_s)
            self.take(effects)
            self.answer_create(effects)
            self.commit()
            assert self.attached == connection
            if self.session.in_flight and self.out is None:
                self.place()  # a chunk that was made and never sent: only a lost worker does that
            goal = self.session.bound + 3
            for _ in range(200):
                if self.session.next_index >= goal:
                    return
                if not self.placed:
                    self.place()
                self.commit()
                if self.out is not None:
                    self.chunk_arrives(1)
                self.commit()
                self.now_s += 0.5
                self.take(self.logic.tick(self.now_s))
                if self.attached is None:
                    break
                if self.session.next_index > self.acked:
                    self.ack(0)
            raise AssertionError(f"the stream stands still at {self.session.next_index} of {goal}")
        except TurboServeError as error:
            raise AssertionError(str(error)) from error


TestStory = Story.TestCase
TestStory.settings = settings(
    max_examples=40,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,  # the same stories every time; run with --hypothesis-seed and more examples to look for new ones
    suppress_health_check=list(HealthCheck),
)
