"""The controller's state machine: admission, placement, queue, loss of workers, and messages that come twice."""

from __future__ import annotations

import itertools
from dataclasses import replace

from turboserve.errors import Conflict
from turboserve.orchestrator import plan as plans
from turboserve.orchestrator import view as views
from turboserve.orchestrator.latency import LatencyProfile
from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import GATEWAY, Drop, Send
from turboserve.runtime.controller_logic import ControllerLogic
from turboserve.runtime.controller_opening import REFUSALS_MAX
from turboserve.session import SessionRecord, SessionState

CAPACITY = 2


class MemoryStore:
    """The directory's rules without its file. Rows are [epoch, owner, state, strikes, (move_id, target)]."""

    def __init__(self) -> None:
        self.rows: dict[str, list] = {}
        self.requests: dict[str, tuple[SessionRecord, m.CreateSession]] = {}
        self.numbers: dict[str, int] = {}
        self.numerics: dict[str, tuple[str, int]] = {}
        self.wishes: dict[int, list[tuple[str, str]]] = {}
        self.points: dict[str, str] = {}

    def insert(self, record: SessionRecord, request: bytes = b"") -> None:
        if record.session_id in self.rows:
            raise Conflict("exists")
        self.rows[record.session_id] = [record.epoch, record.owner, record.state, 0, (0, "")]
        self.requests[record.session_id] = (record, m.decode(request))

    def own(self, session_id: str, seen_epoch: int, owner: str | None, state: SessionState) -> int:
        if self.rows[session_id][0] != seen_epoch:
            raise Conflict("epoch")
        self.rows[session_id][:3] = [seen_epoch + 1, owner, state]
        return seen_epoch + 1

    def set_state(self, session_id: str, state: SessionState, reason: str = "", strikes: int | None = None) -> None:
        self.rows[session_id][2] = state
        if strikes is not None:
            self.rows[session_id][3] = strikes

    def set_move(self, session_id: str, move_id: int, target: str) -> None:
        self.rows[session_id][4] = (move_id, target)

    def set_numerics(self, session_id: str, numerics_id: str, approximate_from: int) -> None:
        self.numerics[session_id] = (numerics_id, approximate_from)

    def set_point(self, session_id: str, node: str) -> None:
        self.points[session_id] = node

    def forget(self, session_id: str) -> None:
        del self.rows[session_id], self.requests[session_id]
        self.points.pop(session_id, None)

    def record_wish(self, op_id: int, wishes: list[tuple[str, str]]) -> None:
        assert op_id not in self.wishes
        self.wishes[op_id] = wishes

    def recorded_wish(self, op_id: int) -> list[tuple[str, str]] | None:
        return self.wishes.get(op_id)

    def next_epoch(self, name: str) -> int:
        self.numbers[name] = self.numbers.get(name, 0) + 1
        return self.numbers[name]

    def stored(self) -> list[tuple[SessionRecord, m.CreateSession]]:
        """What a controller that starts reads."""
        found = []
        for session_id, (record, request) in self.requests.items():
            epoch, owner, state, strikes, _ = self.rows[session_id]
            found.append((replace(record, epoch=epoch, owner=owner, state=state, strikes=strikes, history=[]), request))
        return found

    def moves(self) -> dict[str, tuple[int, str]]:
        return {key: row[4] for key, row in self.rows.items() if row[4][0]}


def fill_in_order(view: views.ClusterView, memory: object, now_s: float):
    """A scheduler small enough to foresee: first worker with room, at most CAPACITY sessions each."""
    actions: list[plans.Action] = []
    workers, sessions = view.workers, view.sessions
    ready = [row for row in range(workers.count) if workers.state[row] == views.READY]
    ends = (sessions.worker[: sessions.count], sessions.target[: sessions.count])
    held = {row: sum(int((end == row).sum()) for end in ends) for row in ready}
    for session in sorted(view.open_sessions(), key=lambda one: one.row):
        if session.state not in ("new", "host") or not session.active:
            continue
        roomy = [row for row in ready if held[row] < CAPACITY]
        if roomy:
            held[roomy[0]] += 1
            act = plans.Resume if session.state == "host" else plans.Place
            actions.append(act(session.id, workers.ids[roomy[0]], "first with room"))
        else:
            actions.append(plans.Queue(session.id, "no room"))
    return plans.Plan(tuple(actions)), memory


def profile() -> LatencyProfile:
    return LatencyProfile(
        name="test", chunk_s=1, chunk_target_s=1, batch_latency_s=(0.5, 1.0), capacity=2, resident_max=2,
        denoise_steps=4, denoise_steps_floor=4, step_latency_share=0.8,
    )  # fmt: skip


