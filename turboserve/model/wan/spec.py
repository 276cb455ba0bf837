"""A Wan preset at a size as the spec that server, gateway and scheduler read; needs no torch."""

from __future__ import annotations

from turboserve.model.interface import ModelSpec
from turboserve.model.presets import WanPreset


def wan_spec(
    preset: WanPreset, size: str, name: str, model_hash: str, decoders: tuple[str, ...] = ("full",)
) -> ModelSpec:
    """The spec of a preset at a pixel size WxH; `decoders` are those offered, the default first."""
    width, _, height = size.partition("x")
    return ModelSpec(
        name=name,
        model_hash=model_hash,
        width=int(width),
        height=int(height),
        fps=preset.fps,
        # The first latent frame becomes one pixel frame, every other time_factor.
        chunk_frames_first=1 + (preset.chunk_latent_frames - 1) * preset.time_factor,
        chunk_frames_rest=preset.chunk_latent_frames * preset.time_factor,
        slot=preset.slot(size),
        denoise_steps=preset.schedule.steps,
        denoise_steps_floor=preset.steps_floor,
        prompt_switch=preset.prompt_switch,
        sizes=(size,),
        recovery_every_chunks=preset.recovery_every_chunks,
        max_chunks=preset.max_chunks,
        about=preset.about,
        decoders=decoders,
    )
