"""The shipped profiles load, and the modelled ones are what their derivation gives today."""

from __future__ import annotations

import json
from importlib import import_module, resources
from pathlib import Path

import pytest

from turboserve.sim.profile_files import load_profile, shipped_profiles

MODELLED = [name for name in shipped_profiles() if name.startswith(("1.3b", "14b"))]


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_are_usable(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.batch_latency(profile.capacity) <= profile.chunk_target_s + 1e-9
    assert profile.capacity_at(profile.denoise_steps_floor) >= profile.capacity_at(profile.denoise_steps)


@pytest.mark.parametrize("name", MODELLED)
def test_modelled_profiles_say_so_and_follow_from_their_derivation(name: str) -> None:
    model, device = name.split("x")[0].split("-")
    made = import_module("bench.orchestrator.modelled_profiles").profile(model, device)
    shipped = Path(str(resources.files("turboserve.sim"))) / "profiles" / f"{name}.json"
    assert made == json.loads(shipped.read_text())
    assert made["about"].startswith("MODELLED")


def test_both_models_on_three_devices() -> None:
    assert len(MODELLED) == 6
