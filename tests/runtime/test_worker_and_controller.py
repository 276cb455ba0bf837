"""The real controller's logic and the real worker's logic, message by message, without sockets between them."""

from __future__ import annotations

from test_controller_logic import create, end, make, sent, sid
from worker_logic_harness import HELLO, SPEC

from turboserve.runtime import controller_books as books
from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_books import CONTROLLER, Action, Beat, Send, Stop
from turboserve.runtime.worker_logic import WorkerLogic


class Pair:
    """Both logics; every message arrives at once, the engine does as it is told."""

    def __init__(self) -> None:
        self.controller = make()
        spec = SPEC.__class__(**{name: getattr(SPEC, name) for name in SPEC.__slots__} | {"width": 96, "height": 96})
        self.worker = WorkerLogic(HELLO, spec)
        self.connected = False
        self.now_s = 0.0
        self.held: dict[str, int] = {}
        self.to_gateway: list[m.Message] = []
        self.stopped = False

    def connect(self) -> None:
        self.connected = True
        self.obey(self.worker.on_connect(CONTROLLER, self.now_s))

    def disconnect(self) -> None:
        self.connected = False
        self.take(self.controller.on_disconnect("w0", self.now_s))
        self.obey(self.worker.on_disconnect(CONTROLLER, self.now_s))

    def from_gateway(self, message: m.Message) -> None:
        self.take(self.controller.on_message(books.GATEWAY, message, self.now_s))

    def take(self, effects) -> None:
        self.to_gateway += sent(effects, m.Message, books.GATEWAY)
        for message in sent(effects, m.Message, "w0"):
            if self.connected:
                self.obey(self.worker.on_message(CONTROLLER, message, self.now_s))

    def obey(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send) and action.to == CONTROLLER and self.connected:
                self.take(self.controller.on_message("w0", action.message, self.now_s))
            elif isinstance(action, e.Open):
                self.held[action.session_id] = action.epoch
                self.obey(self.worker.on_engine(e.Opened(action.session_id), action.epoch, self.now_s))
            elif isinstance(action, e.Close):
                del self.held[action.session_id]
                self.obey(self.worker.on_engine(e.Closed(action.session_id), action.epoch, self.now_s))
            elif isinstance(action, Stop):
                self.stopped = True
            else:
                assert isinstance(action, e.Hold | Beat | Send), action


def placed(pair: Pair) -> list[str]:
    return [one.session_id for one in pair.to_gateway if isinstance(one, m.SessionPlaced)]


def test_a_session_comes_and_goes():
    pair = Pair()
    pair.connect()
    assert pair.worker.lease_left_s(0.0) > 0
    pair.from_gateway(create(1))
    assert placed(pair) == [sid(1)] and pair.held == {sid(1): 1}
    pair.from_gateway(end(1))
    assert pair.held == {} and pair.controller.sessions == {}


def test_a_channel_that_was_down_costs_a_new_epoch_and_nothing_else():
    pair = Pair()
    pair.connect()
    pair.from_gateway(create(1))
    pair.disconnect()
    assert pair.held == {sid(1): 1}  # kept until somebody tells
    pair.connect()
    (live,) = pair.controller.sessions.values()
    assert pair.held == {sid(1): live.record.epoch} and live.record.epoch > 1
    pair.from_gateway(create(2))
    assert placed(pair)[-1] == sid(2) and sorted(pair.held) == [sid(1), sid(2)]


def test_a_session_that_ended_while_the_channel_was_down_is_freed_too():
    pair = Pair()
    pair.connect()
    pair.from_gateway(create(1))
    pair.disconnect()
    pair.from_gateway(end(1))
    pair.connect()
    assert pair.held == {} and pair.controller.sessions == {}


def test_a_worker_told_to_end_is_stopped_when_its_last_session_is_gone():
    pair = Pair()
    pair.connect()
    pair.from_gateway(create(1))
    pair.obey(pair.worker.on_terminate(1.0))
    assert not pair.stopped
    pair.from_gateway(create(2))
    assert placed(pair) == [sid(1)]  # none goes to a worker that drains
    pair.from_gateway(end(1))
    assert pair.stopped and pair.held == {}
