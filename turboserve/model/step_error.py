"""What fewer denoise steps cost in quality, as a number: how far the finished latents lie from those of all steps.

It compares latents, not pictures, and says nothing of taste; but a model that loses half its signal at two steps shows
it here, and brownout to two steps then says what it costs.
"""

from __future__ import annotations

import torch

from turboserve.model.interface import ChunkRequest, Control, SessionTensors, StreamingModel, pack

WORK = "work"
"""The field that holds the finished latents of a chunk once its last denoise step is done."""


@torch.no_grad()
def latent_error_by_steps(
    model: StreamingModel, *, chunks: int = 3, seed: int = 1, prompt: str = "a red circle drifting left"
) -> dict[int, float]:
    """Steps -> root mean square of (latents - latents at all steps) over that of the latter, averaged over chunks.

    Every run has the same seed, prompt and noise, and its own history: chunk 2 at two steps follows chunk 1 at two
    steps, as in a session under brownout. The full step count has error 0 by definition and is left out.
    """
    full = model.spec.denoise_steps
    expected = _latents(model, full, chunks, seed, prompt)
    errors = {}
    for steps in range(model.spec.denoise_steps_floor, full):
        found = _latents(model, steps, chunks, seed, prompt)
        each = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
        errors[steps] = sum(each) / len(each)
    return errors


def _latents(model: StreamingModel, steps: int, chunks: int, seed: int, prompt: str) -> list[torch.Tensor]:
    tensors = {
        one.name: torch.zeros(one.shape, dtype=getattr(torch, one.dtype), device=model.device)
        for one in model.state_layout()
    }
    state = SessionTensors(session_id="steps", seed=seed, slot=0, tensors=tensors)
    model.begin(state, Control(prompt))
    made = []
    for chunk in range(chunks):
        for segment in model.next_passes(state, ChunkRequest(chunk, steps, Control(prompt))):
            model.advance(segment, model.forward(pack([segment])))
            if segment.completes_latents:
                made.append(state.tensors[WORK].double().clone())
    return made
