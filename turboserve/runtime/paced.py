"""A model whose passes last as long as a latency profile says: the real work, padded by sleep. For studies.

A profile gives the time of a batch of n whole chunks. A pass of n segments gets its part of that: each denoise pass
`step_latency_share / denoise_steps`, the context pass (and a recache) the rest, so that a chunk with fewer steps takes
what the profile says of it. A pass of several kinds lasts as long as the mean of its segments' kinds. Time that
decoding took is taken off the pads that follow. A pass slower than the profile is not made up for, only counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboserve.errors import ConfigError
from turboserve.model.interface import PackedBatch, PassKind, SessionTensors, StreamingModel
from turboserve.orchestrator.latency import LatencyProfile, profile_from_dict
from turboserve.runtime.cost_model import MeasuredCost, fit_line

if TYPE_CHECKING:
    import numpy as np
    import torch


def read_profile(path: str) -> LatencyProfile:
    """The latency profile in a JSON file; ConfigError when it cannot be read."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"latency profile {path}: {error}", expected="a file that `turboserve calibrate` wrote"
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(f"latency profile {path} is no JSON object")
    return profile_from_dict(data, path)


class PacedModel:
    """Another model's faces and bits, at a profile's pace. All but `forward` and `decode` is the model's own."""

    def __init__(
        self,
        model: StreamingModel,
        profile: LatencyProfile,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if profile.denoise_steps != model.spec.denoise_steps:
            raise ConfigError(
                f"profile {profile.name} is of {profile.denoise_steps} denoise steps",
                expected=f"{model.spec.denoise_steps}, as {model.spec.name} takes",
            )
        self._model = model
        self._profile = profile
        self._clock = clock
        self._sleep = sleep
        self._owed_s = 0.0
        self.overruns = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def pass_s(self, kinds: list[PassKind]) -> float:
        """How long a pass of these segments lasts."""
        profile = self._profile
        step = profile.step_latency_share / profile.denoise_steps
        shares = [step if kind is PassKind.DENOISE else 1.0 - profile.step_latency_share for kind in kinds]
        return profile.load_latency(len(kinds)) * sum(shares) / len(shares)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        before_s = self._clock()
        rows = self._model.forward(batch)
        due_s = self.pass_s([one.kind for one in batch.segments]) - self._owed_s
        left_s = due_s - (self._clock() - before_s)
        if left_s > 0:
            self._sleep(left_s)
            # Sleep wakes a little late, every time; the next pass pays for it.
            self._owed_s = max(0.0, self._clock() - before_s - due_s)
        else:
            self._owed_s = max(0.0, -due_s)  # decoding took longer than this whole pass: the next one pays the rest
            self.overruns += 1
        return rows

    def decode(self, state: SessionTensors, chunk_index: int) -> np.ndarray:
        before_s = self._clock()
        frames = self._model.decode(state, chunk_index)
        self._owed_s += self._clock() - before_s
        return frames

    def cost(self, segment_max: int) -> MeasuredCost:
        """The cost model of denoise passes at this pace, in place of a calibration."""
        tokens = self._model.spec.slot.page_tokens
        counts = range(1, min(segment_max, self._profile.batch_max) + 1)
        points = [(float(count * tokens), self.pass_s([PassKind.DENOISE] * count)) for count in counts]
        base_s, token_s = fit_line(points)
        cost = MeasuredCost(fitted_base_s=base_s, fitted_token_s=token_s, segment_max=segment_max)
        cost.by_count_s.update({count: seconds for count, (_, seconds) in zip(counts, points, strict=True)})
        return cost
