"""What `generate` and `replay` share: a card's inputs as chunk requests, and the progress bar while chunks are made."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from turboserve.card import CardInput, StepsRun
from turboserve.cli.options import console
from turboserve.model.interface import ChunkRequest, Control, ModelSpec, PromptSwitch

if TYPE_CHECKING:
    from turboserve.runtime.worker_events import FinishedChunk


def chunk_at(spec: ModelSpec, time_s: float) -> int:
    """The first chunk that begins at or after a time of the video."""
    frame = math.ceil(time_s * spec.fps - 1e-6)
    return spec.chunks_for(frame) if frame > 0 else 0


def requests(
    inputs: Iterable[CardInput], steps: Iterable[StepsRun], chunk_count: int, prompt_switch: str
) -> Iterator[ChunkRequest]:
    """The bound inputs of every chunk, in order."""
    by_index = {one.from_index: one for one in inputs}
    steps_by_index = {one.from_index: one.steps for one in steps}
    prompt, step_count = by_index[0], steps_by_index[0]
    for index in range(chunk_count):
        prompt, step_count = by_index.get(index, prompt), steps_by_index.get(index, step_count)
        control = Control(prompt.prompt, prompt.prompt_version)
        yield ChunkRequest(index, step_count, control, PromptSwitch(prompt_switch))


class Pace:
    """How fast chunks come, over the last few seconds and over all."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._begun_s = time.monotonic()
        self.frame_count = 0

    def add(self, frames: int) -> None:
        self.frame_count += frames

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._begun_s

    @property
    def fps(self) -> float:
        return self.frame_count / max(self.wall_s, 1e-9)

    @property
    def realtime_factor(self) -> float:
        """Above 1, video is made faster than it plays."""
        return self.fps / self._spec.fps


def with_progress(chunks: Iterable[FinishedChunk], total: int, pace: Pace, what: str) -> Iterator[FinishedChunk]:
    """Pass chunks on and show how it goes on stderr; no bar where stderr is no terminal."""
    if not sys.stderr.isatty():
        for chunk in chunks:
            pace.add(len(chunk.frames))
            yield chunk
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("chunk {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[fps]:.1f} fps, {task.fields[factor]:.1f}x real time"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(), transient=True) as bar:
        task = bar.add_task(what, total=total, fps=0.0, factor=0.0)
        for chunk in chunks:
            pace.add(len(chunk.frames))
            bar.update(task, advance=1, fps=pace.fps, factor=pace.realtime_factor)
            yield chunk
