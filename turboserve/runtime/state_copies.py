"""Tensors of a session to host memory and back: in the calling thread on a CPU, by the copy engine on CUDA.

On CUDA small pieces are packed (packing.py): gathered into a staging buffer on the device and copied as one, or copied
as one and scattered. Large ones go as they lie, because a large copy runs at the link's rate without taking anything
from the kernels of a pass. Each way has two staging buffers: while one is on the link the next is filled or emptied.

Order. Copies begin after what is on the current stream, the gather included. `to_host` returns when the bytes are in
host memory. `to_device` returns when they have left it; what follows on the same stream sees them in their tensors.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from turboserve.errors import ConfigError, InvalidRequest
from turboserve.runtime.arena import Arena
from turboserve.runtime.copy_engine import Copy, CopyEngine, Ticket, copy_now, join_pieces
from turboserve.runtime.packing import (
    PACK_COUNT_MIN,
    ExtentKernels,
    find_runs,
    gather_pieces,
    on_device,
    scatter_pieces,
    state_kernels,
)
from turboserve.runtime.snapshot import tensor_addresses

COPY_TIMEOUT_S = 60.0
STAGE_BYTES = 8 << 20
"""Of one staging buffer: 160 us on a link of 51 GB/s, several times what a launch costs."""
STAGES = 2
Places = Sequence[tuple[int, int]]
"""Host memory: (address, bytes) of each piece."""


def staging_bytes(pack_below_bytes: int) -> int:
    """Device memory that `copies_for` takes on CUDA."""
    return 2 * STAGES * STAGE_BYTES if pack_below_bytes else 0


class Copies(Protocol):
    """Copies between flat uint8 tensors laid end to end and as many bytes of host memory; InvalidRequest when the
    sizes differ."""

    def to_host(self, tensors: Sequence[Tensor], host: Places) -> None: ...

    def to_device(self, host: Places, tensors: Sequence[Tensor]) -> None: ...


class HostCopies:
    """Of tensors on the CPU, in the calling thread."""

    def to_host(self, tensors: Sequence[Tensor], host: Places) -> None:
        copy_now(join_pieces(host, tensor_addresses(tensors)))

    def to_device(self, host: Places, tensors: Sequence[Tensor]) -> None:
        copy_now(join_pieces(tensor_addresses(tensors), host))


@dataclass(frozen=True, slots=True)
class _Batch:
    """Pieces that are packed into one staging buffer, and where in host memory their bytes are or go."""

    pieces: Sequence[Tensor]
    host: list[tuple[int, int]]
    bytes_: int


@dataclass(slots=True)
class _Way:
    """The staging of one direction. `emptied` is recorded after the last scatter."""

    stages: list[Tensor]
    lock: threading.Lock = field(default_factory=threading.Lock)
    emptied: Any = None


class DeviceCopies:
    """Of tensors on `device` (and on the CPU among them), by a copy engine. For any thread.

    Equal pieces of less than `pack_below_bytes` are packed by `kernels`; without kernels none are. The staging is taken
    here: four buffers of `stage_bytes`.
    """

    def __init__(
        self,
        engine: CopyEngine,
        device: torch.device,
        kernels: ExtentKernels | None,
        *,
        pack_below_bytes: int,
        stage_bytes: int = STAGE_BYTES,
    ) -> None:
        if pack_below_bytes > stage_bytes:
            raise ConfigError(f"pack_below_bytes is {pack_below_bytes}", expected=f"at most {stage_bytes}")
        self._engine = engine
        self._kernels = kernels
        self._below_bytes = pack_below_bytes if kernels is not None else 0
        self._stage_bytes = stage_bytes
        self._cuda = device.type == "cuda"
        count = STAGES if self._below_bytes else 0
        self._out, self._home = (
            _Way([torch.empty(stage_bytes, dtype=torch.uint8, device=device) for _ in range(count)]) for _ in range(2)
        )
        self._device = self._out.stages[0].device if count else device  # with its index, to compare tensors' with

    def warm_up(self) -> None:
        """Compile the kernels now, so that no session waits for it."""
        if self._kernels is not None and self._below_bytes:
            stage = self._home.stages[0]
            pieces = list(stage[1024:2048].view(16, 64))
            gather_pieces(self._kernels, pieces, stage[:1024])
            scatter_pieces(self._kernels, stage[:1024], pieces)

    def to_host(self, tensors: Sequence[Tensor], host: Places) -> None:
        batches, others = self._plan(tensors, host)
        with self._out.lock, on_device(self._device):
            plain = [self._submit(others)] if others else []
            tickets: list[Ticket] = []
            for number, batch in enumerate(batches):
                if number >= STAGES:
                    tickets[number - STAGES].wait(COPY_TIMEOUT_S)
                stage = self._out.stages[number % STAGES][: batch.bytes_]
                assert self._kernels is not None
                gather_pieces(self._kernels, batch.pieces, stage)
                tickets.append(self._submit(join_pieces(batch.host, tensor_addresses([stage]))))
            for ticket in [*plain, *tickets]:
                ticket.wait(COPY_TIMEOUT_S)

    def to_device(self, host: Places, tensors: Sequence[Tensor]) -> None:
        batches, others = self._plan(tensors, host)
        with self._home.lock, on_device(self._device):
            self._order_after_scatter()
            homeward = [(source, target, count) for target, source, count in others]
            plain = [self._submit(homeward)] if homeward else []

            def ask(number: int) -> Ticket:
                # Behind the current stream, so behind the scatter that last read this buffer.
                stage = self._home.stages[number % STAGES][: batches[number].bytes_]
                return self._submit(join_pieces(tensor_addresses([stage]), batches[number].host))

            under_way = ask(0) if batches else None
            for number, batch in enumerate(batches):
                assert under_way is not None and self._kernels is not None
                arrived, under_way = under_way, ask(number + 1) if number + 1 < len(batches) else None
                arrived.wait(COPY_TIMEOUT_S)
                scatter_pieces(self._kernels, self._home.stages[number % STAGES][: batch.bytes_], batch.pieces)
            if batches and self._cuda:
                self._home.emptied = torch.cuda.Event()
                self._home.emptied.record()
            for ticket in plain:
                ticket.wait(COPY_TIMEOUT_S)

    def _order_after_scatter(self) -> None:
        """The last caller's scatter may be on another stream than ours."""
        if self._home.emptied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._home.emptied)

    def _submit(self, copies: list[Copy]) -> Ticket:
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._cuda else 0
        return self._engine.submit(copies, after_stream=stream)

    def _plan(self, tensors: Sequence[Tensor], host: Places) -> tuple[list[_Batch], list[Copy]]:
        """What is packed, and the other copies as towards host memory."""
        here, there = sum(one.numel() for one in tensors), sum(count for _, count in host)
        if here != there:
            raise InvalidRequest(f"tensors of {here} bytes and host memory of {there} bytes")
        waiting = deque(host)
        batches: list[_Batch] = []
        others: list[Copy] = []
        for run in find_runs(tensors, self._device, self._below_bytes):
            at_most = self._stage_bytes // run.piece_bytes if run.packed else run.count
            for first in range(run.first, run.first + run.count, at_most):
                pieces = tensors[first : min(first + at_most, run.first + run.count)]
                bytes_ = sum(one.numel() for one in pieces)
                places = _take(waiting, bytes_)
                # What lies in as many places of host memory takes as many copies, packed or not.
                if run.packed and len(pieces) >= PACK_COUNT_MIN and 2 * len(places) <= len(pieces):
                    batches.append(_Batch(pieces, places, bytes_))
                else:
                    others += join_pieces(places, tensor_addresses(pieces))
        return batches, others


def _take(waiting: deque[tuple[int, int]], bytes_: int) -> list[tuple[int, int]]:
    """The next `bytes_` bytes of host memory, removed from what waits."""
    taken: list[tuple[int, int]] = []
    while bytes_:
        address, count = waiting.popleft()
        if count > bytes_:
            waiting.appendleft((address + bytes_, count - bytes_))
            count = bytes_
        if count:
            taken.append((address, count))
        bytes_ -= count
    return taken


def copies_for(device: torch.device, arena: Arena, pack_below_bytes: int) -> Copies:
    """How a device's tensors come into the arena, which on CUDA is page-locked first, and back."""
    if device.type == "cpu":
        return HostCopies()
    arena.pin()
    kernels = state_kernels(device) if pack_below_bytes else None
    copies = DeviceCopies(CopyEngine(str(device)), device, kernels, pack_below_bytes=pack_below_bytes)
    copies.warm_up()
    return copies
