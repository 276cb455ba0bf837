"""Presets: the published noise levels, geometry, and overrides that cannot be."""

from __future__ import annotations

import pytest

from turboserve.errors import ConfigError
from turboserve.model.interface import PromptSwitch
from turboserve.model.noise_schedule import NoiseSchedule
from turboserve.model.presets import PRESETS, find_preset


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("self-forcing-1.3b", [1000.0, 937.5, 833.3333, 625.0]),
        ("longlive-1.3b", [1000.0, 937.5, 833.3333, 625.0]),
        ("causvid-1.3b", [1000.0, 960.0, 888.8889, 727.2727]),
    ],
)
def test_noise_levels_are_the_published_ones(preset, published):
    schedule = find_preset(preset).schedule
    assert schedule.timesteps[0] == 0
    assert schedule.timesteps[1:] == pytest.approx(published, rel=1e-6)


def test_unwarped_list_of_three_steps():
    assert NoiseSchedule.from_timesteps((1000, 757, 522), 1.0).timesteps == pytest.approx((0, 1000, 757, 522))


def test_levels_are_those_of_diffusers_shifted_sigmas():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    ours = find_preset("self-forcing-1.3b").schedule
    assert list(ours.timesteps[1:]) == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)


def test_geometry_at_480p():
    for name in ("longlive-1.3b", "causal-wan-14b"):
        slot = find_preset(name).slot("832x480")
        assert (slot.tokens_per_latent_frame, slot.page_tokens, slot.slot_tokens) == (1560, 4680, 18720)
        assert (slot.sink_pages, slot.window_pages) == (1, 3)
    assert find_preset("self-forcing-1.3b").slot().slot_tokens == 32760
    assert find_preset("self-forcing-1.3b").max_chunks == 7
    assert find_preset("longlive-1.3b").max_chunks == 341
    assert find_preset("longlive-1.3b-endless").max_chunks is None


def test_every_preset_divides():
    for preset in PRESETS.values():
        assert preset.dim % preset.heads == 0 and (preset.dim // preset.heads) % 2 == 0
        assert preset.slot().page_tokens > 0 and preset.schedule.steps == 4


def test_overrides_change_what_they_name():
    changed = find_preset(
        "self-forcing-1.3b",
        {"sink_latent_frames": 3, "window_latent_frames": 6, "rope_mode": "relative", "latent_frames_max": 0,
         "timesteps": [1000, 500], "shift": 8.0, "prompt_switch": ["blend"]},
    )  # fmt: skip
    assert changed.max_chunks is None and changed.slot().page_count == 3
    assert changed.schedule.sigmas == pytest.approx((1.0, 8 / 9)) and changed.prompt_switch == (PromptSwitch.BLEND,)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"layers": 3}, "no layers"),
        ({"window_latent_frames": 7}, "whole chunks"),
        ({"rope_mode": "diagonal"}, "absolute or relative"),
        ({"latent_frames_max": 0}, "1024"),
        ({"prompt_switch": ["cut"]}, "cut"),
    ],
)
def test_overrides_that_cannot_be_are_refused(overrides, says):
    with pytest.raises(ConfigError, match=says):
        find_preset("self-forcing-1.3b", overrides)


@pytest.mark.parametrize("size", ["832", "830x480", "0x0", "832x480x3", "-16x16", "axb"])
def test_sizes_that_do_not_divide_are_refused(size):
    with pytest.raises(ConfigError, match=r"multiples of 16|neither of them"):
        find_preset("self-forcing-1.3b").latent_size(size)


def test_an_unknown_preset_names_the_known():
    with pytest.raises(ConfigError, match=r"longlive-1\.3b"):
        find_preset("wan")
