"""The policies by name. A policy's module is imported only when it is asked for."""

from __future__ import annotations

import importlib
import inspect
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


def policy_class(name: str) -> Any:
    """The class of a policy."""
    if name not in POLICIES:
        raise ConfigError(f"no policy {name!r}", expected=", ".join([*POLICIES, "clairvoyant"]))
    module, class_name = POLICIES[name].split(":")
    return getattr(importlib.import_module(f"turboserve.sim.policies.{module}"), class_name)


def make_policy(name: str, *, scaling: bool = True, provision_s: float | None = None, **knobs: float) -> Policy:
    """A fresh policy. `scaling` False: the fleet is fixed. `knobs`: its own; an unknown one is an error."""
    made = policy_class(name)
    takes = inspect.signature(made).parameters
    settings: dict[str, Any] = {"scaling": scaling, "provision_s": provision_s}
    given = {key: value for key, value in settings.items() if key in takes and value is not None}
    unknown = [key for key in knobs if key not in takes]
    if unknown:
        known = [key for key in takes if key not in settings]
        raise ConfigError(f"{name} has no knob {', '.join(unknown)}", expected=", ".join(known) or "no knobs at all")
    return made(**given, **knobs)