def make(**options) -> ControllerLogic:
    return ControllerLogic(
        options.pop("store", None) or MemoryStore(), fill_in_order, profile(), **({"node": "n"} | options)
    )


def hello(worker_id: str, epoch: int = 1) -> m.WorkerHello:
    return m.WorkerHello(
        worker_id=worker_id, worker_epoch=epoch, pid=1, node="n", model="shapes", model_hash="h", numerics_id="num",
        device="cpu", device_class="cpu", slot_count=CAPACITY, capacity=CAPACITY,
    )  # fmt: skip


def sid(number: int) -> str:
    return f"{number:026d}"


_ops = itertools.count(1)


def create(number: int, op_id: int | None = None) -> m.CreateSession:
    return m.CreateSession(
        op_id=op_id or next(_ops), session_id=sid(number), tenant="t", model="shapes", seed=1, width=96, height=96,
        steps=4, prompt="a red circle",
    )  # fmt: skip


def end(number: int) -> m.EndSession:
    return m.EndSession(op_id=next(_ops), session_id=sid(number), reason="asked")


def sent(effects, kind, to=None):
    return [
        one.message
        for one in effects
        if isinstance(one, Send) and isinstance(one.message, kind) and to in (None, one.to)
    ]


def started(logic: ControllerLogic, *workers: str) -> None:
    for worker_id in workers:
        logic.on_message(worker_id, hello(worker_id), 0.0)


def test_a_session_is_placed_opened_and_closed():
    logic = make()
    started(logic, "w0")
    effects = logic.on_message(GATEWAY, create(1), 1.0)
    (opened,) = sent(effects, m.OpenSession, "w0")
    (done,) = sent(effects, m.OpDone)
    assert (opened.epoch, done.code, done.state, done.queue_position) == (1, "", "active", -1)
    effects = logic.on_message("w0", m.SessionOpened(session_id=sid(1), epoch=1), 1.1)
    (placed,) = sent(effects, m.SessionPlaced)
    assert (placed.worker_id, placed.epoch, placed.numerics_id) == ("w0", 1, "num")
    effects = logic.on_message(GATEWAY, end(1), 2.0)
    assert sent(effects, m.CloseSession, "w0")
    assert logic.sessions, "it is not gone before the worker has let go"
    effects = logic.on_message("w0", m.SessionReleased(session_id=sid(1), epoch=1), 2.1)
    assert sent(effects, m.SessionState)[-1].state == "closed"
    assert not logic.sessions and not logic._store.rows


def test_queue_positions_move_up_and_the_queue_is_bounded():
    logic = make(queue_max=2)
    started(logic, "w0")
    answers = [sent(logic.on_message(GATEWAY, create(number), 1.0), m.OpDone)[0] for number in range(5)]
    assert [one.queue_position for one in answers[:4]] == [-1, -1, 1, 2]
    assert (answers[4].code, answers[4].retry_after_s > 0) == ("overloaded", True)
    for number in (0, 1):
        logic.on_message("w0", m.SessionOpened(session_id=sid(number), epoch=1), 1.5)
    logic.on_message(GATEWAY, end(0), 2.0)
    effects = logic.on_message("w0", m.SessionReleased(session_id=sid(0), epoch=1), 2.1)
    assert sent(effects, m.OpenSession)[0].session_id == sid(2)
    states = {one.session_id: one for one in sent(effects, m.SessionState)}
    assert states[sid(3)].queue_position == 1


def test_an_operation_repeated_is_answered_as_the_first_time():
    logic = make()
    started(logic, "w0")
    first = sent(logic.on_message(GATEWAY, create(1, op_id=77), 1.0), m.OpDone)
    effects = logic.on_message(GATEWAY, create(1, op_id=77), 1.2)
    assert sent(effects, m.OpDone) == first
    assert not sent(effects, m.OpenSession)
    assert sent(logic.on_message(GATEWAY, create(1), 1.3), m.OpDone)[0].code == "conflict"


def test_the_sessions_of_a_lost_worker_wait_and_go_to_the_next():
    for how in ("disconnect", "lease"):
        logic = make(lease_s=2.0)
        started(logic, "w0")
        logic.on_message(GATEWAY, create(1), 1.0)
        logic.on_message("w0", m.SessionOpened(session_id=sid(1), epoch=1), 1.0)
        effects = logic.on_disconnect("w0", 1.5) if how == "disconnect" else logic.on_timer(60.0)
        state = sent(effects, m.SessionState)[-1]
        assert (state.state, state.owned, state.epoch) == ("recovering", False, 2)
        assert sent(effects, m.WorkerChanged)[0].state == "lost"
        assert logic.view.workers.state[0] == views.ABSENT
        (opened,) = sent(logic.on_message("w1", hello("w1"), 61.0), m.OpenSession, "w1")
        assert (opened.epoch, opened.restore) == (3, True)


