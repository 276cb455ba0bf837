"""Checks at load: does this machine give a session the same bits alone and packed (design P1)?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from turboserve.model.interface import ChunkRequest, Control, SessionTensors, StreamingModel, pack

if TYPE_CHECKING:
    from turboserve.model.shapes.model import ShapesModel

_PROMPTS = (
    "two small red circles drifting left",
    "a blue square",
    "a spinning star",
    "a green ring bouncing",
)


def allocate(model: StreamingModel, session_id: str, seed: int) -> SessionTensors:
    """A session's zeroed state outside any pool: for tests, scoring and the probe below."""
    tensors = {
        one.name: torch.zeros(one.shape, dtype=getattr(torch, one.dtype), device=model.device)
        for one in model.state_layout()
    }
    return SessionTensors(session_id=session_id, seed=seed, slot=0, tensors=tensors)


def run_chunks(
    model: ShapesModel, states: Sequence[SessionTensors], prompts: Sequence[str], chunks: int
) -> list[list[torch.Tensor]]:
    """Lock-step packed generation: rows of every pass, per session. States must be fresh."""
    rows_of: list[list[torch.Tensor]] = [[] for _ in states]
    controls = [Control(prompt) for prompt in prompts]
    for state, control in zip(states, controls, strict=True):
        model.begin(state, control)
    for chunk in range(chunks):
        lists = [
            model.next_passes(state, ChunkRequest(chunk, model.spec.denoise_steps, control))
            for state, control in zip(states, controls, strict=True)
        ]
        for segments in zip(*lists, strict=True):
            batch = pack(segments)
            out = model.forward(batch)
            for index, segment in enumerate(segments):
                rows = out[batch.rows(index)]
                rows_of[index].append(rows.clone())
                model.advance(segment, rows)
    return rows_of


def packed_equals_alone(model: ShapesModel, sessions: int = 4, chunks: int = 2) -> dict[str, Any]:
    """{"packed_equals_alone": bool, "sessions", "passes", "max_abs_difference"}."""
    prompts = [_PROMPTS[i % len(_PROMPTS)] for i in range(sessions)]
    together = run_chunks(model, [allocate(model, f"p{i}", i) for i in range(sessions)], prompts, chunks)
    worst, equal = 0.0, True
    for index in range(sessions):
        alone = run_chunks(model, [allocate(model, "a", index)], [prompts[index]], chunks)[0]
        for a, b in zip(together[index], alone, strict=True):
            equal &= torch.equal(a, b)
            worst = max(worst, float((a - b).abs().max()))
    return {
        "packed_equals_alone": equal,
        "sessions": sessions,
        "passes": len(together[0]),
        "max_abs_difference": worst,
    }
