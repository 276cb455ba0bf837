"""Buffers over torch.distributed point to point: NCCL between GPUs, gloo between CPUs (how this code is tested).

Each pair of workers has a communicator of its own, made when it is first used: a group over all workers would have to
be made anew whenever one comes or goes. The two ends meet over their link (`_LinkStore`), so no rendezvous port is
opened. Buffers are packed into two staging chunks on the device in turn: while one is on its way the next is filled.
On CUDA runs of equal pieces are packed and unpacked by the gather and scatter kernels (a copy inside a GPU costs a
launch each and, by a copy engine, runs near 100 GB/s), and the block checksum kernel verifies what arrived.

A group operation that does not end within `timeout_s` is aborted, and the same buffers go again over the link by host
copies. After `FAILURES_MAX` failures in a row the group is not tried any more. Both ends hear of each other's outcome
over the link, so they always agree on what comes next.

NCCL has not been run: no GPU was at hand.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from turboserve.errors import ConfigError, ProtocolError
from turboserve.kernels.reference import UNIT_BYTES
from turboserve.runtime.arena import Extent, region
from turboserve.runtime.device_checksum import device_checksum
from turboserve.runtime.packing import (
    ExtentKernels,
    StateKernels,
    find_runs,
    gather_pieces,
    scatter_pieces,
    state_kernels,
)
from turboserve.runtime.transport import Buffer, InlineCarrier, Link, Pieces, host_checksum

log = logging.getLogger(__name__)

GROUP_CHUNK_BYTES = 32 << 20
FAILURES_MAX = 2
_POLL_S = 2e-4
_VERDICT, _ENTRY = b"v", b"s"


class _LinkStore(dist.Store):
    """What both ends of a group must know of each other, told over the link. Reads wait for the peer's word."""

    def __init__(self, tell: Callable[[bytes], None], timeout_s: float) -> None:
        super().__init__()
        self._tell = tell
        self._timeout_s = timeout_s
        self._entries: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def hear(self, entry: bytes) -> None:
        key, value = msgspec.msgpack.decode(entry, type=tuple[str, bytes])
        with self._changed:
            self._entries[key] = value
            self._changed.notify_all()

    def set(self, key: str, value: Any) -> None:
        packed = value.encode() if isinstance(value, str) else bytes(value)
        with self._changed:
            self._entries[key] = packed
            self._changed.notify_all()
        self._tell(msgspec.msgpack.encode((key, packed)))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._entries[key]

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            return all(key in self._entries for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        limit_s = self._timeout_s if timeout is None else min(self._timeout_s, timeout.total_seconds())
        with self._changed:
            if not self._changed.wait_for(lambda: all(key in self._entries for key in keys), limit_s):
                raise TimeoutError(f"the peer did not join the group within {limit_s} s")

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()


def make_group(backend: str, store: dist.Store, rank: int, size: int, timeout_s: float, host: str) -> Any:
    """A process group apart from torch's default one. gloo binds to `host`, a named address."""
    timeout = timedelta(seconds=timeout_s)
    if backend == "gloo":
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timeout
        return dist.ProcessGroupGloo(store, rank, size, options)
    if backend == "nccl" and torch.cuda.is_available() and dist.is_nccl_available():
        # torch's own watchdog would end the process on a timeout; we abort the one communicator instead.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    raise ConfigError(f"no {backend} here", expected="gloo, or nccl with a CUDA device")


def _parts(pieces: Pieces, stage: torch.Tensor, kernels: ExtentKernels | None) -> Iterator[tuple[Pieces, torch.Tensor]]:
    """(pieces, their part of `stage`): many where a kernel takes them together, else one."""
    at = 0
    for run in find_runs(pieces, stage.device):
        together = run.packed and kernels is not None and (stage.data_ptr() + at) % UNIT_BYTES == 0
        step = run.count if together else 1
        for first in range(run.first, run.first + run.count, step):
            some = pieces[first : first + step]
            count = sum(len(piece) for piece in some)
            yield some, stage[at : at + count]
            at += count


def pack(pieces: Pieces, offset: int, stage: torch.Tensor, kernels: ExtentKernels | None = None) -> None:
    """Fills `stage` with the bytes from `offset` on of pieces laid end to end, host memory or flat uint8 tensors."""
    for some, part in _parts(region(pieces, offset, len(stage)), stage, kernels):
        piece = some[0]
        if len(some) > 1:
            assert kernels is not None
            gather_pieces(kernels, some, part)
        elif isinstance(piece, torch.Tensor):
            part.copy_(piece, non_blocking=True)
        elif part.device.type == "cpu":
            np.copyto(part.numpy(), np.frombuffer(piece, np.uint8))
        else:
            part.copy_(torch.from_numpy(np.frombuffer(piece, np.uint8)), non_blocking=True)


def unpack(stage: torch.Tensor, pieces: Pieces, offset: int, kernels: ExtentKernels | None = None) -> None:
    """The other way."""
    for some, part in _parts(region(pieces, offset, len(stage)), stage, kernels):
        piece = some[0]
        if len(some) > 1:
            assert kernels is not None
            scatter_pieces(kernels, part, some)
            continue
        target = piece if isinstance(piece, torch.Tensor) else torch.from_numpy(np.frombuffer(piece, np.uint8))
        target.copy_(part, non_blocking=True)


def _chunks(buffers: Sequence[Pieces], chunk_bytes: int) -> list[tuple[Pieces, int, int]]:
    """(buffer, offset, bytes) of every chunk, in order."""
    found = []
    for pieces in buffers:
        total = sum(len(piece) for piece in pieces)
        found += [(pieces, at, min(chunk_bytes, total - at)) for at in range(0, total, chunk_bytes)]
    return found


def send_to_self(group: Any, source: Pieces, target: Pieces, chunk_bytes: int) -> None:
    """The packed, staged way through a group of one rank on one GPU: NCCL sends to itself only inside a group call.

    Flat uint8 device tensors, cut alike or not.
    """
    device = source[0].device
    kernels = state_kernels(device)
    stages = [torch.empty(chunk_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    for pieces, at, count in _chunks([source], chunk_bytes):
        out, back = stages[0][:count], stages[1][:count]
        pack(pieces, at, out, kernels)
        group._start_coalescing(device)
        group.send([out], 0, 0)
        group.recv([back], 0, 0)
        work = group._end_coalescing(device)
        work.wait()
        unpack(back, target, at, kernels)
    torch.cuda.current_stream(device).synchronize()


class GroupCarrier:
    """Carries buffers over a pairwise group, by host copies over the link when the group fails.

    `rank` is 0 at the end that opened the link and 1 at the one that accepted it. `timeout_s` bounds joining and each
    push or pull. `kernels` pack, unpack and verify on the device; default: on CUDA Triton's, on a CPU none, and then
    torch packs and the host's checksum verifies. Both ends must have them or neither: the name says which.
    """

    def __init__(
        self,
        backend: str,
        rank: int,
        *,
        device: str = "cpu",
        timeout_s: float = 10.0,
        chunk_bytes: int = GROUP_CHUNK_BYTES,
        host: str = "127.0.0.1",
        kernels: StateKernels | None = None,
    ) -> None:
        self._kernels = kernels or state_kernels(torch.device(device))
        self.name = f"group-{backend}" if self._kernels is None else f"group-{backend}-device"
        self.fallbacks = 0
        """Transfers that went over the link in the end."""
        self._backend = backend
        self._rank = rank
        self._device = torch.device(device)
        self._timeout_s = timeout_s
        self._chunk_bytes = chunk_bytes
        self._host = host
        self._group: Any = None
        self._store: _LinkStore | None = None
        self._failures = 0
        self._inline = InlineCarrier()

    def extents(self, buffers: Sequence[Buffer]) -> tuple[Sequence[Extent], Callable[[], None]]:
        return (), lambda: None

    async def push(self, link: Link, buffers: Sequence[Pieces]) -> None:
        await self._carry(link, buffers, self._push_all, self._inline.push)

    async def pull(self, link: Link, targets: Sequence[Pieces]) -> None:
        await self._carry(link, targets, self._pull_all, self._inline.pull)

    def checksum(self, pieces: Pieces) -> int:
        kernels = self._kernels
        if kernels is None:
            return host_checksum(pieces)
        return device_checksum(pieces, partial(pack, kernels=kernels), kernels, self._device)

    async def _carry(self, link: Link, buffers: Sequence[Pieces], by_group: Any, by_link: Any) -> None:
        """Both ends: try the group, tell and hear how it went, and do it again over the link unless both succeeded."""
        loop = asyncio.get_running_loop()
        outgoing: asyncio.Queue[bytes] = asyncio.Queue()

        def tell(entry: bytes) -> None:
            loop.call_soon_threadsafe(outgoing.put_nowait, _ENTRY + entry)

        if self._store is None:
            self._store = _LinkStore(tell, self._timeout_s)
        self._store._tell = tell
        work = asyncio.create_task(asyncio.to_thread(self._try, by_group, buffers))
        work.add_done_callback(lambda _: outgoing.put_nowait(_VERDICT + (b"1" if work.result() else b"0")))

        async def say() -> None:
            while True:
                frame = await outgoing.get()
                await link.send(frame)
                if frame.startswith(_VERDICT):
                    return

        saying = asyncio.create_task(say())
        try:
            theirs = await self._hear_verdict(link, self._store)
            await saying
        except BaseException:
            self._abort()  # the thread ends at its next look at the group
            raise
        finally:
            saying.cancel()
        if work.result() and theirs:
            self._failures = 0
            return
        self._abort()
        self._failures += 1
        self.fallbacks += 1
        log.warning("a transfer by %s failed (here: %s); host copies instead", self.name, not work.result())
        await by_link(link, buffers)

    async def _hear_verdict(self, link: Link, store: _LinkStore) -> bool:
        while True:
            frame = bytes(await link.receive())
            if frame[:1] == _VERDICT:
                return frame[1:] == b"1"
            if frame[:1] != _ENTRY:
                raise ProtocolError("a frame out of order while a group was used")
            try:
                store.hear(frame[1:])
            except msgspec.MsgspecError as error:
                raise ProtocolError(f"a group's entry that does not decode: {error}") from None

    def _try(self, by_group: Callable[[Sequence[Pieces]], None], buffers: Sequence[Pieces]) -> bool:
        """In a thread: whether the group did it."""
        if self._failures >= FAILURES_MAX:
            return False
        try:
            if self._group is None:
                assert self._store is not None
                store = dist.PrefixStore(str(self.fallbacks), self._store)
                self._group = make_group(self._backend, store, self._rank, 2, self._timeout_s, self._host)
            by_group(buffers)
        except (RuntimeError, TimeoutError, ConfigError) as error:
            log.warning("%s: %s", self.name, error)
            return False
        return True

    def _finish(self, work: Any, deadline_s: float) -> None:
        """Waits for one operation, at most until the deadline."""
        if self._backend == "gloo":
            work.wait(timedelta(seconds=max(0.001, deadline_s - time.monotonic())))
            return
        # NCCL's wait only orders streams, and a stream that waits for a peer that is gone waits for ever: so we ask.
        while not work.is_completed():
            if time.monotonic() > deadline_s:
                raise TimeoutError("a group operation did not end in time")
            time.sleep(_POLL_S)
        work.wait()

    def _stages(self) -> list[torch.Tensor]:
        return [torch.empty(self._chunk_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)]

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _push_all(self, buffers: Sequence[Pieces]) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        stages = self._stages()
        under_way: list[Any] = [None, None]
        for number, (pieces, at, count) in enumerate(_chunks(buffers, self._chunk_bytes)):
            turn = number % 2
            if under_way[turn] is not None:
                self._finish(under_way[turn], deadline_s)
            stage = stages[turn][:count]
            pack(pieces, at, stage, self._kernels)
            under_way[turn] = self._group.send([stage], 1 - self._rank, 0)
        for work in under_way:
            if work is not None:
                self._finish(work, deadline_s)

    def _pull_all(self, targets: Sequence[Pieces]) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        stages = self._stages()
        chunks = _chunks(targets, self._chunk_bytes)

        def ask(number: int) -> Any:
            return self._group.recv([stages[number % 2][: chunks[number][2]]], 1 - self._rank, 0)

        under_way = ask(0) if chunks else None
        for number, (pieces, at, count) in enumerate(chunks):
            self._finish(under_way, deadline_s)
            # The next one is asked for before this one is unpacked.
            under_way = ask(number + 1) if number + 1 < len(chunks) else None
            unpack(stages[number % 2][:count], pieces, at, self._kernels)
        self._synchronize()

    def _abort(self) -> None:
        group, self._group, self._store = self._group, None, None
        if group is not None:
            try:
                group.abort()
            except RuntimeError as error:
                log.warning("%s: aborting: %s", self.name, error)

    def close(self) -> None:
        """Ends the group."""
        self._abort()
