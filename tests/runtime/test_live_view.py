"""The live controller's view beside the simulator's: one little story, column by column.

The simulator plays a trace. The live controller's logic hears the same story from a scripted gateway and scripted
workers, chunk by chunk as the simulator made them. Both decide with the scheduler's tick; what both ticks saw at the
same instants must be the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from test_controller_logic import MemoryStore, hello

from turboserve.orchestrator.plan import Plan
from turboserve.orchestrator.scheduler import Memory, TickConfig, tick
from turboserve.orchestrator.view import GONE, ClusterView
from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import GATEWAY
from turboserve.runtime.controller_logic import ControllerLogic
from turboserve.runtime.controller_records import Send
from turboserve.sim import batch_steps as b
from turboserve.sim.events import US
from turboserve.sim.profile_files import load_profile
from turboserve.sim.replay import Run, Settings, simulate
from turboserve.sim.trace import Trace, read_trace

K4 = dataclasses.replace(load_profile("k4"), chunk_target_s=0.3)
CONFIG = TickConfig(migrate=False, scale=False)
WORKERS = 2
FLOOR = 2
PROBE_S, PROBE_AT_S = 0.0371, 0.00013
"""Both tick that often, at instants at which nothing else happens."""


def sid(number: int) -> str:
    return f"{number:026d}"


def story(folder: Path) -> Trace:
    """Ten sessions on two workers that are meant for eight: late ones, reduced ones, one that comes back, one that
    leaves early."""
    lines = []
    for number in range(10):
        at_s = 0.21 * number
        lines += [(at_s, number, "arrive", ""), (at_s, number, "active", 9 if number else 3)]
    lines += [(5.1, 0, "idle", ""), (7.3, 0, "active", 4), (9.9, 4, "depart", "")]
    lines += [(13.1, 5, "idle", ""), (14.2, 5, "active", 3)]
    lines += [(30.0, number, "depart", "") for number in range(10) if number != 4]
    path = folder / "story.csv"
    rows = [f"{at_s:.2f},{sid(number)},{event},{chunks}" for at_s, number, event, chunks in sorted(lines, key=at_first)]
    path.write_text("time_s,session_id,event,chunks\n" + "\n".join(rows) + "\n")
    return read_trace(path)


def at_first(line: tuple) -> float:
    return line[0]


class Recorded:
    """The tick, and what it saw at the probes."""

    name, scales = "recorded", False

    def __init__(self) -> None:
        self.memory, self.seen = Memory(), {}
        self.asleep = False
        """More of this instant is to come: the simulator decides once, when all of it has happened."""

    def decide(self, view: ClusterView, now_s: float) -> Plan:
        if self.asleep:
            return Plan()
        probe = round((now_s - PROBE_AT_S) / PROBE_S)
        if abs(now_s - PROBE_AT_S - probe * PROBE_S) < 2e-6:
            self.seen.setdefault(probe, view.snapshot())
        plan, self.memory = tick(view, self.memory, now_s, CONFIG)
        return Plan(plan.actions, (math.floor((now_s - PROBE_AT_S) / PROBE_S + 1e-3) + 1) * PROBE_S + PROBE_AT_S)

    def __call__(self, view: ClusterView, memory: object, now_s: float) -> tuple[Plan, object]:
        return self.decide(view, now_s), memory


def instants(trace: Trace, run: Run) -> Iterator[tuple[float, str, object]]:
    """What happened, in order of time; of one instant ends before the trace's events before beginnings."""
    found: list[tuple[int, int, str, object]] = []
    for row in run.rows:
        found.append((int(row[b.R_FINISH]), 0, "end", row))
        found.append((int(row[b.R_START]), 4, "begin", row))
    last = {}
    for row in run.rows:
        last[int(row[b.R_SESSION]), int(row[b.R_PERIOD])] = int(row[b.R_FINISH])
    found += [(at_us, 1, "idle", trace.session_ids[session]) for (session, _), at_us in last.items()]
    kinds = {0: "arrive", 1: "active", 3: "depart"}
    for at in range(trace.time_us.size):
        kind = kinds.get(int(trace.event[at]))
        if kind is not None:
            number, at_us = int(trace.session[at]), int(trace.time_us[at])
            if kind == "depart":  # the simulator lets a session finish what it asked for
                at_us = max(at_us, *(ended for (session, _), ended in last.items() if session == number))
            found.append((at_us, 2, kind, trace.session_ids[number]))
    probes = int((run.end_us / US - PROBE_AT_S) / PROBE_S)
    found += [(round((PROBE_AT_S + k * PROBE_S) * US), 3, "probe", None) for k in range(probes)]
    for at_us, _, kind, what in sorted(found, key=lambda one: one[:2]):
        yield at_us / US, kind, what


