"""The packed pass in PyTorch: what a CPU runs, and the yardstick of the other kernels at the level of a whole pass.

Attention runs per segment at that segment's own shape, and rows are grouped so that a group has one noise level: a
segment's bits do not depend on its neighbours (docs/design.md, promise P1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from turboserve.kernels.packed import LevelTable, PackedSegment, Rotation


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (i, i + D / 2) of x [..., tokens, H, D].

    Wan pairs neighbours (2i, 2i + 1); halves are several times faster on a CPU and the same but for the order
    of the channels, so loading permutes the rows of q and k once (`rotary.halves_order`).
    """
    first, second = x.chunk(2, -1)
    cos, sin = rotation.cos.to(x.dtype), rotation.sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, last_counts: int = 1) -> Tensor:
    """Full attention of one session's q [Tq, H, D] over k, v [Tk, H, D]; returns [Tq, H * D].

    The last key counts `last_counts` times: log of that, added to its score, is the same as so many equal keys.
    """
    bias = None
    if last_counts > 1:
        bias = torch.zeros(len(k), dtype=q.dtype, device=q.device)
        bias[-1] = math.log(last_counts)
        bias = bias.expand(1, 1, len(q), -1)
    # The batch axis is there for the fused kernel, which takes four dimensions only.
    q, k, v = (one.transpose(0, 1)[None] for one in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, bias)[0].transpose(0, 1).flatten(1)


def by_segment(layer: Callable[[Tensor], Tensor], x: Tensor, segments: Sequence[PackedSegment]) -> Tensor:
    """A row-wise layer, once for every segment at its own shape."""
    if len(segments) == 1:
        return layer(x)
    return torch.cat([layer(x[one.rows]) for one in segments])


class TorchKernels:
    name = "torch"

    def __init__(self) -> None:
        self.linears_by_segment = False

    def begin(
        self, segments: Sequence[PackedSegment], levels: LevelTable, *, heads: int, eps: float, rotate_keys: bool
    ) -> TorchPass:
        made = TorchPass(segments, levels, heads=heads, eps=eps, rotate_keys=rotate_keys)
        made.linears_by_segment = self.linears_by_segment
        return made


class TorchPass:
    """See packed.PackedPass. Modulation handles are [groups, 1, C], gathered by group of rows."""

    linears_by_segment = False

    def __init__(
        self, segments: Sequence[PackedSegment], levels: LevelTable, *, heads: int, eps: float, rotate_keys: bool
    ) -> None:
        self._segments, self._heads, self._eps, self._rotate_keys = segments, heads, eps, rotate_keys
        # Rows in groups of one level each: whole segments where all are equally long, else single rows.
        lengths = [one.rows.stop - one.rows.start for one in segments]
        self._group = lengths[0] if len(set(lengths)) == 1 else 1
        of_group = [
            one.level for one, length in zip(segments, lengths, strict=True) for _ in range(length // self._group)
        ]
        level = torch.tensor(of_group, device=levels.blocks.device)
        self._blocks = levels.blocks[level][..., None, :]  # [groups, layers, 6, 1, C]
        self._head = levels.head[level][:, :, None]
        self._query_rotation = Rotation(
            torch.cat([one.query_rotation.cos for one in segments]),
            torch.cat([one.query_rotation.sin for one in segments]),
        )

    def linear(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return by_segment(layer, x, self._segments) if self.linears_by_segment else layer(x)

    def modulation(self, layer: int) -> tuple[Tensor, ...]:
        return self._blocks[:, layer].unbind(1)

    def head_modulation(self) -> tuple[Tensor, ...]:
        return self._head.unbind(1)

    def normalise(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:], eps=self._eps)
        return torch.addcmul(shift, y.unflatten(0, (-1, self._group)), 1 + scale).flatten(0, 1)

    def residual(
        self, x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = x + y if gate is None else self._gated(x, y, gate)
        return x, self.normalise(x, shift, scale)

    def residual_affine(
        self, x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = self._gated(x, y, gate)
        return x, F.layer_norm(x, x.shape[-1:], weight, bias, self._eps)

    def _gated(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        group = (-1, self._group)
        return torch.addcmul(x.unflatten(0, group), y.unflatten(0, group), gate).flatten(0, 1)

    def append(self, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, layer: int) -> Tensor:
        keys = self._split(F.rms_norm(k, k.shape[-1:], k_weight, self._eps))
        if self._rotate_keys:
            keys = rotate(keys, self._query_rotation)
        values = self._split(v)
        for one in self._segments:
            slot_keys, slot_values = one.kv_cache[layer].unbind(0)
            row = one.rows.start
            for start, count in one.write:
                slot_keys[start : start + count] = keys[row : row + count]
                slot_values[start : start + count] = values[row : row + count]
                row += count
        return rotate(self._split(F.rms_norm(q, q.shape[-1:], q_weight, self._eps)), self._query_rotation)

    def attend_slots(self, q: Tensor, layer: int) -> Tensor:
        return torch.cat([self._attend_slot(one, layer, q) for one in self._segments])

    @staticmethod
    def _attend_slot(segment: PackedSegment, layer: int, q: Tensor) -> Tensor:
        keys, values = segment.kv_cache[layer].unbind(0)
        seen, seen_values = _runs(keys, segment.read), _runs(values, segment.read)
        if segment.key_rotation is not None:
            seen = rotate(seen, segment.key_rotation)
        return attend(q[segment.rows], seen.to(q.dtype), seen_values.to(q.dtype))

    def text_query(self, q: Tensor, weight: Tensor) -> Tensor:
        return self._split(F.rms_norm(q, q.shape[-1:], weight, self._eps))

    def attend_text(self, q: Tensor, layer: int) -> Tensor:
        return torch.cat([self._attend_text(one, layer, q) for one in self._segments])

    @staticmethod
    def _attend_text(segment: PackedSegment, layer: int, q: Tensor) -> Tensor:
        keys, values = segment.text_kv[layer].unbind(0)
        return attend(q[segment.rows], keys, values, segment.text_pads)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self._heads, -1))


def _runs(x: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """The given runs of the first axis, laid end to end; one run is a view."""
    if len(runs) == 1:
        start, count = runs[0]
        return x[start : start + count]
    return torch.cat([x[start : start + count] for start, count in runs])
