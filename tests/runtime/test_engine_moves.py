"""Two engines and one arena under random orders: opened, moved, adopted, prepared, killed. Digests and ledgers hold."""

from __future__ import annotations

import contextlib
import functools

from engine_harness import alone, prompt_of, request_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from point_harness import SLAB_BYTES, Node
from tiny_model import TinyModel, session_id

from turboserve.errors import ArenaFull, PoolExhausted
from turboserve.model.interface import Control
from turboserve.runtime.cost_model import MeasuredCost

NAMES = "bcd"
SLOTS = 2
LENGTH = 40
name_of = st.sampled_from(NAMES)
engine_of = st.integers(0, 1)


@functools.cache
def chain(name: str) -> tuple[str, ...]:
    return tuple(alone(name, LENGTH))


def seed_of(name: str) -> int:
    return sum(name.encode())


class MovesMachine(RuleBasedStateMachine):
    @initialize(slabs=st.sampled_from([40, 120, 400]))
    def start(self, slabs):
        self.node = Node(slabs * SLAB_BYTES, workers=2)
        self.deaths = [0, 0]
        self.engines = [self.new_engine(0), self.new_engine(1)]
        self.owner: dict[str, int] = {}
        self.epoch = dict.fromkeys(NAMES, 0)
        self.made = dict.fromkeys(NAMES, 0)
        for name, at in (("b", 0), ("c", 1)):
            self.open(name, at)
            self.stream(name, 3)

    def new_engine(self, number):
        # Packing pays in this cost model, so that passes really are shared; the second engine writes its points beside.
        return self.node.engine(
            TinyModel(),
            slots=SLOTS,
            cost=MeasuredCost(1e-2, 1e-6, segment_max=SLOTS),
            background=number == 1,
            partition=number,
            owner_epoch=1 + self.deaths[number],
        )

    def pass_in(self, engine):
        for event in engine.run_pass():
            name = event.session_id[0]
            assert event.digest == chain(name)[event.chunk_index]
            self.made[name] = max(self.made[name], event.chunk_index + 1)

    def to_boundary(self, engine, name):
        engine.forget_queue(session_id(name))
        while not engine.at_boundary(session_id(name)):
            self.pass_in(engine)

    @rule(name=name_of, at=engine_of)
    def open(self, name, at):
        """Where nobody has it: from its newest point, else anew."""
        if name in self.owner:
            return
        engine, sid = self.engines[at], session_id(name)
        point = self.node.store.latest(sid)
        self.epoch[name] += 1
        try:
            if engine.restore(sid, seed_of(name), self.epoch[name]) is None:
                assert point is None
                engine.open(sid, seed_of(name), Control(prompt_of(name, 0)), self.epoch[name])
        except PoolExhausted:
            assert engine.session_count == SLOTS
            return
        assert engine.next_chunk_index(sid) == (0 if point is None else point.chunk) <= self.made[name]
        self.owner[name] = at

    @rule(name=name_of, count=st.integers(1, 3))
    def submit(self, name, count):
        if name not in self.owner:
            return
        engine, sid = self.engines[self.owner[name]], session_id(name)
        for _ in range(count):
            index = engine._session(sid).next_unqueued_index
            if index < LENGTH:
                engine.submit(sid, request_of(name, index), 1e9)

    @rule(name=name_of, count=st.integers(1, 5))
    def stream(self, name, count):
        self.submit(name, count)
        if name in self.owner:
            while self.engines[self.owner[name]].has_work:
                self.pass_in(self.engines[self.owner[name]])

    @rule(at=engine_of, count=st.integers(1, 12))
    def passes(self, at, count):
        for _ in range(count):
            self.pass_in(self.engines[at])

    @rule(name=name_of, ahead=st.booleans(), at=engine_of)
    def move(self, name, ahead, at):
        """Stop, save, open elsewhere, close here; without room for the point it stays."""
        if self.owner.get(name, at) == at:
            return
        source, target, sid = self.engines[self.owner[name]], self.engines[at], session_id(name)
        if ahead:
            with contextlib.suppress(PoolExhausted):
                target.prepare(sid)
        self.to_boundary(source, name)
        stands = source.next_chunk_index(sid)
        try:
            source.save(sid)
        except ArenaFull:
            target.drop_prepared(sid)
            return
        self.epoch[name] += 1
        try:
            restored = target.restore(sid, seed_of(name), self.epoch[name])
        except PoolExhausted:
            self.epoch[name] += 1
            assert source.adopt(sid, self.epoch[name]) == stands
            return
        assert restored is not None and target.next_chunk_index(sid) == stands
        source.close(sid)
        self.owner[name] = at

    @rule(name=name_of)
    def suspend(self, name):
        if name not in self.owner:
            return
        engine = self.engines[self.owner[name]]
        self.to_boundary(engine, name)
        with contextlib.suppress(ArenaFull):
            engine.save(session_id(name))
            engine.close(session_id(name))
            del self.owner[name]

    @rule(name=name_of)
    def adopt(self, name):
        if name in self.owner:
            self.epoch[name] += 1
            engine, sid = self.engines[self.owner[name]], session_id(name)
            assert engine.adopt(sid, self.epoch[name]) in range(self.made[name] + 1)

    @rule(name=name_of, at=engine_of, drop=st.booleans())
    def prepare(self, name, at, drop):
        if self.owner.get(name) == at:
            return
        if drop:
            self.engines[at].drop_prepared(session_id(name))
            return
        with contextlib.suppress(PoolExhausted):
            self.engines[at].prepare(session_id(name))

    @rule(at=engine_of)
    def die(self, at):
        """All of an engine's memory is gone; what it had committed to the arena is not."""
        for name in [one for one, owner in self.owner.items() if owner == at]:
            self.engines[at]._settle(self.engines[at]._session(session_id(name)))
            del self.owner[name]
        self.deaths[at] += 1
        self.engines[at] = self.new_engine(at)

    @rule(name=name_of)
    def end(self, name):
        if name in self.owner:
            self.engines[self.owner.pop(name)].close(session_id(name))
            self.node.store.drop(session_id(name))
            self.made[name] = 0

    @invariant()
    def ledgers_are_exact(self):
        if not hasattr(self, "engines"):
            return
        for at, engine in enumerate(self.engines):
            engine.pool.check()
            mine = {session_id(name) for name, owner in self.owner.items() if owner == at}
            assert set(engine.pool.held) == mine | set(engine._prepared)
            assert engine.session_count == len(engine.pool.held)
        ledger = self.node.reader.ledger()
        assert ledger.free_bytes + ledger.reserved_bytes + ledger.committed_bytes == ledger.total_bytes

    def teardown(self):
        if not hasattr(self, "engines"):
            return
        for name in list(self.owner):
            self.end(name)
        for name in NAMES:
            for engine in self.engines:
                engine.drop_prepared(session_id(name))
            self.node.store.drop(session_id(name))
        assert self.node.committed_bytes() == 0
        assert all(engine.pool.free_count == SLOTS for engine in self.engines)
        self.node.close()


TestMoves = MovesMachine.TestCase
TestMoves.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
