"""One viewer of the load: opens a session, watches its periods, pauses between them, steers now and then, leaves.

Open loop: everything happens at its planned time, whether or not the server keeps up, and latencies count from there.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from turboserve.bench.serve_trace import PeriodPlan, SessionPlan
from turboserve.client import AsyncSession
from turboserve.errors import TurboServeError

START_TARGETS = 2.5
"""A player starts so many chunk targets after the period's start (contracts section 4)."""
PROMPTS = (
    "two small red circles drifting left over a dark blue sky",
    "one large green square bouncing over dark purple",
    "three yellow stars drifting right over black",
    "a blue ring growing on grey",
)


@dataclass(frozen=True, slots=True)
class LiveClock:
    """Of the server's live streams: wall-clock seconds of a chunk, and its latency target."""

    chunk_s: float
    chunk_target_s: float


@dataclass(slots=True)
class PeriodSeen:
    """One period as the viewer saw it. `arrivals_s` and `latencies_ms` are per chunk, in order."""

    start_s: float
    wanted: int
    first_of_session: bool
    arrivals_s: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    steer_at: int | None = None
    """New words are sent when so many chunks of it are here."""
    steered_s: float | None = None
    steered_version: int | None = None

    def play(self, clock: LiveClock) -> tuple[list[float], list[float]]:
        """(when each chunk's first frame is shown, seconds the player stood still before it) of a simulated player.

        It starts START_TARGETS after the period's start or with the first chunk, whichever is later, plays a chunk in
        chunk_s, and stands still where the next one is not there.
        """
        shown: list[float] = []
        stalls: list[float] = []
        for arrival_s in self.arrivals_s:
            if not shown:
                shown.append(max(arrival_s, self.start_s + START_TARGETS * clock.chunk_target_s))
                stalls.append(0.0)
                continue
            due_s = shown[-1] + clock.chunk_s
            shown.append(max(due_s, arrival_s))
            stalls.append(max(0.0, arrival_s - due_s))
        return shown, stalls

    def on_time(self, clock: LiveClock) -> int:
        """Chunks that were here by start + 2.5 targets + i chunks (contracts section 4)."""
        first_due_s = self.start_s + START_TARGETS * clock.chunk_target_s
        return sum(at_s <= first_due_s + place * clock.chunk_s for place, at_s in enumerate(self.arrivals_s))

    def input_to_visible_s(self, clock: LiveClock) -> float | None:
        """From the words sent to the first frame that follows them on the simulated player; None when not steered,
        or when the period ended before."""
        if self.steered_s is None or self.steered_version is None:
            return None
        shown, _ = self.play(clock)
        for at_s, version in zip(shown, self.versions, strict=True):
            if version >= self.steered_version:
                return max(0.0, at_s - self.steered_s)
        return None


@dataclass(slots=True)
class ViewerSeen:
    """What became of one session."""

    session_id: str
    periods: list[PeriodSeen] = field(default_factory=list)
    extra: int = 0
    """Chunks that came after a period was over: begun before the pause reached the server."""
    reconnects: int = 0
    worker_changes: int = 0
    failure: str = ""

    @property
    def wanted(self) -> int:
        return sum(one.wanted for one in self.periods)

    @property
    def delivered(self) -> int:
        return sum(len(one.arrivals_s) for one in self.periods)


class LoadViewer:
    """Runs one plan. `now_s` counts from the start of the load."""

    def __init__(
        self, plan: SessionPlan, options: dict[str, Any], *, started_s: float, steer_share: float, seed: int
    ) -> None:
        self.plan = plan
        self.seen = ViewerSeen(plan.session_id)
        self._options = options
        self._started_s = started_s
        self._rng = random.Random(f"{seed}/{plan.session_id}")
        self._steer_share = steer_share
        self._period: PeriodSeen | None = None
        self._moved = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._prompt = self._rng.randrange(len(PROMPTS))

    def now_s(self) -> float:
        return time.monotonic() - self._started_s

    async def run(self, give_up_s: float, on_chunk: Callable[[], None]) -> ViewerSeen:
        """The whole plan; what is not delivered by `give_up_s` is left."""
        await self._until(self.plan.periods[0].start_s if self.plan.periods else self.plan.arrive_s)
        # What is wanted counts from here on, whether or not the server lets the session in.
        self.seen.periods = [
            PeriodSeen(one.start_s, one.chunks, place == 0) for place, one in enumerate(self.plan.periods)
        ]
        session = None
        try:
            session = await AsyncSession.open(PROMPTS[self._prompt], pace="live", **self._options)
            reader = asyncio.create_task(self._read(session, on_chunk))
            self._tasks.add(reader)
            for place, (plan, period) in enumerate(zip(self.plan.periods, self.seen.periods, strict=True)):
                await self._watch(session, plan, period, resume=place > 0, give_up_s=give_up_s)
            await self._until(min(self.plan.depart_s, give_up_s))
        except TurboServeError as error:
            self.seen.failure = f"{error.code}: {error.message}"
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if session is not None:
                self.seen.reconnects = session.reconnects
                await session.close()
        return self.seen

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self.now_s()))

    async def _watch(
        self, session: AsyncSession, plan: PeriodPlan, period: PeriodSeen, *, resume: bool, give_up_s: float
    ) -> None:
        await self._until(plan.start_s)
        self._period = period
        if resume:
            await session.resume()
        if self._rng.random() < self._steer_share and plan.chunks >= 4:
            period.steer_at = self._rng.randrange(1, plan.chunks - 2)
        while len(period.arrivals_s) < period.wanted and self.seen.failure == "" and self.now_s() < give_up_s:
            self._moved.clear()
            try:
                async with asyncio.timeout(max(0.05, min(1.0, give_up_s - self.now_s()))):
                    await self._moved.wait()
            except TimeoutError:
                continue
        self._period = None
        if plan is not self.plan.periods[-1] or self.now_s() < self.plan.depart_s:
            await session.pause()

    async def _steer(self, session: AsyncSession, period: PeriodSeen) -> None:
        """New words, at a moment of no special kind."""
        await asyncio.sleep(self._rng.uniform(0.0, 0.3))
        if self._period is not period:
            return
        self._prompt = (self._prompt + 1) % len(PROMPTS)
        period.steered_s = self.now_s()
        answer = await session.update(PROMPTS[self._prompt])
        period.steered_version = answer.prompt_version

    async def _read(self, session: AsyncSession, on_chunk: Callable[[], None]) -> None:
        epoch = 0
        try:
            async for chunk in session:
                now_s, period = self.now_s(), self._period
                if epoch and chunk.epoch != epoch:
                    self.seen.worker_changes += 1
                epoch = chunk.epoch
                if period is None or len(period.arrivals_s) >= period.wanted:
                    self.seen.extra += 1
                    continue
                period.arrivals_s.append(now_s)
                period.latencies_ms.append(chunk.latency_ms)
                period.versions.append(chunk.prompt_version)
                if len(period.arrivals_s) == period.steer_at:
                    self._tasks.add(asyncio.create_task(self._steer(session, period)))
                on_chunk()
                self._moved.set()
        except TurboServeError as error:
            self.seen.failure = f"{error.code}: {error.message}"
        self._moved.set()
