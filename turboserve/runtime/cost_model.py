"""What a packed pass costs on this machine: measured at load, corrected while it runs.

The decision (`orchestrator/batching.py`) wants straight lines: a pass costs `base_s`, and each segment its own time.
Calibration times passes of 1, 2, 4, ... segments and fits base and per-segment time by least squares, neither below
zero. Whether packing pays is a property of the machine and the model, so it is measured, never assumed: a compute-bound
model comes out with base_s near 0 and its segments then run one by one in deadline order.

Afterwards every pass is compared with its prediction. The machine slows down and speeds up as a whole (other
processes, clocks), so the correction is one factor on all times, a slow average, kept within [1/8, 8]; a table of
measured times by segment count, made isotonic, is what reports show.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from turboserve.model.interface import ChunkRequest, Control, Segment, SessionTensors, StreamingModel, pack
from turboserve.orchestrator.batching import PassCost, ReadySegment
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.session_tensors import hold_session

_CORRECTION_MAX = 8.0
_AVERAGE_WEIGHT = 0.05
_GUESS_BASE_S = 2e-3
_GUESS_TOKEN_S = 5e-5


@dataclass(frozen=True, slots=True)
class PassTime:
    """One measured pass: its segments, their tokens together, and seconds."""

    segments: int
    tokens: int
    seconds: float


def isotonic(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The nearest non-decreasing sequence in least squares (pool adjacent violators)."""
    blocks: list[list[float]] = []  # mean, weight, length
    for index, value in enumerate(values):
        blocks.append([value, weights[index] if weights else 1.0, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, weight, length = blocks.pop()
            last = blocks[-1]
            last[0] = (last[0] * last[1] + mean * weight) / (last[1] + weight)
            last[1] += weight
            last[2] += length
    return [block[0] for block in blocks for _ in range(int(block[2]))]


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(base, slope), neither negative, of least relative squares through (x, y); one point gives (0, y / x).

    Relative, because a pass of sixteen segments must not outweigh the pass of one, where most decisions fall.
    """
    weights = [1.0 / (y * y) for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    if spread <= 1e-12 * total * mean_x * mean_x:
        return 0.0, mean_y / mean_x
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)) / spread
    base = mean_y - slope * mean_x
    if slope < 0:
        return mean_y, 0.0
    if base < 0:
        squares = sum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
        return 0.0, sum(w * x * y for w, (x, y) in zip(weights, points, strict=True)) / squares
    return base, slope


@dataclass(slots=True)
class MeasuredCost:
    """The cost model of one (model, device), as `choose_batch` reads it. Times are seconds.

    `base_s` and `token_s` are the fit at calibration; `correction` multiplies both. Without calibration they are a
    guess that observation soon corrects.
    """

    fitted_base_s: float = _GUESS_BASE_S
    fitted_token_s: float = _GUESS_TOKEN_S
    segment_max: int = 16
    pack_all: bool = False
    correction: float = 1.0
    by_count_s: dict[int, float] = field(default_factory=dict)
    segment_tokens: int = 0
    """Tokens of the segments that were calibrated; 0: not calibrated."""
    decode_s: float = 0.0
    """One chunk's decode, as calibrated."""

    @property
    def base_s(self) -> float:
        return self.fitted_base_s * self.correction

    def segment_s(self, segment: ReadySegment) -> float:
        """Own time of one segment. Kinds cost the same per token: a pass does the same work for each."""
        return self.fitted_token_s * segment.tokens * self.correction

    def pass_s(self, tokens: int) -> float:
        """Predicted seconds of a pass."""
        return (self.fitted_base_s + self.fitted_token_s * tokens) * self.correction

    def observe(self, measured: PassTime) -> None:
        """Learn from a pass that has run. One wild measurement moves the correction by a few percent at most."""
        predicted = self.pass_s(measured.tokens)
        if predicted > 0:
            ratio = min(2.0, max(0.5, measured.seconds / predicted))
            corrected = self.correction * math.exp(_AVERAGE_WEIGHT * math.log(ratio))
            self.correction = min(_CORRECTION_MAX, max(1 / _CORRECTION_MAX, corrected))
        before = self.by_count_s.get(measured.segments, measured.seconds)
        self.by_count_s[measured.segments] = before + _AVERAGE_WEIGHT * (measured.seconds - before)

    def table_s(self) -> list[tuple[int, float]]:
        """(segments, seconds) of the passes seen, smoothed to never fall with the number of segments."""
        counts = sorted(self.by_count_s)
        return list(zip(counts, isotonic([self.by_count_s[one] for one in counts]), strict=True))

    def chunk_table_s(self, denoise_steps: int, count: int) -> list[float]:
        """Seconds of a batch of 1..`count` whole chunks (their passes packed, their decodes one by one); empty when
        nothing was calibrated."""
        if not self.segment_tokens:
            return []
        passes = denoise_steps + 1  # and the context pass
        return [
            passes * (self.fitted_base_s + self.fitted_token_s * self.segment_tokens * n) + n * self.decode_s
            for n in range(1, count + 1)
        ]

    def frozen(self) -> PassCost:
        """The same numbers as the simulator's immutable cost model."""
        return PassCost(
            base_s=self.base_s,
            token_s=dict.fromkeys(("denoise", "context", "recache"), self.fitted_token_s * self.correction),
            segment_max=self.segment_max,
        )


def calibrate(
    model: StreamingModel,
    pool: KvPool,
    *,
    segment_max: int,
    count_max: int = 8,
    repeats: int = 3,
    budget_s: float = 3.0,
) -> MeasuredCost:
    """Time packed denoise steps of 1, 2, 4, ... `count_max` sessions in free slots, and fit. All slots are given back.

    On a CPU the clock is this thread's own time: beside other busy processes wall time says more of them than of us,
    and what matters here is how the cost grows; the correction turns it into wall time once passes run. The best of
    `repeats` counts. A full window costs more than an empty one, so the sessions first run chunks, without decode,
    until it is full. Stops early after `budget_s`.
    """
    counts = [1]
    while counts[-1] * 2 <= min(segment_max, count_max, pool.free_count):
        counts.append(counts[-1] * 2)
    on_cuda = model.device.type == "cuda"
    synchronize: Callable[[], object] = torch.cuda.synchronize if on_cuda else (lambda: None)
    clock = time.perf_counter if on_cuda else time.thread_time
    started_s = clock()
    names = [f"calibrate{index:02d}".ljust(26, "a") for index in range(counts[-1])]
    held = []
    times: list[PassTime] = []
    try:
        control = Control(prompt="")
        for index, name in enumerate(names):
            held.append(hold_session(pool, model, name, seed=index, control=control))
        for chunk_index in range(model.spec.slot.page_count):
            if clock() - started_s > budget_s / 2:
                break
            _advance_all(model, [one.state for one in held], chunk_index)
        request_index = held[0].state.next_chunk_index
        for count in counts:
            best = math.inf
            segments = [_first_segment(model, one.state, request_index) for one in held[:count]]
            for _ in range(repeats):
                batch = pack(segments)
                synchronize()
                before_s = clock()
                model.forward(batch)
                synchronize()
                best = min(best, clock() - before_s)
            times.append(PassTime(count, pack(segments).tokens, best))
            if clock() - started_s > budget_s and len(times) >= 2:
                break
        decode_s = _time_decode(model, held[0].state, request_index, clock, synchronize)
    finally:
        for one in held:
            pool.release(one.session_id)
    base_s, token_s = fit_line([(one.tokens, one.seconds) for one in times])
    cost = MeasuredCost(fitted_base_s=base_s, fitted_token_s=token_s, segment_max=segment_max)
    cost.segment_tokens, cost.decode_s = times[0].tokens, decode_s
    cost.by_count_s.update({one.segments: one.seconds for one in times})
    return cost


def _first_segment(model: StreamingModel, state: SessionTensors, chunk_index: int) -> Segment:
    request = ChunkRequest(chunk_index, model.spec.denoise_steps, Control(prompt=""))
    return model.next_passes(state, request)[0]


def _time_decode(
    model: StreamingModel,
    state: SessionTensors,
    chunk_index: int,
    clock: Callable[[], float],
    synchronize: Callable[[], object],
) -> float:
    """Seconds of one decode of one session's next chunk."""
    request = ChunkRequest(chunk_index, model.spec.denoise_steps_floor, Control(prompt=""))
    for segment in model.next_passes(state, request):
        model.advance(segment, model.forward(pack([segment])))
        if segment.completes_latents:
            synchronize()
            before_s = clock()
            model.decode(state, chunk_index)
            synchronize()
            return clock() - before_s
    return 0.0


def _advance_all(model: StreamingModel, states: Sequence[SessionTensors], chunk_index: int) -> None:
    """Run one chunk of every session without decoding it."""
    request = ChunkRequest(chunk_index, model.spec.denoise_steps_floor, Control(prompt=""))
    lists = [model.next_passes(state, request) for state in states]
    for segments in zip(*lists, strict=True):
        batch = pack(segments)
        rows = model.forward(batch)
        for index, segment in enumerate(segments):
            model.advance(segment, rows[batch.rows(index)])
