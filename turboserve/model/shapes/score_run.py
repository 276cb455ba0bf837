"""Generates streams with the serving class and scores them chunk by chunk (`score.py` judges)."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from turboserve.model.interface import ChunkRequest, Control, SessionTensors, StreamingModel, pack
from turboserve.model.shapes.score import Expectation, Verdict, judge
from turboserve.model.shapes.score_prompts import ScoredPrompt, random_prompt
from turboserve.model.shapes.self_test import allocate

_TOGETHER = 8  # streams generated in one packed pass


@dataclass
class Stream:
    """What a stream is asked for: (from chunk, prompt) in order, the first from 0."""

    seed: int
    chunks: int
    prompts: list[tuple[int, ScoredPrompt]]
    verdicts: list[Verdict] = field(default_factory=list)

    def prompt_at(self, chunk: int) -> tuple[int, ScoredPrompt]:
        """(version, prompt) that is bound to a chunk."""
        version = sum(first <= chunk for first, _ in self.prompts)
        return version, self.prompts[version - 1][1]

    def expected_at(self, chunk: int) -> Expectation:
        return self.prompt_at(chunk)[1].expected


def generate(
    model: StreamingModel, streams: Sequence[Stream], on_chunk: Callable[[Stream, int, np.ndarray], None]
) -> None:
    """Run streams of equal length side by side, in packed passes."""
    states: list[SessionTensors] = []
    for index, stream in enumerate(streams):
        state = allocate(model, f"score{index}", stream.seed)
        version, prompt = stream.prompt_at(0)
        model.begin(state, Control(prompt.text, version))
        states.append(state)
    for chunk in range(streams[0].chunks):
        segments = []
        for stream, state in zip(streams, states, strict=True):
            version, prompt = stream.prompt_at(chunk)
            request = ChunkRequest(chunk, model.spec.denoise_steps, Control(prompt.text, version))
            segments.append(model.next_passes(state, request))
        for together in zip(*segments, strict=True):
            batch = pack(together)
            rows = model.forward(batch)
            for index, segment in enumerate(together):
                model.advance(segment, rows[batch.rows(index)])
            if together[0].completes_latents:
                for stream, state in zip(streams, states, strict=True):
                    on_chunk(stream, chunk, model.decode(state, chunk))


def score_streams(
    model: StreamingModel, streams: Sequence[Stream], progress: Callable[[int], None] = lambda chunks: None
) -> None:
    """Fill the verdicts of all streams. `progress` gets the number of chunks done since the last call."""

    def on_chunk(stream: Stream, chunk: int, frames: np.ndarray) -> None:
        stream.verdicts.append(judge(frames, stream.expected_at(chunk)))
        progress(1)

    for start in range(0, len(streams), _TOGETHER):
        generate(model, streams[start : start + _TOGETHER], on_chunk)


def share(values: Iterable[bool | None]) -> float | None:
    """Share of True among those that are not None."""
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def shares(verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """Share of chunks right in each respect; `right` is all of colour, count and direction."""
    return {
        "colour": share(one.colour for one in verdicts),
        "count": share(one.count for one in verdicts),
        "direction": share(one.direction for one in verdicts),
        "right": share(one.right for one in verdicts),
        "shape": share(one.shape for one in verdicts),
    }


@dataclass(frozen=True)
class Plan:
    """How much to generate."""

    prompts: int
    prompt_s: float
    switches: int
    long_streams: int
    long_s: float
    long_edge_s: float  # the first and last so many seconds of a long stream are compared

    @classmethod
    def full(cls) -> Plan:
        return cls(prompts=200, prompt_s=30, switches=200, long_streams=4, long_s=600, long_edge_s=60)

    @classmethod
    def quick(cls) -> Plan:
        """What `make test` runs."""
        return cls(prompts=10, prompt_s=8, switches=10, long_streams=1, long_s=60, long_edge_s=12)


def score(
    model: StreamingModel, plan: Plan, seed: int = 0, progress: Callable[[float], None] = lambda share: None
) -> dict[str, object]:
    """The whole score, as shares of chunks (0..1).

    `steady`: chunks after the second. `first_chunks`: chunk 0 and 1. `switch`: whether the second chunk after a
    prompt switch, and all later ones, are right. `long`: first and last minute of a stream whose prompt stays.
    """
    rng = random.Random(seed)
    chunk_s = model.spec.chunk_s

    def chunks(seconds: float) -> int:
        return round(seconds / chunk_s)

    steady = [
        Stream(rng.getrandbits(32), chunks(plan.prompt_s), [(0, random_prompt(rng))]) for _ in range(plan.prompts)
    ]
    switch_at, after = 6, 6
    switched = [
        Stream(rng.getrandbits(32), switch_at + after, [(0, random_prompt(rng)), (switch_at, random_prompt(rng))])
        for _ in range(plan.switches)
    ]
    endless = [
        Stream(rng.getrandbits(32), chunks(plan.long_s), [(0, random_prompt(rng, drifting=True))])
        for _ in range(plan.long_streams)
    ]
    groups = (steady, switched, endless)
    total = sum(stream.chunks for group in groups for stream in group)
    done = 0

    def advanced(count: int) -> None:
        nonlocal done
        done += count
        progress(done / total)

    start = time.process_time()
    for group in groups:
        score_streams(model, group, advanced)
    edge = chunks(plan.long_edge_s)
    return {
        "plan": asdict(plan),
        "seed": seed,
        "model_hash": model.spec.model_hash,
        "chunks": total,
        "chunk_s": chunk_s,
        "chunk_cpu_ms": {str(n): chunk_cpu_ms(model, n) for n in (1, 2, 4, 8)},
        "cpu_s": round(time.process_time() - start, 1),
        "steady": shares([v for stream in steady for v in stream.verdicts[2:]]),
        "first_chunks": shares([v for stream in steady for v in stream.verdicts[:2]]),
        "switch": {
            "second_chunk": shares([stream.verdicts[switch_at + 1] for stream in switched]),
            "later_chunks": shares([v for stream in switched for v in stream.verdicts[switch_at + 2 :]]),
        },
        "long": {
            "first": shares([v for stream in endless for v in stream.verdicts[2:edge]]),
            "last": shares([v for stream in endless for v in stream.verdicts[-edge:]]),
        },
        "worst": worst(steady),
    }


def chunk_cpu_ms(model: StreamingModel, sessions: int, chunks: int = 12) -> float:
    """CPU time of one chunk of `sessions` coalesced sessions, all passes and the decoding: the best of several, since
    other work on the machine can only add to it."""
    prompt = random_prompt(random.Random(1))
    marks = [time.thread_time()]
    generate(
        model,
        [Stream(seed, chunks, [(0, prompt)]) for seed in range(sessions)],
        lambda stream, chunk, frames: marks.append(time.thread_time()),
    )
    every = marks[sessions::sessions]
    return round(1e3 * min(after - before for before, after in itertools.pairwise(every)), 1)


def worst(streams: Sequence[Stream], count: int = 10) -> list[dict[str, object]]:
    """The prompts with the most wrong chunks."""
    ranked = sorted(streams, key=lambda stream: share(v.right for v in stream.verdicts[2:]) or 0.0)
    return [{"prompt": one.prompts[0][1].text, "seed": one.seed, **shares(one.verdicts[2:])} for one in ranked[:count]]
