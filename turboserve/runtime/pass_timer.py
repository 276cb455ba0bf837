"""How long passes take on the device, measured without waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from turboserve.runtime.cost_model import PassTime


class PassTimer:
    """The engine's own clock on a CPU; on CUDA a pair of events per pass, read once the device has passed them."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._cuda = device.type == "cuda"
        self._open: deque[tuple[int, int, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._done: list[PassTime] = []

    @contextmanager
    def measure(self, segments: int, tokens: int) -> Iterator[None]:
        """Time the body; a body that raises leaves no measurement."""
        if not self._cuda:
            before_s = self._clock()
            yield
            self._done.append(PassTime(segments, tokens, self._clock() - before_s))
            return
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        yield
        after.record()
        self._open.append((segments, tokens, before, after))

    def finished(self) -> list[PassTime]:
        """Measurements that have become known since the last call."""
        while self._open and self._open[0][3].query():
            segments, tokens, before, after = self._open.popleft()
            self._done.append(PassTime(segments, tokens, before.elapsed_time(after) / 1e3))
        done, self._done = self._done, []
        return done
