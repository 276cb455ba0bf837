"""Varlen attention of a coalesced batch over contiguous slots: `attn_varlen_slot` of reference.py in Triton.

A *work list* in device memory has one row per tile of queries: (first packed row, rows, place, visible tokens). A
*place* says where a segment's keys and values begin, in 16-byte units from a base address, so that sessions need not
share one allocation. Tiles are anchored at each segment's own first row and the kernel walks the slot's tokens from 0
in fixed steps: no split over keys, no atomics, a tile shape from a static table by (arch, dtype, head_dim). What a
segment computes therefore does not depend on what else is in the batch, to the bit.

Text cross-attention is the same kernel with the text keys as the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from turboserve.kernels.reference import UNIT_BYTES

LOG2_E = 1.4426950408889634
WORK_COLUMNS = 4


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Rows of queries and of keys per step, and how many warps and load stages work on them."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (capability major * 10 + minor, head_dim) -> tiles, for 16-bit inputs. Every entry compiles without spills
# (tests/kernels/test_aot.py); which is fastest on a device is for `turboserve bench kernels` to say.
TILES: dict[tuple[int, int], TileConfig] = {
    (80, 128): TileConfig(128, 32, 8, 3),
    (80, 64): TileConfig(128, 64, 8, 3),
    (80, 32): TileConfig(128, 64, 4, 3),
    (90, 128): TileConfig(128, 128, 8, 2),
    (90, 64): TileConfig(128, 128, 8, 2),
    (90, 32): TileConfig(128, 64, 4, 3),
    (100, 128): TileConfig(128, 64, 8, 2),
    (100, 64): TileConfig(128, 64, 8, 3),
    (100, 32): TileConfig(128, 64, 4, 3),
    # Consumer Blackwell has the shared memory of Ada and mma.sync, not tcgen05.
    (120, 128): TileConfig(128, 32, 8, 2),
    (120, 64): TileConfig(128, 64, 8, 2),
    (120, 32): TileConfig(128, 64, 4, 3),
}
# float32 is for checks, not for speed: small tiles that fit any device's shared memory.
TILES_FLOAT32 = TileConfig(64, 32, 4, 2)


def tile_config(arch: int, head_dim: int, dtype: torch.dtype) -> TileConfig:
    """The static tile shape; an arch that is not listed takes the newest older one."""
    if dtype == torch.float32:
        return TILES_FLOAT32
    known = sorted({one for one, _ in TILES if one <= arch})
    return TILES[(known[-1] if known else 80, head_dim)]


@triton.jit
def _attn_varlen_slot_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    work_ptr,
    places_ptr,
    stride_q_row,
    stride_k_token,
    stride_v_token,
    qk_scale_log2,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    first_row = tl.load(work_ptr + tile * 4 + 0)
    rows = tl.load(work_ptr + tile * 4 + 1)
    place = tl.load(work_ptr + tile * 4 + 2)
    kv_len = tl.load(work_ptr + tile * 4 + 3)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)
    row_mask = offs_m < rows
    q_rows = (first_row + offs_m).to(tl.int64)
    q_offsets = q_rows[:, None] * stride_q_row + head * HEAD_DIM + offs_d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=row_mask[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    # Places count 16-byte units: the constant factor tells the compiler that every access is aligned to 128 bits.
    k_base = tl.load(places_ptr + place * 2 + 0) * UNIT + head * HEAD_DIM
    v_base = tl.load(places_ptr + place * 2 + 1) * UNIT + head * HEAD_DIM

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    # Whole steps without a mask, then one masked tail: the tail's comparisons cost registers in every step otherwise.
    whole = (kv_len // BLOCK_N) * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N):
        tokens = (start + offs_n).to(tl.int64)
        k = tl.load(k_ptr + k_base + tokens[None, :] * stride_k_token + offs_d[:, None])
        v = tl.load(v_ptr + v_base + tokens[:, None] * stride_v_token + offs_d[None, :])
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * qk_scale_log2
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        peak = new_peak
    if whole < kv_len:
        tokens = (whole + offs_n).to(tl.int64)
        seen = tokens < kv_len
        k = tl.load(k_ptr + k_base + tokens[None, :] * stride_k_token + offs_d[:, None], mask=seen[None, :], other=0.0)
        v = tl.load(v_ptr + v_base + tokens[:, None] * stride_v_token + offs_d[None, :], mask=seen[:, None], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * qk_scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")

    out = acc / total[:, None]
    tl.store(out_ptr + q_offsets, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None])


def work_list(cu_seqlens_q: np.ndarray, places: np.ndarray, kv_lens: np.ndarray, block_m: int) -> np.ndarray:
    """int32 [tiles, 4]: (first row, rows, place, visible tokens), the longest first so that the last wave is short.

    Everything is counted on the host: reading one length back from the device would stall the batch.
    """
    rows: list[tuple[int, int, int, int]] = []
    for n in range(len(places)):
        begin, end = int(cu_seqlens_q[n]), int(cu_seqlens_q[n + 1])
        if int(kv_lens[n]) <= 0:
            raise ValueError(f"segment {n} sees no keys")
        rows += [
            (first, min(block_m, end - first), int(places[n]), int(kv_lens[n])) for first in range(begin, end, block_m)
        ]
    rows.sort(key=lambda one: (-one[3], one[0]))
    return np.array(rows, dtype=np.int32).reshape(-1, WORK_COLUMNS)


def attn_varlen_slot(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, work: Tensor, config: TileConfig, scale: float | None = None
) -> Tensor:
    """Packed q [R, H, D] over slots k_cache, v_cache [S, T, H, D] by a work list made with `config.block_m`, its
    places being slots.

    The caches may be strided views (one layer of a slab) as long as a token's [H, D] is contiguous and slots are
    multiples of 16 bytes apart.
    """
    apart = [one.stride(0) * one.element_size() for one in (k_cache, v_cache)]
    if any(one % UNIT_BYTES for one in apart):
        raise ValueError(f"slots are {apart} bytes apart; they must be multiples of {UNIT_BYTES}")
    slots = torch.arange(k_cache.shape[0], device=q.device)
    places = torch.stack([slots * (one // UNIT_BYTES) for one in apart], 1)
    return attn_varlen_placed(q, k_cache[0], v_cache[0], places, work, config, scale)


def attn_varlen_placed(
    q: Tensor,
    k_base: Tensor,
    v_base: Tensor,
    places: Tensor,
    work: Tensor,
    config: TileConfig,
    scale: float | None = None,
) -> Tensor:
    """Packed q [R, H, D] over keys and values that begin `places` int64 [P, 2] (16-byte units) after the addresses of
    k_base and v_base [tokens, H, D], whose token strides hold at every place. A place may lie outside the tensor that
    names the base: the caller says that the memory is there.
    """
    heads, head_dim = q.shape[-2:]
    for one in (q, k_base, v_base):
        if one.stride(-1) != 1 or one.stride(-2) != head_dim:
            raise ValueError("attention: the [H, D] of a token must be contiguous in queries, keys and values")
        if one.dtype != q.dtype:
            raise ValueError(f"attention: queries are {q.dtype}, keys or values {one.dtype}; they must be alike")
    out = torch.empty_like(q)
    _attn_varlen_slot_kernel[(work.shape[0], heads)](
        q_ptr=q,
        k_ptr=k_base,
        v_ptr=v_base,
        out_ptr=out,
        work_ptr=work,
        places_ptr=places,
        stride_q_row=q.stride(0),
        stride_k_token=k_base.stride(0),
        stride_v_token=v_base.stride(0),
        qk_scale_log2=(head_dim**-0.5 if scale is None else scale) * LOG2_E,
        UNIT=UNIT_BYTES // q.element_size(),
        HEAD_DIM=head_dim,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        # The CPU interpreter multiplies the bit patterns of bfloat16; on a device tl.dot stays 16-bit.
        UPCAST=not q.is_cuda and q.dtype == torch.bfloat16,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
