"""What is simulated in a grid, and by which name."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from turboserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Case:
    """One simulation. `fleet`: "scale", a number, "peak*1.3", or "least" (smallest that gives equal service)."""

    trace: str
    policy: str  # name[:knob=value[,knob=value]]
    profile: str = "k4"
    fleet: str = "scale"
    provision_s: float = 30.0
    seed: int = 0
    """0: the trace as it is. Others: every session shifted by a part of a chunk drawn from the seed."""
    steps_floor: int | None = None
    warmup_s: float = 600.0
    unit_workers: int = 1
    audit: bool = False
    curve: bool = False

    @property
    def key(self) -> str:
        """Names the case among rows; two runs of it on the same files give the same row."""
        said = dataclasses.asdict(self) | {"trace": trace_name(self.trace), "profile": profile_name(self.profile)}
        said.pop("curve")
        return json.dumps(said, sort_keys=True)


def trace_name(path: str) -> str:
    return Path(path).name.removesuffix(".gz").removesuffix(".csv")


def profile_name(path: str) -> str:
    return Path(path).name.removesuffix(".json")  # no stem: that of 1.3b-h200 would be 1


def group_of(name: str) -> str:
    """The source that a trace came from: the word before its first underscore."""
    return name.split("_")[0]


def parse_policy(spec: str) -> tuple[str, dict[str, float]]:
    """`hpa:target=0.6` as ("hpa", {"target": 0.6})."""
    name, _, rest = spec.partition(":")
    knobs: dict[str, float] = {}
    for pair in filter(None, rest.split(",")):
        knob, _, value = pair.partition("=")
        try:
            knobs[knob] = float(value)
        except ValueError:
            raise ConfigError(f"policy {spec!r}", expected="name:knob=number,knob=number") from None
    return name, knobs
