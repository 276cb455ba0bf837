"""The causal video transformer, whole, in one file.

It is the Wan 2.1 block (adaptive layer norm from a learned 6 x dim table plus a shared projection of the time
embedding, RMS-normalised queries and keys, 3-D rotary embedding, text cross-attention behind its own affine
norm, GELU-tanh feed-forward) made causal over chunks, as in Self-Forcing and LongLive. One class serves the
Wan family and the small `shapes` model; module names are those of original Wan checkpoints.

Two forms of forward compute the same thing:
- `forward_dense` for training: whole clips, each chunk told which chunks it sees;
- `forward_packed` for serving: rows of many sessions end to end, keys read from and written to their slots.

Shapes: B clips, C chunks, P tokens a chunk, R packed rows, H heads, D head_dim, S text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from turboserve.kernels.packed import Kernels, LevelTable, PackedSegment, Rotation, kernels_for
from turboserve.kernels.packed_torch import TorchKernels, rotate
from turboserve.model.rotary import RopeMode
from turboserve.ranges import span


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that fixes the weights' shapes, and how positions are counted."""

    layers: int
    dim: int
    heads: int
    ffn_dim: int
    patch_dim: int  # numbers per token in and out: latent channels x patch size
    text_dim: int
    text_tokens: int
    condition_dim: int = 0  # further numbers per token that only go in (Wan's image-to-video channels; a start map)
    freq_dim: int = 256
    rope_mode: RopeMode = RopeMode.RELATIVE
    rope_theta: float = 10000.0
    eps: float = 1e-6
    # A learned vector for each place in a latent frame; 0: none. Wan has none; `shapes` must know where the
    # edges are.
    position_tokens: int = 0

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


# For each chunk of a clip: the chunks it sees as (chunk, position) pairs, itself last. In relative mode a
# position is a place in the window, in absolute mode a latent frame of the stream.
Visible = Sequence[Sequence[tuple[int, int]]]


class Attention(nn.Module):
    """Projections of one attention; queries and keys are RMS-normalised over the full width, before the
    heads.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)
        self.heads = config.heads

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def query(self, x: Tensor) -> Tensor:
        return self.split(self.norm_q(self.q(x)))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.norm_k(self.k(x))), self.split(self.v(x))


def _chunks_first(x: Tensor) -> Tensor:
    """[B, C, T, H, D] -> [C, B, H, T, D]."""
    return x.permute(1, 0, 3, 2, 4).contiguous()


def _attend_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention spelt out, for training: the fused kernel's backward is ten times slower on a CPU at these
    sizes.
    """
    scores = torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return torch.matmul(scores.softmax(-1), v)


class Block(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.self_attn = Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )


class Head(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.norm = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.patch_dim)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.head(self.norm(x) * (1 + scale) + shift)


