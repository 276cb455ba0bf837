"""The worker's protocol without I/O: random schedules with lost, doubled and late messages."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from worker_logic_harness import HELLO, LEASE_S, SPEC, credit, lease, made, open_session, prepare

from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_books import (
    CONTROLLER,
    GATEWAY,
    KEPT_CHUNKS,
    Beat,
    Emit,
    Phase,
    Send,
)
from turboserve.runtime.worker_logic import WorkerLogic

NAMES = "bcde"


class WorkerMachine(RuleBasedStateMachine):
    """The logic between a controller, a gateway and an engine that are honest, and wires that are not."""

    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed):
        self.rng = random.Random(seed)
        self.logic = WorkerLogic(HELLO, SPEC)
        self.now_s = 0.0
        self.epochs: dict[str, int] = {}
        self.engine: dict[str, tuple[int, int]] = {}  # session -> (epoch, chunks made)
        self.work: list[tuple[str, int, int]] = []  # (session, epoch, chunk) that the engine was told to make
        self.wire: list[tuple[str, m.Message]] = []
        self.connected: set[str] = set()
        self.emitted: dict[str, int] = {}  # session -> highest index that left, here or before it came here
        self.closed: set[tuple[str, int]] = set()
        self.held = False
        self.last_heard_s = float("-inf")
        self.outbox: list[Emit] = []
        self.points: dict[str, int] = {}  # what lies in the arena: session -> chunk that comes next
        self.prepared: set[str] = set()
        self.stops: dict[str, e.Stop] = {}
        self.handed_over: set[str] = set()
        self.broken: set[str] = set()  # of these no state can be saved
        self.adopted: set[tuple[str, int]] = set()  # epochs of which nothing has left yet
        self.move_id = 0
        for source in (CONTROLLER, GATEWAY):
            self.connect(source)
        self.deliver(CONTROLLER, lease())
        for name in NAMES[:2]:
            self.send_open(name, True)

    def obey(self, actions):
        for action in actions:
            if isinstance(action, e.Open):
                event = self.open_in_engine(action)
                self.obey(self.logic.on_engine(event, action.epoch, self.now_s))
            elif isinstance(action, e.Stop):
                assert self.engine[action.session_id][0] == action.epoch and action.session_id not in self.stops
                self.stops[action.session_id] = action
                queued = [one for one in self.work if one[0] == action.session_id]
                begun = queued[: self.rng.randrange(2)]  # perhaps one is in work
                self.work = [one for one in self.work if one[0] != action.session_id or one in begun]
            elif isinstance(action, e.Prepare):
                assert action.session_id not in self.engine and action.session_id not in self.prepared
                if len(self.engine) + len(self.prepared) < 3:
                    self.prepared.add(action.session_id)
                    event = e.Prepared(action.session_id, action.move_id)
                else:
                    event = e.PrepareFailed(action.session_id, action.move_id, "pool_exhausted", "full")
                self.obey(self.logic.on_engine(event, -1, self.now_s))
            elif isinstance(action, e.DropPrepared):
                self.prepared.discard(action.session_id)
            elif isinstance(action, e.Close):
                self.last_pass_ends(action.session_id, action.epoch)
                if self.engine.get(action.session_id, (None,))[0] == action.epoch:
                    self.leave_engine(action.session_id)
                self.closed.add((action.session_id, action.epoch))
                self.obey(self.logic.on_engine(e.Closed(action.session_id), action.epoch, self.now_s))
            elif isinstance(action, e.Begin):
                assert self.engine[action.session_id][0] == action.epoch
                assert action.session_id not in self.handed_over  # it stands still until it is told
                self.work.append((action.session_id, action.epoch, action.request.chunk_index))
            elif isinstance(action, e.Hold):
                self.held = action.hold
            elif isinstance(action, Emit):
                self.outbox.append(action)
            else:
                assert isinstance(action, Send | Beat), action

    def open_in_engine(self, action):
        sid = action.session_id
        assert (sid, action.epoch) not in self.closed  # a closed epoch stays closed
        if action.adopt_epoch is not None and self.engine.get(sid, (None,))[0] == action.adopt_epoch:
            self.stops.pop(sid, None)
            self.handed_over.discard(sid)
            self.work = [one for one in self.work if one[0] != sid]
            count = self.engine[sid][1]
            self.engine[sid] = (action.epoch, count)
            self.adopted.add((sid, action.epoch))
            return e.Opened(sid, count, adopted=True)
        assert sid not in self.engine  # one owner at a time, whatever the epoch
        if action.adopt_epoch is not None and not action.restore:
            return e.OpenFailed(sid, "not_found", "not here")
        if sid not in self.prepared and len(self.engine) + len(self.prepared) >= 3:
            return e.OpenFailed(sid, "pool_exhausted", "full")
        self.prepared.discard(sid)
        count = self.points.get(sid, 0) if action.restore else 0
        self.engine[sid] = (action.epoch, count)
        if not action.restore or sid not in self.points:
            return e.Opened(sid)
        self.emitted[sid] = max(self.emitted.get(sid, -1), count - 1)
        kept = tuple(made(index, sid) for index in range(max(0, count - KEPT_CHUNKS), count))
        return e.Opened(sid, count, restored=True, made=kept)

    def leave_engine(self, sid):
        del self.engine[sid]
        self.stops.pop(sid, None)
        self.handed_over.discard(sid)
        self.broken.discard(sid)
        self.work = [one for one in self.work if one[0] != sid]

    @rule(fails=st.sampled_from([False, False, False, True]))
    def boundaries_are_reached(self, fails):
        for sid, stop in list(self.stops.items()):
            while any(one[0] == sid for one in self.work) and sid in self.stops:
                self.work.sort(key=lambda one: one[0] != sid)
                self.make_one(False)
            if sid not in self.stops:
                continue
            del self.stops[sid]
            count = self.engine[sid][1]
            if fails or sid in self.broken:
                event = e.StopFailed(sid, count, "arena_full", "no room")
            else:
                self.points[sid] = count
                event = e.Stopped(sid, count, 1)
                if stop.release:
                    self.leave_engine(sid)
                    self.closed.add((sid, stop.epoch))
                else:
                    self.handed_over.add(sid)
            self.obey(self.logic.on_engine(event, stop.epoch, self.now_s))

    def last_pass_ends(self, sid, epoch):
        """What the engine made just before it heard of the close; the logic must not take it for another epoch's."""
        epoch_held, count = self.engine.get(sid, (None, 0))
        if epoch_held == epoch and (sid, epoch, count) in self.work:
            before = {sid: len(one.made) for sid, one in self.logic.sessions.items()}
            assert self.logic.on_engine(made(count, sid), epoch, self.now_s) == []
            assert before == {sid: len(one.made) for sid, one in self.logic.sessions.items()}

    @rule(count=st.integers(1, 8))
    def frames_leave(self, count):
        self.ring_has_room(count)

    def ring_has_room(self, count):
        """Emits leave when the ring has room, which may be long after they were decided."""
        for _ in range(min(count, len(self.outbox))):
            action = self.outbox.pop(0)
            chunk = self.logic.may_emit(action, self.now_s)
            if chunk is None:
                continue
            key = (action.session_id, action.epoch)
            assert key not in self.closed  # nothing is emitted after close
            assert self.now_s < self.last_heard_s + LEASE_S  # nor without a lease
            assert chunk.chunk_index == action.chunk_index
            assert self.logic.sessions[action.session_id].epoch == action.epoch
            last = self.emitted.get(action.session_id, -1)
            # Contiguous; again is allowed, a gap is not, but where an adopted session begins: what its former epoch had
            # not sent is sent if the gateway asks for it, which it need not do.
            assert action.chunk_index <= last + 1 or key in self.adopted
            self.adopted.discard(key)
            assert action.chunk_index < self.engine[action.session_id][1]  # only what was made
            self.emitted[action.session_id] = max(last, action.chunk_index)
            self.logic.did_emit(action)

    def deliver(self, source, message):
        if source not in self.connected:
            return
        if source == GATEWAY or isinstance(message, m.Lease):
            self.last_heard_s = max(self.last_heard_s, self.now_s)
        self.obey(self.logic.on_message(source, message, self.now_s))

    @rule(source=st.sampled_from([CONTROLLER, GATEWAY]))
    def connect(self, source):
        if source not in self.connected:
            self.connected.add(source)
            self.obey(self.logic.on_connect(source, self.now_s))

    @rule(source=st.sampled_from([CONTROLLER, GATEWAY]))
    def disconnect(self, source):
        if source in self.connected and self.rng.random() < 0.5:
            self.connected.discard(source)
            self.obey(self.logic.on_disconnect(source, self.now_s))

    @rule(name=st.sampled_from(NAMES), newer=st.booleans(), restore=st.booleans(), adopt=st.booleans())
    def send_open(self, name, newer, restore=False, adopt=False):
        sid = name * 26
        self.epochs[sid] = self.epochs.get(sid, 0) + newer if sid in self.epochs else 1
        self.send(CONTROLLER, open_session(sid=sid, epoch=self.epochs[sid], restore=restore, adopt=adopt))

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 1), move=st.booleans())
    def send_stop(self, name, back, move):
        sid = name * 26
        epoch = max(0, self.epochs.get(sid, 0) - back)
        if move:
            self.move_id += self.rng.randrange(2)
            message = m.HandOver(session_id=sid, epoch=epoch, move_id=max(1, self.move_id), target="w1")
        else:
            message = m.SuspendSession(session_id=sid, epoch=epoch)
        self.send(CONTROLLER, message)

    @rule(name=st.sampled_from(NAMES), newer=st.booleans(), drop=st.booleans())
    def send_prepare(self, name, newer, drop):
        self.move_id += newer
        if drop:
            self.send(CONTROLLER, m.DropPrepared(session_id=name * 26, move_id=self.move_id))
        else:
            self.send(CONTROLLER, prepare(sid=name * 26, move_id=self.move_id))

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 1))
    def send_close(self, name, back):
        sid = name * 26
        epoch = max(0, self.epochs.get(sid, 0) - back)
        if back or self.rng.random() < 0.3:  # else few sessions would live long enough
            self.send(CONTROLLER, m.CloseSession(session_id=sid, epoch=epoch))

    @rule(name=st.sampled_from(NAMES), index=st.integers(0, 6), old=st.booleans())
    def send_credit(self, name, index, old):
        sid = name * 26
        epoch = max(0, self.epochs.get(sid, 0) - old)
        self.send(GATEWAY, credit(index, sid=sid, epoch=epoch))

    @rule(at=st.integers(0, 2), count=st.integers(1, 6))
    def stream(self, at, count):
        """A gateway at work: accept what came, give the next credits."""
        if not self.logic.sessions:
            return
        sid = sorted(self.logic.sessions)[at % len(self.logic.sessions)]
        session = self.logic.sessions[sid]
        for _ in range(count):
            sent = self.emitted.get(sid, -1)
            if sent >= 0:
                accepted = m.ChunkAccepted(session_id=sid, epoch=session.epoch, chunk_index=sent)
                self.send(GATEWAY, accepted)
            self.send(GATEWAY, credit(session.next_index, sid=sid, epoch=session.epoch))
            if self.rng.random() < 0.8:
                self.engine_works(1, False)
            if self.rng.random() < 0.3:
                self.ring_has_room(4)

    @rule(name=st.sampled_from(NAMES), index=st.integers(0, 6))
    def send_accepted(self, name, index):
        sid = name * 26
        message = m.ChunkAccepted(session_id=sid, epoch=self.epochs.get(sid, 0), chunk_index=index)
        self.send(GATEWAY, message)

    @rule()
    def send_lease(self):
        self.send(CONTROLLER, lease())

    def send(self, source, message):
        """Wires lose, double and delay messages, and keep copies that come much later."""
        fate = self.rng.choice(["once", "once", "once", "once", "twice", "later", "lost"])
        for _ in range({"once": 1, "twice": 2}.get(fate, 0)):
            self.deliver(source, message)
        if fate == "later" or self.rng.random() < 0.2:
            self.wire.append((source, message))

    @rule(count=st.integers(1, 6))
    def late_messages_arrive(self, count):
        for _ in range(min(count, len(self.wire))):
            self.deliver(*self.wire.pop(self.rng.randrange(len(self.wire))))

    @rule(count=st.integers(1, 4))
    def passes_run(self, count):
        self.engine_works(count, True)

    def engine_works(self, count, breaks):
        for _ in range(count):
            if self.work and not self.held:
                self.make_one(breaks)

    def make_one(self, breaks):
        sid, epoch, index = self.work.pop(0)
        held_epoch, count = self.engine.get(sid, (None, 0))
        if held_epoch != epoch:
            return
        assert index == count  # the engine is asked for chunks in order, each once
        if breaks and self.rng.random() < 0.2:
            event = e.BrokenSession(session_id=sid, chunk_index=index, code="session_poisoned", message="nan")
            self.work = [one for one in self.work if one[0] != sid]
            self.broken.add(sid)
        else:
            self.engine[sid] = (epoch, count + 1)
            if self.rng.random() < 0.7:
                self.points[sid] = count + 1  # write-through
            event = made(index, sid)
        self.obey(self.logic.on_engine(event, epoch, self.now_s))

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0]), answered=st.booleans())
    def time_passes(self, seconds, answered):
        self.now_s += seconds
        self.obey(self.logic.on_timer(self.now_s))
        if self.rng.random() < 0.5:
            self.ring_has_room(8)
        if answered:
            self.deliver(CONTROLLER, lease())

    @invariant()
    def books_agree(self):
        if not hasattr(self, "logic"):
            return
        assert {sid: one.epoch for sid, one in self.logic.sessions.items()} == {
            sid: epoch for sid, (epoch, _) in self.engine.items()
        }
        assert not self.logic.closing
        assert set(self.logic.prepared) == self.prepared and not self.prepared & set(self.engine)
        assert len(self.engine) + len(self.prepared) <= 3
        for sid, session in self.logic.sessions.items():
            assert (session.phase is Phase.HANDED_OVER) == (sid in self.handed_over)
            assert session.phase is not Phase.STOPPING or sid in self.stops
            assert not session.early or session.phase is Phase.STOPPING
        for session in self.logic.sessions.values():
            assert len(session.made) <= KEPT_CHUNKS
            assert session.next_index - session.accepted <= KEPT_CHUNKS
            assert session.phase is not Phase.OPENING
        if self.now_s >= self.last_heard_s + LEASE_S:
            assert self.logic.lease_left_s(self.now_s) == 0.0

    def teardown(self):
        """Everything closes at the newest epoch: nothing is left."""
        if not hasattr(self, "logic"):
            return
        self.connected.add(CONTROLLER)
        self.obey(self.logic.on_connect(CONTROLLER, self.now_s))
        for sid, session in list(self.logic.sessions.items()):
            self.deliver(CONTROLLER, m.CloseSession(session_id=sid, epoch=session.epoch))
        for sid in list(self.logic.prepared):
            self.deliver(CONTROLLER, m.DropPrepared(session_id=sid, move_id=self.move_id))
        assert not self.engine and not self.logic.sessions and not self.logic.closing and not self.prepared


TestWorkerMachine = WorkerMachine.TestCase
TestWorkerMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
