"""Chunks that a worker of another machine encoded: what the gateway keeps, whom it gives them, what it asks again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest
import structlog
from gateway_harness import config_for
from test_gateway_moves import SID, VIEWER, Gateway

from turboserve.digest import next_digest
from turboserve.errors import CorruptState, ProtocolError
from turboserve.metrics import Metrics
from turboserve.runtime import channel
from turboserve.runtime import messages as m
from turboserve.server.attach_encoder import AttachEncoder
from turboserve.server.effects import Deliver, Effect
from turboserve.server.gateway import Gateway as RealGateway
from turboserve.server.links import WorkerListener
from turboserve.server.pacing import Pace
from turboserve.server.session_ring import MISFITS_MAX
from turboserve.server.stream_shape import StoredChunk, StreamShape
from turboserve.session import PublicState


class Formats(Gateway):
    """The gateway's logic, an owner that answers when the test says so, and what viewers were given."""

    def __init__(self) -> None:
        self.given: list[tuple[int, str, Any]] = []
        super().__init__()

    def take(self, effects: list[Effect]) -> None:
        super().take(effects)
        self.given += [
            (one.chunk.index, one.chunk.format, one.chunk.data) for one in effects if isinstance(one, Deliver)
        ]

    def watch(self, format: str, next_index: int = 0, token: str = "fresh") -> None:
        effects = self.logic.attach(VIEWER, SID, token, next_index, format, Pace.FREE, self.now_s)
        self.take(effects)
        self.commit()

    def asked(self) -> m.Credit:
        return next(one for _, one in reversed(self.to_worker) if isinstance(one, m.Credit))

    def answer(self, format: str | None = None, *, epoch: int | None = None, **changes: Any) -> None:
        """The owner answers the newest credit: in the format it names, unless the test says otherwise."""
        asked = self.asked()
        digest = ""
        for index in range(asked.chunk_index + 1):
            before, digest = digest, next_digest(digest, f"chunk {index}".encode())
        ready = m.ChunkReady(
            session_id=SID,
            epoch=asked.epoch if epoch is None else epoch,
            chunk_index=asked.chunk_index,
            digest=digest,
            digest_prev=before,
            frames=4,
            steps=4,
            prompt_version=1,
            format=format or asked.format,
        )
        ready = msgspec.structs.replace(ready, **changes)
        self.take(self.logic.chunk(ready, f"{ready.chunk_index} as {ready.format}", self.now_s))
        self.commit()

    def ack(self, index: int) -> bool:
        good, effects = self.logic.viewer(
            VIEWER, SID, lambda session: session.ack(VIEWER, index, self.now_s), self.now_s
        )
        self.take(effects)
        self.commit()
        return good


def opened(format: str = "h264") -> Formats:
    gateway = Formats()
    gateway.open()
    gateway.watch(format)
    # The credit that `open` let go was for the session's own format: its answer does not fit.
    gateway.answer()
    gateway.given.clear()
    return gateway


def full(format: str = "h264") -> Formats:
    """Four chunks made, given, and none acked."""
    gateway = opened(format)
    while len(gateway.session.ring) < 4:
        gateway.answer()
    assert [one.index for one in gateway.session.ring] == [0, 1, 2, 3]
    return gateway


def test_credits_name_what_the_viewer_receives_before_during_and_after_an_attach():
    gateway = Formats().open()
    assert gateway.asked().format == "raw"  # the session's own
    gateway.watch("jpeg")
    gateway.answer()
    assert gateway.asked().format == "jpeg"
    gateway.take(gateway.logic.detach(VIEWER, SID, gateway.now_s))
    gateway.answer()
    assert gateway.asked().format == "jpeg"  # who comes back wants what it had


def test_an_encoded_chunk_goes_to_the_viewer_as_it_came():
    gateway = full()
    assert gateway.given == [(index, "h264", f"{index} as h264") for index in range(1, 4)]
    assert gateway.session.counts.replayed == 0


def test_a_viewer_that_comes_with_another_format_gets_the_unacked_chunks_in_it():
    gateway = full()
    credits = len(gateway.credits())
    gateway.watch("mp4", 1)
    # The first chunk came raw, and lies before what is asked for; three are asked for again, one after the other.
    for index in (1, 2, 3):
        assert gateway.credits()[credits + index - 1 :] == [("w0", 1, index)]
        assert gateway.asked().format == "mp4"
        gateway.answer()
    assert gateway.given[-3:] == [(index, "mp4", f"{index} as mp4") for index in (1, 2, 3)]
    assert gateway.session.next_index == 4 and gateway.session.counts.replayed == 3
    gateway.ack(3)
    gateway.answer()
    assert gateway.given[-1] == (4, "mp4", "4 as mp4")  # and the stream goes on


