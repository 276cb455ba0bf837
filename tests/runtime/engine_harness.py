"""Drives an engine through a schedule and collects each session's digest chain."""

from __future__ import annotations

from dataclasses import dataclass, field

from tiny_model import TinyModel, session_id

from turboserve.model.interface import ChunkRequest, Control
from turboserve.runtime.cost_model import MeasuredCost
from turboserve.runtime.engine import Engine
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.worker_events import BrokenSession, FinishedChunk


@dataclass
class Driven:
    """An engine on a hand-cranked clock; `digests[name]` is the chain so far."""

    slots: int = 8
    device: str = "cpu"
    cost: MeasuredCost | None = None
    now_s: float = 0.0
    digests: dict[str, list[str]] = field(default_factory=dict)
    finished: list[FinishedChunk] = field(default_factory=list)
    broken: dict[str, BrokenSession] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = TinyModel(self.device)
        self.pool = KvPool(self.model.state_layout(), self.slots, self.device)
        # A large fixed cost makes packing worth while, so that passes really are shared.
        self.cost = self.cost or MeasuredCost(1e-2, 1e-6, segment_max=self.slots)
        self.engine = Engine(self.model, self.pool, self.cost, clock=lambda: self.now_s)

    def open(self, name: str, seed: int | None = None) -> None:
        self.digests[name] = []
        seed = sum(name.encode()) if seed is None else seed
        self.engine.open(session_id(name), seed, Control(prompt_of(name, 0)))

    def credit(self, name: str, index: int, steps: int = 4, deadline_s: float = 1e9) -> None:
        self.engine.submit(session_id(name), request_of(name, index, steps), deadline_s)

    def run_pass(self) -> None:
        self.now_s += 0.01
        for event in self.engine.run_pass():
            name = next(one for one in self.digests if session_id(one) == event.session_id)
            if isinstance(event, BrokenSession):
                self.broken[name] = event
            else:
                assert event.digest_prev == (self.digests[name][-1] if self.digests[name] else "")
                assert event.chunk_index == len(self.digests[name])
                self.digests[name].append(event.digest)
                self.finished.append(event)
        self.pool.check()

    def run_until_idle(self) -> None:
        while self.engine.has_work:
            self.run_pass()

    def chunks(self, name: str, count: int) -> list[str]:
        """Run `count` chunks of one session and nothing else."""
        for index in range(len(self.digests[name]), len(self.digests[name]) + count):
            self.credit(name, index)
            self.run_until_idle()
        return self.digests[name]


def prompt_of(name: str, index: int) -> str:
    """A session's prompt for a chunk: it changes in mid-stream, at chunk 3."""
    return f"{name} {'first' if index < 3 else 'second'}"


def request_of(name: str, index: int, steps: int = 4) -> ChunkRequest:
    return ChunkRequest(index, steps, Control(prompt_of(name, index), version=1 if index < 3 else 2))


def alone(name: str, count: int) -> list[str]:
    """The chain of a session that has an engine to itself."""
    driven = Driven(slots=1)
    driven.open(name)
    return driven.chunks(name, count)
