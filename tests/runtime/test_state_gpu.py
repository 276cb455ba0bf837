"""What only a GPU can show of the state's ways: run by hand or by `make gpu`."""

from __future__ import annotations

import asyncio
import multiprocessing
import os

import pytest
import torch

from turboserve.kernels import reference
from turboserve.runtime import native
from turboserve.runtime.arena import Arena, create_arena
from turboserve.runtime.channel import bound_port, new_token
from turboserve.runtime.copy_engine import CopyEngine, join_pieces
from turboserve.runtime.device_checksum import device_checksum
from turboserve.runtime.packing import state_kernels
from turboserve.runtime.snapshot import tensor_addresses
from turboserve.runtime.state_copies import DeviceCopies
from turboserve.runtime.transport import Transport
from turboserve.runtime.transport_group import make_group, pack, send_to_self
from turboserve.runtime.transport_ipc import CudaIpcCarrier
from turboserve.runtime.transport_links import connect_link, listen_for_links

pytestmark = pytest.mark.gpu
A = "a" * 26


def noise(bytes_: int) -> torch.Tensor:
    return torch.randint(0, 256, (bytes_,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bytes_))


def test_pages_go_to_the_pinned_arena_and_back_after_the_stream_that_writes_them():
    assert native.load_cuda()[1] >= 1, native.load_cuda()[0]
    fd = create_arena(64 << 20)
    with Arena.map(fd, partition=0, owner_epoch=1) as arena:
        arena.pin()
        expected = noise(48 << 20)
        source = torch.zeros(48 << 20, dtype=torch.uint8, device="cuda")
        back = torch.zeros_like(source)
        reservation = arena.reserve(A, 1, 48 << 20)
        pieces = [source[i : i + (1 << 20)] for i in range(0, 48 << 20, 1 << 20)]
        with CopyEngine("cuda") as out, CopyEngine("cuda", stable_sources=True) as home:
            torch.cuda._sleep(50_000_000)  # the copies must wait for what is on the stream already
            source.copy_(expected.cuda(), non_blocking=True)
            stream = torch.cuda.current_stream().cuda_stream
            copies = join_pieces(reservation.addresses(), tensor_addresses(pieces))
            out.submit(copies, keep=source, after_stream=stream).wait(30)
            extent = arena.commit(reservation, 0)
            assert arena.read_bytes(extent) == expected.numpy().tobytes()
            targets = tensor_addresses([back[i : i + (1 << 20)] for i in range(0, 48 << 20, 1 << 20)])
            ticket = home.submit(join_pieces(targets, reservation.addresses()))
            ticket.wait(30, copies=1)
            ticket.wait(30)
        assert torch.equal(back.cpu(), expected)
        del reservation
    os.close(fd)


def test_small_pieces_are_packed_on_their_way_to_the_arena_and_scattered_home():
    """Among large ones, after the stream that writes them, by callers on two streams; to the bit."""
    fd = create_arena(64 << 20)
    with Arena.map(fd, partition=0, owner_epoch=1) as arena:
        arena.pin()
        device = torch.device("cuda", 0)
        kernels = state_kernels(device)
        moved = DeviceCopies(CopyEngine("cuda:0"), device, kernels, pack_below_bytes=1 << 20, stage_bytes=1 << 20)
        expected = noise(32 << 20)
        memory, back = (torch.zeros(32 << 20, dtype=torch.uint8, device=device) for _ in range(2))

        def pieces(whole: torch.Tensor) -> list[torch.Tensor]:
            small = list(whole[: 24 << 20].view(768, 2, -1)[:760, 0, :15_712])
            return [*small, whole[24 << 20 : 30 << 20], *whole[30 << 20 :].view(64, -1)[:, 8:30_008]]

        reservation = arena.reserve(A, 1, sum(map(len, pieces(memory))))
        torch.cuda._sleep(50_000_000)
        memory.copy_(expected.cuda(), non_blocking=True)
        moved.to_host(pieces(memory), reservation.addresses())
        assert b"".join(reservation.views) == torch.cat(pieces(expected)).numpy().tobytes()
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                back.zero_()
                moved.to_device(reservation.addresses(), pieces(back))
                again = back.clone()  # what follows on the stream sees the bytes
                stream.synchronize()
            for one, other in zip(pieces(again.cpu()), pieces(expected), strict=True):
                assert torch.equal(one, other)
            assert int(again.count_nonzero()) == sum(int(one.count_nonzero()) for one in pieces(expected))
        moved._engine.close()
        del reservation
    os.close(fd)


def test_the_device_checksum_is_the_reference_s():
    data = noise(5_000_001)
    device = torch.device("cuda", 0)
    kernels = state_kernels(device)
    assert kernels is not None
    found = device_checksum([data[:77].cuda(), data[77:].cuda()], pack, kernels, device)
    assert found == device_checksum([data], pack, reference, torch.device("cpu"))


def test_nccl_sends_to_itself():
    store = torch.distributed.HashStore()
    group = make_group("nccl", store, 0, 1, 30.0, "127.0.0.1")
    source = noise(100_000_001).cuda()
    target = torch.zeros_like(source)
    send_to_self(group, [source], [target], 16 << 20)
    assert torch.equal(source, target)
    rows, wide = noise(3 << 20).cuda().view(96, 2, -1), torch.zeros(3 << 20, dtype=torch.uint8, device="cuda")
    there = wide.view(96, 2, -1)
    send_to_self(group, [one[0] for one in rows], [one[1] for one in there], 1 << 20)  # by gather and scatter
    assert torch.equal(there[:, 1], rows[:, 0]) and not there[:, 0].any()
    group.abort()


def _send_by_ipc(port: int, token: bytes) -> None:
    async def send() -> None:
        transport = Transport(await connect_link("127.0.0.1", port, token), CudaIpcCarrier())
        data = noise(30_000_000).cuda()
        await transport.send(b"", [[data[:1000], data[1000:]]], timeout_s=60)
        await transport.close()

    asyncio.run(send())


async def test_two_processes_on_one_gpu_by_cuda_ipc():
    token, arrived = new_token(), asyncio.Queue()
    over = asyncio.Event()

    async def on_link(link) -> None:
        await arrived.put(link)
        await over.wait()

    server = await listen_for_links("127.0.0.1", 0, token, on_link)
    process = multiprocessing.get_context("spawn").Process(target=_send_by_ipc, args=(bound_port(server), token))
    process.start()
    target = torch.zeros(30_000_000, dtype=torch.uint8, device="cuda")
    transport = Transport(await asyncio.wait_for(arrived.get(), 60), CudaIpcCarrier())
    await transport.receive(lambda offer: [[target]], timeout_s=60)
    assert torch.equal(target.cpu(), noise(30_000_000))
    over.set()
    process.join(30)
    server.close()