def test_the_same_format_again_asks_for_nothing():
    gateway = full()
    credits = len(gateway.credits())
    gateway.given.clear()
    gateway.watch("h264", 1)
    assert len(gateway.credits()) == credits
    assert [index for index, _, _ in gateway.given] == [1, 2, 3]


def test_raw_frames_are_given_to_anybody():
    gateway = full("raw")
    credits = len(gateway.credits())
    gateway.given.clear()
    gateway.watch("h264", 0)
    assert len(gateway.credits()) == credits and [index for index, _, _ in gateway.given] == [0, 1, 2, 3]


def test_what_is_in_work_at_an_attach_comes_in_the_old_format_and_is_asked_for_again():
    gateway = opened()
    assert gateway.asked().chunk_index == 1 and gateway.asked().format == "h264"
    gateway.watch("jpeg", 1)
    gateway.answer("h264")
    assert gateway.session.next_index == 2 and gateway.given == []  # accepted, and not for this viewer
    assert (gateway.asked().chunk_index, gateway.asked().format) == (1, "jpeg")
    assert not gateway.ack(1)  # it was not given yet
    gateway.answer()
    assert gateway.given == [(1, "jpeg", "1 as jpeg")]
    assert gateway.ack(1)


def test_the_chunks_of_a_paused_and_of_a_complete_session_are_asked_for_too():
    for end in ("pause", "complete"):
        gateway = full()
        if end == "pause":
            gateway.take(gateway.logic.pause(SID, None, gateway.now_s))
        else:
            gateway.session.max_chunks = 4
        gateway.state(PublicState.SUSPENDED, 1, owned=False)
        gateway.watch("jpeg", 3)
        reports = [one for one in gateway.to_controller if isinstance(one, m.SessionActivity)]
        assert reports[-1].active  # the controller resumes it
        gateway.place(2, "w1", 4)
        assert gateway.credits()[-1] == ("w1", 2, 3)
        gateway.answer()
        assert gateway.given[-1] == (3, "jpeg", "3 as jpeg")


def test_a_new_owner_that_makes_them_again_gives_them_in_the_new_format():
    gateway = full()
    gateway.watch("jpeg", 1)
    gateway.controller(m.WorkerChanged(worker_id="w0", worker_epoch=1, state="lost"))
    gateway.place(2, "w1", 0)  # without a recovery point
    for index in range(4):
        assert gateway.credits()[-1] == ("w1", 2, index)
        gateway.answer()
    assert gateway.given[-3:] == [(index, "jpeg", f"{index} as jpeg") for index in (1, 2, 3)]


def test_an_owner_that_has_not_kept_one_is_told_of():
    gateway = full()
    gateway.watch("jpeg", 1)
    gateway.refuse(1, 1, 4, "index_passed")
    [stuck] = [one for one in gateway.to_controller if isinstance(one, m.SessionStuck)]
    assert (stuck.code, stuck.epoch) == ("ahead", 1)


def test_a_viewer_is_not_slow_while_its_chunks_are_made_anew():
    gateway = full()
    gateway.watch("jpeg", 1)
    gateway.state(PublicState.RECOVERING, 1, owned=False)
    gateway.wait(300.0)
    assert gateway.session.viewer is not None and gateway.session.full_s is None
    gateway.place(2, "w1", 4)
    for _ in range(3):
        gateway.answer()
    assert gateway.session.full_s == gateway.now_s  # from now on it is


def test_a_worker_that_keeps_sending_something_else_ends_the_session():
    gateway = full()
    gateway.watch("jpeg", 1)
    for _ in range(MISFITS_MAX + 1):
        assert gateway.session.ended_s is None
        gateway.answer("mp4")
    assert gateway.session.public() == PublicState.FAILED.value
    assert any("as mp4" in one.get("message", "") for one in gateway.to_viewer)


def test_a_chunk_that_is_another_one_the_second_time_is_never_shown():
    gateway = full()
    gateway.watch("jpeg", 1)
    given = len(gateway.given)
    gateway.answer(digest="ab" * 32)
    assert gateway.session.public() == PublicState.FAILED.value and len(gateway.given) == given


def test_a_worker_that_cannot_encode_fails_the_session_with_its_name():
    gateway = opened()
    gateway.refuse(1, 1, 2, m.NOT_ENCODED)
    assert gateway.session.public() == PublicState.FAILED.value
    assert any("w0 cannot encode chunk 1" in one.get("message", "") for one in gateway.to_viewer)


# ------------------------------------------------------------------ what is sent


SHAPE = StreamShape("m", "h", 16, 16, 12.0, 1, 4)


