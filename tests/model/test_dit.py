"""The transformer: the packed serving form equals the dense training form, and a session's bits are its
own.
"""

from __future__ import annotations

import random

import pytest
import torch

from turboserve.geometry import SlotGeometry
from turboserve.kernels.packed import PackedSegment, Rotation
from turboserve.kernels.packed_torch import rotate
from turboserve.model.dit import CausalVideoTransformer, TransformerConfig, init_weights
from turboserve.model.rotary import RopeMode, RotaryTable, halves_order

GRID = (4, 4)
TOKENS = GRID[0] * GRID[1]
SLOT = SlotGeometry(chunk_latent_frames=1, tokens_per_latent_frame=TOKENS, sink_latent_frames=1, window_latent_frames=3)
LEVELS = (0.0, 1000.0, 625.0)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(rope_mode: RopeMode = RopeMode.RELATIVE) -> CausalVideoTransformer:
    config = TransformerConfig(
        layers=3,
        dim=96,
        heads=4,
        ffn_dim=192,
        patch_dim=32,
        text_dim=24,
        text_tokens=5,
        rope_mode=rope_mode,
        position_tokens=TOKENS,
    )
    model = CausalVideoTransformer(config)
    init_weights(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # zero or constant at the start of training; a test needs all of them to matter
        model.head.head.weight.normal_(0, 0.2, generator=generator)
        for name, one in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                one.add_(torch.randn(one.shape, generator=generator) * 0.1)
    return model.eval()


class Stream:
    """One session's slot and what serving does with it."""

    def __init__(self, model: CausalVideoTransformer, seed: int) -> None:
        self.model, config = model, model.config
        self.generator = torch.Generator().manual_seed(seed)
        shape = (config.layers, 2, SLOT.slot_tokens, config.heads, config.head_dim)
        # Junk, not zeros: a key that nobody wrote must never be seen.
        self.kv = torch.randn(shape, generator=self.generator) * 50
        self.text = torch.randn(config.text_tokens, config.text_dim, generator=self.generator)
        self.text_kv = model.text_kv(self.text)
        self.table = RotaryTable(config.head_dim, config.rope_theta, *GRID)

    def rows(self) -> torch.Tensor:
        return torch.randn(TOKENS, self.model.config.patch_dim, generator=self.generator)

    def segment(self, chunk: int, level: int, first_row: int = 0) -> PackedSegment:
        page, absolute = SLOT.page_of_chunk(chunk), self.model.config.rope_mode is RopeMode.ABSOLUTE
        positions = SLOT.page_positions(chunk)
        return PackedSegment(
            rows=slice(first_row, first_row + TOKENS),
            level=level,
            kv_cache=self.kv,
            write=((page * TOKENS, TOKENS),),
            read=((0, SLOT.kv_tokens(chunk)),),
            query_rotation=self.table.at([chunk if absolute else positions[page]]),
            key_rotation=None if absolute else self.table.at(positions),
            text_kv=self.text_kv,
        )

    def forward(self, chunk: int, level: int, rows: torch.Tensor) -> torch.Tensor:
        return self.model.forward_packed(rows, [self.segment(chunk, level)], self.model.level_table(LEVELS))


@pytest.mark.parametrize("rope_mode", list(RopeMode))
def test_packed_equals_dense_over_a_wrapping_ring(rope_mode):
    model = make(rope_mode)
    stream, chunks = Stream(model, 3), 9
    clean = torch.stack([stream.rows() for _ in range(chunks)])
    noisy = torch.stack([stream.rows() for _ in range(chunks)])

    table = RotaryTable(model.config.head_dim, model.config.rope_theta, *GRID)
    seen = [sorted({*range(min(1, c)), *range(max(c - 2, 0), c)}) for c in range(chunks)]
    rows = [[*seen[c], c] for c in range(chunks)] + [[*seen[c], chunks + c] for c in range(chunks)]
    if rope_mode is RopeMode.RELATIVE:
        visible = [[(other, place) for place, other in enumerate(row)] for row in rows]
    else:
        visible = [[(other, other % chunks) for other in row] for row in rows]
    rotations = {at: table.at([at]) for at in range(chunks)}
    tokens = torch.cat([clean, noisy])[None]
    timestep = torch.tensor([[LEVELS[0]] * chunks + [LEVELS[2]] * chunks])
    text = stream.text.expand(1, 2 * chunks, -1, -1)
    with torch.no_grad():
        dense = model.forward_dense(tokens, timestep, text, visible, rotations)
    dense = dense[0]

    for chunk in range(chunks):
        for _ in range(2):  # junk passes: what they write must be gone after the context pass
            stream.forward(chunk, 1, stream.rows())
        denoised = stream.forward(chunk, 2, noisy[chunk])
        context = stream.forward(chunk, 0, clean[chunk])
        scale = dense.abs().max()
        assert (denoised - dense[chunks + chunk]).abs().max() <= 1e-5 * scale
        assert (context - dense[chunk]).abs().max() <= 1e-5 * scale


def test_a_cancelled_chunk_leaves_no_trace():
    model = make()
    plain, broken = Stream(model, 4), Stream(model, 4)
    for chunk in range(7):
        rows = plain.rows()
        junk = broken.rows()
        assert torch.equal(rows, junk)
        broken.forward(chunk, 1, torch.full_like(junk, 7.0))
        assert torch.equal(plain.forward(chunk, 2, rows), broken.forward(chunk, 2, rows))
        plain.forward(chunk, 0, rows)
        broken.forward(chunk, 0, rows)


@pytest.mark.parametrize("others", [1, 2, 3, 8])
def test_bits_are_the_same_alone_and_packed_in_any_order(others):
    # 36 rows of 192 numbers, as the shipped model: these are the shapes that serving runs.
    from turboserve.model.shapes.model import ShapesModel
    from turboserve.model.shapes.self_test import packed_equals_alone

    found = packed_equals_alone(ShapesModel.random(others), sessions=others + 1, chunks=2)
    assert found["packed_equals_alone"], found


def test_order_in_the_batch_does_not_matter():
    model = make()
    levels, order = model.level_table(LEVELS), [0, 1, 2, 3, 4]
    rows = [torch.randn(TOKENS, model.config.patch_dim, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    results = []
    for attempt in range(3):
        streams = [Stream(model, 10 + i) for i in range(5)]
        random.Random(attempt).shuffle(order)
        packed = torch.cat([rows[i] for i in order])
        segments = [streams[i].segment(0, 1 + i % 2, place * TOKENS) for place, i in enumerate(order)]
        out = model.forward_packed(packed, segments, levels)
        results.append({i: out[place * TOKENS :][:TOKENS] for place, i in enumerate(order)})
    for other in results[1:]:
        for i in range(5):
            torch.testing.assert_close(results[0][i], other[i], rtol=0, atol=1e-5)


def test_levels_are_computed_one_by_one():
    model = make()
    together, alone = model.level_table(LEVELS), model.level_table(LEVELS[2:])
    assert torch.equal(together.blocks[2:], alone.blocks)
    assert torch.equal(together.head[2:], alone.head)


def test_halves_are_interleaved_pairs_in_another_order():
    config = make().config
    angle = torch.randn(7, 1, config.head_dim // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x = torch.randn(7, config.heads, config.head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    order = halves_order(config.heads, config.head_dim)
    ours = rotate(x.flatten(1)[:, order].view_as(x), Rotation(angle.cos(), angle.sin()))
    torch.testing.assert_close(ours.flatten(1), turned.flatten(1)[:, order])