class CausalVideoTransformer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Linear(config.patch_dim + config.condition_dim, dim)
        self.position_embedding = (
            nn.Parameter(torch.randn(config.position_tokens, dim) * 0.02) if config.position_tokens else None
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        # PyTorch's run on any device; whoever loads the weights onto a device calls `choose_kernels`.
        self.kernels: Kernels = TorchKernels()

    @property
    def layers(self) -> list[Block]:
        """The blocks, under their type."""
        return cast("list[Block]", list(self.blocks))

    def choose_kernels(self) -> None:
        """Kernels for the device that the weights lie on, from now on. ConfigError where it has none."""
        self.kernels = kernels_for(self.patch_embedding.weight.device, self.config.head_dim)

    # -- conditioning --

    def time_features(self, timestep: Tensor) -> Tensor:
        """Sinusoidal features of timesteps 0..1000, [..., freq_dim] (cosines first, as Wan)."""
        half = self.config.freq_dim // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
        angle = timestep.double()[..., None] * frequency
        return torch.cat([angle.cos(), angle.sin()], -1).to(self.patch_embedding.weight.dtype)

    def modulation(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(blocks [..., layers, 6, dim], head [..., 2, dim]) of timesteps of any shape."""
        embedded = self.time_embedding(self.time_features(timestep))
        shared = self.time_projection(embedded).unflatten(-1, (6, -1))
        own = torch.cat([block.modulation for block in self.layers])
        return shared[..., None, :, :] + own, embedded[..., None, :] + self.head.modulation[0]

    @torch.no_grad()
    def level_table(self, timesteps: Sequence[float]) -> LevelTable:
        """The table of all levels, one level at a time: a level's bits must not depend on its neighbours."""
        device = self.patch_embedding.weight.device
        each = [self.modulation(torch.tensor([one], dtype=torch.float64, device=device)) for one in timesteps]
        return LevelTable(torch.cat([blocks for blocks, _ in each]), torch.cat([head for _, head in each]))

    @torch.no_grad()
    def text_kv(self, text: Tensor) -> Tensor:
        """Cross-attention keys and values [layers, 2, S, H, D] of one prompt's text [S, text_dim]."""
        context = self.text_embedding(text)
        return torch.stack([torch.stack(block.cross_attn.key_value(context)) for block in self.layers])

    def _embed(self, tokens: Tensor) -> Tensor:
        """Patch embedding of [..., patch_dim]; the second axis from the end counts the tokens of whole
        frames.
        """
        x = self.patch_embedding(tokens)
        if self.position_embedding is not None:
            count = self.position_embedding.shape[0]
            x = (x.unflatten(-2, (-1, count)) + self.position_embedding).flatten(-3, -2)
        return x

    # -- training --

    def forward_dense(
        self,
        tokens: Tensor,
        timestep: Tensor,
        text: Tensor,
        visible: Visible,
        rotations: Mapping[int, Rotation],
    ) -> Tensor:
        """Clips: tokens [B, C, P, patch_dim + condition_dim], timestep [B, C] in 0..1000, text [B, C, S, text_dim] ->
        like tokens.

        The same chunk may be there twice, clean and noisy: this is how one forward trains on clean context
        ("teacher forcing").
        """
        blocks, head = self.modulation(timestep)
        context = self.text_embedding(text)
        x = self._embed(tokens)
        for index, block in enumerate(self.layers):
            x = self._block_dense(block, x, blocks[:, :, index], context, visible, rotations)
        shift, scale = head[:, :, :, None].unbind(2)
        return self.head(x, shift, scale)

    def _block_dense(
        self,
        block: Block,
        x: Tensor,
        modulation: Tensor,
        context: Tensor,
        visible: Visible,
        rotations: Mapping[int, Rotation],
    ) -> Tensor:
        m = modulation[:, :, :, None].unbind(2)  # six of [B, C, 1, dim]
        y = torch.addcmul(m[0], block.norm1(x), 1 + m[1])
        q, k, v = (_chunks_first(one) for one in (block.self_attn.query(y), *block.self_attn.key_value(y)))
        y = self._attend_window(q, k, v, visible, rotations)
        x = torch.addcmul(x, block.self_attn.o(y), m[2])
        q = _chunks_first(block.cross_attn.query(block.norm3(x)))
        k, v = (_chunks_first(one) for one in block.cross_attn.key_value(context))
        y = _attend_dense(q, k, v).permute(1, 0, 3, 2, 4).flatten(-2)
        x = x + block.cross_attn.o(y)
        y = torch.addcmul(m[3], block.norm2(x), 1 + m[4])
        return torch.addcmul(x, block.ffn(y), m[5])

    @staticmethod
    def _attend_window(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Visible,
        rotations: Mapping[int, Rotation],
    ) -> Tensor:
        """Each chunk over the chunks it sees; q, k, v are [C, B, H, P, D], the result is [B, C, P, H * D]."""
        queries, values = q.unbind(0), v.unbind(0)
        keys = k.unbind(0)
        turned = {at: Rotation(one.cos[:, 0], one.sin[:, 0]) for at, one in rotations.items()}
        rotated: dict[tuple[int, int], Tensor] = {}
        out = []
        for chunk, seen in enumerate(visible):
            for other, at in seen:
                if (other, at) not in rotated:
                    rotated[other, at] = rotate(keys[other], turned[at])
            query = rotate(queries[chunk], turned[seen[-1][1]])
            key = torch.cat([rotated[one] for one in seen], -2)
            out.append(_attend_dense(query, key, torch.cat([values[other] for other, _ in seen], -2)))
        return torch.stack(out, 1).transpose(2, 3).flatten(-2)

    # -- serving --

    @torch.no_grad()
    def forward_packed(self, tokens: Tensor, segments: Sequence[PackedSegment], levels: LevelTable) -> Tensor:
        """One pass over packed rows [R, patch_dim + condition_dim] -> [R, patch_dim]; writes the segments' keys into
        their slots.

        Linear layers run over all rows at once, unless the kernels were told otherwise; all else is the kernels'
        (kernels/packed.py), which give a segment the same result whatever its neighbours.
        """
        work = self.kernels.begin(
            segments,
            levels,
            heads=self.config.heads,
            eps=self.config.eps,
            rotate_keys=self.config.rope_mode is RopeMode.ABSOLUTE,
        )
        x = work.linear(self._embed, tokens)
        m = work.modulation(0)
        y = work.normalise(x, m[0], m[1])
        for layer, block in enumerate(self.layers):
            attention = block.self_attn
            q, k, v = (work.linear(one, y) for one in (attention.q, attention.k, attention.v))
            with span("attention"):
                q = work.append(q, k, v, attention.norm_q.weight, attention.norm_k.weight, layer)
                y = work.attend_slots(q, layer)
            y = work.linear(attention.o, y)
            x, y = work.residual_affine(x, y, m[2], block.norm3.weight, block.norm3.bias)
            attention = block.cross_attn
            q = work.text_query(work.linear(attention.q, y), attention.norm_q.weight)
            y = work.linear(attention.o, work.attend_text(q, layer))
            x, y = work.residual(x, y, None, m[3], m[4])
            y = work.linear(block.ffn, y)
            # The residual is fused with the norm that comes next: the following block's, or the head's.
            gate = m[5]
            m = work.modulation(layer + 1) if layer + 1 < len(self.blocks) else work.head_modulation()
            x, y = work.residual(x, y, gate, m[0], m[1])
        return work.linear(self.head.head, y)


def init_weights(model: CausalVideoTransformer, seed: int) -> None:
    """Xavier for linear layers, zero for the output head: training starts at "predict nothing"."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                bound = math.sqrt(6 / (module.in_features + module.out_features))
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.zero_()
        for block in model.layers:
            block.modulation.normal_(0, model.config.dim**-0.5, generator=generator)
        if model.position_embedding is not None:
            model.position_embedding.normal_(0, 0.02, generator=generator)
        model.head.modulation.normal_(0, model.config.dim**-0.5, generator=generator)
        model.head.head.weight.zero_()
