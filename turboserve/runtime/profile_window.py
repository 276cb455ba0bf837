"""A window of torch.profiler over the next chunks of a live engine; its trace opens in Perfetto or chrome://tracing.

It runs in the engine's thread, between passes. While it is open a pass costs several times as much (the profiler notes
every operator), and writing the trace holds the engine up for as long as that takes: fractions of a second for tens of
chunks. That is the price of looking; the windows are bounded so that nobody pays it for long.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from turboserve import ranges
from turboserve.errors import Conflict, StateError

CHUNKS_MAX = 1000
WINDOW_MAX_S = 60.0
TABLE_ROWS = 40


class ProfileWindow:
    """At most one window at a time."""

    def __init__(self, device: torch.device) -> None:
        self._activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler: Any = None
        self._path = Path()
        self._left = 0
        self._until_s = 0.0

    @property
    def is_open(self) -> bool:
        return self._profiler is not None

    @property
    def path(self) -> Path:
        """Where the open or the last window's trace is, or will be."""
        return self._path

    def open(self, path: Path, chunks: int) -> None:
        """Begin; Conflict while one is open, StateError when the folder cannot be made."""
        if self.is_open:
            raise Conflict(f"a capture window is open; it writes {self._path}", hint="wait until its chunks are made")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"the trace cannot be written to {path.parent}: {error.strerror}") from None
        self._path, self._left = path, max(1, min(chunks, CHUNKS_MAX))
        self._until_s = time.monotonic() + WINDOW_MAX_S
        self._profiler = torch.profiler.profile(activities=self._activities)
        self._profiler.start()
        ranges.set_recorder(torch.profiler.record_function)

    def saw_chunk(self) -> None:
        """A chunk's frames are out."""
        self._left -= 1

    @property
    def left_s(self) -> float | None:
        """How much longer the open window may be open; None when none is."""
        return max(0.0, self._until_s - time.monotonic()) if self.is_open else None

    @property
    def is_due(self) -> bool:
        """Whether an open window has seen its chunks, or has been open for too long."""
        return self.is_open and (self._left <= 0 or time.monotonic() >= self._until_s)

    def close(self) -> Path:
        """End the window: the trace, and beside it a table of the costliest operators (`.txt`). Both appear whole."""
        profiler, self._profiler = self._profiler, None
        ranges.set_recorder(None)
        profiler.stop()
        part = self._path.with_name(f".{self._path.name}.part")
        profiler.export_chrome_trace(str(part))
        sort = "self_cuda_time_total" if len(self._activities) > 1 else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=sort, row_limit=TABLE_ROWS, max_name_column_width=60)
        self._path.with_suffix(".txt").write_text(table + "\n")
        part.rename(self._path)
        return self._path
