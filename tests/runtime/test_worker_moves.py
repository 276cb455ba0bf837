"""Real worker processes on one arena, a scripted controller and gateway: moves, and deaths at every step of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Coroutine

import pytest
from engine_harness import alone, prompt_of
from point_harness import SLAB_BYTES
from tiny_model import session_id
from worker_peers import Peers

from turboserve.runtime import messages as m
from turboserve.runtime.arena import Arena, create_arena

COUNT = 14
B = session_id("b")


@pytest.fixture(scope="module")
def chain(deterministic):
    return alone("b", COUNT)


class Pair:
    """Two workers of one node and one stream that they make between them."""

    def __init__(self) -> None:
        self.fd = create_arena(4 << 20, name="test", partition_count=2, slab_bytes=SLAB_BYTES)
        self.digests: list[str] = []
        self.peers: list[Peers] = []
        self.epoch = 1
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Pair:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        os.close(self.fd)

    async def start(self, failpoints: str = "", **changes: object) -> Peers:
        one = await self._stack.enter_async_context(Peers())
        partition = len(self.peers)
        self.peers.append(one)
        await one.start_worker(
            worker_id=f"w{partition}",
            arena_fd=self.fd,
            arena_partition=partition,
            failpoints=failpoints,
            **changes,
        )
        return one

    def open(self, on: Peers, **changes: object) -> None:
        on.controller.send(
            m.OpenSession(
                session_id=B,
                epoch=self.epoch,
                seed=sum(b"b"),
                width=8,
                height=8,
                prompt=prompt_of("b", 0),
                **changes,
            )
        )

    def credit(self, on: Peers, index: int) -> None:
        on.credit(B, index, prompt_of("b", index), epoch=self.epoch, version=1 if index < 3 else 2)

    async def stream(self, on: Peers, until: int, *, placed_at: int | None = None) -> None:
        """Take chunks as the gateway does: one credit at a time, from where the worker stands if that is earlier."""
        index = len(self.digests) if placed_at is None else min(placed_at, len(self.digests))
        while index < until:
            self.credit(on, index)
            ready = await on.next_ready()
            while ready.chunk_index != index or ready.epoch != self.epoch:
                ready = await on.next_ready()  # what an earlier epoch said
            assert index == len(self.digests) or ready.digest == self.digests[index]
            if index == len(self.digests):
                self.digests.append(ready.digest)
            [*_, record] = on.chunks[(B, index)]
            record.verify()
            on.accept(B, index, epoch=self.epoch)
            index += 1

    async def answer(self, on: Peers, kind: type[m.Message]) -> m.Message:
        """The next message of that kind; others are stepped over."""
        async with asyncio.timeout(20):
            while not isinstance(message := await on.told.get(), kind):
                pass
        return message

    async def restored_on(self, on: Peers) -> int:
        self.epoch += 1
        self.open(on, restore=True)
        opened = await self.answer(on, m.SessionOpened)
        assert opened.epoch == self.epoch
        return opened.next_index

    async def migrate(self, source: Peers, target: Peers, move_id: int) -> None:
        prepare = {"session_id": B, "seed": sum(b"b"), "width": 8, "height": 8, "prompt": prompt_of("b", 0)}
        target.controller.send(m.PrepareSession(move_id=move_id, **prepare))
        assert (await self.answer(target, m.SessionPrepared)).move_id == move_id
        source.controller.send(m.HandOver(session_id=B, epoch=self.epoch, move_id=move_id, target="other"))
        handed = await self.answer(source, m.HandedOver)
        former = self.epoch
        placed_at = await self.restored_on(target)
        assert placed_at == handed.next_index
        source.controller.send(m.CloseSession(session_id=B, epoch=former))
        assert (await self.answer(source, m.SessionReleased)).epoch == former
        await self.stream(target, len(self.digests), placed_at=placed_at)

    async def stream_then_migrate(self, source: Peers, target: Peers, count: int) -> None:
        await self.stream(source, count)
        await self.migrate(source, target, move_id=1)

    async def ledger(self) -> None:
        """All bytes are free or of the session's one point; dropping it leaves nothing. No worker is left after it: one
        still writes the last chunk's point when its stream is over."""
        for peers in self.peers:
            peers.process.kill()
            await gone(peers)
        with Arena.map(self.fd) as arena:
            arena.check()
            for extent in arena.find(B):
                arena.free(extent)
            ledger = arena.ledger()
            assert ledger.free_bytes + ledger.reserved_bytes == ledger.total_bytes


