"""Points between two workers' arenas over sockets: what is awaited comes whole, what is not is refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
from types import SimpleNamespace

import pytest
import structlog

from turboserve.errors import ConfigError, ProtocolError
from turboserve.runtime import worker_books as b
from turboserve.runtime.arena import Arena, create_arena
from turboserve.runtime.channel import new_token
from turboserve.runtime.point_links import PointLinks, own_address, split_address
from turboserve.runtime.recovery_store import RecoveryPoint, RecoveryStore
from turboserve.runtime.worker_config import WorkerConfig

SID, OTHER = "a" * 26, "c" * 26
PAGE_BYTES = 3 << 10
TOKEN = new_token()


class Node:
    """One node's arena, its worker's links, and what those said."""

    def __init__(self, bytes_: int = 1 << 20, host: str = "127.0.0.1", timeout_s: float = 5.0, token: bytes = TOKEN):
        fd = create_arena(bytes_, partition_count=1, slab_bytes=4096)
        self.arena = Arena.map(fd, partition=0, owner_epoch=1)
        os.close(fd)
        self.store = RecoveryStore(self.arena)
        self.events: asyncio.Queue[b.PointEvent] = asyncio.Queue()
        self.told: list[dict[str, int]] = []
        log = structlog.get_logger()
        self.links = PointLinks(
            self.store, token, lambda: host, self.events.put_nowait, self.told.append, log, timeout_s=timeout_s
        )

    async def event(self, kind: type) -> b.PointEvent:
        found = await asyncio.wait_for(self.events.get(), 10)
        assert isinstance(found, kind), found
        return found

    def write(self, chunk: int, epoch: int = 1, pages: int = 4) -> RecoveryPoint:
        """A point at `chunk` whose pages are those of the last chunks, and nothing older."""
        known = {one.meta.decode(): one for one in self.arena.find(SID, kind=1)}
        refs = []
        for at in range(max(0, chunk - pages), chunk):
            here = known.get(f"page/{at}")
            if here is None:
                refs.append(self.store.put_page(SID, epoch, f"page/{at}", bytes([at]) * PAGE_BYTES, chunk=at))
            else:
                before = self.store.latest(SID)
                assert before is not None
                refs += [one for one in before.pages if one.chunk == at]
        point = self.store.commit_point(
            SID, epoch, chunk, pages=refs, tail=b"tail%d" % chunk, digest=bytes([chunk]) * 32, meta=b"meta"
        )
        self.store.drop_older(SID, point)
        return point

    async def awaits(self, move_id: int, session: str = SID) -> str:
        self.links.do(b.AwaitPoint(session, move_id))
        awaited = await self.event(b.PointAwaited)
        assert isinstance(awaited, b.PointAwaited) and awaited.move_id == move_id
        return awaited.address

    def clean(self) -> bool:
        """Nothing is reserved, and the books of the arena agree."""
        self.arena.check()
        return self.arena.ledger().reserved_bytes == 0


@contextlib.asynccontextmanager
async def nodes(**second):
    one, other = Node(), Node(**second)
    try:
        yield one, other
    finally:
        for node in (one, other):
            await node.links.close()
            node.arena.close()


async def test_what_is_sent_ahead_is_not_sent_again():
    async with nodes() as (here, there):
        here.write(4)
        address = await there.awaits(7)
        assert address.startswith("127.0.0.1:")
        here.links.do(b.SendPoint(SID, 7, address, ahead=True))
        ahead = await here.event(b.PointSent)
        assert ahead.ahead and ahead.sent_bytes > 4 * PAGE_BYTES
        assert there.store.latest(SID).chunk == 4
        last = here.write(5)
        here.links.do(b.SendPoint(SID, 7, address, ahead=False))
        sent = await here.event(b.PointSent)
        assert not sent.ahead and PAGE_BYTES <= sent.sent_bytes < 2 * PAGE_BYTES
        found = there.store.latest(SID)
        assert (found.chunk, found.epoch, found.digest, found.meta) == (5, 1, last.digest, b"meta")
        assert b"".join(there.store.read_tail(found)) == b"tail5"
        assert [b"".join(there.store.read_page(one))[:1] for one in found.pages] == [bytes([at]) for at in (1, 2, 3, 4)]
        # What is older went at once, so a session that moves to and fro fills nobody's arena.
        assert len(there.arena.find(SID)) == 5
        assert here.clean() and there.clean()
        there.links.do(b.TellPoints())
        assert there.told == [there.store.sessions()] and there.told[0][SID] > 4 * PAGE_BYTES
        there.links.do(b.ForgetPoint(SID))
        assert there.store.sessions() == {}


async def test_a_point_of_an_owner_that_goes_on_meanwhile_arrives_as_one_of_its_points():
    """Points end while they are sent; what arrives is one of them, bit for bit."""
    async with nodes() as (here, there):
        here.write(4)
        address = await there.awaits(1)
        for chunk in range(5, 25):
            here.links.do(b.SendPoint(SID, 1, address, ahead=True))
            for _ in range(chunk % 7):
                await asyncio.sleep(0)
            here.write(chunk)
            said = await asyncio.wait_for(here.events.get(), 10)
            assert isinstance(said, b.PointSent), said
            found = there.store.latest(SID)
            assert found.chunk in (chunk - 1, chunk)
            assert b"".join(there.store.read_tail(found)) == b"tail%d" % found.chunk
            assert found.digest == bytes([found.chunk]) * 32
        assert here.clean() and there.clean()


async def test_only_what_is_awaited_is_taken():
    async with nodes() as (here, there):
        here.write(4)
        address = await there.awaits(3)
        here.links.do(b.SendPoint(SID, 2, address, ahead=False))  # of a move that was given up
        assert (await here.event(b.PointNotSent)).move_id == 2
        there.links.do(b.RefusePoint(SID))
        here.links.do(b.SendPoint(SID, 3, address, ahead=False))
        refused = await here.event(b.PointNotSent)
        assert refused.code == "refused" and "awaited" in refused.message
        here.links.do(b.SendPoint(OTHER, 3, address, ahead=True))
        assert (await here.event(b.PointNotSent)).code == "not_found"
        assert there.arena.find() == [] and there.clean()


async def test_a_full_arena_refuses_before_anything_moves():
    async with nodes(bytes_=3 * 4096) as (here, there):
        here.write(4)
        address = await there.awaits(1)
        here.links.do(b.SendPoint(SID, 1, address, ahead=False))
        refused = await here.event(b.PointNotSent)
        assert refused.code == "refused" and "pool_exhausted" in refused.message
        assert there.arena.find() == [] and there.clean()


async def test_a_peer_without_the_token_gets_nothing_in():
    async with nodes(token=new_token()) as (here, there):
        here.write(4)
        address = await there.awaits(1)
        here.links.do(b.SendPoint(SID, 1, address, ahead=False))
        assert (await here.event(b.PointNotSent)).code == "auth_failed"
        assert there.arena.find() == []


async def test_a_peer_that_stands_still_costs_the_time_out_and_no_memory():
    """Cut off in the midst of the bytes: what was reserved is free again, and the next try goes through."""
    async with nodes(timeout_s=0.3) as (here, there):
        address = await there.awaits(1)
        silent = await asyncio.open_connection(*split_address(address))
        here.write(4)
        here.links.do(b.SendPoint(SID, 1, address, ahead=False))
        await here.event(b.PointSent)
        silent[1].close()
        assert there.clean()
        nowhere = "127.0.0.1:1"
        here.links.do(b.SendPoint(SID, 2, nowhere, ahead=False))
        assert (await here.event(b.PointNotSent)).code == "worker_failed"


async def test_it_never_listens_on_every_interface():
    async with nodes(host="0.0.0.0") as (_, there):
        there.links.do(b.AwaitPoint(SID, 1))
        refused = await there.event(b.PointNotAwaited)
        assert "wildcard" in refused.message


def test_the_address_it_listens_on():
    config = {"worker_id": "w", "worker_epoch": 1, "token": "", "controller_port": 1, "gateway_port": 1}
    seen = SimpleNamespace(own_host="10.0.0.7")
    assert own_address(WorkerConfig(**config, controller_host="10.0.0.1"), seen) == "10.0.0.1"
    assert own_address(WorkerConfig(**config, joined=True), seen) == "10.0.0.7"
    assert own_address(WorkerConfig(**config, joined=True, advertise="10.0.0.9"), None) == "10.0.0.9"
    with pytest.raises(ProtocolError):
        own_address(WorkerConfig(**config, joined=True), None)
    with pytest.raises(ConfigError):
        WorkerConfig(**config, joined=True, advertise="0.0.0.0")
    assert split_address("[::1]:80") == ("::1", 80)
    for text in ("", "host", ":1", "host:0", "host:99999"):
        with pytest.raises(ProtocolError):
            split_address(text)
