"""Small pieces of a device's memory into the arena and home again: packed by the kernels, and a copy for each."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

import torch

from turboserve.bench import timing
from turboserve.runtime.arena import Arena, create_arena
from turboserve.runtime.copy_engine import CopyEngine
from turboserve.runtime.packing import ExtentKernels
from turboserve.runtime.state_copies import STAGE_BYTES, DeviceCopies

SESSION = "a" * 26


def pack_times(
    pieces: int, piece_bytes: int, rounds: int, device: torch.device, kernels: ExtentKernels
) -> tuple[dict[str, timing.Timing], float]:
    """Times of "out" (into the arena) and "home", each "packed", "plain" and as the "floor": one copy of all the bytes;
    and the largest error of the packed way. Every way is timed until the bytes are there."""
    total = pieces * piece_bytes
    generator = torch.Generator().manual_seed(1)
    whole = torch.randint(0, 256, (pieces, 2, piece_bytes), dtype=torch.uint8, generator=generator).to(device)
    back = torch.zeros_like(whole)
    # Every second row, as the pages of a cache lie.
    sources, targets = [row[0] for row in whole], [row[0] for row in back]
    with ExitStack() as stack:
        fd = create_arena(total + (1 << 20))
        stack.callback(os.close, fd)
        arena = stack.enter_context(Arena.map(fd, partition=0, owner_epoch=1))
        if device.type == "cuda":
            arena.pin()
        else:
            arena.touch()
        engine = stack.enter_context(CopyEngine(str(device)))
        packed, plain = (
            DeviceCopies(engine, device, kernels, pack_below_bytes=below, stage_bytes=STAGE_BYTES)
            for below in (piece_bytes + 1, 0)
        )
        reservation = arena.reserve(SESSION, 1, total)
        host, (memory,) = reservation.addresses(), reservation.views
        flat = torch.empty(total, dtype=torch.uint8, device=device)
        into = torch.frombuffer(memory, dtype=torch.uint8)

        def there() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        def home(copies: DeviceCopies) -> None:
            copies.to_device(host, targets)
            there()

        def floor(target: torch.Tensor, source: torch.Tensor) -> None:
            target.copy_(source, non_blocking=True)
            there()

        packed.to_host(sources, host)
        error = timing.max_rel_err(into.numpy(), torch.cat(sources).cpu().numpy())
        home(packed)
        error = max(error, timing.max_rel_err(back.cpu().numpy()[:, 0], whole.cpu().numpy()[:, 0]))
        ways: dict[str, Callable] = {
            "out packed": lambda: packed.to_host(sources, host),
            "out plain": lambda: plain.to_host(sources, host),
            "out floor": lambda: floor(into, flat),
            "home packed": lambda: home(packed),
            "home plain": lambda: home(plain),
            "home floor": lambda: floor(flat, into),
        }
        return timing.alternate(ways, rounds=rounds), error