async def gone(peers: Peers) -> int:
    return await asyncio.to_thread(peers.process.wait, 60)


async def until_gone(peers: Peers, doing: Coroutine[None, None, None]) -> None:
    """Do something in the midst of which a worker kills itself; it is left where it stands then."""
    task = asyncio.create_task(doing)
    assert await gone(peers) == -9
    await asyncio.wait([task], timeout=0.5)  # what the worker had said before may still be on its way
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_stream_moves_to_and_fro_is_suspended_and_goes_on_with_the_same_chain(chain):
    async with Pair() as pair:
        a, b = await asyncio.gather(pair.start(), pair.start())
        pair.open(a)
        await pair.answer(a, m.SessionOpened)
        await pair.stream(a, 3)
        await pair.migrate(a, b, move_id=1)
        await pair.stream(b, 5)
        await pair.migrate(b, a, move_id=2)
        await pair.stream(a, 7)
        # A move that is given up: the source goes on as it stood.
        a.controller.send(m.HandOver(session_id=B, epoch=pair.epoch, move_id=3, target="w1"))
        handed = await pair.answer(a, m.HandedOver)
        again = await pair.answer(a, m.HandedOver)  # it says so at each heartbeat until it is told
        assert handed == again and handed.next_index == 7
        pair.credit(a, 7)
        refused = await asyncio.wait_for(a.refused.get(), 10)
        assert (refused.code, refused.next_index) == ("moving", 7)
        pair.epoch += 1
        pair.open(a, adopt=True)
        assert (await pair.answer(a, m.SessionOpened)).next_index == 7
        await pair.stream(a, 9)
        # Suspended here, resumed there.
        a.controller.send(m.SuspendSession(session_id=B, epoch=pair.epoch))
        suspended = await pair.answer(a, m.SessionSuspended)
        assert (suspended.next_index, suspended.tier) == (9, "host") and suspended.point_bytes > 0
        a.controller.send(m.SuspendSession(session_id=B, epoch=pair.epoch))
        assert await pair.answer(a, m.SessionSuspended) == suspended
        await asyncio.sleep(0.25)
        assert (a.beats[-1].resident, a.beats[-1].slots_free) == (0, 4)
        assert await pair.restored_on(b) == 9
        await pair.stream(b, COUNT)
        assert pair.digests == chain
        assert b.beats[-1].points > 0 and b.beats[-1].points_refused == 0
        b.controller.send(m.CloseSession(session_id=B, epoch=pair.epoch))
        await pair.answer(b, m.SessionReleased)
        await pair.ledger()


async def test_a_worker_killed_in_mid_chunk_is_succeeded_with_the_same_chain(chain):
    async with Pair() as pair:
        a, b = await asyncio.gather(pair.start(), pair.start())
        pair.open(a)
        await pair.answer(a, m.SessionOpened)
        await pair.stream(a, 6)
        pair.credit(a, 6)
        await asyncio.sleep(0.003)
        a.process.kill()
        placed_at = await pair.restored_on(b)
        assert 5 <= placed_at <= 7
        await pair.stream(b, COUNT, placed_at=placed_at)
        assert pair.digests == chain
        await pair.ledger()