class Live:
    """The controller's logic, and everybody it speaks with."""

    def __init__(self, trace: Trace, decide: Recorded) -> None:
        self.trace, self.decide = trace, decide
        self.logic = ControllerLogic(
            MemoryStore(), decide, K4, steps_floor=FLOOR, workers=WORKERS, lease_s=1e6, queue_age_max_s=1e6
        )
        self.now_s = 0.0
        self.made = dict.fromkeys(trace.session_ids, 0)
        self.epochs: dict[str, int] = {}
        self.owners: dict[str, str] = {}
        self.at_work: dict[str, dict[str, float]] = {}
        self.delivered = [0, 0, 0]
        self.ops = 0
        for number in range(WORKERS):
            fields = {name: getattr(hello(f"w{number}"), name) for name in m.WorkerHello.__struct_fields__}
            here = {"slot_count": K4.resident_max, "capacity": K4.capacity, "node": f"n{number}"}
            self.tell(f"w{number}", m.WorkerHello(**fields | here))
            self.at_work[f"w{number}"] = {}
        self.tell(GATEWAY, m.GatewayHello(gateway_epoch=1, pid=1, data_host="h", data_port=1))
        self.tell(GATEWAY, m.ChunksDelivered(chunks=0, reduced=0, late=0))

    def tell(self, source: str, message: m.Message) -> None:
        """A message as it comes off a socket; what workers are told they do at once."""
        effects = self.logic.on_message(source, m.decode(m.encode(message)), self.now_s)
        self.carry_out(effects)

    def carry_out(self, effects: list) -> None:
        for effect in effects:
            told = effect.message if isinstance(effect, Send) else None
            if isinstance(told, m.OpenSession):
                self.epochs[told.session_id], self.owners[told.session_id] = told.epoch, effect.to
                self.decide.asleep = True  # the simulator places at once and is told of nothing
                self.tell(effect.to, m.SessionOpened(session_id=told.session_id, epoch=told.epoch))
                self.decide.asleep = False
            elif isinstance(told, m.CloseSession):
                self.tell(effect.to, m.SessionReleased(session_id=told.session_id, epoch=told.epoch))

    def report(self, worker_id: str) -> None:
        work = self.at_work[worker_id]
        until_s = max(work.values(), default=self.now_s)
        held = [one for one, owner in self.owners.items() if owner == worker_id]
        sessions = {one: m.SessionWork(self.epochs[one], self.made[one], one in work) for one in held}
        busy_s = max(0.0, until_s - self.now_s)
        self.tell(worker_id, m.WorkReport(worker_id=worker_id, worker_epoch=1, busy_s=busy_s, sessions=sessions))

    def activity(self, session_id: str, active: bool) -> None:
        due_s = 2.5 * K4.chunk_target_s if active else None
        index = self.made[session_id]
        fields = {"due_index": index, "due_s": due_s, "every_s": K4.chunk_s if active else 0.0}
        self.tell(GATEWAY, m.SessionActivity(session_id=session_id, active=active, attached=active, **fields))

    def happen(self, kind: str, what: object) -> None:
        if kind in ("begin", "end"):
            row = what
            session_id, worker_id = self.trace.session_ids[int(row[b.R_SESSION])], f"w{int(row[b.R_WORKER])}"
            assert self.owners[session_id] == worker_id, "the two have placed it differently"
            if kind == "begin":
                self.at_work[worker_id][session_id] = int(row[b.R_FINISH]) / US
            else:
                del self.at_work[worker_id][session_id]
                self.made[session_id] += 1
                counted = (1, row[b.R_STEPS] < K4.denoise_steps, row[b.R_FINISH] > row[b.R_DEADLINE] + 2)
                self.delivered = [total + int(one) for total, one in zip(self.delivered, counted, strict=True)]
                chunks, reduced, late = self.delivered
                self.tell(GATEWAY, m.ChunksDelivered(chunks=chunks, reduced=reduced, late=late))
            self.report(worker_id)
        elif kind == "arrive":
            self.ops += 1
            self.tell(
                GATEWAY,
                m.CreateSession(
                    op_id=self.ops, session_id=what, tenant="t", model="shapes", seed=1, width=96, height=96,
                    steps=K4.denoise_steps, prompt="a red circle",
                ),
            )  # fmt: skip
        elif kind == "depart":
            self.ops += 1
            self.tell(GATEWAY, m.EndSession(op_id=self.ops, session_id=what, reason="left"))
            self.owners.pop(what)
        elif kind == "probe":
            self.carry_out(self.logic.on_timer(self.now_s))
        else:
            self.activity(what, kind == "active")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, ClusterView], dict[int, ClusterView]]:
    trace = story(tmp_path_factory.mktemp("story"))
    simulated, live = Recorded(), Recorded()
    run = simulate(trace, K4, simulated, Settings(workers=WORKERS, warmup_s=0.0, steps_floor=FLOOR))
    told = Live(trace, live)
    story_lines = [*instants(trace, run)]
    for (now_s, kind, what), (next_s, next_kind, _) in pairwise([*story_lines, (math.inf, "", None)]):
        told.now_s, live.asleep = now_s, next_s == now_s and next_kind != "begin"
        told.happen(kind, what)
    return simulated.seen, live.seen


