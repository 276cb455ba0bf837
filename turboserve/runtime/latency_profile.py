"""Measures a model on this device and writes the latency profile that placement, autoscaling and the simulator read.

What is timed is what a worker runs: packed passes of 1..n sessions whose windows are full, at every step of the noise
schedule and the context pass, and one session's decode. A batch of n whole chunks is then n decodes and the passes of
its steps; the simulator's chunk batching means exactly that.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from turboserve.errors import ConfigError
from turboserve.model.interface import ChunkRequest, Control, StreamingModel, Tier, moved_bytes, pack, state_bytes
from turboserve.model.step_error import latent_error_by_steps
from turboserve.orchestrator.latency import LatencyProfile, profile_from_dict
from turboserve.runtime.cost_model import isotonic
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.numerics import device_class
from turboserve.runtime.session_tensors import HeldSession, hold_session

_PROMPT = Control(prompt="")
_COPY_BYTES_MAX = 256 << 20


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """What the measurement cannot know. `resident_max` None: what fits the memory that is free now."""

    segments_max: int = 8
    repeats: int = 5
    chunk_target_s: float | None = None
    resident_max: int | None = None
    price_per_worker_hour: float = 1.0
    provision_s: float = 30.0


class _Clock:
    """Seconds of this thread on a CPU, where wall time beside other processes says more of them than of us; wall time
    with the device idle at both ends on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self.name = "wall" if self._on_cuda else "thread"

    def __call__(self) -> float:
        if self._on_cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.thread_time()


def measure_profile(
    model: StreamingModel, options: ProfileOptions, name: str, note: Callable[[str], None] = lambda _text: None
) -> dict[str, Any]:
    """The profile's JSON: the fields of LatencyProfile, and under `measured` all that was timed and where.

    ConfigError when memory does not hold the sessions asked for.
    """
    spec, layout = model.spec, model.state_layout()
    clock = _Clock(model.device)
    counts = range(1, options.segments_max + 1)
    with _sessions(model, options.segments_max) as held:
        note(f"filling the windows of {len(held)} sessions")
        request = _fill_windows(model, held)
        passes, decode_s = _time_passes(model, held, request, counts, options.repeats, clock, note)
    steps = spec.denoise_steps
    by_count = {
        n: {
            "denoise": isotonic_at(passes, "denoise", n),
            "context": isotonic_at(passes, "context", n),
        }
        for n in counts
    }
    table = [n * decode_s + steps * by_count[n]["denoise"] + by_count[n]["context"] for n in counts]
    table = isotonic(table)
    target_s = options.chunk_target_s or spec.chunk_s
    session_bytes = state_bytes(layout)
    copy_s = _copy_seconds(model.device, moved_bytes(layout), clock)
    resident = options.resident_max or _resident_max(model, session_bytes, options.segments_max)
    capacity = max(1, sum(one <= target_s for one in table))
    note("comparing latents at fewer steps")
    profile = {
        "name": name,
        "about": (
            f"Measured by `turboserve calibrate`: {spec.name} at {spec.width}x{spec.height} on "
            f"{device_class(model.device)}, full windows, {clock.name} time, median of {options.repeats}. "
            f"Transfers are copies of the session's bytes {_copy_words(model.device)}; provision_s is as given."
        ),
        "chunk_s": spec.chunk_s,
        "chunk_target_s": target_s,
        "batch_latency_s": [round(one, 6) for one in table],
        "capacity": capacity,
        "resident_max": max(resident, capacity),
        "denoise_steps": steps,
        "denoise_steps_floor": spec.denoise_steps_floor,
        "step_latency_share": round(steps * by_count[1]["denoise"] / table[0], 4),
        "state_bytes": session_bytes,
        "offload_s": round(copy_s, 6),
        "resume_s": round(copy_s, 6),
        "migrate_s": round(2 * copy_s, 6),
        "migrate_cross_node_s": round(2 * copy_s, 6),
        "provision_s": options.provision_s,
        "release_s": 0.0,
        "provision_unit_workers": 1,
        "gpu_count": 1,
        "price_per_worker_hour": options.price_per_worker_hour,
        "measured": {
            "model": spec.name,
            "model_hash": spec.model_hash,
            "size": f"{spec.width}x{spec.height}",
            "device_class": device_class(model.device),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "load_1min": round(os.getloadavg()[0], 2),
            "clock": clock.name,
            "passes": passes,
            "decode_s": round(decode_s, 6),
            "chunk_s_by_steps": _chunk_by_steps(spec.denoise_steps_floor, steps, by_count, decode_s),
            "latent_error_by_steps": {
                str(count): round(error, 6) for count, error in latent_error_by_steps(model).items()
            },
            "state_bytes": {tier.value: state_bytes(layout, tier) for tier in Tier},
        },
    }
    profile_from_dict(profile, name)  # what we write, the readers take
    return profile


