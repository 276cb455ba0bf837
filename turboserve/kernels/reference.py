"""What each kernel computes, in plain PyTorch: the definition that every other version is held to.

Written for reading and for exactness, not for speed: run it in float64 to judge a kernel. Rows of several sessions
lie end to end ("packed"); a session's keys and values lie in its *slot*, a contiguous run of tokens: the sink first,
then a ring of chunk pages (geometry.py), of which the first `kv_len` tokens are visible to the chunk in work.

Letters: R packed rows, N segments, H heads, D head_dim, C = H * D channels, T slot tokens, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_BYTES = 16
"""What kernels count memory in: every access is aligned to 128 bits."""


def attn_varlen_slot(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    slots: Tensor,
    kv_lens: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Attention of packed queries [R, H, D] over each segment's visible slot prefix; no mask, no split.

    k_cache, v_cache: [S, T, H, D]; segment n has rows cu_seqlens_q[n]:cu_seqlens_q[n + 1] and sees
    k_cache[slots[n], :kv_lens[n]]. Softmax and sums in float32 or better; returns [R, H, D] in q's dtype. Text
    cross-attention is the same function with the text keys as the cache. A segment without keys is an error of ours.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q)
    bounds = cu_seqlens_q.tolist()
    for n, (slot, length) in enumerate(zip(slots.tolist(), kv_lens.tolist(), strict=True)):
        rows = slice(bounds[n], bounds[n + 1])
        queries = q[rows].to(wide).transpose(0, 1)
        keys = k_cache[slot, :length].to(wide).transpose(0, 1)
        values = v_cache[slot, :length].to(wide).transpose(0, 1)
        weights = (queries @ keys.transpose(1, 2) * scale).softmax(-1)
        out[rows] = (weights @ values).transpose(0, 1).to(q.dtype)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C] over the root of its mean square over all channels (before the head split), times weight [C]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(wide)).to(x.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [R, H, D] by cos, sin [R, D / 2]; pair i is (x[i], x[i + D / 2])."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, -1)
    c, s = cos[:, None].to(wide), sin[:, None].to(wide)
    return torch.cat([first * c - second * s, second * c + first * s], -1).to(x.dtype)


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
    """Normalise q and k over all channels, rotate, and write k and v into their slots; returns the rotated q.

    q, k, v: [R, C]; cos, sin: [R, D / 2]; k_cache, v_cache: [S, T, H, D], written at flat token rows
    cache_rows [R] (slot * T + token); a negative row writes nothing. With `rotate_keys` false keys are cached
    un-rotated (relative positions). Returns [R, H, D].
    """
    heads, head_dim = k_cache.shape[-2:]
    queries = rms_norm(q, q_weight, eps).unflatten(-1, (heads, head_dim))
    keys = rms_norm(k, k_weight, eps).unflatten(-1, (heads, head_dim))
    if rotate_keys:
        keys = rotate_halves(keys, cos, sin)
    written = cache_rows >= 0
    k_cache.view(-1, heads, head_dim)[cache_rows[written]] = keys[written].to(k_cache.dtype)
    v_cache.view(-1, heads, head_dim)[cache_rows[written]] = v.unflatten(-1, (heads, head_dim))[written].to(
        v_cache.dtype
    )
    return rotate_halves(queries, cos, sin)


def gather_keys(cache: Tensor, rows: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """Token rows [K] of a cache [T, H, D], rotated by cos, sin [K, D / 2] if given: [K, H, D]."""
    keys = cache[rows]
    return keys if cos is None or sin is None else rotate_halves(keys, cos, sin)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, level: Tensor, eps: float) -> Tensor:
    """norm(x) * (1 + scale[level]) + shift[level] for x [R, C], tables [levels, C], level [R]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    y = (y - y.mean(-1, keepdim=True)) * torch.rsqrt(y.var(-1, unbiased=False, keepdim=True) + eps)
    return (y * (1 + scale[level].to(wide)) + shift[level].to(wide)).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, level: Tensor) -> Tensor:
    """x + y * gate[level] for x, y [R, C], gate [levels, C]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + y.to(wide) * gate[level].to(wide)).to(x.dtype)


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, level: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual (no gate: x + y), and it normalised and modulated for what comes next: one read instead of two.

    The norm sees the residual as it was rounded to x's dtype, so that it equals the two steps one after the other.
    """
    residual = x + y if gate is None else gated_residual(x, y, gate, level)
    return residual, layer_norm_modulate(residual, shift, scale, level, eps)


def gated_residual_affine(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, level: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual, and a plain LayerNorm of it with weight and bias [C]."""
    residual = gated_residual(x, y, gate, level)
    wide = torch.promote_types(x.dtype, torch.float32)
    z = residual.to(wide)
    z = (z - z.mean(-1, keepdim=True)) * torch.rsqrt(z.var(-1, unbiased=False, keepdim=True) + eps)
    return residual, (z * weight.to(wide) + bias.to(wide)).to(x.dtype)


def gather_extents(source: Tensor, starts: Tensor, extent_bytes: int) -> Tensor:
    """Equal extents of a byte buffer [B], laid end to end: [len(starts) * extent_bytes]. Starts are byte offsets."""
    return torch.cat([source[start : start + extent_bytes] for start in starts.tolist()])


def scatter_extents(packed: Tensor, target: Tensor, starts: Tensor, extent_bytes: int) -> None:
    """The reverse of `gather_extents`, into `target` in place."""
    for index, start in enumerate(starts.tolist()):
        target[start : start + extent_bytes] = packed[index * extent_bytes : (index + 1) * extent_bytes]


CHECKSUM_PRIME = 0x9E3779B1


def block_checksum(data: Tensor, block_bytes: int) -> Tensor:
    """One 64-bit number per block of a byte buffer [B], B a multiple of block_bytes, that a multiple of 4.

    Low half: sum of 32-bit words w[i] modulo 2^32. High half: sum of w[i] * (i * P + 1) modulo 2^32, which notices
    words that changed places. Sums wrap, so any order of adding gives the same number. int64 [B / block_bytes].
    """
    words = data.view(torch.int32).to(torch.int64).bitwise_and(0xFFFFFFFF).view(-1, block_bytes // 4)
    index = torch.arange(words.shape[1], dtype=torch.int64, device=data.device)
    weight = (index * CHECKSUM_PRIME + 1).bitwise_and(0xFFFFFFFF)
    plain = words.sum(-1).bitwise_and(0xFFFFFFFF)
    # A product of two 32-bit numbers can pass 2^63; only its low half counts, and multiplication keeps that.
    mixed = (words * weight).bitwise_and(0xFFFFFFFF).sum(-1).bitwise_and(0xFFFFFFFF)
    return mixed.bitwise_left_shift(32).bitwise_or(plain)
