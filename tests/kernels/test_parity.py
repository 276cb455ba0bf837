"""Every Triton kernel against reference.py in float64, on the CPU interpreter: random and odd shapes, fp32 and fp16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from turboserve.kernels import attention, extents, norm, reference, rope

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}  # of the output's scale
DTYPES = [torch.float32, torch.float16]


def rand(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-6)
    assert error < TOLERANCE[dtype], f"error {error:.2e} of scale"


def attend(q, k, v, cu, slots, lens, config):
    work = torch.from_numpy(attention.work_list(np.array(cu), np.array(slots), np.array(lens), config.block_m))
    return attention.attn_varlen_slot(q, k, v, work, config)


CASES = [  # rows of each segment, slot tokens, visible tokens, heads, head_dim
    ([36], 144, [144], 2, 32),
    ([36, 36, 36], 144, [36, 144, 72], 3, 32),
    ([1, 130, 7], 200, [1, 199, 64], 1, 64),
    ([45], 130, [129], 2, 128),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "tokens", "lens", "heads", "dim"), CASES)
def test_attention(rows, tokens, lens, heads, dim, dtype):
    n = len(rows)
    cu = np.concatenate([[0], np.cumsum(rows)])
    q = rand(sum(rows), heads, dim, dtype=dtype, seed=1)
    k, v = (rand(n + 1, tokens, heads, dim, dtype=dtype, seed=s) for s in (2, 3))
    slots = list(range(n, 0, -1))
    got = attend(q, k, v, cu, slots, lens, attention.TileConfig(64, 64, 4, 2))
    exact = (one.double() for one in (q, k, v))
    close(got, reference.attn_varlen_slot(*exact, *(torch.tensor(x) for x in (cu, slots, lens))), dtype)


def test_attention_of_a_segment_does_not_depend_on_its_neighbours():
    config = attention.TileConfig(32, 32, 4, 2)
    rows, lens, slots = [36, 50, 36, 5], [144, 100, 7, 33], [2, 0, 3, 1]
    k, v = (rand(4, 144, 2, 32, dtype=torch.float32, seed=s) for s in (2, 3))
    parts = [rand(count, 2, 32, dtype=torch.float32, seed=10 + i) for i, count in enumerate(rows)]
    alone = [attend(parts[i], k, v, [0, rows[i]], [slots[i]], [lens[i]], config) for i in range(4)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0]):
        cu = np.concatenate([[0], np.cumsum([rows[i] for i in order])])
        packed = attend(
            torch.cat([parts[i] for i in order]), k, v, cu, [slots[i] for i in order], [lens[i] for i in order], config
        )
        for place, i in enumerate(order):
            assert torch.equal(packed[cu[place] : cu[place + 1]], alone[i])


def test_attention_reads_a_strided_layer_of_a_slab():
    slab = rand(2, 3, 2, 40, 2, 32, dtype=torch.float32, seed=4)  # slots, layers, k|v, tokens, heads, dim
    k, v = slab[:, 1, 0], slab[:, 1, 1]
    q = rand(9, 2, 32, dtype=torch.float32, seed=5)
    got = attend(q, k, v, [0, 4, 9], [1, 0], [40, 11], attention.TileConfig(16, 16, 4, 2))
    want = reference.attn_varlen_slot(q, k, v, torch.tensor([0, 4, 9]), torch.tensor([1, 0]), torch.tensor([40, 11]))
    close(got, want, torch.float32)


def test_work_list_covers_every_row_once_and_refuses_empty_segments():
    work = attention.work_list(np.array([0, 130, 131]), np.array([5, 2]), np.array([10, 900]), 64)
    rows = sorted(row for first, count, *_ in work.tolist() for row in range(first, first + count))
    assert rows == list(range(131))
    assert work[0].tolist() == [130, 1, 2, 900]
    with pytest.raises(ValueError, match="no keys"):
        attention.work_list(np.array([0, 4]), np.array([0]), np.array([0]), 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels"), [(1, 64), (37, 160), (5, 1536)])
def test_norms(rows, channels, dtype):
    x, y = (rand(rows, channels, dtype=dtype, seed=s) for s in (1, 2))
    gate, shift, scale = (rand(4, channels, dtype=torch.float32, seed=s) for s in (3, 4, 5))
    level = torch.arange(rows, dtype=torch.int32) % 4
    wide = [one.double() for one in (gate, shift, scale)]
    index = level.long()
    close(
        norm.layer_norm_modulate(x, shift, scale, level, 1e-6),
        reference.layer_norm_modulate(x.double(), *wide[1:], index, 1e-6),
        dtype,
    )
    close(
        norm.gated_residual(x, y, gate, level), reference.gated_residual(x.double(), y.double(), wide[0], index), dtype
    )
    residual, out = norm.gated_residual_norm(x, y, gate, shift, scale, level, 1e-6)
    assert torch.equal(residual, norm.gated_residual(x, y, gate, level))
    assert torch.equal(out, norm.layer_norm_modulate(residual, shift, scale, level, 1e-6))


def test_a_row_does_not_depend_on_how_many_there_are():
    x = rand(40, 192, dtype=torch.float32, seed=1)
    tables = [rand(2, 192, dtype=torch.float32, seed=s) for s in (2, 3)]
    level = torch.zeros(40, dtype=torch.int32)
    whole = norm.layer_norm_modulate(x, *tables, level, 1e-6)
    for rows in (1, 3, 17):
        part = norm.layer_norm_modulate(x[:rows].clone(), *tables, level[:rows].clone(), 1e-6)
        assert torch.equal(part, whole[:rows])


@pytest.mark.parametrize("rotate_keys", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 1, 8), (11, 5, 32), (3, 12, 128)])
def test_qk_norm_rope_append(rows, heads, dim, dtype, rotate_keys):
    channels = heads * dim
    q, k, v = (rand(rows, channels, dtype=dtype, seed=s) for s in (1, 2, 3))
    q_weight, k_weight = (rand(channels, dtype=dtype, seed=s) for s in (4, 5))
    angle = rand(rows, dim // 2, dtype=torch.float32, seed=6) * 3
    cos, sin = angle.cos(), angle.sin()
    caches = [rand(2, 20, heads, dim, dtype=dtype, seed=s) for s in (7, 8)]
    cache_rows = torch.randperm(40, generator=torch.Generator().manual_seed(9))[:rows]
    cache_rows[0] = -1 if rows > 1 else cache_rows[0]
    exact = [one.double().clone() for one in caches]
    want = reference.qk_norm_rope_append(
        *(one.double() for one in (q, k, v, q_weight, k_weight, cos, sin)), *exact, cache_rows, 1e-6,
        rotate_keys=rotate_keys,
    )  # fmt: skip
    got = rope.qk_norm_rope_append(
        q, k, v, q_weight, k_weight, cos, sin, *caches, cache_rows, 1e-6, rotate_keys=rotate_keys
    )
    close(got, want, dtype)
    for cache, one in zip(caches, exact, strict=True):
        close(cache, one, dtype)


@pytest.mark.parametrize(("extent", "count"), [(16, 1), (64, 9), (20_000, 3)])
def test_extents_there_and_back(extent, count):
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(256, (extent * (2 * count + 1),), dtype=torch.uint8, generator=generator)
    starts = torch.randperm(2 * count, generator=generator)[:count] * extent
    packed = extents.gather_extents(source, starts, extent)
    assert torch.equal(packed, reference.gather_extents(source, starts, extent))
    target, want = torch.zeros_like(source), torch.zeros_like(source)
    extents.scatter_extents(packed, target, starts, extent)
    reference.scatter_extents(packed, want, starts, extent)
    assert torch.equal(target, want)


def test_checksum_equals_the_reference_and_sees_what_it_should():
    data = torch.randint(256, (3 * 20_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    sums = reference.block_checksum(data, 20_000)
    assert torch.equal(extents.block_checksum(data, 20_000), sums)
    flipped = data.clone()
    flipped[20_001] ^= 4
    assert (reference.block_checksum(flipped, 20_000) != sums).tolist() == [False, True, False]
    swapped = data.clone()
    swapped[0:4], swapped[8:12] = data[8:12], data[0:4]
    assert reference.block_checksum(swapped, 20_000)[0] != sums[0]