def _chunk_by_steps(floor: int, full: int, by_count: dict[int, dict[str, float]], decode_s: float) -> dict[str, Any]:
    """steps -> [seconds of a batch of n chunks at that many steps, n = 1...]."""
    return {
        str(steps): [round(n * decode_s + steps * one["denoise"] + one["context"], 6) for n, one in by_count.items()]
        for steps in range(floor, full + 1)
    }


def isotonic_at(passes: list[dict[str, Any]], kind: str, segments: int) -> float:
    """Seconds of a pass of a kind, made to never fall with the number of segments."""
    rows = [one for one in passes if one["kind"] == kind]
    smooth = isotonic([one["median_s"] for one in rows])
    return smooth[[one["segments"] for one in rows].index(segments)]


@contextmanager
def _sessions(model: StreamingModel, count: int) -> Iterator[list[HeldSession]]:
    """Sessions in a pool of their own; their memory goes back at the end."""
    try:
        pool = KvPool(model.state_layout(), count, model.device)
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"{count} sessions of {state_bytes(model.state_layout())} bytes do not fit: {error}",
            expected="fewer --segments",
        ) from None
    held = []
    try:
        for index in range(count):
            held.append(hold_session(pool, model, f"profile{index:03d}".ljust(26, "a"), index, _PROMPT))
        yield held
    finally:
        for one in held:
            pool.release(one.session_id)


def _fill_windows(model: StreamingModel, held: list[HeldSession]) -> ChunkRequest:
    """Run chunks, without decode, until every page of the slots has been written; the request that comes next."""
    spec = model.spec
    last = min(spec.slot.page_count, (spec.max_chunks or spec.slot.page_count + 1) - 1)
    with torch.inference_mode():
        for chunk in range(last):
            request = ChunkRequest(chunk, spec.denoise_steps_floor, _PROMPT)
            for one in held:
                for segment in model.next_passes(one.state, request):
                    model.advance(segment, model.forward(pack([segment])))
    return ChunkRequest(last, spec.denoise_steps, _PROMPT)


def _time_passes(
    model: StreamingModel,
    held: list[HeldSession],
    request: ChunkRequest,
    counts: range,
    repeats: int,
    clock: _Clock,
    note: Callable[[str], None],
) -> tuple[list[dict[str, Any]], float]:
    """Rows {"kind", "segments", "tokens", "median_s", "p20_s", "p80_s"}, and the median of one decode in seconds."""
    rows = []
    with torch.inference_mode():
        lists = [model.next_passes(one.state, request) for one in held]
        for kind, place in (("denoise", 0), ("context", -1)):
            for count in counts:
                batch = pack([one[place] for one in lists[:count]])
                model.forward(batch)  # the first of a shape allocates, and compiles where there is a compiler
                times = sorted(_timed(partial(model.forward, batch), clock) for _ in range(repeats))
                rows.append(
                    {
                        "kind": kind,
                        "segments": count,
                        "tokens": batch.tokens,
                        "median_s": round(statistics.median(times), 6),
                        "p20_s": round(times[len(times) // 5], 6),
                        "p80_s": round(times[-1 - len(times) // 5], 6),
                    }
                )
            note(f"timed {kind} passes of 1 to {counts[-1]} sessions")
        state = held[0].state
        for segment in lists[0]:
            rows_out = model.forward(pack([segment]))
            model.advance(segment, rows_out)
            if segment.completes_latents:
                decodes = [_timed(lambda: model.decode(state, request.chunk_index), clock) for _ in range(repeats)]
    return rows, statistics.median(decodes)


def _timed(work: Callable[[], object], clock: _Clock) -> float:
    before_s = clock()
    work()
    return clock() - before_s


def _copy_seconds(device: torch.device, count: int, clock: _Clock) -> float:
    """Seconds to bring so many bytes to the host, from the rate of a block of at most 256 MiB."""
    block = min(count, _COPY_BYTES_MAX)
    source = torch.ones(block, dtype=torch.uint8, device=device)
    target = torch.empty(block, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target.copy_(source)
    return min(_timed(lambda: target.copy_(source), clock) for _ in range(3)) * count / block


def _copy_words(device: torch.device) -> str:
    return "from the device to pinned memory" if device.type == "cuda" else "between host buffers"


def _resident_max(model: StreamingModel, session_bytes: int, floor: int) -> int:
    """Sessions that fit what is free now: the device's memory, or half of this machine's on a CPU."""
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(floor, min(4096, int(free // max(1, session_bytes))))


def check_profile(data: dict[str, Any]) -> LatencyProfile:
    """A written profile as its readers see it."""
    return profile_from_dict(data, data.get("name", "profile"))
