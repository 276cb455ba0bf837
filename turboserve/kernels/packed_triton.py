"""The packed pass on CUDA: the Triton kernels between the linear layers.

What all layers share (levels of rows, angles, where keys go and lie, tiles of attention) is worked out once a pass on
the host and sent over; nothing is read back. Sessions' slots need not share an allocation: places count 16-byte units
from the lowest address among them. Keys that are cached un-rotated, and the scattered runs that a recache reads, are
first laid end to end (rotated) in scratch; a segment's bits are the same either way.

It also runs on CPU tensors under Triton's interpreter, which is how the tests without a GPU hold it to TorchPass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from turboserve.kernels import attention, norm, rope
from turboserve.kernels.attention import TileConfig
from turboserve.kernels.packed import LevelTable, PackedSegment
from turboserve.kernels.packed_torch import by_segment
from turboserve.kernels.reference import UNIT_BYTES


class TritonKernels:
    """Tile shapes of one device. `arch` is its capability, major * 10 + minor (tests without a device name one)."""

    name = "triton"

    def __init__(self, device: torch.device, arch: int | None = None) -> None:
        if arch is None:
            major, minor = torch.cuda.get_device_capability(device)
            arch = major * 10 + minor
        self._arch = arch
        self.linears_by_segment = False

    def begin(
        self, segments: Sequence[PackedSegment], levels: LevelTable, *, heads: int, eps: float, rotate_keys: bool
    ) -> TritonPass:
        cache = segments[0].kv_cache
        tiles = attention.tile_config(self._arch, cache.shape[-1], cache.dtype)
        made = TritonPass(segments, levels, tiles, heads=heads, eps=eps, rotate_keys=rotate_keys)
        made.linears_by_segment = self.linears_by_segment
        return made


@dataclass(frozen=True, slots=True)
class _Attention:
    """One attention of the pass: where keys lie and its tiles, both on the device."""

    places: Tensor  # int64 [segments, 2]
    work: Tensor  # int32 [tiles, 4]


class TritonPass:
    """See packed.PackedPass. Modulation handles are tables [levels, C]; a row finds its own by its level."""

    linears_by_segment = False

    def __init__(
        self,
        segments: Sequence[PackedSegment],
        levels: LevelTable,
        tiles: TileConfig,
        *,
        heads: int,
        eps: float,
        rotate_keys: bool,
    ) -> None:
        self._levels, self._tiles, self._heads, self._eps = levels, tiles, heads, eps
        self._segments = segments
        self._rotate_keys = rotate_keys
        self._device = levels.blocks.device
        lengths = [one.rows.stop - one.rows.start for one in segments]
        self._bounds = np.concatenate([[0], np.cumsum(lengths)])
        self._level = self._send(np.repeat([one.level for one in segments], lengths).astype(np.int32))
        self._cos = torch.cat([one.query_rotation.cos for one in segments]).flatten(1)
        self._sin = torch.cat([one.query_rotation.sin for one in segments]).flatten(1)

        self._base, origins = _lowest([one.kv_cache for one in segments])
        token_units = rope.token_units(self._base)
        runs = [(_tokens(one.write), _tokens(one.read)) for one in segments]
        own = [origin + token_units * written for origin, (written, _) in zip(origins, runs, strict=True)]
        self._own = self._send(np.concatenate(own))
        self._gathered: Tensor | None = None
        self._key_angles: tuple[Tensor, Tensor] | None = None
        if any(one.key_rotation is not None or len(one.read) > 1 for one in segments):
            seen = [origin + token_units * read for origin, (_, read) in zip(origins, runs, strict=True)]
            self._gathered = self._send(np.concatenate(seen))
            if segments[0].key_rotation is not None:
                turned = [one.key_rotation for one in segments if one.key_rotation is not None]
                if len(turned) != len(segments):
                    raise ValueError("keys are cached rotated in some segments of a pass and not in others")
                self._key_angles = (
                    torch.cat([one.cos for one in turned]).flatten(1),
                    torch.cat([one.sin for one in turned]).flatten(1),
                )
        # Values stay where they are unless a recache reads them from scattered pages.
        self._gather_values = any(len(one.read) > 1 for one in segments)
        kv_lens = np.array([len(read) for _, read in runs])
        firsts = np.array(
            [origin + token_units * one.read[0][0] for origin, one in zip(origins, segments, strict=True)]
        )
        in_scratch = token_units * np.concatenate([[0], np.cumsum(kv_lens)[:-1]])
        self._slots = self._attention(
            firsts if self._gathered is None else in_scratch, in_scratch if self._gather_values else firsts, kv_lens
        )
        if any(one.text_pads > 1 for one in segments):
            raise ValueError("these kernels weigh all text keys alike; write padding out instead of folding it")
        self._text_base, text_origins = _lowest([one.text_kv for one in segments])
        text_places = np.array(text_origins)
        text_lens = np.array([one.text_kv.shape[2] for one in segments])
        self._text = self._attention(text_places, text_places, text_lens)

    def _attention(self, k_places: np.ndarray, v_places: np.ndarray, kv_lens: np.ndarray) -> _Attention:
        work = attention.work_list(self._bounds, np.arange(len(kv_lens)), kv_lens, self._tiles.block_m)
        return _Attention(self._send(np.stack([k_places, v_places], 1)), self._send(work))

    def _send(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)

    def linear(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return by_segment(layer, x, self._segments) if self.linears_by_segment else layer(x)

    def modulation(self, layer: int) -> tuple[Tensor, ...]:
        return self._levels.blocks[:, layer].unbind(1)

    def head_modulation(self) -> tuple[Tensor, ...]:
        return self._levels.head.unbind(1)

    def normalise(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return norm.layer_norm_modulate(x, shift, scale, self._level, self._eps)

    def residual(
        self, x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        return norm.gated_residual_norm(x, y, gate, shift, scale, self._level, self._eps)

    def residual_affine(
        self, x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        return norm.gated_residual_affine(x, y, gate, weight, bias, self._level, self._eps)

    def append(self, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, layer: int) -> Tensor:
        keys, values = self._base[layer].unbind(0)
        return rope.qk_norm_rope_append_placed(
            q, k, v, q_weight, k_weight, self._cos, self._sin, keys, values, self._own, self._eps,
            rotate_keys=self._rotate_keys,
        )  # fmt: skip

    def attend_slots(self, q: Tensor, layer: int) -> Tensor:
        keys, values = self._base[layer].unbind(0)
        if self._gathered is not None:
            angles = () if self._key_angles is None else self._key_angles
            seen = rope.gather_keys(keys, self._gathered, *angles)
            values = rope.gather_keys(values, self._gathered) if self._gather_values else values
            keys = seen
        return self._attend(q, keys, values, self._slots)

    def text_query(self, q: Tensor, weight: Tensor) -> Tensor:
        return norm.rms_norm(q, weight, self._eps).unflatten(-1, (self._heads, -1))

    def attend_text(self, q: Tensor, layer: int) -> Tensor:
        keys, values = self._text_base[layer].unbind(0)
        return self._attend(q, keys, values, self._text)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, where: _Attention) -> Tensor:
        out = attention.attn_varlen_placed(q, keys, values, where.places, where.work, self._tiles)
        return out.flatten(1)


def _tokens(runs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Slot tokens of runs (first, count), in order."""
    return np.concatenate([np.arange(first, first + count, dtype=np.int64) for first, count in runs])


def _lowest(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """The tensor with the lowest address, and how many 16-byte units after it each of them begins."""
    base = min(tensors, key=Tensor.data_ptr)
    away = [one.data_ptr() - base.data_ptr() for one in tensors]
    if base.data_ptr() % UNIT_BYTES or any(one % UNIT_BYTES for one in away):
        raise ValueError(f"sessions' tensors must begin at multiples of {UNIT_BYTES} bytes")
    if any(one.stride() != base.stride() or one.dtype != base.dtype for one in tensors):
        raise ValueError("sessions' tensors of one kind must be laid out alike")
    return base, [one // UNIT_BYTES for one in away]