def test_both_ticks_saw_the_story(both: tuple[dict[int, ClusterView], dict[int, ClusterView]]) -> None:
    """What is compared below happens in the story at all."""
    simulated, live = both
    assert len(set(simulated) & set(live)) > 500
    views = [simulated[key] for key in sorted(set(simulated) & set(live))]
    last = views[-1].observed
    assert last.reduced_chunks > 0 and last.late_chunks > 0 and last.periods_ended > 8 and last.chunks > 60
    assert any(view.sessions.in_chunk.any() for view in views)


SESSION_COLUMNS = (
    *("state", "active", "in_chunk", "worker", "target", "tenant", "size", "load", "state_bytes", "steps"),
    *("steps_full", "may_reduce", "active_since_s", "idle_since_s", "next_deadline_s", "moved_s", "transfer_end_s"),
)
WORKER_COLUMNS = (
    *("state", "node", "gpu_count", "profile", "request_s", "ready_at_s", "busy_until_s", "inbound", "outbound"),
)


def differences(both: tuple[dict, dict], part: str, name: str) -> list[tuple]:
    simulated, live = both
    found = []
    for probe in sorted(set(simulated) & set(live)):
        one, other = getattr(simulated[probe], part), getattr(live[probe], part)
        assert one.count == other.count, probe
        a, c = getattr(one, name)[: one.count], getattr(other, name)[: other.count]
        if part == "sessions":
            there = one.state[: one.count] != GONE
            a, c = a[there], c[there]
        same = np.isclose(a, c, rtol=0, atol=2e-6) | (a == c) if a.dtype.kind == "f" else a == c
        if not same.all():
            found.append((probe * PROBE_S + PROBE_AT_S, a.tolist(), c.tolist()))
    return found


@pytest.mark.parametrize("name", SESSION_COLUMNS)
def test_a_column_of_sessions_is_the_same(both: tuple[dict, dict], name: str) -> None:
    assert differences(both, "sessions", name)[:3] == []


@pytest.mark.parametrize("name", WORKER_COLUMNS)
def test_a_column_of_workers_is_the_same(both: tuple[dict, dict], name: str) -> None:
    assert differences(both, "workers", name)[:3] == []


def test_what_is_observed_is_the_same(both: tuple[dict, dict]) -> None:
    simulated, live = both
    for probe in sorted(set(simulated) & set(live)):
        expected, found = (dataclasses.asdict(one[probe].observed) for one in (simulated, live))
        assert found == pytest.approx(expected, abs=1e-5), probe


def test_what_a_worker_says_of_an_epoch_that_is_over_is_left_out(tmp_path: Path) -> None:
    trace = story(tmp_path)
    live = Live(trace, Recorded())
    for number in (0, 1):
        live.happen("arrive", sid(number))
        live.happen("active", sid(number))
    owner, row = live.owners[sid(0)], live.logic.sessions[sid(0)].row
    view = live.logic.view
    deadline_s = float(view.sessions.next_deadline_s[row])
    told = {"worker_id": owner, "worker_epoch": 1, "busy_s": 0.5}
    old = m.WorkReport(**told, sessions={sid(0): m.SessionWork(0, 7, True)})
    live.tell(owner, old)
    assert not view.sessions.in_chunk[row] and view.sessions.next_deadline_s[row] == deadline_s
    live.tell(owner, m.WorkReport(**told, sessions={sid(0): m.SessionWork(1, 1, True)}))
    assert view.sessions.in_chunk[row] and view.sessions.next_deadline_s[row] == deadline_s + K4.chunk_s
    live.tell(owner, m.WorkReport(**(told | {"worker_epoch": 0}), sessions={}))
    assert view.sessions.in_chunk[row], "a zombie's word"
    live.carry_out(live.logic.on_disconnect(owner, 0.1))
    assert not view.sessions.in_chunk[row], "whoever has it next has not begun"


def test_a_gateway_that_was_there_before_is_counted_from_what_it_says_first(tmp_path: Path) -> None:
    live = Live(story(tmp_path), Recorded())
    live.tell(GATEWAY, m.ChunksDelivered(chunks=5, reduced=1, late=1))
    live.tell(GATEWAY, m.GatewayHello(gateway_epoch=1, pid=1, data_host="h", data_port=1))
    live.tell(GATEWAY, m.ChunksDelivered(chunks=105, reduced=9, late=9))
    live.tell(GATEWAY, m.ChunksDelivered(chunks=108, reduced=10, late=9))
    seen = live.logic.view.observed
    assert (seen.chunks, seen.reduced_chunks, seen.late_chunks) == (8, 2, 1)
