"""Static facts of the `shapes` model: known without torch, and without its weights in memory."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from turboserve.geometry import SlotGeometry
from turboserve.model.interface import ModelSpec, PromptSwitch
from turboserve.model.noise_schedule import NoiseSchedule
from turboserve.model.shapes import vocabulary as v

WEIGHTS_PATH = Path(__file__).parent / "weights" / "shapes.safetensors"
TOKENS = v.TOKENS_PER_SIDE**2
# One chunk is one latent frame: a sink chunk, and a window of two past chunks and the one in work.
SLOT = SlotGeometry(chunk_latent_frames=1, tokens_per_latent_frame=TOKENS, sink_latent_frames=1, window_latent_frames=3)
SCHEDULE = NoiseSchedule.uniform(steps=4, shift=5.0)


@cache
def weights_digest(path: Path = WEIGHTS_PATH) -> str:
    """Identity of the weights: the hash of their file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def spec(model_hash: str | None = None) -> ModelSpec:
    """The spec of the shipped weights, or of others under the hash given."""
    return ModelSpec(
        name="shapes",
        model_hash=model_hash or weights_digest(),
        width=v.SIZE_PX,
        height=v.SIZE_PX,
        fps=float(v.FPS),
        chunk_frames_first=v.CHUNK_FRAMES,
        chunk_frames_rest=v.CHUNK_FRAMES,
        slot=SLOT,
        denoise_steps=SCHEDULE.steps,
        denoise_steps_floor=2,
        prompt_switch=(PromptSwitch.SWAP, PromptSwitch.RECACHE),
        sizes=(f"{v.SIZE_PX}x{v.SIZE_PX}",),
        about="coloured shapes that drift, bounce, grow and spin; trained by this package, runs on a laptop",
    )