def stored(index: int, data: Any, format: str = "raw", init: bytes = b"") -> StoredChunk:
    return StoredChunk(index, 1, data, 4, 1, 4, "", "", 0.0, 0.0, 1.0, "", format, init)


def test_a_session_that_moves_between_nodes_stays_one_mp4():
    """Chunks encoded here, there, and here again; the other node's encoder has other parameters."""
    rng = np.random.default_rng(1)
    frames = [rng.integers(0, 256, (SHAPE.chunk_frames(index), 16, 16, 3), np.uint8) for index in range(5)]
    here = AttachEncoder("mp4", SHAPE, 0)
    times = [here.encode(stored(index, frames[index])) for index in (0, 1)]
    assert [one.init for one in times] == [b"", b""]
    there = here.encode(stored(2, b"theirs", "mp4", here.init))
    assert (there.data, there.init) == (b"theirs", b"")  # the same libraries: nothing to say
    other = here.encode(stored(3, b"theirs", "mp4", b"other init"))
    assert (other.data, other.init) == (b"theirs", b"other init")
    back = here.encode(stored(4, frames[4]))
    assert back.init == AttachEncoder("mp4", SHAPE, 4).init  # a player needs ours again
    fragment = back.data
    at = fragment.index(b"tfdt") + 8
    assert int.from_bytes(fragment[at : at + 8], "big") == 1000 * SHAPE.frames_before(4)


# ------------------------------------------------------------------ the data channel


@pytest.fixture
async def listener(tmp_path) -> AsyncIterator[tuple[RealGateway, int]]:
    gateway = RealGateway(config_for(tmp_path), Metrics(), structlog.get_logger())
    gateway.open_log(lambda logged: None)
    listening = WorkerListener(gateway, b"t" * 32)
    port = await listening.start()
    yield gateway, port
    listening.close()
    gateway.close()


HELLO = m.WorkerHello(
    worker_id="j-0",
    worker_epoch=1,
    pid=1,
    node="j-0",
    model="shapes",
    model_hash="h",
    numerics_id="n",
    device="cpu",
    device_class="cpu",
    slot_count=1,
    capacity=1,
)


def part(**changes: Any) -> m.FramePart:
    fields = {
        "session_id": SID,
        "epoch": 1,
        "chunk_index": 0,
        "offset": 0,
        "frames": 1,
        "height": 8,
        "width": 8,
        "format": "h264",
        "total_bytes": 4,
        "data": b"data",
    }
    return m.FramePart(**(fields | changes))


def ready(**changes: Any) -> m.ChunkReady:
    fields = {
        "session_id": SID,
        "epoch": 1,
        "chunk_index": 0,
        "digest": "00" * 32,
        "digest_prev": "",
        "frames": 1,
        "steps": 4,
        "prompt_version": 1,
        "format": "h264",
    }
    return m.ChunkReady(**(fields | changes))


@pytest.mark.parametrize(
    "messages",
    [
        [part(total_bytes=1 << 40)],
        [part(offset=4)],
        [part(), ready(format="jpeg")],
        [part(), ready(frames=2)],
        [part(format="raw", total_bytes=4)],
        [part(frames=4096, height=16384, width=16384)],
    ],
    ids=["too large", "wrong order", "other format", "other frames", "not raw", "too many frames"],
)
async def test_a_worker_that_breaks_the_rules_loses_its_channel_and_nobody_else_anything(listener, messages):
    gateway, port = listener
    taken: list[Any] = []
    gateway.chunk_ready = lambda message, data: taken.append((message, data))
    bad, good = [await channel.connect("127.0.0.1", port, b"t" * 32) for _ in range(2)]
    bad.send(HELLO)
    good.send(msgspec.structs.replace(HELLO, worker_id="j-1"))
    for message in messages:
        bad.send(message)
    async with asyncio.timeout(10):
        assert await bad.receive() is None  # closed
    good.send(part())
    good.send(ready())
    async with asyncio.timeout(10):
        while not taken:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert [data for _, data in taken] == [b"data"]
    assert set(gateway._workers) == {"j-1"}
    await good.close()


async def test_an_announcement_without_its_bytes_is_the_sessions_matter(listener):
    """A chunk that did not come whole is not shown; the channel stands."""
    gateway, port = listener
    corrupt: list[Any] = []
    gateway.chunk_corrupt = lambda message, error: corrupt.append(error)
    peer = await channel.connect("127.0.0.1", port, b"t" * 32)
    peer.send(HELLO)
    peer.send(part(total_bytes=5))
    peer.send(ready())
    async with asyncio.timeout(10):
        while not corrupt:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert isinstance(corrupt[0], CorruptState) and not isinstance(corrupt[0], ProtocolError)
    assert set(gateway._workers) == {"j-0"}
    await peer.close()
