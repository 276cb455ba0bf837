"""The worker's protocol without I/O, and messages to it: for tests."""

from __future__ import annotations

import hashlib

import numpy as np

from turboserve.geometry import SlotGeometry
from turboserve.model.interface import ModelSpec
from turboserve.runtime import messages as m
from turboserve.runtime import worker_events as e
from turboserve.runtime.worker_books import (
    CONTROLLER,
    GATEWAY,
    Send,
)
from turboserve.runtime.worker_logic import WorkerLogic

LEASE_S = 2.0
SPEC = ModelSpec(
    name="tiny",
    model_hash="0" * 16,
    width=8,
    height=8,
    fps=12.0,
    chunk_frames_first=4,
    chunk_frames_rest=4,
    slot=SlotGeometry(1, 16, 1, 3),
    denoise_steps=4,
    denoise_steps_floor=1,
)
HELLO = m.WorkerHello(
    worker_id="w0",
    worker_epoch=7,
    pid=1,
    node="local",
    model="tiny",
    model_hash="0" * 16,
    numerics_id="n",
    device="cpu",
    device_class="cpu",
    slot_count=3,
    capacity=3,
)
SID = "b" * 26


def lease(epoch: int = 7) -> m.Lease:
    return m.Lease(lease_s=LEASE_S, worker_epoch=epoch)


def open_session(sid: str = SID, epoch: int = 1, **changes) -> m.OpenSession:
    values = {"seed": 1, "width": 8, "height": 8, "prompt": "p"} | changes
    return m.OpenSession(session_id=sid, epoch=epoch, **values)


def credit(index: int, sid: str = SID, epoch: int = 1, prompt: str = "p") -> m.Credit:
    return m.Credit(
        session_id=sid,
        epoch=epoch,
        chunk_index=index,
        steps=4,
        prompt=prompt,
        prompt_version=1,
        deadline_s=0.5,
    )


def made(index: int, sid: str = SID) -> e.FinishedChunk:
    digest = hashlib.sha256(f"{sid} {index}".encode()).hexdigest()
    return e.FinishedChunk(
        session_id=sid,
        chunk_index=index,
        frames=np.zeros((4, 8, 8, 3), np.uint8),
        digest=digest,
        digest_prev="" if index == 0 else hashlib.sha256(f"{sid} {index - 1}".encode()).hexdigest(),
        steps=4,
        prompt_version=1,
        wait_s=0.0,
        denoise_s=0.0,
        decode_s=0.0,
        batch_size=1.0,
    )


def kinds(actions) -> list[str]:
    return [type(one.message if isinstance(one, Send) else one).__name__ for one in actions]


def connected() -> WorkerLogic:
    """A worker with both channels and a lease until 2.0, at time 0."""
    logic = WorkerLogic(HELLO, SPEC)
    assert kinds(logic.on_connect(CONTROLLER, 0.0)) == ["Hold", "WorkerHello"]
    assert kinds(logic.on_connect(GATEWAY, 0.0)) == ["WorkerHello"]
    assert logic.on_message(CONTROLLER, lease(), 0.1) == [e.Hold(False)]
    return logic


def opened() -> WorkerLogic:
    logic = connected()
    assert kinds(logic.on_message(CONTROLLER, open_session(), 0.1)) == ["Open"]
    assert kinds(logic.on_engine(e.Opened(SID), 1, 0.1)) == ["SessionOpened"]
    return logic


def prepare(sid: str = SID, move_id: int = 1) -> m.PrepareSession:
    return m.PrepareSession(session_id=sid, move_id=move_id, seed=1, width=8, height=8, prompt="p")


def hand_over(epoch: int = 1, move_id: int = 1) -> m.HandOver:
    return m.HandOver(session_id=SID, epoch=epoch, move_id=move_id, target="w1")
