"""Latency profiles from JSON: a path, or the name of one that is shipped in sim/profiles."""

from __future__ import annotations

import json
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from turboserve.errors import ConfigError
from turboserve.orchestrator.latency import LatencyProfile, profile_from_dict


def load_profile(name_or_path: str | Path) -> LatencyProfile:
    """A profile by file path, or by the name of a shipped one."""
    file = profile_file(name_or_path)
    try:
        raw = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise ConfigError(f"{file}: cannot read the latency profile ({e})") from e
    return profile_from_dict(raw, str(file) if file == Path(name_or_path) else f"profile {name_or_path}")


def profile_file(name_or_path: str | Path) -> Path | Traversable:
    """The file that a profile's path or name stands for."""
    path = Path(name_or_path)
    if path.suffix == ".json" or path.is_file():
        return path
    shipped = resources.files("turboserve.sim") / "profiles"
    entry = shipped / f"{name_or_path}.json"
    if not entry.is_file():
        names = shipped_profiles()
        raise ConfigError(f"no profile named {name_or_path!r}", expected=f"a .json file or one of {', '.join(names)}")
    return entry


def shipped_profiles() -> list[str]:
    """Names that `load_profile` knows without a path."""
    shipped = resources.files("turboserve.sim") / "profiles"
    return sorted(p.name[:-5] for p in shipped.iterdir() if p.name.endswith(".json"))
