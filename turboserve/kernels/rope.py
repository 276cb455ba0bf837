"""qk-RMSNorm, rotary embedding and append into the slot, in one Triton pass: `qk_norm_rope_append` of reference.py.

One program takes whole rows: the norm runs over all channels before the heads are split. Rotary pairs are the two
halves of a head, so all loads and stores are contiguous runs of D / 2; interleaved pairs would store 2 bytes at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load_half(ptr, row, start, mask, HEADS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """[HEADS padded, PAIRS padded] of one half of every head of a row, as float32."""
    head = tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    return tl.load(ptr + row + head[:, None] * (2 * HALF) + start + pair[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _qk_norm_rope_append_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    cache_rows_ptr,
    out_ptr,
    channels,
    stride_in,
    eps,
    heads,
    stride_cache_token,
    ROTATE_KEYS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    mask = (head < heads)[:, None] & (pair < HALF)[None, :]
    place = head[:, None] * (2 * HALF) + pair[None, :]
    cos = tl.load(cos_ptr + row * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]

    q0 = _load_half(q_ptr, row * stride_in, 0, mask, HEADS, HALF, PAIRS)
    q1 = _load_half(q_ptr, row * stride_in, HALF, mask, HEADS, HALF, PAIRS)
    q_norm = tl.rsqrt((tl.sum(q0 * q0) + tl.sum(q1 * q1)) / channels + eps)
    q0 = q0 * q_norm * _load_half(q_weight_ptr, 0, 0, mask, HEADS, HALF, PAIRS)
    q1 = q1 * q_norm * _load_half(q_weight_ptr, 0, HALF, mask, HEADS, HALF, PAIRS)
    out = out_ptr + row * channels + place
    tl.store(out, (q0 * cos - q1 * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + HALF, (q1 * cos + q0 * sin).to(out_ptr.dtype.element_ty), mask=mask)

    target = tl.load(cache_rows_ptr + row)
    if target >= 0:
        k0 = _load_half(k_ptr, row * stride_in, 0, mask, HEADS, HALF, PAIRS)
        k1 = _load_half(k_ptr, row * stride_in, HALF, mask, HEADS, HALF, PAIRS)
        k_norm = tl.rsqrt((tl.sum(k0 * k0) + tl.sum(k1 * k1)) / channels + eps)
        k0 = k0 * k_norm * _load_half(k_weight_ptr, 0, 0, mask, HEADS, HALF, PAIRS)
        k1 = k1 * k_norm * _load_half(k_weight_ptr, 0, HALF, mask, HEADS, HALF, PAIRS)
        if ROTATE_KEYS:
            turned = k0 * cos - k1 * sin
            k1 = k1 * cos + k0 * sin
            k0 = turned
        slot = target.to(tl.int64) * stride_cache_token + place
        tl.store(k_cache_ptr + slot, k0.to(k_cache_ptr.dtype.element_ty), mask=mask)
        tl.store(k_cache_ptr + slot + HALF, k1.to(k_cache_ptr.dtype.element_ty), mask=mask)
        v0 = _load_half(v_ptr, row * stride_in, 0, mask, HEADS, HALF, PAIRS)
        v1 = _load_half(v_ptr, row * stride_in, HALF, mask, HEADS, HALF, PAIRS)
        tl.store(v_cache_ptr + slot, v0.to(v_cache_ptr.dtype.element_ty), mask=mask)
        tl.store(v_cache_ptr + slot + HALF, v1.to(v_cache_ptr.dtype.element_ty), mask=mask)


def qk_norm_rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_rows: Tensor,
    eps: float,
    *,
    rotate_keys: bool,
) -> Tensor:
    """See reference.qk_norm_rope_append. cache_rows int64 [R] counts tokens of the flattened caches [S, T, H, D]."""
    heads, head_dim = k_cache.shape[-2:]
    if not (q.stride() == k.stride() == v.stride()) or q.stride(1) != 1:
        raise ValueError("q, k and v must be laid out alike with contiguous channels")
    out = torch.empty(q.shape[0], heads, head_dim, dtype=q.dtype, device=q.device)
    half = head_dim // 2
    _qk_norm_rope_append_kernel[(q.shape[0],)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        q_weight_ptr=q_weight,
        k_weight_ptr=k_weight,
        cos_ptr=cos,
        sin_ptr=sin,
        k_cache_ptr=k_cache,
        v_cache_ptr=v_cache,
        cache_rows_ptr=cache_rows,
        out_ptr=out,
        channels=q.shape[1],
        stride_in=q.stride(0),
        eps=eps,
        heads=heads,
        stride_cache_token=heads * head_dim,
        ROTATE_KEYS=rotate_keys,
        HALF=half,
        HEADS=triton.next_power_of_2(heads),
        PAIRS=triton.next_power_of_2(half),
        num_warps=warp_count(q.shape[1]),
    )
    return out


def warp_count(channels: int) -> int:
    """Few enough that a thread moves 16 bytes at a time, fixed by the channel count alone."""
    return 1 if channels < 1024 else 4
