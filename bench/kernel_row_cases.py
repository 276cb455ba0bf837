"""Row-wise cases of `turboserve bench kernels`: norms, residuals, rotary embedding and append."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from turboserve.bench.kernel_case import Case, Work, error_of
from turboserve.kernels import reference
from turboserve.kernels.packed import LevelTable, PackedPass, PackedSegment, Rotation
from turboserve.kernels.packed_torch import TorchKernels


def row_cases(device: torch.device, dtype: torch.dtype, rows: int, heads: int, dim: int) -> Iterator[Case]:
    """Norms, residuals, rotary and append: bytes that must move at the least, against the same in plain torch."""
    generator = torch.Generator(device=device).manual_seed(0)
    channels = heads * dim

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, y, v = rand(rows, channels), rand(rows, channels), rand(rows, channels)
    shift, scale, gate = (rand(4, channels).float() for _ in range(3))
    weights = rand(2, channels)
    level = (torch.arange(rows, device=device) * 4 // rows).to(torch.int32)
    angle = torch.rand(rows, dim // 2, generator=generator, device=device) * 3
    cos, sin = angle.cos(), angle.sin()
    caches = [rand(1, rows, heads, dim) for _ in range(2)]
    cache_rows = torch.randperm(rows, generator=generator, device=device)
    index = level.long()
    row_bytes = rows * channels * x.element_size()
    eps = 1e-6

    def plain_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (channels,), eps=eps) * (1 + scale[index]).to(dtype) + shift[index].to(dtype)

    def plain_residual() -> tuple[Tensor, Tensor]:
        out = x + y * gate[index].to(dtype)
        return out, plain_norm(out)

    def plain_append() -> Tensor:
        def turned(one: Tensor, weight: Tensor) -> Tensor:
            one = F.rms_norm(one, (channels,), weight, eps).unflatten(-1, (heads, dim))
            first, second = one.chunk(2, -1)
            c, s = cos[:, None].to(dtype), sin[:, None].to(dtype)
            return torch.cat([first * c - second * s, second * c + first * s], -1)

        caches[0].view(rows, heads, dim)[cache_rows] = turned(y, weights[1])
        caches[1].view(rows, heads, dim)[cache_rows] = v.unflatten(-1, (heads, dim))
        return turned(x, weights[0])

    append = (x, y, v, weights[0], weights[1], cos, sin, *caches, cache_rows)
    if device.type == "cuda":
        from turboserve.kernels import norm, rope

        places = cache_rows * rope.token_units(caches[0])
        ours: dict[str, Work] = {
            "layer_norm_modulate": lambda: norm.layer_norm_modulate(x, shift, scale, level, eps),
            "gated_residual_norm": lambda: norm.gated_residual_norm(x, y, gate, shift, scale, level, eps)[1],
            "qk_norm_rope_append": lambda: rope.qk_norm_rope_append_placed(*append[:-1], places, eps, rotate_keys=True),
        }
    else:
        work = _torch_pass(heads, cos, sin, (shift, scale, gate), caches, eps)
        m = work.modulation(0)
        ours = {
            "layer_norm_modulate": lambda: work.normalise(x, m[0], m[1]),
            "gated_residual_norm": lambda: work.residual(x, y, m[2], m[0], m[1])[1],
            "qk_norm_rope_append": lambda: work.append(x, y, v, weights[0], weights[1], 0),
        }
    # (the same in plain torch, the reference, the bytes that must move, in rows of x)
    beside: dict[str, tuple[Work, Work, int]] = {
        "layer_norm_modulate": (
            lambda: plain_norm(x),
            lambda: reference.layer_norm_modulate(x, shift, scale, index, eps),
            2,
        ),
        "gated_residual_norm": (
            lambda: plain_residual()[1],
            lambda: reference.gated_residual_norm(x, y, gate, shift, scale, index, eps)[1],
            4,
        ),
        "qk_norm_rope_append": (
            plain_append,
            lambda: reference.qk_norm_rope_append(*append, eps, rotate_keys=True),
            6,
        ),
    }
    for name, (baseline, exact, moved) in beside.items():
        yield Case(
            name=f"rows/{name}",
            shape=f"{rows} x {channels}",
            dtype=dtype,
            floor="copy",
            work=float(moved * row_bytes),
            ours=ours[name],
            baselines={"plain torch": baseline},
            error=lambda work=ours[name], exact=exact: error_of(work(), exact()),
        )


def _torch_pass(
    heads: int, cos: Tensor, sin: Tensor, tables: tuple[Tensor, Tensor, Tensor], caches: list[Tensor], eps: float
) -> PackedPass:
    """The pass that a CPU serves with, over as many segments as there are levels."""
    shift, scale, gate = tables
    segments, count = shift.shape[0], cos.shape[0] // shift.shape[0]
    blocks = torch.stack([shift, scale, gate, shift, scale, gate], 1)[:, None]
    kv = torch.stack([one.view(segments, count, *one.shape[2:]) for one in caches], 1)[:, None]
    packed = [
        PackedSegment(
            rows=slice(i * count, (i + 1) * count),
            level=i,
            kv_cache=kv[i],
            write=((0, count),),
            read=((0, count),),
            query_rotation=Rotation(*(one[i * count : (i + 1) * count, None] for one in (cos, sin))),
            key_rotation=None,
            text_kv=kv[i],
        )
        for i in range(segments)
    ]
    levels = LevelTable(blocks, torch.stack([shift, scale], 1))
    return TorchKernels().begin(packed, levels, heads=heads, eps=eps, rotate_keys=True)
