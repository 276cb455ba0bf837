"""Anything in any order: workers that come, die and go silent, messages that wait, are lost or come twice, controllers
that are killed. After every step records, directory, view and workers agree; in calm everything that is wanted runs."""

from __future__ import annotations

import itertools

from controller_harness import Cluster
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_controller_logic import GATEWAY, create, end, sent, sid

from turboserve.runtime import messages as m
from turboserve.session import SessionState

WORKERS = ("w0", "w1", "w2")
_ops = itertools.count(1_000_000)


class Storm(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster("w0", "w1", queue_max=4, queue_age_max_s=1e9, move_deadline_s=2.0)
        self.created = 0
        self.epochs: dict[str, int] = {}
        self.wanted: dict[str, bool] = {}

    # ------------------------------------------------------------------ the gateway's side

    @precondition(lambda self: self.created < 6)
    @rule()
    def create(self):
        self.created += 1
        self.wanted[sid(self.created)] = True
        self.cluster.tell(GATEWAY, create(self.created, op_id=next(_ops)))

    @precondition(lambda self: self.cluster.logic.sessions)
    @rule(data=st.data())
    def end(self, data):
        key = data.draw(st.sampled_from(sorted(self.cluster.logic.sessions)))
        self.cluster.tell(GATEWAY, end(int(key)))

    @precondition(lambda self: self.cluster.logic.sessions)
    @rule(data=st.data(), active=st.booleans())
    def wants(self, data, active):
        key = data.draw(st.sampled_from(sorted(self.cluster.logic.sessions)))
        self.wanted[key] = active
        self.cluster.active(int(key), active)

    @precondition(lambda self: self.cluster.logic.sessions)
    @rule(data=st.data(), kind=st.sampled_from(["migrate", "suspend", "resume"]), worker=st.sampled_from(WORKERS))
    def operate(self, data, kind, worker):
        key = data.draw(st.sampled_from(sorted(self.cluster.logic.sessions)))
        self.cluster.admin(kind, session_id=key, worker_id=worker)

    @rule(worker=st.sampled_from(WORKERS))
    def drain(self, worker):
        if worker in self.cluster.logic.workers:
            self.cluster.admin("drain", worker_id=worker)

    # ------------------------------------------------------------------ workers and messages

    @rule(worker=st.sampled_from(WORKERS))
    def start(self, worker):
        if worker not in self.cluster.workers:
            self.cluster.start(worker)

    @rule(worker=st.sampled_from(WORKERS))
    def kill(self, worker):
        if worker in self.cluster.workers:
            self.cluster.kill(worker)

    @rule(worker=st.sampled_from(WORKERS))
    def cut(self, worker):
        """The channel breaks: what was on its way is lost; the worker is as it was and connects again."""
        if worker in self.cluster.workers:
            cluster = self.cluster
            cluster.carry_out(cluster.logic.on_disconnect(worker, cluster.now_s))
            cluster.workers[worker].connect()

    @rule(worker=st.sampled_from(WORKERS), side=st.sampled_from(["said", "heard"]))
    def deliver(self, worker, side):
        one = self.cluster.workers.get(worker)
        if one is None:
            return
        if side == "said" and one.said:
            cluster = self.cluster
            cluster.carry_out(cluster.logic.on_message(worker, one.said.pop(0), cluster.now_s))
        elif side == "heard" and one.heard:
            one.take(one.heard.pop(0))

    @rule(worker=st.sampled_from(WORKERS), data=st.data())
    def say_twice(self, worker, data):
        """The same answer again, as a worker does that is not sure it was heard."""
        one = self.cluster.workers.get(worker)
        if one is not None and one.said:
            again = data.draw(st.sampled_from(one.said))
            if not isinstance(again, m.WorkerHello):
                one.said.append(again)

    @rule(steps=st.integers(1, 20))
    def flow(self, steps):
        for _ in range(steps):
            if not self.cluster.step():
                return

    @rule(worker=st.sampled_from(WORKERS), data=st.data())
    def breaks(self, worker, data):
        one = self.cluster.workers.get(worker)
        if one is not None and one.held:
            key = data.draw(st.sampled_from(sorted(one.held)))
            held = one.held[key]
            broken = m.SessionBroken(
                session_id=key, epoch=held.epoch, chunk_index=held.next_index, code="session_poisoned", message="nan"
            )
            self.cluster.tell(worker, broken)

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.5]))
    def time_passes(self, seconds):
        cluster = self.cluster
        cluster.now_s += seconds
        for worker in cluster.workers.values():
            worker.work()
        cluster.carry_out(cluster.logic.on_timer(cluster.now_s))

    @rule()
    def kill_controller(self):
        self.cluster.restart_controller()
        for key in self.cluster.logic.sessions:
            self.cluster.active(int(key), self.wanted[key])

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def agree(self):
        self.cluster.check()

    @invariant()
    def epochs_grow(self):
        for key, row in self.cluster.store.rows.items():
            assert row[0] >= self.epochs.get(key, 0)
            self.epochs[key] = row[0]

    def teardown(self):
        """Calm, and room for all: what is wanted runs, and nothing is left where it does not belong."""
        cluster = self.cluster
        for worker in ("w3", "w4", "w5"):
            cluster.start(worker)
        for _ in range(8):
            cluster.settle()
            cluster.now_s += (
                cluster.logic.lease_s
                if any(one.adopt_by_s is not None for one in cluster.logic.sessions.values())
                else 3.0
            )
            for worker in cluster.logic.workers.values():
                worker.lease_until_s = cluster.now_s + cluster.logic.lease_s + 100.0
            cluster.carry_out(cluster.logic.on_timer(cluster.now_s))
        cluster.wait(3.0)
        cluster.check()
        for key, live in cluster.logic.sessions.items():
            state = live.record.state
            if live.wanted:
                assert state is SessionState.RUNNING, (key, state, live)
            else:
                assert state in (SessionState.STALLED, SessionState.HOST, SessionState.QUEUED), (key, state, live)
        for name, worker in cluster.workers.items():
            for key, held in worker.held.items():
                live = cluster.logic.sessions.get(key)
                assert live is not None and live.record.owner == name and live.record.epoch == held.epoch, (name, key)
            assert not worker.prepared, (name, worker.prepared)
        assert not cluster.logic.view.workers.inbound.any() and not cluster.logic.view.workers.outbound.any()


TestStorm = Storm.TestCase
TestStorm.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_store_that_storms_use_speaks_as_the_directory_does(tmp_path):
    """Both answer the same calls alike."""
    from test_controller_logic import MemoryStore

    from turboserve.runtime.directory import Directory
    from turboserve.session import SessionRecord

    directory = Directory(tmp_path / "d.sqlite")
    answers = []
    for store in (MemoryStore(), directory):
        record = SessionRecord(sid(1), "t", "shapes", 1, 0.0, 96, 96, 4)
        store.insert(record, m.encode(create(1, op_id=5)))
        found = [store.own(sid(1), 0, "w0", SessionState.LOADING)]
        store.set_state(sid(1), SessionState.RUNNING, "r", 1)
        store.set_move(sid(1), 4, "w1")
        found += [
            store.own(sid(1), 1, None, SessionState.RECOVERING),
            store.next_epoch("move"),
            store.next_epoch("move"),
        ]
        answers.append(found)
    assert answers[0] == answers[1]
    (row,) = directory.stored()
    assert (row.record.strikes, row.move_id, m.decode(row.request).op_id) == (1, 4, 5)
    assert sent([], m.Message) == []
