"""Named shapes and habits of causal Wan models: what the weights' files do not tell.

A checkpoint holds no chunk length, no window, no noise levels: those come with the code that trained it. Numbers are
those of the projects' own configs. Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from turboserve.errors import ConfigError
from turboserve.geometry import SlotGeometry
from turboserve.model.interface import PromptSwitch
from turboserve.model.noise_schedule import NoiseSchedule

# One rotary table holds so many latent frames; absolute positions end there.
ABSOLUTE_LATENT_FRAMES_MAX = 1024


@dataclass(frozen=True)
class WanPreset:
    """One causal Wan model. Window and sink count latent frames as geometry.py does: the window holds the chunk in
    work and not the sink."""

    name: str
    about: str
    layers: int
    dim: int
    heads: int
    ffn_dim: int
    chunk_latent_frames: int
    sink_latent_frames: int
    window_latent_frames: int
    timesteps: tuple[float, ...]
    shift: float
    prompt_switch: tuple[PromptSwitch, ...]
    rope_mode: str = "absolute"
    latent_channels: int = 16
    text_dim: int = 4096
    text_tokens: int = 512
    freq_dim: int = 256
    fps: float = 16.0
    size: str = "832x480"
    steps_floor: int = 1
    latent_frames_max: int | None = ABSOLUTE_LATENT_FRAMES_MAX
    blend_chunks: int = 4
    # Every chunk, by the figures in docs/models.md: a point costs a sixth of the chunk's time on the copy engine at
    # most, and every further chunk without one is a chunk to make again when a worker dies.
    recovery_every_chunks: int = 1
    space_factor: int = 8
    time_factor: int = 4
    sources: tuple[tuple[str, str], ...] = ()  # (part, repository that `models pull` fetches it from)

    @property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_timesteps(self.timesteps, self.shift)

    @property
    def max_chunks(self) -> int | None:
        if self.latent_frames_max is None:
            return None
        return self.latent_frames_max // self.chunk_latent_frames

    def latent_size(self, size: str | None = None) -> tuple[int, int]:
        """(rows, columns) of latents for a pixel size WxH; ConfigError where it does not divide."""
        text = size or self.size
        width, _, height = text.partition("x")
        cell = 2 * self.space_factor  # a token is two by two cells
        if not (width.isdecimal() and height.isdecimal()) or int(width) % cell or int(height) % cell:
            raise ConfigError(f"size {text!r}", expected=f"WxH, both multiples of {cell}")
        if not (int(width) and int(height)):
            raise ConfigError(f"size {text!r}", expected="WxH, neither of them 0")
        return int(height) // self.space_factor, int(width) // self.space_factor

    def slot(self, size: str | None = None) -> SlotGeometry:
        rows, columns = self.latent_size(size)
        return SlotGeometry(
            chunk_latent_frames=self.chunk_latent_frames,
            tokens_per_latent_frame=(rows // 2) * (columns // 2),
            sink_latent_frames=self.sink_latent_frames,
            window_latent_frames=self.window_latent_frames,
        )


_SWAP, _RECACHE, _BLEND = PromptSwitch.SWAP, PromptSwitch.RECACHE, PromptSwitch.BLEND
_FOUR_STEPS = (1000.0, 750.0, 500.0, 250.0)
_BASE_13B = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
_BASE_14B = "Wan-AI/Wan2.1-T2V-14B-Diffusers"


def _parts(base: str, transformer: str) -> tuple[tuple[str, str], ...]:
    return (("transformer", transformer), ("text_encoder", base), ("tokenizer", base), ("vae", base))


_SELF_FORCING_13B = WanPreset(
    name="self-forcing-1.3b",
    about="Self-Forcing on Wan 2.1 1.3B: four steps, sees all of at most 21 latent frames (81 frames of video)",
    layers=30,
    dim=1536,
    heads=12,
    ffn_dim=8960,
    chunk_latent_frames=3,
    sink_latent_frames=0,
    window_latent_frames=21,
    timesteps=_FOUR_STEPS,
    shift=5.0,
    prompt_switch=(_SWAP, _BLEND),
    latent_frames_max=21,
    sources=_parts(_BASE_13B, "gdhe17/Self-Forcing"),
)

PRESETS = {
    one.name: one
    for one in (
        _SELF_FORCING_13B,
        replace(
            _SELF_FORCING_13B,
            name="causvid-1.3b",
            about="CausVid on Wan 2.1 1.3B: four steps at shift 8, sees all of at most 21 latent frames",
            shift=8.0,
            sources=_parts(_BASE_13B, "tianweiy/CausVid"),
        ),
        replace(
            _SELF_FORCING_13B,
            name="longlive-1.3b",
            about="LongLive on Wan 2.1 1.3B: a sink of 3 and a window of 9 latent frames, recache on a new prompt",
            sink_latent_frames=3,
            window_latent_frames=9,
            prompt_switch=(_RECACHE, _SWAP, _BLEND),
            latent_frames_max=ABSOLUTE_LATENT_FRAMES_MAX,
            sources=_parts(_BASE_13B, "Efficient-Large-Model/LongLive-1.3B"),
        ),
        replace(
            _SELF_FORCING_13B,
            name="longlive-1.3b-endless",
            about="LongLive on Wan 2.1 1.3B with positions relative to the window: a stream without end",
            sink_latent_frames=3,
            window_latent_frames=9,
            prompt_switch=(_RECACHE, _SWAP, _BLEND),
            rope_mode="relative",
            latent_frames_max=None,
            sources=_parts(_BASE_13B, "Efficient-Large-Model/LongLive-1.3B"),
        ),
        replace(
            _SELF_FORCING_13B,
            name="causal-wan-14b",
            about="a causal Wan 2.1 14B: four steps, a sink of 3 and a window of 9 latent frames",
            layers=40,
            dim=5120,
            heads=40,
            ffn_dim=13824,
            sink_latent_frames=3,
            window_latent_frames=9,
            prompt_switch=(_SWAP, _RECACHE, _BLEND),
            latent_frames_max=ABSOLUTE_LATENT_FRAMES_MAX,
            sources=_parts(_BASE_14B, "krea/krea-realtime-video"),
        ),
        replace(
            _SELF_FORCING_13B,
            name="wan-tiny",
            about="the Wan shape with tiny random weights: noise for pictures; for tests and trials without a GPU",
            layers=2,
            dim=96,
            heads=4,
            ffn_dim=192,
            latent_channels=4,
            sink_latent_frames=3,
            window_latent_frames=9,
            prompt_switch=(_SWAP, _RECACHE, _BLEND),
            text_dim=32,
            text_tokens=64,
            freq_dim=64,
            size="32x32",
            latent_frames_max=ABSOLUTE_LATENT_FRAMES_MAX,
            sources=(),
        ),
    )
}

OVERRIDABLE = (
    "chunk_latent_frames",
    "sink_latent_frames",
    "window_latent_frames",
    "latent_frames_max",
    "timesteps",
    "shift",
    "rope_mode",
    "prompt_switch",
    "blend_chunks",
    "steps_floor",
    "fps",
)


def find_preset(name: str, overrides: dict[str, Any] | None = None) -> WanPreset:
    """A preset by name, with what a model.toml says otherwise; ConfigError names an unknown one."""
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}", expected=f"one of {', '.join(PRESETS)}")
    preset, changes = PRESETS[name], dict(overrides or {})
    unknown = sorted(changes.keys() - set(OVERRIDABLE))
    if unknown:
        raise ConfigError(f"a preset has no {', '.join(unknown)}", expected=f"some of {', '.join(OVERRIDABLE)}")
    if "latent_frames_max" in changes and changes["latent_frames_max"] == 0:
        changes["latent_frames_max"] = None  # TOML has no word for "without end"
    if "timesteps" in changes:
        changes["timesteps"] = tuple(float(one) for one in changes["timesteps"])
    try:
        if "prompt_switch" in changes:
            changes["prompt_switch"] = tuple(PromptSwitch(one) for one in changes["prompt_switch"])
        changed = replace(preset, **changes)
        changed.slot()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"preset {name} with these overrides: {error}") from None
    if changed.rope_mode not in ("absolute", "relative"):
        raise ConfigError(f"rope_mode {changed.rope_mode!r}", expected="absolute or relative")
    if changed.rope_mode == "absolute" and (changed.latent_frames_max or ABSOLUTE_LATENT_FRAMES_MAX + 1) > 1024:
        raise ConfigError(
            "absolute rotary positions end at 1024 latent frames",
            expected="latent_frames_max up to 1024, or rope_mode = relative",
        )
    return changed


def guess_preset(layers: int, dim: int) -> WanPreset | None:
    """The plainest preset of a transformer's shape; which training it had the files do not tell."""
    return next((one for one in PRESETS.values() if (one.layers, one.dim) == (layers, dim)), None)
