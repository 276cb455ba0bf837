"""What every kernel must hold to, on whatever device it runs: tests/gpu calls these on a GPU, tests/kernels on the CPU
interpreter with small shapes, so that the checks themselves are run everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from turboserve.kernels import attention, extents, norm, reference, rope
from turboserve.kernels.attention import TileConfig

TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of the output's scale
Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int], Sequence[int], Sequence[int]], Tensor]
"""(q, k_cache, v_cache, rows of each segment, slots, visible tokens) -> out."""


def rand(*shape: int, dtype: torch.dtype, seed: int, device: torch.device) -> Tensor:
    """Made on the CPU, so that every device sees the same numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    error = float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-6))
    assert error < TOLERANCE[dtype], f"error {error:.2e} of scale, {TOLERANCE[dtype]:.0e} allowed"


def triton_attention(config: TileConfig) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, rows: Sequence[int], slots: Sequence[int], lens: Sequence[int]):
        bounds = np.concatenate([[0], np.cumsum(rows)])
        work = attention.work_list(bounds, np.array(slots), np.array(lens), config.block_m)
        return attention.attn_varlen_slot(q, k, v, torch.from_numpy(work).to(q.device), config)

    return attend


def hopper_attention() -> Attend:
    from turboserve.kernels import attention_hopper

    def attend(q: Tensor, k: Tensor, v: Tensor, rows: Sequence[int], slots: Sequence[int], lens: Sequence[int]):
        bounds = np.concatenate([[0], np.cumsum(rows)])
        work = attention.work_list(bounds, np.arange(len(rows)), np.array(lens), attention_hopper.BLOCK_M)
        places = torch.tensor(slots, device=q.device) * (k.stride(0) * k.element_size() // attention.UNIT_BYTES)
        return attention_hopper.attn_varlen_hopper(
            q, k[0], v[0], torch.stack([places, places], 1), torch.from_numpy(work).to(q.device)
        )

    return attend


@dataclass(frozen=True)
class Ragged:
    """Segments of unlike lengths over the slots of one slab."""

    rows: tuple[int, ...]
    lens: tuple[int, ...]
    slot_tokens: int
    heads: int
    dim: int

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        slots = len(self.rows) + 1
        q = rand(sum(self.rows), self.heads, self.dim, dtype=dtype, seed=1, device=device)
        k, v = (rand(slots, self.slot_tokens, self.heads, self.dim, dtype=dtype, seed=s, device=device) for s in (2, 3))
        return q, k, v


def attention_equals_the_reference(attend: Attend, shape: Ragged, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = shape.tensors(dtype, device)
    n = len(shape.rows)
    slots = list(range(n, 0, -1))
    got = attend(q, k, v, shape.rows, slots, shape.lens)
    bounds = torch.tensor([0, *np.cumsum(shape.rows)])
    want = reference.attn_varlen_slot(
        *(one.double() for one in (q, k, v)), bounds, torch.tensor(slots), torch.tensor(shape.lens)
    )
    close(got, want, dtype)


def attention_has_the_same_bits(attend: Attend, shape: Ragged, dtype: torch.dtype, device: torch.device) -> None:
    """Alone, coalesced, in another order, in another slot after a stay in host memory, and beside junk."""
    q, k, v = shape.tensors(dtype, device)
    n = len(shape.rows)
    starts = [0, *np.cumsum(shape.rows).tolist()]
    parts = [q[starts[i] : starts[i + 1]].clone() for i in range(n)]
    alone = [attend(parts[i], k, v, [shape.rows[i]], [i], [shape.lens[i]]) for i in range(n)]
    for order in (list(range(n)), list(range(n))[::-1], [*range(1, n), 0]):
        packed = attend(
            torch.cat([parts[i] for i in order]),
            k,
            v,
            [shape.rows[i] for i in order],
            order,
            [shape.lens[i] for i in order],
        )
        first = 0
        for i in order:
            assert torch.equal(packed[first : first + shape.rows[i]], alone[i]), (order, i)
            first += shape.rows[i]
    # Offloaded and restored: the same rows come back in the last slot, whose unseen tokens are another session's.
    host = [one[0, : shape.lens[0]].cpu() for one in (k, v)]
    for cache, kept in zip((k, v), host, strict=True):
        cache[n] = 1e4
        cache[n, : shape.lens[0]] = kept.to(device)
    assert torch.equal(attend(parts[0], k, v, [shape.rows[0]], [n], [shape.lens[0]]), alone[0])


def norms_equal_the_reference(rows: int, channels: int, dtype: torch.dtype, device: torch.device) -> None:
    x, y = (rand(rows, channels, dtype=dtype, seed=s, device=device) for s in (1, 2))
    gate, shift, scale = (rand(4, channels, dtype=torch.float32, seed=s, device=device) for s in (3, 4, 5))
    weight, bias = (rand(channels, dtype=dtype, seed=s, device=device) for s in (6, 7))
    level = (torch.arange(rows) % 4).to(device)
    short = level.to(torch.int32)
    wide = [one.double() for one in (gate, shift, scale)]
    x64, y64 = x.double(), y.double()
    close(
        norm.layer_norm_modulate(x, shift, scale, short, 1e-6),
        reference.layer_norm_modulate(x64, *wide[1:], level, 1e-6),
        dtype,
    )
    close(norm.gated_residual(x, y, gate, short), reference.gated_residual(x64, y64, wide[0], level), dtype)
    close(norm.rms_norm(x, weight, 1e-6), reference.rms_norm(x64, weight.double(), 1e-6), dtype)
    residual, out = norm.gated_residual_norm(x, y, gate, shift, scale, short, 1e-6)
    assert torch.equal(residual, norm.gated_residual(x, y, gate, short))
    assert torch.equal(out, norm.layer_norm_modulate(residual, shift, scale, short, 1e-6))
    plain, _ = norm.gated_residual_norm(x, y, None, shift, scale, short, 1e-6)
    close(plain, x64 + y64, dtype)
    _, affine = norm.gated_residual_affine(x, y, gate, weight, bias, short, 1e-6)
    want = reference.gated_residual_affine(x64, y64, wide[0], weight.double(), bias.double(), level, 1e-6)[1]
    close(affine, want, dtype)


def rows_have_the_same_bits(rows: int, channels: int, dtype: torch.dtype, device: torch.device) -> None:
    """However many rows there are, and wherever a row stands among them."""
    x, y = (rand(rows, channels, dtype=dtype, seed=s, device=device) for s in (1, 2))
    tables = [rand(2, channels, dtype=torch.float32, seed=s, device=device) for s in (3, 4, 5)]
    level = torch.zeros(rows, dtype=torch.int32, device=device)
    residual, whole = norm.gated_residual_norm(x, y, *tables, level, 1e-6)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(6)).to(device)
    for picked in (order, order[: max(1, rows // 3)], order[:1]):
        part = norm.gated_residual_norm(x[picked], y[picked], *tables, level[: len(picked)], 1e-6)
        assert torch.equal(part[0], residual[picked]) and torch.equal(part[1], whole[picked])


def append_equals_the_reference(rows: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Also: untouched rows of the slots stay as they were, and what was written is read back, rotated."""
    channels = heads * dim
    q, k, v = (rand(rows, channels, dtype=dtype, seed=s, device=device) for s in (1, 2, 3))
    weights = [rand(channels, dtype=dtype, seed=s, device=device) for s in (4, 5)]
    angle = rand(rows, dim // 2, dtype=torch.float32, seed=6, device=device) * 3
    cos, sin = angle.cos(), angle.sin()
    tokens = rows + 3
    for rotate_keys in (True, False):
        caches = [rand(2, tokens, heads, dim, dtype=dtype, seed=s, device=device) for s in (7, 8)]
        before = [one.clone() for one in caches]
        written = torch.randperm(2 * tokens, generator=torch.Generator().manual_seed(9))[:rows]
        written[0] = -1 if rows > 1 else written[0]
        exact = [one.double() for one in caches]
        wide = [one.double() for one in (q, k, v, *weights, cos, sin)]
        want = reference.qk_norm_rope_append(*wide, *exact, written.to(device), 1e-6, rotate_keys=rotate_keys)
        got = rope.qk_norm_rope_append(
            q, k, v, *weights, cos, sin, *caches, written.to(device), 1e-6, rotate_keys=rotate_keys
        )
        close(got, want, dtype)
        kept = torch.ones(2 * tokens, dtype=torch.bool)
        kept[written[written >= 0]] = False
        for cache, one, old in zip(caches, exact, before, strict=True):
            close(cache, one, dtype)
            flat = [each.view(-1, heads, dim)[kept.to(device)] for each in (cache, old)]
            assert torch.equal(*flat)
    places = torch.arange(rows, device=device) * rope.token_units(caches[0])
    turned = rope.gather_keys(caches[0], places, cos, sin)
    close(turned, reference.gather_keys(caches[0][0].double(), torch.arange(rows), cos.double(), sin.double()), dtype)
    assert torch.equal(rope.gather_keys(caches[0], places), caches[0][0, :rows])


def extents_go_there_and_back(extent_bytes: int, count: int, device: torch.device, family=extents) -> None:
    """Gather, scatter into zeros, and compare; what was not chosen stays zero."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(256, (extent_bytes * 2 * count,), dtype=torch.uint8, generator=generator).to(device)
    chosen = torch.randperm(2 * count, generator=generator)[:count].to(device)
    packed = family.gather_extents(source, chosen * extent_bytes, extent_bytes)
    assert torch.equal(packed, source.view(-1, extent_bytes)[chosen].flatten())
    target, want = torch.zeros_like(source), torch.zeros_like(source)
    family.scatter_extents(packed, target, chosen * extent_bytes, extent_bytes)
    want.view(-1, extent_bytes)[chosen] = source.view(-1, extent_bytes)[chosen]
    assert torch.equal(target, want)


def checksum_equals_the_reference(block_bytes: int, blocks: int, device: torch.device) -> None:
    data = torch.randint(256, (blocks * block_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    want = reference.block_checksum(data, block_bytes)
    assert torch.equal(extents.block_checksum(data.to(device), block_bytes).cpu(), want)
    data[block_bytes + 5] ^= 16
    changed = extents.block_checksum(data.to(device), block_bytes).cpu() != want
    assert changed.tolist() == [index == 1 for index in range(blocks)]
