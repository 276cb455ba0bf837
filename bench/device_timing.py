"""Times of work on a device: CUDA graphs replayed between events with a cold L2 cache, or the wall clock of a CPU.

On CUDA a contender is captured into a graph once, so that what is measured is the device's work and not Python's;
before every replay a buffer larger than the L2 cache is overwritten; contenders take turns; the median of all replays
counts. A contender that cannot be captured is launched directly between the same events.

Floors are measured here too, on random data (zeros run faster): the rate of a large matrix product, and the bandwidth
of a copy, read and written bytes counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from turboserve.bench.timing import Timing, alternate

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any device we know


def measure(
    contenders: Mapping[str, Callable[[], Any]], *, device: torch.device, rounds: int, warmup: int = 3
) -> dict[str, Timing]:
    """Times of each contender, which take turns round by round."""
    if device.type != "cuda":
        return alternate(contenders, rounds=rounds, warmup=warmup)
    replays = {name: _captured(work, warmup) for name, work in contenders.items()}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in replays}
    names = list(replays)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            flush.zero_()
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            replays[name]()
            after.record()
            pairs[name].append((before, after))
    torch.cuda.synchronize(device)
    return {name: Timing(tuple(a.elapsed_time(b) for a, b in found)) for name, found in pairs.items()}


def _captured(work: Callable[[], Any], warmup: int) -> Callable[[], Any]:
    """A replay of the work's graph; the work itself where a graph cannot hold it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(max(1, warmup)):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return work
    return graph.replay


def matmul_rate(device: torch.device, dtype: torch.dtype, rounds: int = 20) -> float:
    """FLOP a second of one large matrix product in this dtype, float32 accumulation, random data."""
    size = 8192 if device.type == "cuda" else 384
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    time = measure({"matmul": lambda: torch.matmul(a, b, out=out)}, device=device, rounds=rounds)["matmul"]
    return 2 * size**3 / (time.median_ms * 1e-3)


def copy_rate(device: torch.device, rounds: int = 20) -> float:
    """Bytes a second, read and written, of one large copy on the device."""
    count = (1 << 30) if device.type == "cuda" else (8 << 20)
    source = torch.randint(256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    time = measure({"copy": lambda: target.copy_(source)}, device=device, rounds=rounds)["copy"]
    return 2 * count / (time.median_ms * 1e-3)
