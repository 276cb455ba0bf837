"""Packed copies of session state on the CPU: the path a GPU takes, with the Triton kernels interpreted."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboserve.errors import ConfigError, CorruptState, InvalidRequest, StateError
from turboserve.kernels import extents, reference
from turboserve.runtime.copy_engine import CopyEngine
from turboserve.runtime.device_checksum import BLOCK_BYTES, device_checksum
from turboserve.runtime.packing import PACK_COUNT_MIN, find_runs
from turboserve.runtime.state_copies import DeviceCopies
from turboserve.runtime.transport import Transport
from turboserve.runtime.transport_group import GroupCarrier, pack, unpack
from turboserve.runtime.transport_links import MemoryLink

CPU = torch.device("cpu")
STAGE_BYTES = 4096


class Counting:
    """The kernels, and how often they ran. One at a time: the interpreter patches Triton's modules while it runs."""

    turn = threading.Lock()

    def __init__(self) -> None:
        self.gathers = self.scatters = self.checksums = 0

    def gather_extents(self, *arguments):
        self.gathers += 1
        with self.turn:
            return extents.gather_extents(*arguments)

    def scatter_extents(self, *arguments):
        self.scatters += 1
        with self.turn:
            extents.scatter_extents(*arguments)

    def block_checksum(self, *arguments):
        self.checksums += 1
        with self.turn:
            return extents.block_checksum(*arguments)


