"""A worker as the controller sees it: the answers of docs/moving.md, and nothing of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from turboserve.runtime import messages as m


@dataclass
class Held:
    epoch: int
    next_index: int = 0
    stopped_by: int = 0
    """The move it has stopped for; 0 while it goes on."""


@dataclass
class ScriptedWorker:
    """`points` is the node's arena: session -> chunks made; it outlives the worker. `nodes` are all arenas by the
    address under which points are awaited there, which here is the node's name."""

    hello: m.WorkerHello
    points: dict[str, int]
    slots: int = 2
    held: dict[str, Held] = field(default_factory=dict)
    prepared: dict[str, int] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    """Where a prepared session's pages are awaited."""
    fences: dict[str, int] = field(default_factory=dict)
    said: list[m.Message] = field(default_factory=list)
    """To the controller, not yet received."""
    heard: list[m.Message] = field(default_factory=list)
    """From the controller, not yet taken."""
    stopped: bool = False
    nodes: dict[str, dict[str, int]] = field(default_factory=dict)
    arrive: int = 1000
    """Points that still arrive of those that it sends to other nodes."""

    def connect(self) -> None:
        """Say hello and what it holds, as after every connect."""
        self.said, self.heard = [self.hello], []
        for session_id, held in self.held.items():
            if held.stopped_by:
                self._say_handed_over(session_id, held)
            else:
                self.said.append(m.SessionOpened(session_id=session_id, epoch=held.epoch, next_index=held.next_index))
        for session_id, move_id in self.prepared.items():
            self._say_prepared(session_id, move_id)

    def _say_prepared(self, session_id: str, move_id: int) -> None:
        address = self.addresses.get(session_id, "")
        self.said.append(m.SessionPrepared(session_id=session_id, move_id=move_id, address=address))

    def work(self) -> None:
        """One chunk of everything that runs; what has stopped says so again."""
        for session_id, held in self.held.items():
            if held.stopped_by:
                self._say_handed_over(session_id, held)
            else:
                held.next_index += 1
                self.points[session_id] = max(held.next_index, self.points.get(session_id, 0))

    def take(self, message: m.Message) -> None:
        match message:
            case m.OpenSession():
                self._open(message)
            case m.SuspendSession():
                held = self.held.get(message.session_id)
                if held is not None and held.epoch == message.epoch:
                    del self.held[message.session_id]
                    self._fence(message.session_id, message.epoch)
                    suspended = m.SessionSuspended(
                        session_id=message.session_id,
                        epoch=message.epoch,
                        next_index=held.next_index,
                        tier=message.tier,
                        point_bytes=1,
                    )
                    self.said.append(suspended)
            case m.PrepareSession():
                full = len(self.held) + len(self.prepared) >= self.slots and message.session_id not in self.prepared
                if full:
                    refused = m.PrepareRefused(
                        session_id=message.session_id, move_id=message.move_id, code="pool_exhausted", message="full"
                    )
                    self.said.append(refused)
                else:
                    if message.slot:
                        self.prepared[message.session_id] = message.move_id
                    self.addresses[message.session_id] = self.hello.node if message.awaits else ""
                    self._say_prepared(message.session_id, message.move_id)
            case m.DropPrepared():
                if self.prepared.get(message.session_id) == message.move_id:
                    del self.prepared[message.session_id]
            case m.HandOver():
                held = self.held.get(message.session_id)
                if held is not None and held.epoch == message.epoch and not self._carry(message, held.next_index):
                    kept = m.SessionKept(
                        session_id=message.session_id,
                        epoch=held.epoch,
                        move_id=message.move_id,
                        code="worker_failed",
                        message="cut",
                    )
                    self.said.append(kept)
                elif held is not None and held.epoch == message.epoch:
                    held.stopped_by = message.move_id
                    self._say_handed_over(message.session_id, held)
            case m.SendPoint():
                names = {"session_id": message.session_id, "move_id": message.move_id}
                if message.session_id in self.points and self._carry(message, self.points[message.session_id]):
                    self.said.append(m.PointSent(sent_bytes=1, **names))
                else:
                    self.said.append(m.PointKept(code="worker_failed", message="cut", **names))
            case m.ForgetPoint():
                if message.session_id not in self.held:
                    self.points.pop(message.session_id, None)
            case m.CloseSession():
                held = self.held.get(message.session_id)
                if held is not None and message.epoch >= held.epoch:
                    del self.held[message.session_id]
                self._fence(message.session_id, message.epoch)
                self.said.append(m.SessionReleased(session_id=message.session_id, epoch=message.epoch))
            case m.StopWorker():
                self.stopped = True

    def _carry(self, asked: m.SendPoint | m.HandOver, next_index: int) -> bool:
        """Its point to another node, when it is to go to one."""
        if not asked.target_address:
            return True
        self.arrive -= 1
        if self.arrive >= 0:
            self.nodes[asked.target_address][asked.session_id] = next_index
        return self.arrive >= 0

    def tell_points(self) -> None:
        told = m.PointsHeld(
            worker_id=self.hello.worker_id, worker_epoch=self.hello.worker_epoch, sessions=dict(self.points)
        )
        self.said.append(told)

    def _open(self, asked: m.OpenSession) -> None:
        session_id, held = asked.session_id, self.held.get(asked.session_id)
        if asked.epoch <= self.fences.get(session_id, -1) or (held is not None and asked.epoch <= held.epoch):
            assert held is None or asked.epoch != held.epoch, "one epoch was opened twice"
            refused = m.SessionRefused(session_id=session_id, epoch=asked.epoch, code="stale_epoch", message="old")
            self.said.append(refused)
            return
        if held is not None and not asked.adopt:
            del self.held[session_id]
            held = None
        taken = self.prepared.pop(session_id, None) if asked.move_id or held is None else None
        if held is None and taken is None and len(self.held) + len(self.prepared) >= self.slots:
            refused = m.SessionRefused(session_id=session_id, epoch=asked.epoch, code="pool_exhausted", message="full")
            self.said.append(refused)
            return
        next_index = held.next_index if held is not None else self.points.get(session_id, 0) if asked.restore else 0
        self.held[session_id] = Held(asked.epoch, next_index)
        opened = m.SessionOpened(
            session_id=session_id, epoch=asked.epoch, next_index=next_index, restored=bool(next_index)
        )
        self.said.append(opened)

    def _say_handed_over(self, session_id: str, held: Held) -> None:
        handed = m.HandedOver(
            session_id=session_id, epoch=held.epoch, move_id=held.stopped_by, next_index=held.next_index, point_bytes=1
        )
        self.said.append(handed)

    def _fence(self, session_id: str, epoch: int) -> None:
        self.fences[session_id] = max(epoch, self.fences.get(session_id, -1))
