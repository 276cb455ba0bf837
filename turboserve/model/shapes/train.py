"""Trains the `shapes` model: seeded, resumable, about an hour and a half on one CPU core.

The objective is teacher forcing with the very passes that serving runs. A clip of six chunks enters twice:
its first five chunks clean at timestep 0, as the context pass sees them, and all six noisy at one of the
sampler's four levels, each seeing the clean sink, its two clean predecessors and itself. The network predicts
clean latents (x0), with the weight min(3, 1 / (sigma^2 + 0.1)).

What makes streams last: clean context is noised a little without a label; a third of the clips get the sink
of another clip, as a stream has when its first second is long gone; context is sometimes run under the next
prompt, as a recache does; and in the last third half of the batches see their own predictions as context
(self-forcing).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from turboserve.kernels.packed import Rotation
from turboserve.model.shapes.clips import CLIP_CHUNKS, ClipPool, make_frames
from turboserve.model.shapes.codec import PatchCodec
from turboserve.model.shapes.network import ShapesNetwork, fresh_network, rotary_table
from turboserve.model.shapes.spec import SCHEDULE, SLOT, TOKENS
from turboserve.model.shapes.start_map import START_DIM

_CLEAN = CLIP_CHUNKS - 1


def visible_chunks() -> list[list[tuple[int, int]]]:
    """What each of the 5 clean and 6 noisy chunks of a training sequence sees: (index, window position)."""

    def context(chunk: int) -> list[int]:
        return sorted({0, *range(max(chunk - 2, 0), chunk)}) if chunk else []

    clean = [[*context(chunk), chunk] for chunk in range(_CLEAN)]
    noisy = [[*context(chunk), _CLEAN + chunk] for chunk in range(CLIP_CHUNKS)]
    return [[(other, place) for place, other in enumerate(row)] for row in clean + noisy]


@dataclass
class TrainConfig:
    out: Path
    seed: int = 0
    steps: int | None = None  # None: as many as fit into `minutes`
    minutes: float = 80.0
    batch: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    ema: float = 0.998
    codec_clips: int = 96
    pool_clips: int = 12288
    first_clips: int = 1024
    grow_every: int = 12
    checkpoint_every: int = 200
    self_forcing_from: float = 0.66


@dataclass
class Progress:
    """What a progress display may show."""

    step: int
    share: float
    loss: float
    step_ms: float
    clips: int


class Trainer:
    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.network = fresh_network(config.seed)
        self.ema = {name: one.detach().clone() for name, one in self.network.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.generator = torch.Generator().manual_seed(config.seed + 17)
        self.step = 0
        self.elapsed_s = 0.0
        frames, _, _ = make_frames(config.codec_clips, config.seed + 5)
        self.codec = PatchCodec.fit(frames[:, ::3])
        self._visible = visible_chunks()
        table = rotary_table()
        self._rotations = {place: table.at([place]) for place in range(SLOT.page_count)}
        self._levels = torch.tensor(SCHEDULE.sigmas)
        self._next_shard = 0

    # -- one step --

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def _randn_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator)

    def _predict(
        self, clean: Tensor, clean_prompt: Tensor, noisy: Tensor, prompt: Tensor, sigma: Tensor, starts: Tensor
    ) -> Tensor:
        """Clean estimates [B, 6, 36, D] of the noisy chunks, in bfloat16 arithmetic on float32 weights.

        `starts` [B, 2, 36, START_DIM] are the start maps of the sink and of the noisy first chunk.
        """
        weights = {name: one.bfloat16() for name, one in self.network.named_parameters()}
        timestep = torch.cat([torch.zeros(len(sigma), _CLEAN), sigma * 1000], 1)
        rotations = {at: Rotation(one.cos.bfloat16(), one.sin.bfloat16()) for at, one in self._rotations.items()}
        maps = torch.zeros(len(sigma), _CLEAN + CLIP_CHUNKS, TOKENS, START_DIM)
        maps[:, 0], maps[:, _CLEAN] = starts[:, 0], starts[:, 1]
        tokens = torch.cat([torch.cat([clean, noisy], 1), maps], -1).bfloat16()
        prompts = torch.cat([clean_prompt, prompt], 1)
        out = functional_call(self.network, weights, (tokens, timestep, prompts, self._visible, rotations))
        return out[:, _CLEAN:].float()

    def loss(self, latents: Tensor, prompt: Tensor, start: Tensor, valid: Tensor, self_forcing: bool) -> Tensor:
        batch = len(latents)
        sigma = self._levels[torch.randint(4, (batch, CLIP_CHUNKS), generator=self.generator)]
        s = sigma[:, :, None, None]
        noisy = (1 - s) * latents + s * self._randn_like(latents)
        clean = latents[:, :_CLEAN]
        dirt = self._rand(batch, 1, 1, 1) * 0.15 * (self._rand(batch, 1, 1, 1) < 0.6)
        clean = clean + dirt * self._randn_like(clean)
        ahead = self._rand(batch, 1, 1) < 0.12
        clean_prompt = torch.where(ahead, prompt[:, 1:], prompt[:, :_CLEAN])
        starts = torch.stack([start, start], 1)
        if self_forcing:
            with torch.no_grad():
                guess = self._predict(clean, clean_prompt, noisy, prompt, sigma, starts)[:, :_CLEAN]
            # What the noisier steps guess is blurrier than what serving ever keeps.
            usable = (s[:, :_CLEAN] < 0.9) & (self._rand(batch, _CLEAN, 1, 1) < 0.8)
            usable &= valid[:, :_CLEAN, None, None]
            clean = torch.where(usable, guess, clean)
        # Somebody else's first chunk: then only chunks that have two predecessors of their own can be predicted.
        foreign = self._rand(batch) < 0.33

        def swapped(own: Tensor) -> Tensor:
            return torch.where(foreign.view(-1, *[1] * (own.ndim - 1)), own.roll(1, 0), own)

        clean = torch.cat([swapped(clean[:, 0])[:, None], clean[:, 1:]], 1)
        clean_prompt = torch.cat([swapped(clean_prompt[:, 0])[:, None], clean_prompt[:, 1:]], 1)
        starts = torch.stack([swapped(start), start], 1)
        weight = (1 / (s * s + 0.1)).clamp(max=3.0) * valid[:, :, None, None]
        weight[:, 1:3] *= (~foreign).float()[:, None, None, None]
        out = self._predict(clean, clean_prompt, noisy, prompt, sigma, starts)
        error = (out - latents).pow(2).mean((-1, -2), keepdim=True)
        return (error * weight).sum() / weight.sum()

    def train_step(self, pool: ClipPool, share: float) -> float:
        config = self.config
        rate = config.learning_rate * min(1.0, (self.step + 1) / config.warmup_steps)
        rate *= max(0.01, 0.5 + 0.5 * math.cos(math.pi * min(share, 1.0)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        latents, prompt, start, valid = pool.draw(config.batch, self.generator)
        forcing = share > config.self_forcing_from and self.step % 2 == 0
        loss = self.loss(latents, prompt, start, valid, forcing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(config.ema, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for name, one in self.network.named_parameters():
                self.ema[name].lerp_(one, 1 - decay)
        return loss.item()

    # -- the run --

    def share(self) -> float:
        """How much of the run is done, 0..1: by steps where they were asked for, else by time."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        return self.elapsed_s / (self.config.minutes * 60)

    def run(self, report: Callable[[Progress], None]) -> None:
        """Train to the end; `report` is called after every step."""
        pool = ClipPool(self.codec, self.config.seed, self._next_shard, self.config.pool_clips)
        try:
            while pool.clips < self.config.first_clips:
                pool.grow()
            mean = None
            while (share := self.share()) < 1:
                start = time.monotonic()
                value = self.train_step(pool, share)
                if self.step % self.config.grow_every == 0:
                    pool.grow()
                taken = time.monotonic() - start
                self.elapsed_s += taken
                mean = value if mean is None else 0.98 * mean + 0.02 * value
                report(Progress(self.step, self.share(), mean, taken * 1e3, pool.clips))
                if self.step % self.config.checkpoint_every == 0:
                    self._next_shard = pool.next_shard
                    self.save()
            self.save()
        finally:
            pool.close()

    def summary(self) -> dict[str, object]:
        """How these weights were made, for their metadata."""
        config = self.config
        return {
            "seed": config.seed,
            "steps": self.step,
            "batch": config.batch,
            "minutes": round(self.elapsed_s / 60, 1),
            "learning_rate": config.learning_rate,
            "torch": torch.__version__,
        }

    def ema_network(self) -> ShapesNetwork:
        network = ShapesNetwork()
        network.load_state_dict(self.ema)
        return network.eval()

    def predict_last_step(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A function (latents, prompts, starts) -> what the averaged network makes of them in its last denoise step,
        on clean context; the sharpener trains on that."""
        self.network.load_state_dict(self.ema)

        @torch.no_grad()
        def predict(latents: Tensor, prompt: Tensor, start: Tensor) -> Tensor:
            sigma = torch.full(latents.shape[:2], SCHEDULE.sigmas[-1])
            s = sigma[:, :, None, None]
            noisy = (1 - s) * latents + s * self._randn_like(latents)
            starts = torch.stack([start, start], 1)
            return self._predict(latents[:, :_CLEAN], prompt[:, :_CLEAN], noisy, prompt, sigma, starts)

        return predict

    # -- checkpoints --

    @property
    def checkpoint_path(self) -> Path:
        return self.config.out / "checkpoint.pt"

    def save(self) -> None:
        self.config.out.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "network": self.network.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "codec": {"mean": self.codec.mean, "basis": self.codec.basis, "scale": self.codec.scale},
            "next_shard": self._next_shard,
        }
        part = self.checkpoint_path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint_path)

    def resume(self) -> bool:
        """Go on from the last checkpoint in `out`, if there is one. The pool is filled again with newer
        clips.
        """
        with contextlib.suppress(FileNotFoundError):
            state = torch.load(self.checkpoint_path, weights_only=True)
            self.step, self.elapsed_s = state["step"], state["elapsed_s"]
            self.network.load_state_dict(state["network"])
            self.ema = state["ema"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            self.codec = PatchCodec(**state["codec"])
            self._next_shard = state["next_shard"]
            return True
        return False
