"""A chunk's context pass and the next chunk's first denoise step in one packed pass: where that is exact.

Within a layer every segment's keys are written before any attends. So the next chunk sees its predecessor's clean keys,
and the pair is exact as long as the next chunk's page is a fresh one. Once the ring is full that page is the oldest,
which the context pass still reads and the next chunk's noisy keys have overwritten by then: the engine does not pair
them (docs/models.md says what it would save).
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from turboserve.model.interface import ChunkRequest, Control, SessionTensors, pack
from turboserve.model.registry import load_model
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.session_tensors import hold_session

PROMPT = Control("a red circle")
WORK, KV_CACHE = "work", "kv_cache"
# What a commit turns into what, in each model's scalars.
COMMITTED = {"pending": "text", "pending_scene": "scene", "text_prompt": "prompt"}


def passes(model, state: SessionTensors, chunk: int):
    return model.next_passes(state, ChunkRequest(chunk, model.spec.denoise_steps, PROMPT))


def as_if_committed(state: SessionTensors) -> SessionTensors:
    """The session one chunk on, over the same keys, with room of its own for the next chunk's noise."""
    scalars = copy.deepcopy(state.scalars)
    scalars |= {after: scalars[before] for before, after in COMMITTED.items() if before in scalars}
    tensors = {**state.tensors, WORK: state.tensors[WORK].clone()}
    return replace(state, tensors=tensors, scalars=scalars, next_chunk_index=state.next_chunk_index + 1)


@pytest.mark.parametrize("name", ["wan-tiny", "shapes"])
@torch.inference_mode()
def test_in_one_pass_they_are_exact_until_the_ring_is_full(name):
    model = load_model(name)
    state = hold_session(KvPool(model.state_layout(), 1), model, "a" * 26, 5, PROMPT).state
    pages, exact = model.spec.slot.page_count, []
    for chunk in range(pages + 2):
        *denoise, context = passes(model, state, chunk)
        for segment in denoise:
            model.advance(segment, model.forward(pack([segment])))
        together = replace(
            state,
            tensors={key: one.clone() for key, one in state.tensors.items()},
            scalars=copy.deepcopy(state.scalars),
        )
        ahead = as_if_committed(together)
        batch = pack([replace(context, state=together), passes(model, ahead, chunk + 1)[0]])
        paired = model.forward(batch)[batch.rows(1)].clone()

        model.advance(context, model.forward(pack([context])))
        alone = copy.deepcopy(state.scalars), state.tensors[WORK].clone()
        first = passes(model, state, chunk + 1)[0]
        same_rows = torch.equal(model.forward(pack([first])), paired)
        exact.append(same_rows and torch.equal(state.tensors[KV_CACHE], together.tensors[KV_CACHE]))
        state.scalars, _ = alone
        state.tensors[WORK].copy_(alone[1])
    assert exact == [chunk + 1 < pages for chunk in range(pages + 2)]
