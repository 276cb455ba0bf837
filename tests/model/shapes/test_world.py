"""The training world: deterministic rules, and pictures that the codec can carry."""

from __future__ import annotations

import math

import torch

from turboserve.model.shapes import vocabulary as v
from turboserve.model.shapes.clips import make_frames, make_shard
from turboserve.model.shapes.codec import PatchCodec, from_patches, to_patches
from turboserve.model.shapes.script import random_script, start_cells
from turboserve.model.shapes.start_map import start_maps
from turboserve.model.shapes.world import MOTION_INDEX, Script, play, render


def script(**changes: list[list[int]]) -> Script:
    """Two large red circles standing still for two chunks; `changes` gives [chunk][object] values."""
    base = {
        "shape": [[0, 0]] * 2,
        "colour": [[0, 0]] * 2,
        "size": [[2, 2]] * 2,
        "motion": [[MOTION_INDEX["still"]] * 2] * 2,
        "speed": [[1, 1]] * 2,
    }
    columns = {name: torch.tensor([changes.get(name, value)]) for name, value in base.items()}
    count = torch.tensor([changes.get("count", [1, 1])])
    start = torch.tensor([[[1, 2], [7, 8]]])
    return Script(count=count, background=torch.zeros(1, 2, dtype=torch.int64), start=start, **columns)


def moved(motion: str) -> torch.Tensor:
    """Displacement (dx, dy) of the first object between the first and last of eight frames."""
    played = play(script(motion=[[MOTION_INDEX[motion]] * 2] * 2))
    return (played.centre[0, -1, 0] - played.centre[0, 0, 0] + 48) % 96 - 48


def test_drifts_go_where_they_say_and_wrap():
    for name, direction in v.DRIFTS.items():
        assert torch.allclose(moved(name), torch.tensor(direction) * 2.0 * 7)
    assert torch.equal(moved("still"), torch.zeros(2))


def test_bouncing_stays_inside():
    many = random_script(32, 6, torch.Generator().manual_seed(0))
    many.motion[:] = MOTION_INDEX["bouncing"]
    y = play(many).centre[:, 8:, 0, 1]  # after two chunks those that began at the edge are inside
    assert (y > 0).all() and (y < 96).all()
    assert (y.diff(dim=1).sign().amin(1) < 0).any() and (y.diff(dim=1).sign().amax(1) > 0).any()


def test_a_second_object_comes_in_half_a_world_away():
    played = play(script(count=[0, 1]))
    apart = (played.centre[0, -1, 1] - played.centre[0, -1, 0]) % 96
    assert torch.equal(apart, torch.full((2,), 48.0))


def test_two_that_were_alike_are_told_apart_by_place():
    """Slots cannot say which of two equal objects is meant, so the left one becomes the first."""
    start = torch.tensor([[[9, 2], [3, 8]]])
    ambiguous = script(colour=[[0, 0], [0, 1]])
    ambiguous.start = start
    centre = play(ambiguous).centre[0, -1]
    assert centre[0, 0] < centre[1, 0]


def test_two_that_came_too_close_go_apart_and_then_keep_their_distance():
    many = random_script(64, 6, torch.Generator().manual_seed(4))
    many.count[:], many.motion[:], many.speed[:] = 1, MOTION_INDEX["left"], 1
    many.shape[:], many.colour[:], many.size[:] = 0, 0, 0
    many.start[:, 1] = (many.start[:, 0] + 2) % v.START_CELLS  # 16 pixels along both axes
    gap = ((play(many).centre[:, :, 1] - play(many).centre[:, :, 0]) % 96)[:, :, 0]
    assert torch.allclose(gap[:, 0], torch.full((64,), 16.0))
    assert torch.allclose(gap[:, -1] - gap[:, 0], torch.full((64,), 23 * 2 * v.APART_SPEED), atol=1e-4)
    many.start[:, 1] = (many.start[:, 0] + 6) % v.START_CELLS
    gap = (play(many).centre[:, :, 1] - play(many).centre[:, :, 0]) % 96
    assert torch.allclose(gap, torch.full_like(gap, 48.0), atol=1e-3)


def test_a_lost_object_comes_back_in_its_place():
    many = random_script(400, 6, torch.Generator().manual_seed(5), lose=True)
    gone = many.lost.any((1, 2))
    assert 0.05 < gone.float().mean() < 0.15
    assert not many.lost[:, 0].any() and not many.lost[:, -1].any()
    played = play(many)
    for scene in torch.nonzero(many.lost[:, :, 0].any(1) & (many.count == 0).all(1))[:, 0].tolist():
        back = int(torch.nonzero(many.lost[scene, :, 0])[-1]) + 1
        reach = 4 * 3.5 + 1  # it has moved for at most four frames
        assert (played.centre[scene, back * 4, 0] - 48).abs().max() <= reach
    scene = int(torch.nonzero((many.lost[:, 1, 0]) & (many.count[:, 1] == 0))[0])
    one = Script(**{name: value[scene : scene + 1] for name, value in vars(many).items()})
    shown = render(one, play(one))[0]
    assert shown[4].std(-1).max() < 1e-4  # rows of one colour: nothing is drawn
    assert shown[-1].std(-1).max() > 0.01


def test_starts_lie_apart_along_both_axes():
    cells = start_cells(500, torch.Generator().manual_seed(1))
    apart = (cells[:, 1] - cells[:, 0]) % v.START_CELLS
    assert apart.min() >= v.APART_CELLS_MIN
    assert (v.START_CELLS - apart).min() >= v.APART_CELLS_MIN


def test_start_maps_peak_at_the_start():
    maps = start_maps(torch.tensor([[[0, 11], [6, 3]]]), torch.tensor([False]))[0]
    first, second = maps.unflatten(1, (2, 16)).unbind(1)
    assert not second.any()
    token = int(first.sum(1).argmax())
    assert divmod(token, v.TOKENS_PER_SIDE) == (5, 0)


def test_patches_are_a_permutation():
    frames = torch.arange(2 * 3 * 96 * 96.0).view(2, 3, 96, 96)
    assert torch.equal(from_patches(to_patches(frames)), frames)


def test_the_codec_is_orthonormal_and_good_enough():
    frames, _, _ = make_frames(24, seed=3)
    codec = PatchCodec.fit(frames[:, ::3])
    identity = codec.basis.T @ codec.basis
    torch.testing.assert_close(identity, torch.eye(len(identity)), rtol=0, atol=1e-5)
    other, _, _ = make_frames(6, seed=4)
    error = (codec.decode(codec.encode(other)).flatten(1, 2) - other).square().mean().item() / 4
    assert -10 * math.log10(error) > 28


def test_shards_are_functions_of_seed_and_index():
    frames, _, _ = make_frames(8, seed=3)
    codec = PatchCodec.fit(frames[:, ::3])
    first, again, other = (make_shard(codec, 0, index, clips=32) for index in (4, 4, 5))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.prompts, again.prompts)
    assert not torch.equal(first.latents, other.latents)


def test_pictures_are_in_range():
    one = random_script(8, 2, torch.Generator().manual_seed(2))
    frames = render(one, play(one))
    assert frames.shape == (8, 8, 3, 96, 96)
    assert frames.min() >= 0 and frames.max() <= 1
