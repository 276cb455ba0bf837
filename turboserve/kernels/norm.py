"""Row-wise kernels in Triton: normalise and modulate, gated residual, and both at once.

One row is never split over programs and a program's block is fixed by the channel count, so a row's bits do not
depend on how many rows there are. Memory-bound: each reads its rows once, in 128-bit pieces.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _modulated(x, shift, scale, mask, channels, eps, AFFINE: tl.constexpr):
    """LayerNorm over the last axis of a float32 row block, then times 1 + scale (affine: scale), plus shift."""
    mean = tl.sum(x, 1) / channels
    centred = tl.where(mask[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / channels
    if not AFFINE:
        scale = 1.0 + scale
    return centred * tl.rsqrt(variance + eps)[:, None] * scale + shift


@triton.jit
def _layer_norm_modulate_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    level_ptr,
    out_ptr,
    row_count,
    channels,
    stride_table,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = columns < channels
    both = (rows < row_count)[:, None] & mask[None, :]
    level = tl.load(level_ptr + rows, mask=rows < row_count, other=0).to(tl.int64)
    offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
    table = level[:, None] * stride_table + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=both, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + table, mask=both, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + table, mask=both, other=0.0).to(tl.float32)
    out = _modulated(x, shift, scale, mask, channels, eps, False)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=both)


@triton.jit
def _gated_residual_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    level_ptr,
    residual_ptr,
    out_ptr,
    row_count,
    channels,
    stride_gate,
    stride_table,
    eps,
    WITH_GATE: tl.constexpr,
    WITH_NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = columns < channels
    both = (rows < row_count)[:, None] & mask[None, :]
    level = tl.load(level_ptr + rows, mask=rows < row_count, other=0).to(tl.int64)
    offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
    table = level[:, None] * stride_table + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=both, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offsets, mask=both, other=0.0).to(tl.float32)
    if WITH_GATE:
        gates = level[:, None] * stride_gate + columns[None, :]
        y = y * tl.load(gate_ptr + gates, mask=both, other=0.0).to(tl.float32)
    residual = (x + y).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + offsets, residual, mask=both)
    if WITH_NORM:
        # The rounded residual, so that fused and one-after-the-other agree.
        shift = tl.load(shift_ptr + table, mask=both, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + table, mask=both, other=0.0).to(tl.float32)
        out = _modulated(residual.to(tl.float32), shift, scale, mask, channels, eps, AFFINE)
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=both)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, row_count, channels, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = columns < channels
    both = (rows < row_count)[:, None] & mask[None, :]
    offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=both, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / channels + eps)
    out = x * scale[:, None] * weight[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=both)


def row_block(channels: int) -> tuple[int, int, int]:
    """(rows a program, padded channels, warps), fixed by the channel count alone."""
    block = triton.next_power_of_2(channels)
    rows = max(1, 2048 // block)
    return rows, block, 8 if block >= 2048 else 4


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, level: Tensor, eps: float) -> Tensor:
    """x [R, C], tables shift and scale [levels, C] (rows of one stride), level int32 [R] -> [R, C]."""
    rows, block, warps = row_block(x.shape[1])
    out = torch.empty_like(x)
    _layer_norm_modulate_kernel[(triton.cdiv(x.shape[0], rows),)](
        x_ptr=x,
        shift_ptr=shift,
        scale_ptr=scale,
        level_ptr=level,
        out_ptr=out,
        row_count=x.shape[0],
        channels=x.shape[1],
        stride_table=_same_stride(shift, scale),
        eps=eps,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return out


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, level: Tensor) -> Tensor:
    """x + y * gate[level]."""
    return _residual(x, y, gate, gate, gate, level, 0.0, with_norm=False, affine=False)[0]


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, level: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual and, normalised and modulated, the next layer's input. No gate: x + y."""
    return _residual(x, y, gate, shift, scale, level, eps, with_norm=True, affine=False)


def gated_residual_affine(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, level: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual, and a plain LayerNorm of it with weight and bias [C]."""
    shift, scale = (one.expand(gate.shape[0], -1) for one in (bias, weight))  # stride 0: one row for every level
    return _residual(x, y, gate, shift, scale, level, eps, with_norm=True, affine=True)


def _residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    level: Tensor,
    eps: float,
    *,
    with_norm: bool,
    affine: bool,
) -> tuple[Tensor, Tensor]:
    rows, block, warps = row_block(x.shape[1])
    residual = torch.empty_like(x)
    out = torch.empty_like(x) if with_norm else residual
    gates = shift if gate is None else gate
    _gated_residual_kernel[(triton.cdiv(x.shape[0], rows),)](
        x_ptr=x,
        y_ptr=y,
        gate_ptr=gates,
        shift_ptr=shift,
        scale_ptr=scale,
        level_ptr=level,
        residual_ptr=residual,
        out_ptr=out,
        row_count=x.shape[0],
        channels=x.shape[1],
        stride_gate=_same_stride(gates),
        stride_table=_same_stride(shift, scale),
        eps=eps,
        WITH_GATE=gate is not None,
        WITH_NORM=with_norm,
        AFFINE=affine,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return residual, out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [R, C] over the root of its mean square, times weight [C]."""
    rows, block, warps = row_block(x.shape[1])
    out = torch.empty_like(x)
    _rms_norm_kernel[(triton.cdiv(x.shape[0], rows),)](
        x_ptr=x,
        weight_ptr=weight,
        out_ptr=out,
        row_count=x.shape[0],
        channels=x.shape[1],
        eps=eps,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return out


def _same_stride(*tables: Tensor) -> int:
    stride = tables[0].stride(0)
    if any(one.stride(0) != stride or one.stride(1) != 1 for one in tables):
        raise ValueError("modulation tables must have the same row stride and contiguous channels")
    return stride