def test_heartbeats_keep_the_lease():
    logic = make(lease_s=2.0)
    started(logic, "w0")
    for now_s in range(1, 20):
        beat = m.Heartbeat(
            worker_id="w0", worker_epoch=1, active=0, resident=0, slots_free=2, busy_share=0, chunk_latency_ms=0,
            batch_size_mean=0, chunks=0, passes=0, device_bytes=0,
        )  # fmt: skip
        assert sent(logic.on_message("w0", beat, float(now_s)), m.Lease)[0].lease_s == 2.0
        assert not [one for one in logic.on_timer(float(now_s)) if isinstance(one, Drop)]
    assert "w0" in logic.workers


def test_a_refusal_for_good_counts_and_one_for_lack_of_room_does_not():
    for code, end_state in (("invalid_request", "failed"), ("pool_exhausted", "queued")):
        logic = make(lease_s=100.0)
        started(logic, "w0")
        effects = logic.on_message(GATEWAY, create(1), 1.0)
        now_s = 2.0
        for turn in range(REFUSALS_MAX):
            epoch = sent(effects, m.OpenSession)[0].epoch
            refused = m.SessionRefused(session_id=sid(1), epoch=epoch, code=code, message="no")
            effects = logic.on_message("w0", refused, now_s)
            if turn < REFUSALS_MAX - 1:
                assert sent(effects, m.SessionState)[-1].state == "queued"
                assert not sent(effects, m.OpenSession), "not again at once"
                now_s += 6.0
                effects = logic.on_timer(now_s)
        assert sent(effects, m.SessionState)[-1].state == end_state


def test_stale_epochs_are_ignored():
    logic = make()
    started(logic, "w0")
    logic.on_message(GATEWAY, create(1), 1.0)
    assert logic.on_message("w0", m.SessionOpened(session_id=sid(1), epoch=9), 1.1) == []
    assert logic.on_message("w1", m.SessionOpened(session_id=sid(1), epoch=1), 1.1) == []
    assert logic.sessions[sid(1)].record.state is SessionState.LOADING


def test_a_gateway_that_comes_back_hears_where_everything_is():
    logic = make()
    started(logic, "w0")
    logic.on_message(GATEWAY, create(1), 1.0)
    logic.on_message("w0", m.SessionOpened(session_id=sid(1), epoch=1), 1.1)
    back = m.GatewayHello(gateway_epoch=2, pid=1, data_host="127.0.0.1", data_port=1)
    effects = logic.on_message(GATEWAY, back, 5.0)
    assert sent(effects, m.SessionPlaced)[0].session_id == sid(1)
    assert sent(effects, m.WorkerChanged)[0].worker_id == "w0"


def test_drain_lets_sessions_end_and_then_stops_the_worker():
    logic = make()
    started(logic, "w0")
    logic.on_message(GATEWAY, create(1), 1.0)
    logic.on_message("w0", m.SessionOpened(session_id=sid(1), epoch=1), 1.1)
    drain = m.AdminCommand(op_id=next(_ops), kind="drain", worker_id="w0")
    effects = logic.on_message(GATEWAY, drain, 2.0)
    assert not sent(effects, m.StopWorker)
    assert sent(logic.on_message(GATEWAY, create(2), 2.1), m.OpDone)[0].state == "queued"
    logic.on_message(GATEWAY, end(1), 3.0)
    effects = logic.on_message("w0", m.SessionReleased(session_id=sid(1), epoch=1), 3.1)
    assert sent(effects, m.StopWorker, "w0")


def test_a_message_for_somebody_else_drops_its_sender():
    effects = make().on_message("w0", m.Lease(lease_s=1, worker_epoch=1), 0.0)
    assert isinstance(effects[0], Drop)


def test_snapshot_is_what_the_page_needs():
    logic = make()
    started(logic, "w0")
    logic.on_message(GATEWAY, create(1), 1.0)
    shown = logic.snapshot()
    assert shown["workers"][0] | {"group": "w0", "gpu_count": 0} == shown["workers"][0]
    assert shown["workers"][0] | {"id": "w0", "state": "ready", "resident": 1, "capacity": 2} == shown["workers"][0]
    assert shown["sessions"] == {"active": 1}
    assert all("reason" in one for one in shown["decisions"])
    (listed,) = shown["session_list"]
    expected = {"state": "active", "stage": "loading", "worker": "w0", "tier": "device", "epoch": 1, "active": True}
    assert listed | expected == listed
    assert {"device", "host", "disk"} == set(listed["bytes"]) and shown["sessions_not_listed"] == 0
    assert shown["clock"]["unix_s"] > 1e9 > shown["workers"][0]["ready_s"]
