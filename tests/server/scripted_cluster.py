"""A controller and workers that do what a test tells them, behind the real gateway."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from turboserve.digest import next_digest
from turboserve.runtime import messages as m
from turboserve.server.gateway import Gateway


def frames_of(seed: int, prompt: str, steps: int, index: int, count: int, height: int, width: int) -> np.ndarray:
    """The scripted model: pixels that depend on every bound input."""
    key = hashlib.sha256(f"{seed}|{prompt}|{steps}|{index}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(key[:8], "little"))
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@dataclass
class Opened:
    create: m.CreateSession
    epoch: int = 0
    worker_id: str = ""
    digest: str = ""
    next_index: int = 0


@dataclass
class ScriptedCluster:
    """One controller and any number of workers. `chunk_s` is how long a chunk takes; None waits for `release`."""

    gateway: Gateway
    chunk_s: float | None = 0.005
    room: int = 64
    sessions: dict[str, Opened] = field(default_factory=dict)
    credits: dict[str, list[m.Credit]] = field(default_factory=lambda: defaultdict(list))
    accepted: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    seen: list[m.Message] = field(default_factory=list)
    held: list[tuple[str, m.Credit]] = field(default_factory=list)
    queue: list[str] = field(default_factory=list)
    workers: dict[str, str] = field(default_factory=dict)

    def start(self, workers: int = 1) -> None:
        self.gateway.controller_connected(self._as_controller)
        for number in range(workers):
            self.add_worker(f"w{number}")

    def add_worker(self, worker_id: str) -> None:
        self.workers[worker_id] = "ready"
        self.gateway.worker_connected(worker_id, lambda message: self._as_worker(worker_id, message))
        self.tell(m.WorkerChanged(worker_id=worker_id, worker_epoch=1, state="ready", numerics_id="scripted"))

    def tell(self, message: m.Message) -> None:
        self.gateway.from_controller(message)

    # ---------------------------------------------------------------- controller

    def _as_controller(self, message: m.Message) -> None:
        self.seen.append(message)
        asyncio.get_running_loop().call_soon(self._answer, m.decode(m.encode(message)))

    def _answer(self, message: Any) -> None:
        match message:
            case m.CreateSession():
                self.sessions[message.session_id] = Opened(message)
                active = sum(1 for one in self.sessions.values() if one.worker_id)
                if active >= self.room:
                    self.queue.append(message.session_id)
                    position = len(self.queue)
                    self.tell(m.OpDone(op_id=message.op_id, state="queued", queue_position=position))
                    return
                self.tell(m.OpDone(op_id=message.op_id, state="active"))
                self.place(message.session_id)
            case m.EndSession():
                self.sessions.pop(message.session_id, None)
                self.tell(m.OpDone(op_id=message.op_id, state="closed"))
                while self.queue and sum(1 for one in self.sessions.values() if one.worker_id) < self.room:
                    if (sid := self.queue.pop(0)) in self.sessions:
                        self.place(sid)
            case m.AdminCommand():
                self.tell(m.OpDone(op_id=message.op_id, code="conflict", message=f"cannot {message.kind}"))

    def place(self, sid: str, worker_id: str = "w0", next_index: int | None = None, **more: Any) -> None:
        one = self.sessions[sid]
        one.epoch += 1
        one.worker_id = worker_id
        if next_index is not None:
            one.next_index = next_index
            if next_index == 0:
                one.digest = ""
        self.tell(
            m.SessionPlaced(
                session_id=sid,
                epoch=one.epoch,
                worker_id=worker_id,
                numerics_id="scripted",
                next_index=one.next_index,
                **more,
            )
        )

    # ---------------------------------------------------------------- worker

    def _as_worker(self, worker_id: str, message: m.Message) -> None:
        message = m.decode(m.encode(message))
        if isinstance(message, m.ChunkAccepted):
            self.accepted[message.session_id].append(message.chunk_index)
            return
        assert isinstance(message, m.Credit)
        self.credits[message.session_id].append(message)
        if self.chunk_s is None:
            self.held.append((worker_id, message))
        else:
            asyncio.get_running_loop().call_later(self.chunk_s, self.finish, message)

    def release(self) -> None:
        """Finish the oldest held credit."""
        self.finish(self.held.pop(0)[1])

    def finish(self, credit: m.Credit) -> None:
        one = self.sessions.get(credit.session_id)
        if one is None or one.epoch != credit.epoch:
            return
        if credit.chunk_index != one.next_index:
            self.gateway.chunk_refused(
                m.ChunkRefused(
                    session_id=credit.session_id,
                    epoch=credit.epoch,
                    chunk_index=credit.chunk_index,
                    next_index=one.next_index,
                    code="index",
                )
            )
            return
        ready, pixels = self.make(credit, one)
        one.digest, one.next_index = ready.digest, credit.chunk_index + 1
        self.gateway.chunk_ready(ready, pixels)

    @staticmethod
    def make(credit: m.Credit, one: Opened) -> tuple[m.ChunkReady, np.ndarray]:
        asked = one.create
        pixels = frames_of(asked.seed, credit.prompt, credit.steps, credit.chunk_index, 4, asked.height, asked.width)
        ready = m.ChunkReady(
            session_id=credit.session_id,
            epoch=credit.epoch,
            chunk_index=credit.chunk_index,
            digest=next_digest(one.digest, pixels),
            digest_prev=one.digest,
            frames=len(pixels),
            steps=credit.steps,
            prompt_version=credit.prompt_version,
            batch_size=1.0,
        )
        return ready, pixels
