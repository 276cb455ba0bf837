"""Training clips, made by a low-priority process beside the trainer: shard k is a pure function of (seed,
k).
"""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from turboserve.model.shapes.codec import PatchCodec
from turboserve.model.shapes.script import random_script
from turboserve.model.shapes.start_map import start_maps
from turboserve.model.shapes.world import play, render

CLIP_CHUNKS = 6
SHARD_CLIPS = 128


@dataclass
class Shard:
    latents: Tensor  # float16 [clips, CLIP_CHUNKS, 36, TOKEN_DIM]
    prompts: Tensor  # int64 [clips, CLIP_CHUNKS, SLOT_COUNT]
    starts: Tensor  # float16 [clips, 36, START_DIM]
    valid: Tensor  # bool [clips, CLIP_CHUNKS]: False where an object asked for is missing, which nothing should learn


def make_frames(clips: int, seed: int, chunks: int = CLIP_CHUNKS) -> tuple[Tensor, Tensor, Tensor]:
    """(frames [clips, chunks * 4, 3, 96, 96] in [-1, 1], prompts, start maps)."""
    script = random_script(clips, chunks, torch.Generator().manual_seed(seed))
    starts = start_maps(script.start, script.count[:, 0] == 1)
    return render(script, play(script)) * 2 - 1, script.tokens(), starts


def make_shard(codec: PatchCodec, seed: int, index: int, clips: int = SHARD_CLIPS) -> Shard:
    parts: list[tuple[Tensor, ...]] = []
    for part in range(0, clips, 32):
        seed_of_part = seed * 1_000_003 + index * 1_009 + part
        script = random_script(32, CLIP_CHUNKS, torch.Generator().manual_seed(seed_of_part), lose=True)
        assert script.lost is not None
        latents = codec.encode(render(script, play(script)) * 2 - 1).half()
        starts = start_maps(script.start, script.count[:, 0] == 1).half()
        parts.append((latents, script.tokens(), starts, ~script.lost.any(-1)))
    return Shard(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _produce(queue: multiprocessing.Queue, codec: tuple[Tensor, Tensor, Tensor], seed: int, first: int) -> None:
    os.nice(3)
    torch.set_num_threads(1)
    index = first
    while True:
        shard = make_shard(PatchCodec(*codec), seed, index)
        queue.put((index, *(one.numpy() for one in (shard.latents, shard.prompts, shard.starts, shard.valid))))
        index += 1


class ClipPool:
    """The newest `capacity` clips. `grow` waits for the next shard, so the order of training data is
    fixed.
    """

    def __init__(self, codec: PatchCodec, seed: int, first_shard: int, capacity: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._queue = context.Queue(maxsize=16)
        parts = (codec.mean, codec.basis, codec.scale)
        self._process = context.Process(target=_produce, args=(self._queue, parts, seed, first_shard), daemon=True)
        self._process.start()
        self._shards: list[Shard] = []
        self._capacity = capacity // SHARD_CLIPS
        self.next_shard = first_shard

    def grow(self) -> None:
        index, *arrays = self._queue.get()
        assert index == self.next_shard
        self.next_shard += 1
        self._shards.append(Shard(*(torch.from_numpy(one) for one in arrays)))
        del self._shards[: -self._capacity]

    @property
    def clips(self) -> int:
        return len(self._shards) * SHARD_CLIPS

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(latents float32, prompts, start maps float32, valid) of `count` random clips."""
        picks = torch.randint(self.clips, (count,), generator=generator).tolist()
        chosen = [(self._shards[pick // SHARD_CLIPS], pick % SHARD_CLIPS) for pick in picks]
        latents = torch.stack([shard.latents[row] for shard, row in chosen]).float()
        prompts = torch.stack([shard.prompts[row] for shard, row in chosen])
        starts = torch.stack([shard.starts[row] for shard, row in chosen]).float()
        return latents, prompts, starts, torch.stack([shard.valid[row] for shard, row in chosen])

    def close(self) -> None:
        self._process.terminate()
        self._process.join()
