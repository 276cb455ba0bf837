"""The trainer: seeded, learns, and goes on from its checkpoint as if it had not stopped."""

from __future__ import annotations

import pytest
import torch

from turboserve.model.shapes.clips import make_frames
from turboserve.model.shapes.codec import PatchCodec, to_patches
from turboserve.model.shapes.sharpen import encoded_pairs, predicted_pairs, train_sharpener
from turboserve.model.shapes.train import TrainConfig, Trainer, visible_chunks


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class FixedPool:
    """The same few clips, without a second process."""

    def __init__(self, codec: PatchCodec) -> None:
        frames, self.prompts, self.starts = make_frames(6, seed=1)
        self.latents = codec.encode(frames)
        self.valid = torch.ones(self.prompts.shape[:2], dtype=torch.bool)

    def draw(self, count: int, generator: torch.Generator):
        picks = torch.randint(len(self.latents), (count,), generator=generator)
        return self.latents[picks], self.prompts[picks], self.starts[picks], self.valid[picks]


def trainer(tmp_path) -> Trainer:
    return Trainer(TrainConfig(out=tmp_path, steps=100, batch=2, warmup_steps=2, codec_clips=6))


def test_every_chunk_sees_the_sink_its_two_predecessors_and_itself():
    seen = visible_chunks()
    assert seen[4] == [(0, 0), (2, 1), (3, 2), (4, 3)]
    assert seen[5] == [(5, 0)]  # the noisy first chunk sees itself alone
    assert seen[10] == [(0, 0), (3, 1), (4, 2), (10, 3)]


def test_it_learns_and_resumes_to_the_same_numbers(tmp_path):
    one = trainer(tmp_path)
    pool = FixedPool(one.codec)

    def fixed_loss() -> float:
        one.generator.manual_seed(99)
        with torch.no_grad():
            return one.loss(pool.latents, pool.prompts, pool.starts, pool.valid, self_forcing=False).item()

    before = fixed_loss()
    for _ in range(6):
        one.train_step(pool, share=0.0)
    assert fixed_loss() < before
    one.save()
    after = [one.train_step(pool, share=0.8) for _ in range(2)]  # one of them on its own predictions

    other = trainer(tmp_path)
    assert other.resume()
    assert other.step == 6
    assert [other.train_step(pool, share=0.8) for _ in range(2)] == after


def test_there_is_nothing_to_resume_in_an_empty_place(tmp_path):
    assert not trainer(tmp_path / "none").resume()


def test_predicted_pairs_belong_together():
    """With a network that changes nothing, decoding the latents gives the pictures beside them."""
    frames, _, _ = make_frames(8, seed=2)
    codec = PatchCodec.fit(frames[:, ::3])
    latents, pictures = next(predicted_pairs(codec, lambda latents, prompts, starts: latents, seed=0))
    torch.testing.assert_close(codec.project(to_patches(pictures)), latents)


def test_the_sharpener_brings_pictures_nearer():
    frames, _, _ = make_frames(8, seed=2)
    codec = PatchCodec.fit(frames[:, ::3])
    losses: list[float] = []
    network = train_sharpener(
        codec, encoded_pairs(codec, 0, batch=8), seed=0, steps=12, report=lambda step, loss: losses.append(loss)
    )
    assert len(losses) == 12
    other, _, _ = make_frames(2, seed=3)
    latents = codec.encode(other)
    with torch.no_grad():
        before = (codec.decode(latents).flatten(1, 2) - other).abs().mean()
        after = (codec.decode(latents, network).flatten(1, 2) - other).abs().mean()
    assert after < before