def noise(bytes_: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (bytes_,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pieces_of(sizes: list[int], gap: int, memory: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Flat tensors of these sizes, `gap` bytes apart in one memory."""
    offsets = np.cumsum([0, *(size + gap for size in sizes)])
    memory = noise(int(offsets[-1]) + 1) if memory is None else memory
    return [memory[at : at + size] for at, size in zip(offsets[:-1].tolist(), sizes, strict=True)]


def host_of(bytes_: int, cuts: list[int]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Host memory of so many bytes in places of the sizes `cuts` (then the rest), from its end on, a byte between."""
    sizes = []
    for cut in [*cuts, bytes_]:
        sizes.append(min(cut, bytes_ - sum(sizes)))
    memory = np.zeros(bytes_ + len(sizes), np.uint8)
    places, end = [], len(memory)
    for size in sizes:
        end -= size + 1
        places.append((memory.ctypes.data + end, size))
    return memory, places


def host_bytes(memory: np.ndarray, places: list[tuple[int, int]]) -> bytes:
    return b"".join(memory[at - memory.ctypes.data :][:size].tobytes() for at, size in places)


@pytest.fixture(scope="module")
def engine():
    with CopyEngine("cpu") as one:
        yield one


def copies(engine: CopyEngine, kernels: Counting, below: int = 1024) -> DeviceCopies:
    return DeviceCopies(engine, CPU, kernels, pack_below_bytes=below, stage_bytes=STAGE_BYTES)


run_of_pieces = st.tuples(st.sampled_from([0, 16, 40, 64, 240, 1008, 1024, 3000]), st.integers(1, 24))


@settings(max_examples=40, deadline=None)
@given(
    runs=st.lists(run_of_pieces, min_size=1, max_size=5),
    gap=st.sampled_from([0, 16, 8, 3]),
    cuts=st.lists(st.integers(0, 5000), max_size=4),
)
def test_any_pieces_to_any_host_memory_and_back_as_plain_copies(engine, runs, gap, cuts):
    sizes = [size for size, count in runs for _ in range(count)]
    pieces = pieces_of(sizes, gap)
    expected = b"".join(one.numpy().tobytes() for one in pieces)
    moved = copies(engine, Counting())
    memory, places = host_of(sum(sizes), cuts)
    moved.to_host(pieces, places)
    assert host_bytes(memory, places) == expected
    between = memory.copy()
    for at, size in places:
        between[at - memory.ctypes.data :][:size] = 0
    assert not between.any()

    blank = torch.zeros(sum(sizes) + gap * len(sizes) + 1, dtype=torch.uint8)
    back = pieces_of(sizes, gap, blank)
    moved.to_device(places, back)
    assert b"".join(one.numpy().tobytes() for one in back) == expected
    for one in back:
        one.zero_()
    assert not blank.any()  # nothing was written between the pieces


def test_the_kernels_run_where_they_pay_and_in_batches_of_the_staging(engine):
    counting = Counting()
    moved = copies(engine, counting)
    moved.warm_up()
    assert (counting.gathers, counting.scatters) == (1, 1)
    counting.gathers = counting.scatters = 0
    sizes = [240] * 44 + [2048] * 10 + [100] * 10 + [64] * (PACK_COUNT_MIN - 1)
    pieces = pieces_of(sizes, 16)
    memory, places = host_of(sum(sizes), [])
    moved.to_host(pieces, places)
    assert counting.gathers == 3  # 44 of 240 bytes, 17 a staging buffer; the others are large, odd or few
    moved.to_device(places, pieces)
    assert counting.scatters == 3
    scattered, many = host_of(44 * 240, [240] * 44)  # as many places as pieces: nothing to win
    moved.to_host(pieces[:44], many)
    assert counting.gathers == 3 and host_bytes(scattered, many) == host_bytes(memory, places)[: 44 * 240]


def test_the_bench_packs_and_checks_what_it_times():
    from turboserve.bench.offload import pack_rows

    rows = list(pack_rows(3, CPU, extents, [(20, 256)]))
    assert [one.case for one in rows] == ["offload/pack/out", "offload/pack/home"]
    assert all(one.checked and one.max_rel_err == 0.0 for one in rows)


def test_sizes_must_fit(engine):
    memory, places = host_of(100, [])
    with pytest.raises(InvalidRequest, match="104 bytes"):
        copies(engine, Counting()).to_host([noise(104)], places)
    assert not memory.any()
    with pytest.raises(ConfigError, match="pack_below_bytes"):
        copies(engine, Counting(), below=STAGE_BYTES + 1)


def test_runs_are_of_equal_aligned_pieces_on_the_device():
    memory = noise(4096)
    aligned = [memory[i * 64 : i * 64 + 32] for i in range(PACK_COUNT_MIN)]
    shifted = [memory[i * 64 + 8 : i * 64 + 40] for i in range(PACK_COUNT_MIN)]
    found = find_runs([*aligned, *shifted, memoryview(bytes(32)), *aligned[1:]], CPU)
    assert [(one.count, one.packed) for one in found] == [(8, True), (9, False), (7, False)]
    assert not any(one.packed for one in find_runs(aligned, torch.device("meta")))


@pytest.mark.parametrize("chunk_bytes", [1000, 1600])
def test_a_group_packs_and_unpacks_as_torch_does(chunk_bytes):
    pieces = pieces_of([48] * 50 + [1000, 7] + [64] * 20, 16)
    total = sum(map(len, pieces))
    back = pieces_of([len(one) for one in pieces], 16, torch.zeros_like(noise(total + 16 * len(pieces) + 1)))
    counting = Counting()
    for at in range(0, total, chunk_bytes):
        by_kernel, by_torch = torch.zeros(min(chunk_bytes, total - at), dtype=torch.uint8), torch.empty(0)
        by_torch = torch.ones_like(by_kernel)
        pack(pieces, at, by_kernel, counting)
        pack(pieces, at, by_torch)
        assert torch.equal(by_kernel, by_torch)
        unpack(by_kernel, back, at, counting)
    assert counting.gathers and counting.scatters
    assert all(torch.equal(one, other) for one, other in zip(back, pieces, strict=True))


@pytest.mark.parametrize("bytes_", [0, 5, BLOCK_BYTES, 3 * BLOCK_BYTES, 2 * BLOCK_BYTES + 33])
def test_the_device_checksum_sees_bytes_and_not_how_they_are_cut(bytes_):
    data = noise(bytes_, 3)

    def of(pieces, kernels) -> int:
        return device_checksum(pieces, pack, kernels, CPU, stage_blocks=2)

    cut = [data[: bytes_ // 3], memoryview(data[bytes_ // 3 :].numpy().tobytes())]
    found = of([data], extents)
    assert found == of([data], reference) == of([one for one in cut if len(one)], extents)
    assert found != of([torch.cat([data, torch.zeros(1, dtype=torch.uint8)])], reference)
    for at in {0, bytes_ // 2, bytes_ - 1} if bytes_ else ():
        flipped = data.clone()
        flipped[at] ^= 1
        assert of([flipped], reference) != found


def carriers(near_kernels, far_kernels):
    near, far = MemoryLink.pair()
    return (
        Transport(link, GroupCarrier("gloo", rank, chunk_bytes=20_000, timeout_s=20, kernels=kernels))
        for rank, (link, kernels) in enumerate([(near, near_kernels), (far, far_kernels)])
    )


async def both(sending, receiving):
    return await asyncio.gather(sending, receiving, return_exceptions=True)


async def test_a_group_with_kernels_moves_and_verifies_by_them():
    near, far = carriers(sends := Counting(), takes := Counting())
    data = pieces_of([1024] * 40, 32)
    targets = [torch.zeros(1024, dtype=torch.uint8) for _ in data]
    sent, got = await both(near.send(b"", [data], timeout_s=60), far.receive(lambda offer: [targets], timeout_s=60))
    assert sent == [] and not isinstance(got, BaseException)
    assert all(torch.equal(one, other) for one, other in zip(targets, data, strict=True))
    assert near.carrier.fallbacks == 0 and sends.gathers and takes.scatters
    assert sends.checksums == takes.checksums == 1

    unpacked = GroupCarrier._pull_all

    def torn(self, buffers) -> None:
        unpacked(self, buffers)
        targets[3][5] ^= 4

    far.carrier._pull_all = torn.__get__(far.carrier)
    sent, got = await both(near.send(b"", [data], timeout_s=60), far.receive(lambda offer: [targets], timeout_s=60))
    assert isinstance(sent, CorruptState) and isinstance(got, CorruptState)
    near.carrier.close()
    far.carrier.close()


async def test_both_ends_of_a_group_must_verify_alike():
    near, far = carriers(extents, None)
    sent, got = await both(near.send(b"", [[noise(5)]], timeout_s=5), far.receive(lambda offer: [], timeout_s=5))
    assert isinstance(got, StateError) and "group-gloo" in str(sent)
