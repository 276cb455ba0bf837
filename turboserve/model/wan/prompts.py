"""Which prompts a chunk is conditioned on: after a switch in blend mode a few of them, each with a weight.

Plain values that travel with a session as JSON. What a chunk sees follows from what the last committed chunk saw, so a
chunk that is begun again, here or elsewhere, sees the same.
"""

from __future__ import annotations

from typing import Any

from turboserve.model.interface import PromptSwitch

# Switching again and again in mid-blend would remember every prompt; the faintest are dropped.
MIXED_PROMPTS_MAX = 4

Mix = list[list[Any]]  # [prompt, weight] each; weights sum to 1


def next_text(committed: dict[str, Any] | None, prompt: str, switch: PromptSwitch, blend_chunks: int) -> dict[str, Any]:
    """The text state of the chunk after `committed` (None: the first chunk) under `prompt`.

    {"target": prompt, "mix": Mix, "from": Mix, "done": chunks blended so far}; "from" is empty when no blend goes on.
    """
    if committed is None:
        return _whole(prompt)
    if prompt != committed["target"]:
        if switch is not PromptSwitch.BLEND:
            return _whole(prompt)
        return _blended(committed["mix"], prompt, 1, blend_chunks)
    if committed["from"]:
        return _blended(committed["from"], prompt, committed["done"] + 1, blend_chunks)
    return _whole(prompt)


def _whole(prompt: str) -> dict[str, Any]:
    return {"target": prompt, "mix": [[prompt, 1.0]], "from": [], "done": 0}


def _blended(before: Mix, prompt: str, done: int, blend_chunks: int) -> dict[str, Any]:
    if done >= blend_chunks:
        return _whole(prompt)
    share = done / blend_chunks
    weights: dict[str, float] = {}
    for one, weight in before:
        weights[one] = weights.get(one, 0.0) + weight * (1 - share)
    weights[prompt] = weights.get(prompt, 0.0) + share
    kept = sorted(weights.items(), key=lambda item: (item[0] != prompt, -item[1], item[0]))[:MIXED_PROMPTS_MAX]
    total = sum(weight for _, weight in kept)
    mix = [[one, weight / total] for one, weight in kept]
    return {"target": prompt, "mix": mix, "from": before, "done": done}
