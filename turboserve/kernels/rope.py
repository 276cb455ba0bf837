"""qk-RMSNorm, rotary embedding and append into the slot, in one Triton pass: `qk_norm_rope_append` of reference.py;
and `gather_keys`, which reads keys back and rotates them where they are cached un-rotated.

One program takes whole rows: the norm runs over all channels before the heads are split. Rotary pairs are the two
halves of a head, so all loads and stores are contiguous runs of D / 2; interleaved pairs would store 2 bytes at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboserve.kernels.reference import UNIT_BYTES


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
    places_ptr,
    out_ptr,
    channels,
    stride_in,
    eps,
    heads,
    ROTATE_KEYS: tl.constexpr,
    UNIT: tl.constexpr,
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

    target = tl.load(places_ptr + row)
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
        slot = target * UNIT + place
        tl.store(k_cache_ptr + slot, k0.to(k_cache_ptr.dtype.element_ty), mask=mask)
        tl.store(k_cache_ptr + slot + HALF, k1.to(k_cache_ptr.dtype.element_ty), mask=mask)
        v0 = _load_half(v_ptr, row * stride_in, 0, mask, HEADS, HALF, PAIRS)
        v1 = _load_half(v_ptr, row * stride_in, HALF, mask, HEADS, HALF, PAIRS)
        tl.store(v_cache_ptr + slot, v0.to(v_cache_ptr.dtype.element_ty), mask=mask)
        tl.store(v_cache_ptr + slot + HALF, v1.to(v_cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gather_keys_kernel(
    cache_ptr,
    places_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    channels,
    heads,
    ROTATE: tl.constexpr,
    UNIT: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    mask = (head < heads)[:, None] & (pair < HALF)[None, :]
    place = head[:, None] * (2 * HALF) + pair[None, :]
    source = tl.load(places_ptr + row) * UNIT + place
    out = out_ptr + row * channels + place
    first = tl.load(cache_ptr + source, mask=mask, other=0.0)
    second = tl.load(cache_ptr + source + HALF, mask=mask, other=0.0)
    if ROTATE:
        cos = tl.load(cos_ptr + row * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + row * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        first = (a * cos - b * sin).to(out_ptr.dtype.element_ty)
        second = (b * cos + a * sin).to(out_ptr.dtype.element_ty)
    tl.store(out, first, mask=mask)
    tl.store(out + HALF, second, mask=mask)


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
    units = token_units(k_cache)
    places = torch.where(cache_rows >= 0, cache_rows * units, -1)
    return qk_norm_rope_append_placed(
        q, k, v, q_weight, k_weight, cos, sin, k_cache, v_cache, places, eps, rotate_keys=rotate_keys
    )


def qk_norm_rope_append_placed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_base: Tensor,
    v_base: Tensor,
    places: Tensor,
    eps: float,
    *,
    rotate_keys: bool,
) -> Tensor:
    """The same with rows written `places` int64 [R] (16-byte units, negative: nowhere) after the addresses of k_base
    and v_base [..., H, D]: the slots of sessions need not share one allocation."""
    heads, head_dim = k_base.shape[-2:]
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
        k_cache_ptr=k_base,
        v_cache_ptr=v_base,
        places_ptr=places,
        out_ptr=out,
        channels=q.shape[1],
        stride_in=q.stride(0),
        eps=eps,
        heads=heads,
        ROTATE_KEYS=rotate_keys,
        UNIT=UNIT_BYTES // k_base.element_size(),
        HALF=half,
        HEADS=triton.next_power_of_2(heads),
        PAIRS=triton.next_power_of_2(half),
        num_warps=warp_count(q.shape[1]),
    )
    return out


def gather_keys(base: Tensor, places: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """Rows [H, D] that lie `places` int64 [K] (16-byte units) after the address of base [..., H, D], end to end and,
    given cos and sin [K, D / 2], rotated; [K, H, D]. Keys that are cached un-rotated are read this way."""
    heads, head_dim = base.shape[-2:]
    token_units(base)
    out = torch.empty(places.numel(), heads, head_dim, dtype=base.dtype, device=base.device)
    half = head_dim // 2
    _gather_keys_kernel[(places.numel(),)](
        cache_ptr=base,
        places_ptr=places,
        cos_ptr=out if cos is None else cos,
        sin_ptr=out if sin is None else sin,
        out_ptr=out,
        channels=heads * head_dim,
        heads=heads,
        ROTATE=cos is not None,
        UNIT=UNIT_BYTES // base.element_size(),
        HALF=half,
        HEADS=triton.next_power_of_2(heads),
        PAIRS=triton.next_power_of_2(half),
        num_warps=warp_count(heads * head_dim),
    )
    return out


def token_units(cache: Tensor) -> int:
    """16-byte units of a token's [H, D] in a cache [..., H, D]; ValueError where it is not a whole number of them."""
    heads, head_dim = cache.shape[-2:]
    token_bytes = heads * head_dim * cache.element_size()
    if token_bytes % UNIT_BYTES or cache.stride(-1) != 1 or cache.stride(-2) != head_dim:
        raise ValueError(f"tokens of {token_bytes} bytes; they must be contiguous and multiples of {UNIT_BYTES} bytes")
    return token_bytes // UNIT_BYTES


def warp_count(channels: int) -> int:
    """Few enough that a thread moves 16 bytes at a time, fixed by the channel count alone."""
    return 1 if channels < 1024 else 4