async def test_a_prepared_slot_nobody_asks_for_is_freed():
    async with Pair() as pair:
        a = await pair.start(prepared_keep_s=0.4, slots=1, capacity=1)
        ask = {"seed": 1, "width": 8, "height": 8, "prompt": "p"}
        a.controller.send(m.PrepareSession(session_id=B, move_id=1, **ask))
        await pair.answer(a, m.SessionPrepared)
        a.controller.send(m.PrepareSession(session_id=session_id("c"), move_id=2, **ask))
        assert (await pair.answer(a, m.PrepareRefused)).code == "pool_exhausted"
        await asyncio.sleep(0.2)
        assert (a.beats[-1].slots_free, a.beats[-1].resident) == (0, 1)
        await asyncio.sleep(0.5)
        assert a.beats[-1].slots_free == 1


SOURCE_DIES = [
    "worker.chunk.emitted:kill@7",
    "worker.chunk.committed:kill@7",
    "worker.emit.ring:kill@7",
    "worker.emit.sent:kill@7",
    "worker.point.pages_written:kill@7",
    "worker.point.committed:kill@7",
    "worker.stop.boundary:kill",
    "worker.stop.point:kill",
    "worker.say.HandedOver:kill",
    "worker.say.SessionReleased:kill",
]


@pytest.mark.soak
@pytest.mark.parametrize("failpoint", SOURCE_DIES)
async def test_the_source_dies_at_any_step_of_a_move(chain, failpoint):
    """Whatever the controller had heard, the session goes on elsewhere from what lies in the arena."""
    async with Pair() as pair:
        a, b = await asyncio.gather(pair.start(failpoint), pair.start())
        pair.open(a)
        await pair.answer(a, m.SessionOpened)
        await until_gone(a, pair.stream_then_migrate(a, b, 7))
        if pair.epoch == 1:  # the move had not been committed
            b.controller.send(m.DropPrepared(session_id=B, move_id=1))
            placed_at = await pair.restored_on(b)
            await pair.stream(b, COUNT, placed_at=placed_at)
        await pair.stream(b, COUNT)
        assert pair.digests == chain
        await pair.ledger()


TARGET_DIES = [
    "worker.prepare.slot:kill",
    "worker.prepare.read:kill",
    "worker.say.SessionPrepared:kill",
    "worker.open.begun:kill",
    "worker.open.read:kill",
    "worker.say.SessionOpened:kill",
]


@pytest.mark.soak
@pytest.mark.parametrize("failpoint", TARGET_DIES)
async def test_the_target_dies_at_any_step_of_a_move(chain, failpoint):
    async with Pair() as pair:
        a, b = await asyncio.gather(pair.start(), pair.start(failpoint))
        pair.open(a)
        await pair.answer(a, m.SessionOpened)
        await pair.stream(a, 7)
        await until_gone(b, pair.migrate(a, b, move_id=1))
        pair.epoch += 1
        pair.open(a, adopt=True, restore=True)
        opened = await pair.answer(a, m.SessionOpened)
        await pair.stream(a, COUNT, placed_at=opened.next_index)
        assert pair.digests == chain
        await pair.ledger()


SUSPEND_DIES = [
    "worker.stop.boundary:kill",
    "worker.stop.point:kill",
    "worker.stop.freed:kill",
    "worker.say.SessionSuspended:kill",
]


@pytest.mark.soak
@pytest.mark.parametrize("failpoint", SUSPEND_DIES)
async def test_a_worker_dies_at_any_step_of_a_suspend(chain, failpoint):
    async with Pair() as pair:
        a, b = await asyncio.gather(pair.start(failpoint), pair.start())
        pair.open(a)
        await pair.answer(a, m.SessionOpened)
        await pair.stream(a, 7)
        a.controller.send(m.SuspendSession(session_id=B, epoch=1))
        assert await gone(a) == -9
        await pair.stream(b, COUNT, placed_at=await pair.restored_on(b))
        assert pair.digests == chain
        await pair.ledger()
