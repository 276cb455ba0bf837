"""The packed pass: PyTorch's against reference.py, Triton's (interpreted) against PyTorch's; the choice by device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from turboserve.errors import ConfigError
from turboserve.kernels import packed, reference
from turboserve.kernels.attention import TILES
from turboserve.kernels.packed import LevelTable, PackedSegment, Rotation
from turboserve.kernels.packed_torch import TorchKernels
from turboserve.kernels.packed_triton import TritonKernels

LAYERS, HEADS, DIM, SLOT, TEXT, LEVELS, EPS = 2, 3, 32, 24, 5, 3, 1e-6
CHANNELS = HEADS * DIM


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(tokens: int, seed: int) -> Rotation:
    angle = rand(tokens, 1, DIM // 2, seed=seed) * 3
    return Rotation(angle.cos(), angle.sin())


def make(rows: list[int], *, relative: bool, recache: bool = False) -> tuple[list[PackedSegment], LevelTable]:
    """Segments with their own tensors, each with another visible length; one reads scattered runs if `recache`."""
    segments, first = [], 0
    for n, count in enumerate(rows):
        own = 24 - count if n == 0 else (3 * n) % 8
        scattered = recache and n == len(rows) - 1
        read = ((0, 4), (own, count)) if scattered else ((0, own + count),)
        seen = sum(length for _, length in read)
        segments.append(
            PackedSegment(
                rows=slice(first, first + count),
                level=n % LEVELS,
                kv_cache=rand(LAYERS, 2, SLOT, HEADS, DIM, seed=10 + n),
                write=((own, count),) if count < 3 else ((own, 2), (own + 2, count - 2)),
                read=read,
                query_rotation=rotation(count, 20 + n),
                key_rotation=rotation(seen, 30 + n) if relative else None,
                text_kv=rand(LAYERS, 2, TEXT, HEADS, DIM, seed=40 + n),
            )
        )
        first += count
    return segments, LevelTable(rand(LEVELS, LAYERS, 6, CHANNELS, seed=50), rand(LEVELS, 2, CHANNELS, seed=51))


def run(kernels, segments, levels, *, relative, skip=0):
    """Every operation of a pass on fixed inputs, their first `skip` rows left out: {name: rows}; slots are written."""
    rows = slice(skip, skip + segments[-1].rows.stop)
    x, y, q, k, v = (rand(100, CHANNELS, seed=60 + i)[rows] for i in range(5))
    weights = [rand(CHANNELS, seed=70 + i) for i in range(5)]
    work = kernels.begin(segments, levels, heads=HEADS, eps=EPS, rotate_keys=not relative)
    m, head = work.modulation(1), work.head_modulation()
    out = {"normalise": work.normalise(x, m[0], m[1]), "head": work.normalise(x, *head)}
    out["residual"], out["residual_norm"] = work.residual(x, y, m[5], m[3], m[4])
    out["plain"], out["plain_norm"] = work.residual(x, y, None, *head)
    out["affine"], out["affine_norm"] = work.residual_affine(x, y, m[2], weights[0], weights[1])
    out["queries"] = work.append(q, k, v, weights[2], weights[3], 1)
    out["slots"] = work.attend_slots(out["queries"], 1)
    out["text_queries"] = work.text_query(q, weights[4])
    out["text"] = work.attend_text(out["text_queries"], 1)
    return out


CASES = [([8], False), ([5, 9, 2], False), ([5, 9, 2], True)]


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(("rows", "recache"), CASES)
def test_triton_pass_equals_the_torch_pass(rows, recache, relative):
    results, slots = [], []
    for kernels in (TorchKernels(), TritonKernels(torch.device("cpu"), arch=90)):
        segments, levels = make(rows, relative=relative, recache=recache)
        results.append(run(kernels, segments, levels, relative=relative))
        slots.append([one.kv_cache for one in segments])
    for name, want in results[0].items():
        torch.testing.assert_close(
            results[1][name], want, rtol=1e-5, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    for got, want in zip(slots[1], slots[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("relative", [True, False])
def test_torch_pass_equals_the_reference(relative):
    rows = [5, 9, 2]
    segments, levels = make(rows, relative=relative)
    got = run(TorchKernels(), segments, levels, relative=relative)
    x, y, q, k, v = (rand(100, CHANNELS, seed=60 + i)[: sum(rows)].double() for i in range(5))
    weights = [rand(CHANNELS, seed=70 + i).double() for i in range(5)]
    level = torch.tensor([one.level for one in segments for _ in range(one.rows.stop - one.rows.start)])
    tables = levels.blocks[:, 1].double().unbind(1)
    head = levels.head.double().unbind(1)
    want = {"normalise": reference.layer_norm_modulate(x, tables[0], tables[1], level, EPS)}
    want["head"] = reference.layer_norm_modulate(x, *head, level, EPS)
    want["residual"], want["residual_norm"] = reference.gated_residual_norm(x, y, tables[5], *tables[3:5], level, EPS)
    want["plain"], want["plain_norm"] = reference.gated_residual_norm(x, y, None, *head, level, EPS)
    want["affine"], want["affine_norm"] = reference.gated_residual_affine(
        x, y, tables[2], weights[0], weights[1], level, EPS
    )
    want["text_queries"] = reference.rms_norm(q, weights[4], EPS).unflatten(-1, (HEADS, DIM))
    slabs = [torch.stack([one.kv_cache[1, i] for one in make(rows, relative=relative)[0]]).double() for i in (0, 1)]
    cos, sin = (
        torch.cat([getattr(one.query_rotation, name) for one in segments]).flatten(1) for name in ("cos", "sin")
    )
    places = [n * SLOT + first + i for n, one in enumerate(segments) for first, c in one.write for i in range(c)]
    want["queries"] = reference.qk_norm_rope_append(
        q, k, v, weights[2], weights[3], cos.double(), sin.double(), *slabs, torch.tensor(places), EPS,
        rotate_keys=not relative,
    )  # fmt: skip
    lens = [one.read[0][1] for one in segments]
    keys = slabs[0].clone()
    if relative:
        for n, one in enumerate(segments):
            angles = (getattr(one.key_rotation, name).flatten(1).double() for name in ("cos", "sin"))
            keys[n, : lens[n]] = reference.gather_keys(keys[n], torch.arange(lens[n]), *angles)
    bounds, slots = torch.tensor(np.concatenate([[0], np.cumsum(rows)])), torch.arange(3)
    want["slots"] = reference.attn_varlen_slot(want["queries"], keys, slabs[1], bounds, slots, torch.tensor(lens))
    text = [torch.stack([one.text_kv[1, i] for one in segments]).double() for i in (0, 1)]
    want["text"] = reference.attn_varlen_slot(want["text_queries"], *text, bounds, slots, torch.tensor([TEXT] * 3))
    assert set(want) == set(got)
    for name, one in want.items():
        exact = one.flatten(1) if name in ("slots", "text") else one
        torch.testing.assert_close(got[name].double(), exact, rtol=1e-5, atol=2e-5, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("kernels", [TorchKernels(), TritonKernels(torch.device("cpu"), arch=90)], ids=lambda k: k.name)
def test_a_segment_gets_the_same_bits_alone_and_among_others(kernels):
    segments, levels = make([8, 8, 8], relative=True)
    together = run(kernels, segments, levels, relative=True)
    fresh, _ = make([8, 8, 8], relative=True)
    for one, after in zip(fresh, segments, strict=True):
        alone = replace(one, rows=slice(0, 8))
        got = run(kernels, [alone], levels, relative=True, skip=one.rows.start)
        for name, value in got.items():
            assert torch.equal(value, together[name][one.rows]), name
        assert torch.equal(one.kv_cache, after.kv_cache)


def test_the_choice_by_device(monkeypatch):
    assert packed.kernels_for(torch.device("cpu"), 128).name == "torch"
    assert TritonKernels(torch.device("cpu"), arch=90).name == "triton"
    import sys

    monkeypatch.setitem(sys.modules, "turboserve.kernels.packed_triton", None)
    with pytest.raises(ConfigError, match="not installed"):
        packed.kernels_for(torch.device("cuda", 0), 128)


def test_heads_without_tiles_run_on_torch_and_the_log_says_so(caplog):
    assert {one[1] for one in TILES} == set(packed.HEAD_DIMS)
    assert packed.kernels_for(torch.device("cuda", 0), 24).name == "torch"
    assert "head_dim 24" in caplog.text


@pytest.mark.parametrize("kernels", [TorchKernels(), TritonKernels(torch.device("cpu"), arch=90)], ids=lambda k: k.name)
def test_linear_layers_by_segment_see_each_segment_at_its_own_shape(kernels):
    segments, levels = make([5, 9, 2], relative=True)
    x = rand(16, CHANNELS, seed=1)
    seen: list[int] = []

    def layer(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return rows * 2

    for kernels.linears_by_segment in (False, True):
        work = kernels.begin(segments, levels, heads=HEADS, eps=EPS, rotate_keys=False)
        assert torch.equal(work.linear(layer, x), x * 2)
    kernels.linears_by_segment = False
    assert seen == [16, 5, 9, 2]


def test_a_model_on_triton_kernels_makes_what_it_makes_on_torch():
    """Whole forwards of the transformer, both rope modes, over several chunks of a wrapping ring."""
    from turboserve.model.dit import CausalVideoTransformer, TransformerConfig, init_weights
    from turboserve.model.rotary import RopeMode, RotaryTable

    for mode in RopeMode:
        config = TransformerConfig(
            layers=2, dim=64, heads=2, ffn_dim=96, patch_dim=8, text_dim=6, text_tokens=3, rope_mode=mode
        )
        model = CausalVideoTransformer(config)
        init_weights(model, 1)
        torch.nn.init.normal_(model.head.head.weight, std=0.2, generator=torch.Generator().manual_seed(1))
        levels = model.level_table((0.0, 1000.0))
        table = RotaryTable(config.head_dim, config.rope_theta, 2, 2)
        outs = []
        for kernels in (TorchKernels(), TritonKernels(torch.device("cpu"), arch=90)):
            model.kernels = kernels
            caches = [rand(2, 2, 12, 2, 32, seed=n) for n in range(2)]
            out = []
            for chunk in range(2):
                segments = [
                    PackedSegment(
                        rows=slice(4 * n, 4 * n + 4),
                        level=(n + chunk) % 2,
                        kv_cache=caches[n],
                        write=((4 * chunk, 4),),
                        read=((0, 4 * chunk + 4),),
                        query_rotation=table.at([chunk]),
                        key_rotation=None if mode is RopeMode.ABSOLUTE else table.at(range(chunk + 1)),
                        text_kv=rand(2, 2, 3, 2, 32, seed=90 + n),
                    )
                    for n in range(2)
                ]
                out.append(model.forward_packed(rand(8, 8, seed=80 + chunk), segments, levels))
            outs.append(torch.cat(out))
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
