"""One contract for every way that state moves: in memory, over an authenticated socket, through the arena."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from turboserve.errors import ArenaFull, AuthFailed, ConfigError, CorruptState, ProtocolError, Refused
from turboserve.runtime import channel
from turboserve.runtime.arena import Arena, create_arena
from turboserve.runtime.channel import bound_port, new_token
from turboserve.runtime.point_transfer import receive_point, send_point
from turboserve.runtime.recovery_store import RecoveryStore
from turboserve.runtime.transport import FRAME_BYTES_MAX, ArenaCarrier, InlineCarrier, Transport
from turboserve.runtime.transport_group import GroupCarrier
from turboserve.runtime.transport_ipc import CudaIpcCarrier
from turboserve.runtime.transport_links import MemoryLink, connect_link, listen_for_links

SLAB = 4096
A = "a" * 26
WAYS = ["memory", "socket", "arena", "arena over a socket", "gloo"]


def noise(count: int, *seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(count)


@asynccontextmanager
async def socket_links(token: bytes | None = None):
    token = token or new_token()
    accepted: asyncio.Queue = asyncio.Queue()
    over = asyncio.Event()

    async def on_link(link) -> None:
        await accepted.put(link)
        await over.wait()

    server = await listen_for_links("127.0.0.1", 0, token, on_link)
    try:
        near = await connect_link("127.0.0.1", bound_port(server), token)
        far = await asyncio.wait_for(accepted.get(), 5)
        yield near, far
        await near.close()
    finally:
        over.set()
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def transports(way: str):
    """Both ends; the arenas are given too, so that what they hold can be checked."""
    fd = create_arena(256 * SLAB, partition_count=2, slab_bytes=SLAB)
    with Arena.map(fd, partition=0, owner_epoch=1) as first, Arena.map(fd, partition=1, owner_epoch=1) as second:

        def end(link, arena: Arena) -> Transport:
            carrier = ArenaCarrier(arena, A, 1) if way.startswith("arena") else InlineCarrier(chunk_bytes=10_000)
            if way == "gloo":
                carrier = GroupCarrier("gloo", arena.partition, chunk_bytes=10_000, timeout_s=5)
            return Transport(link, carrier)

        if "socket" in way:
            async with socket_links() as (near, far):
                yield end(near, first), end(far, second), first, second
        else:
            near, far = MemoryLink.pair()
            yield end(near, first), end(far, second), first, second
    os.close(fd)


def fresh(offer):
    """Memory for every buffer, each in two pieces."""
    targets = []
    for size in offer.sizes:
        memory = memoryview(bytearray(size))
        targets.append([memory[: size // 3], memory[size // 3 :]])
    return targets


async def both(sending, receiving):
    results = await asyncio.gather(sending, receiving, return_exceptions=True)
    return results[0], results[1]


@pytest.mark.parametrize("way", WAYS)
async def test_buffers_of_any_size_in_any_pieces_arrive_whole_and_in_order(way):
    whole = [noise(0, 1), noise(1, 2), noise(123_457, 3), noise(10_000, 4), noise(20_000, 5)]
    cut = [[memoryview(one)[:7], memoryview(one)[7:8], memoryview(one)[8:]] for one in whole]
    async with transports(way) as (near, far, first, second):
        for round_ in range(3):  # a transport is used again
            manifest = f"round {round_}".encode()
            sent, got = await both(near.send(manifest, cut, timeout_s=20), far.receive(fresh, timeout_s=20))
            assert sent == [] and got.manifest == manifest
            assert [b"".join(one) for one in got.buffers] == whole
            for extent in got.extents:
                assert second.free(extent)
            del got
        assert first.ledger().committed_bytes == first.ledger().reserved_bytes == 0


@pytest.mark.parametrize("way", WAYS)
async def test_both_directions_work(way):
    async with transports(way) as (near, far, _first, _second):
        await both(near.send(b"there", [], timeout_s=10), far.receive(fresh, timeout_s=10))
        _, got = await both(
            far.send(b"back", [[memoryview(b"x" * 5000)]], timeout_s=10), near.receive(fresh, timeout_s=10)
        )
        assert got.manifest == b"back" and b"".join(got.buffers[0]) == b"x" * 5000


@pytest.mark.parametrize("way", WAYS)
async def test_a_receiver_without_room_refuses_before_any_byte_moves_and_the_link_goes_on(way):
    def no_room(offer):
        raise ArenaFull(f"{sum(offer.sizes)} B do not fit")

    async with transports(way) as (near, far, first, _second):
        sent, got = await both(
            near.send(b"m", [[memoryview(bytes(50_000))]], timeout_s=10), far.receive(no_room, timeout_s=10)
        )
        assert isinstance(sent, Refused) and "50000 B do not fit" in str(sent) and "pool_exhausted" in str(sent)
        assert isinstance(got, ArenaFull)
        assert first.ledger().committed_bytes == 0, "what was written for the offer is taken back"
        sent, got = await both(near.send(b"n", [[memoryview(b"ok")]], timeout_s=10), far.receive(fresh, timeout_s=10))
        assert sent == [] and got.manifest == b"n"


@pytest.mark.parametrize("way", ["memory", "socket"])
async def test_what_the_receiver_has_already_is_not_sent(way):
    def only_second(offer):
        return [None, [memoryview(bytearray(offer.sizes[1]))]]

    async with transports(way) as (near, far, _first, _second):
        buffers = [[memoryview(noise(30_000, 1))], [memoryview(noise(30_000, 2))]]
        sent, got = await both(near.send(b"", buffers, timeout_s=10), far.receive(only_second, timeout_s=10))
        assert sent == [0] and got.buffers[0] is None and b"".join(got.buffers[1]) == noise(30_000, 2)


@pytest.mark.parametrize("way", WAYS)
async def test_a_peer_that_goes_away_or_falls_silent_is_an_error_in_time(way):
    async with transports(way) as (near, far, first, _second):
        sending = asyncio.create_task(near.send(b"m", [[memoryview(bytes(100_000))]], timeout_s=0.2))
        with pytest.raises(TimeoutError):
            await sending
        assert first.ledger().committed_bytes == 0
        with pytest.raises((ConnectionError, TimeoutError, ProtocolError)):
            while True:  # what was sent before the silence may still come
                await far.receive(fresh, timeout_s=0.5)


@pytest.mark.parametrize("way", ["memory", "socket"])
async def test_bytes_that_change_on_the_way_do_not_verify(way):
    """The source is overwritten while it is sent, as a page that was not finished would be."""
    source = bytearray(noise(200_000, 6))

    class Meddling(InlineCarrier):
        async def push(self, link, buffers):
            await super().push(link, buffers)
            source[5] ^= 1

    async with transports(way) as (near, far, _first, _second):
        near.carrier = Meddling(chunk_bytes=10_000)
        sent, got = await both(near.send(b"m", [[memoryview(source)]], timeout_s=10), far.receive(fresh, timeout_s=10))
        assert isinstance(sent, CorruptState) and isinstance(got, CorruptState)
        near.carrier = InlineCarrier(chunk_bytes=10_000)
        sent, got = await both(near.send(b"m", [[memoryview(source)]], timeout_s=10), far.receive(fresh, timeout_s=10))
        assert sent == [] and b"".join(got.buffers[0]) == source


async def test_a_manifest_or_frame_above_its_bound_is_refused():
    near, far = MemoryLink.pair()
    with pytest.raises(ProtocolError, match="manifest"):
        await Transport(near, InlineCarrier()).send(bytes(2 << 20), [], timeout_s=5)
    async with socket_links() as (one, other):
        with pytest.raises(ProtocolError, match="frame"):
            await one.send(bytes(FRAME_BYTES_MAX + 1))
        await one.send(b"garbage")
        with pytest.raises(ProtocolError, match="decode"):
            await Transport(other, InlineCarrier()).receive(fresh, timeout_s=5)
    await far.close()


async def test_a_link_needs_the_token_the_purpose_and_a_named_address():
    token = new_token()
    met = []

    async def on_link(link) -> None:
        met.append(link)

    server = await listen_for_links("127.0.0.1", 0, token, on_link)
    try:
        with pytest.raises(AuthFailed):
            await connect_link("127.0.0.1", bound_port(server), new_token())
        with pytest.raises((AuthFailed, ProtocolError)):
            await channel.connect("127.0.0.1", bound_port(server), token)
        assert met == []
    finally:
        server.close()
    with pytest.raises(ConfigError, match="wildcard"):
        await listen_for_links("0.0.0.0", 0, token, on_link)


async def test_a_changed_frame_does_not_verify():
    async with socket_links() as (one, other):
        other._received += 1  # as if a frame had been dropped on the way
        await one.send(b"hello")
        with pytest.raises(AuthFailed):
            await other.receive()


@pytest.fixture
def stores():
    """Two nodes: an arena each."""
    fds = [create_arena(256 * SLAB, slab_bytes=SLAB) for _ in range(2)]
    with (
        Arena.map(fds[0], partition=0, owner_epoch=1) as first,
        Arena.map(fds[1], partition=0, owner_epoch=1) as second,
    ):
        yield RecoveryStore(first), RecoveryStore(second)
    for fd in fds:
        os.close(fd)


def make_point(store: RecoveryStore, chunk: int, pages):
    return store.commit_point(
        A, 3, chunk, pages=pages, tail=noise(9000, chunk), frames=[noise(700, chunk), b""], digest=b"d" * 32, meta=b"m"
    )


async def test_a_point_moves_to_another_node_and_pages_sent_ahead_are_not_sent_again(stores):
    here, there = stores
    pages = [here.put_page(A, 3, f"kv/{i}", noise(20_000, i), chunk=i) for i in range(4)]
    early = make_point(here, 4, pages)
    async with socket_links() as (one, other):
        near, far = Transport(one, InlineCarrier()), Transport(other, InlineCarrier())
        moved, first = await both(send_point(near, here, early, timeout_s=10), receive_point(far, there, timeout_s=10))
        assert moved == 4 * 20_000 + 9000 + 700
        pages = [*pages[1:], here.put_page(A, 3, "kv/4", noise(20_000, 4), chunk=4)]
        late = make_point(here, 5, pages)
        moved, point = await both(send_point(near, here, late, timeout_s=10), receive_point(far, there, timeout_s=10))
        assert moved == 20_000 + 9000 + 700
    assert there.latest(A) == point and (point.epoch, point.chunk, point.digest, point.meta) == (3, 5, b"d" * 32, b"m")
    assert [b"".join(there.read_page(page)) for page in point.pages] == [noise(20_000, i) for i in range(1, 5)]
    assert b"".join(there.read_tail(point)) == noise(9000, 5)
    assert there.read_frames(point) == [noise(700, 5), b""]
    assert there.drop_older(A, point) == first.extent.slab_bytes + 5 * SLAB
    assert there.check_pages(point)


async def test_a_node_without_room_keeps_nothing_of_a_point(stores):
    here, there = stores
    point = make_point(here, 1, [here.put_page(A, 3, "kv/0", noise(20_000, 0), chunk=0)])
    there.arena.reserve(A, 1, 250 * SLAB)  # room for the page, not for the point
    before = there.arena.ledger()
    near, far = (Transport(link, InlineCarrier()) for link in MemoryLink.pair())
    sent, got = await both(send_point(near, here, point, timeout_s=5), receive_point(far, there, timeout_s=5))
    assert isinstance(sent, Refused) and isinstance(got, ArenaFull)
    assert there.arena.ledger() == before and there.latest(A) is None


async def test_a_page_that_is_not_the_one_named_leaves_nothing_behind(stores):
    here, there = stores
    page = here.put_page(A, 3, "kv/0", noise(20_000, 0), chunk=0)
    point = make_point(here, 1, [page])
    lying = replace(point, pages=(replace(page, checksum=page.checksum ^ 1),))
    near, far = (Transport(link, InlineCarrier()) for link in MemoryLink.pair())
    with pytest.raises(CorruptState):
        await send_point(near, here, lying, timeout_s=5)
    store_read = here.read_page
    here.read_page = lambda ref: store_read(page)  # a sender whose manifest is wrong
    _, got = await both(send_point(near, here, lying, timeout_s=5), receive_point(far, there, timeout_s=5))
    assert isinstance(got, CorruptState)
    assert there.arena.ledger().committed_bytes == there.arena.ledger().reserved_bytes == 0


async def test_an_extent_is_handed_over_without_a_copy():
    async with transports("arena") as (near, far, first, _second):
        reservation = first.reserve(A, 1, 5000)
        reservation.write(0, noise(5000, 8))
        extent = first.commit(reservation, 3)
        before = first.ledger()
        _, got = await both(near.send(b"", [extent], timeout_s=5), far.receive(lambda offer: [], timeout_s=5))
        assert got.extents == (extent,) and first.ledger() == before
        assert b"".join(got.buffers[0]) == noise(5000, 8)
        first.free(extent)
        sent, got = await both(near.send(b"", [extent], timeout_s=5), far.receive(lambda offer: [], timeout_s=5))
        assert isinstance(sent, Refused) and "not there" in str(sent)


async def test_a_group_that_fails_falls_back_to_host_copies_and_is_given_up_in_the_end():
    """One end cannot join: both hear of it, the bytes go over the link, and later transfers do not try for ever."""
    near_link, far_link = MemoryLink.pair()
    near_carrier = GroupCarrier("gloo", 0, chunk_bytes=10_000, timeout_s=0.3)
    far_carrier = GroupCarrier("nccl", 1, chunk_bytes=10_000, timeout_s=0.3)  # there is none here
    far_carrier.name = near_carrier.name
    near, far = Transport(near_link, near_carrier), Transport(far_link, far_carrier)
    data = noise(55_555, 9)
    for round_ in range(1, 4):
        sent, got = await both(near.send(b"", [[memoryview(data)]], timeout_s=10), far.receive(fresh, timeout_s=10))
        assert sent == [] and b"".join(got.buffers[0]) == data
        assert near_carrier.fallbacks == far_carrier.fallbacks == round_
    assert near_carrier._failures == 3


async def test_a_group_survives_many_transfers_both_ways():
    async with transports("gloo") as (near, far, _first, _second):
        for index in range(6):
            one, other = (near, far) if index % 2 else (far, near)
            data = noise(35_000, index)
            sent, got = await both(
                one.send(b"", [[memoryview(data)]], timeout_s=10), other.receive(fresh, timeout_s=10)
            )
            assert sent == [] and b"".join(got.buffers[0]) == data
        assert near.carrier.fallbacks == far.carrier.fallbacks == 0


@pytest.mark.parametrize("way", WAYS)
async def test_tensors_go_as_memory_does(way):
    def into_tensors(offer):
        targets.extend(torch.zeros(size, dtype=torch.uint8) for size in offer.sizes)
        return [[one[:10], one[10:]] for one in targets]

    data = torch.frombuffer(bytearray(noise(44_444, 1)), dtype=torch.uint8)
    targets: list = []
    async with transports(way) as (near, far, _first, _second):
        sent, got = await both(
            near.send(b"", [[data[:5], data[5:]]], timeout_s=10), far.receive(into_tensors, timeout_s=10)
        )
        assert sent == []
        received = got.buffers[0] if got.extents else [targets[0].numpy()]
        assert b"".join(received) == data.numpy().tobytes()


async def test_device_memory_alone_goes_by_cuda_ipc():
    near, far = (Transport(link, CudaIpcCarrier()) for link in MemoryLink.pair())
    sent, got = await both(near.send(b"", [[memoryview(b"host")]], timeout_s=1), far.receive(fresh, timeout_s=1))
    assert isinstance(sent, ConfigError) and isinstance(got, ConnectionError)
