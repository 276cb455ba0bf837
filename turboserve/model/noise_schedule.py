"""The few noise levels of a distilled flow-matching model.

x_t = (1 - sigma) * x0 + sigma * noise, with sigma in [0, 1] and timestep = 1000 * sigma. A shift k > 1 moves
the levels towards noise: sigma' = k * sigma / (1 + (k - 1) * sigma) (Self-Forcing, utils/scheduler.py).
Between steps the model's clean estimate is noised anew to the next level, as in consistency sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turboserve.errors import InvalidRequest


def shifted(sigma: float, shift: float) -> float:
    """Warp one noise level."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class NoiseSchedule:
    """The levels a model was made for. Level 0 is clean; level i + 1 is `sigmas[i]`, the noisiest first."""

    sigmas: tuple[float, ...]

    @classmethod
    def uniform(cls, steps: int, shift: float) -> NoiseSchedule:
        """`steps` levels evenly spaced from 1 down, then shifted: (4, 5.0) gives 1, 0.9375, 0.8333, 0.625."""
        return cls(tuple(shifted(1 - i / steps, shift) for i in range(steps)))

    @classmethod
    def from_timesteps(cls, timesteps: Sequence[float], shift: float) -> NoiseSchedule:
        """Levels listed as un-warped timesteps, as checkpoints' configs do ([1000, 750, 500, 250], shift
        5).
        """
        return cls(tuple(shifted(one / 1000, shift) for one in timesteps))

    @property
    def steps(self) -> int:
        return len(self.sigmas)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Timesteps of the level table: clean first, then the noisy levels."""
        return (0.0, *(1000.0 * one for one in self.sigmas))

    def sigma(self, level: int) -> float:
        return 0.0 if level == 0 else self.sigmas[level - 1]

    def levels(self, steps: int) -> tuple[int, ...]:
        """The levels to visit with a budget of `steps` passes: always the first, the others spread evenly."""
        if not 1 <= steps <= self.steps:
            raise InvalidRequest(f"{steps} denoise steps", expected=f"1 to {self.steps}")
        return tuple(1 + (i * self.steps) // steps for i in range(steps))
