"""The policies by name. A policy's module is imported only when it is asked for."""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any

from turboserve.errors import ConfigError
from turboserve.sim.policies.base import Policy

POLICIES: dict[str, str] = {
    "static-rr": "static_rr:StaticRoundRobin",
    "static-least": "base:StaticLeast",
    "static-memory": "static_memory:StaticMemory",
    "static-least-resume": "static_least_resume:StaticLeastResume",
    "hpa": "hpa:Hpa",
    "kpa": "kpa:Kpa",
    "llumnix": "llumnix:Llumnix",
    "slack": "slack:Slack",
    "lcp": "lcp:Lcp",
    "published": "published:Published",
    "turboserve": "turboserve:TurboServe",
}
"""Name -> module and class in this package. `clairvoyant` is no policy: it knows the trace
(sim/clairvoyant.py)."""


NO_KNOBS = ("scaling", "provision_s")
"""Arguments of policies that say how the run is, not how the policy behaves."""
DIVISORS = ("target", "rho", "up")
"""Knobs that a load is divided by."""
DIVISOR_LEAST = 0.001
KNOB_MOST = 1e9


def policy_class(name: str) -> Any:
    """The class of a policy."""
    if name not in POLICIES:
        raise ConfigError(f"no policy {name!r}", expected=", ".join(POLICIES))
    module, class_name = POLICIES[name].split(":")
    return getattr(importlib.import_module(f"turboserve.sim.policies.{module}"), class_name)


def make_policy(name: str, *, scaling: bool = True, provision_s: float | None = None, **knobs: float) -> Policy:
    """A fresh policy. `scaling` False: the fleet is fixed. `knobs`: its own; an unknown one is an error."""
    made = policy_class(name)
    takes = inspect.signature(made).parameters
    settings: dict[str, Any] = dict(zip(NO_KNOBS, (scaling, provision_s), strict=True))
    given = {key: value for key, value in settings.items() if key in takes and value is not None}
    check_knobs(name, knobs)
    return made(**given, **knobs)


def check_knobs(name: str, knobs: dict[str, float]) -> None:
    """Refuse knobs that the policy (or the clairvoyant, which has none) lacks, and values that no rule can count with.

    To be asked before `make_policy(**knobs)` where the names are a user's: one may be that of another argument.
    """
    takes = () if name == "clairvoyant" else inspect.signature(policy_class(name)).parameters
    known = [key for key in takes if key not in NO_KNOBS]
    unknown = [key for key in knobs if key not in known]
    if unknown:
        raise ConfigError(f"{name} has no knob {', '.join(unknown)}", expected=", ".join(known) or "no knobs at all")
    for key, value in knobs.items():
        if not math.isfinite(value) or abs(value) > KNOB_MOST:
            raise ConfigError(f"{name}: knob {key}={value:g}", expected=f"a number of at most {KNOB_MOST:g}")
        if key in DIVISORS and value < DIVISOR_LEAST:
            raise ConfigError(f"{name}: knob {key}={value:g}", expected=f"at least {DIVISOR_LEAST:g}")
