"""The serving class: the same bits whatever happens around a session, and honest state."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from turboserve.errors import InvalidRequest, SessionPoisoned
from turboserve.model.interface import (
    ChunkRequest,
    Control,
    PassKind,
    PromptSwitch,
    SessionTensors,
    Update,
    layout_hash,
    moved_bytes,
    pack,
    state_bytes,
)
from turboserve.model.registry import check_prompt, load_spec
from turboserve.model.shapes.model import KV_CACHE, TEXT_KV, WORK, ShapesModel
from turboserve.model.shapes.self_test import allocate

FIRST, SECOND = Control("two red circles drifting left", 1), Control("two green circles drifting up", 2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> ShapesModel:
    return ShapesModel.random(1)


def run_chunk(
    model: ShapesModel,
    state: SessionTensors,
    control: Control,
    steps: int = 4,
    switch: PromptSwitch = PromptSwitch.SWAP,
    stop_after: int | None = None,
) -> np.ndarray | None:
    """One chunk alone; `stop_after` passes it is dropped."""
    frames = None
    chunk = state.next_chunk_index
    for done, segment in enumerate(model.next_passes(state, ChunkRequest(chunk, steps, control, switch))):
        if done == stop_after:
            return None
        model.advance(segment, model.forward(pack([segment])))
        if segment.completes_latents:
            frames = model.decode(state, chunk)
    return frames


def started(model: ShapesModel, seed: int = 5) -> SessionTensors:
    state = allocate(model, f"s{seed}", seed)
    model.begin(state, FIRST)
    return state


def stream(model: ShapesModel, chunks: int, switch_at: int, switch: PromptSwitch, seed: int = 5) -> list[np.ndarray]:
    state = started(model, seed)
    return [run_chunk(model, state, FIRST if i < switch_at else SECOND, switch=switch) for i in range(chunks)]


def test_frames_are_rgb_and_a_second_run_is_the_same(model):
    once, again = (stream(model, 6, 3, PromptSwitch.SWAP) for _ in range(2))
    assert once[0].shape == (4, 96, 96, 3)
    assert once[0].dtype == np.uint8
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert not np.array_equal(once[0], stream(model, 1, 3, PromptSwitch.SWAP, seed=6)[0])


@pytest.mark.parametrize("switch", [PromptSwitch.SWAP, PromptSwitch.RECACHE])
def test_a_chunk_begun_again_after_any_pass_gives_the_same_video(model, switch):
    plain, broken = started(model), started(model)
    for chunk in range(7):
        control = FIRST if chunk < 4 else SECOND
        request = ChunkRequest(chunk, 4, control, switch)
        for stop_after in range(len(model.next_passes(broken, request))):
            run_chunk(model, broken, control, switch=switch, stop_after=stop_after)
        a, b = (run_chunk(model, state, control, switch=switch) for state in (plain, broken))
        assert np.array_equal(a, b), chunk


def test_recache_runs_the_two_past_chunks_again_and_changes_the_video(model):
    state = started(model)
    for _ in range(5):
        run_chunk(model, state, FIRST)
    request = ChunkRequest(5, 4, SECOND, PromptSwitch.RECACHE)
    segments = model.next_passes(state, request)
    assert [one.kind for one in segments[:3]] == [PassKind.RECACHE, PassKind.RECACHE, PassKind.DENOISE]
    assert [one.chunk_index for one in segments[:2]] == [3, 4]
    swap = stream(model, 6, 5, PromptSwitch.SWAP)[5]
    recache = stream(model, 6, 5, PromptSwitch.RECACHE)[5]
    assert not np.array_equal(swap, recache)
    # Under the old prompt a recache would be for nothing.
    assert all(one.kind is not PassKind.RECACHE for one in model.next_passes(state, ChunkRequest(5, 4, FIRST)))


def test_neighbours_that_come_and_go_change_nothing(model):
    """Eight sessions at different chunks and steps, packed in random order, against each of them alone."""
    rng = random.Random(3)
    chunks = 5
    alone = {seed: stream(model, chunks, 3, PromptSwitch.SWAP, seed) for seed in range(8)}
    states = {seed: started(model, seed) for seed in range(8)}
    queues: dict[int, list] = {seed: [] for seed in range(8)}
    made: dict[int, list[np.ndarray]] = {seed: [] for seed in range(8)}
    while any(len(frames) < chunks for frames in made.values()):
        for seed, state in states.items():
            if not queues[seed] and state.next_chunk_index < chunks:
                control = FIRST if state.next_chunk_index < 3 else SECOND
                queues[seed] = model.next_passes(state, ChunkRequest(state.next_chunk_index, 4, control))
        ready = [seed for seed in queues if queues[seed]]
        picked = rng.sample(ready, rng.randint(1, len(ready)))
        segments = [queues[seed].pop(0) for seed in picked]
        batch = pack(segments)
        rows = model.forward(batch)
        for index, (seed, segment) in enumerate(zip(picked, segments, strict=True)):
            model.advance(segment, rows[batch.rows(index)])
            if segment.completes_latents:
                made[seed].append(model.decode(states[seed], segment.chunk_index))
    for seed in range(8):
        assert all(np.array_equal(a, b) for a, b in zip(alone[seed], made[seed], strict=True)), seed


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_steps_are_chosen_per_chunk(model, steps):
    state = started(model)
    segments = model.next_passes(state, ChunkRequest(0, steps, FIRST))
    assert [one.kind for one in segments] == [PassKind.DENOISE] * steps + [PassKind.CONTEXT]
    assert [one.completes_latents for one in segments] == [False] * (steps - 1) + [True, False]
    assert [one.commits for one in segments] == [False] * steps + [True]
    assert run_chunk(model, state, FIRST, steps=steps).shape == (4, 96, 96, 3)


def test_bad_steps_and_a_wrong_chunk_are_refused(model):
    with pytest.raises(InvalidRequest):
        model.next_passes(started(model), ChunkRequest(0, 5, FIRST))
    with pytest.raises(ValueError, match="comes next"):
        model.next_passes(started(model), ChunkRequest(2, 4, FIRST))


def test_latents_that_are_not_finite_poison_the_session_only(model):
    state = started(model)
    run_chunk(model, state, FIRST)
    state.tensors[WORK][3, 5] = float("nan")
    with pytest.raises(SessionPoisoned):
        model.decode(state, 0)


def test_a_moved_session_goes_on_as_if_it_had_stayed(model):
    """Everything but scratch and the scalars is enough, at a chunk boundary and right after a prompt switch."""
    stayed, source = started(model), started(model)
    for chunk in range(5):
        run_chunk(model, stayed, FIRST if chunk < 4 else SECOND)
        run_chunk(model, source, FIRST if chunk < 4 else SECOND)
    target = allocate(model, "target", source.seed)
    for one in model.state_layout():
        if one.update is not Update.SCRATCH:
            target.tensors[one.name].copy_(source.tensors[one.name])
    target.scalars = dict(source.scalars)
    target.next_chunk_index, target.control = source.next_chunk_index, source.control
    for _ in range(3):
        assert np.array_equal(run_chunk(model, stayed, SECOND), run_chunk(model, target, SECOND))


def test_only_the_declared_pages_change(model):
    state = started(model)
    for _ in range(6):
        run_chunk(model, state, FIRST)
    before = state.tensors[KV_CACHE].clone()
    segments = model.next_passes(state, ChunkRequest(6, 4, FIRST))
    model.forward(pack(segments[:1]))
    after = state.tensors[KV_CACHE]
    changed = [page for page in range(before.shape[2]) if not torch.equal(before[:, :, page], after[:, :, page])]
    assert changed == list(segments[0].pages)


def test_layout_says_what_it_holds(model):
    layout = model.state_layout()
    assert {one.name for one in layout} == {KV_CACHE, TEXT_KV, "latents", WORK}
    assert moved_bytes(layout) < state_bytes(layout) < 2_000_000
    assert layout_hash(layout) == layout_hash(ShapesModel.random(2).state_layout())


def test_a_machine_that_breaks_bits_gets_passes_one_by_one(monkeypatch):
    from turboserve.model.shapes import self_test

    model = ShapesModel.random(1)
    assert model.self_test()["one_by_one"] is False
    assert model.self_test()["packed_equals_alone"]
    states = [started(model, seed) for seed in range(3)]
    segments = [model.next_passes(state, ChunkRequest(0, 4, FIRST))[0] for state in states]
    packed = model.forward(pack(segments))
    broken = {"packed_equals_alone": False, "max_abs_difference": 1e-7}
    monkeypatch.setattr(self_test, "packed_equals_alone", lambda model: broken)
    assert model.self_test()["one_by_one"] is True
    torch.testing.assert_close(model.forward(pack(segments)), packed, rtol=0, atol=1e-5)


def test_the_registry_finds_it():
    spec = load_spec("shapes")
    assert (spec.width, spec.height, spec.fps, spec.chunk_frames(0)) == (96, 96, 12.0, 4)
    assert spec.chunk_s == pytest.approx(1 / 3)
    assert check_prompt("shapes", "a red dragon", 1).ignored_words == ("dragon",)
