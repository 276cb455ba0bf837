"""The served transformer against diffusers' WanTransformer3DModel: fp32 on the CPU, tiny random weights.

diffusers sees the whole clip at once with a block-causal mask and a timestep per token; we see one chunk at a time and
a cache. Weights travel through the key maps, padding is folded into one weighted key.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers_wan import MaskedAttention, diffusers_transformer

from turboserve.geometry import SlotGeometry
from turboserve.kernels.packed import PackedSegment
from turboserve.model.dit import CausalVideoTransformer, TransformerConfig
from turboserve.model.random_weights import fill_random
from turboserve.model.rotary import RopeMode, RotaryTable
from turboserve.model.wan.layout import from_tokens, to_tokens

CHANNELS, ROWS, COLUMNS, FRAMES = 4, 4, 6, 3
FRAME_TOKENS = (ROWS // 2) * (COLUMNS // 2)
TEXT_PLACES, TEXT_USED = 16, 5
LEVELS = (0.0, 1000.0, 625.0)
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(rope_mode: RopeMode) -> TransformerConfig:
    return TransformerConfig(
        layers=3,
        dim=96,
        heads=4,
        ffn_dim=160,
        patch_dim=4 * CHANNELS,
        text_dim=32,
        text_tokens=TEXT_PLACES,
        freq_dim=64,
        rope_mode=rope_mode,
    )


class Both:
    """The same weights as ours and as diffusers', and one session's slot."""

    def __init__(self, rope_mode: RopeMode, sink: int, window: int, seed: int = 1) -> None:
        self.ours = CausalVideoTransformer(config(rope_mode)).eval()
        fill_random(self.ours, seed)
        c = self.ours.config
        self.theirs = diffusers_transformer(self.ours, CHANNELS)
        self.slot = SlotGeometry(FRAMES, FRAME_TOKENS, sink, window)
        self.generator = torch.Generator().manual_seed(seed + 1)
        shape = (c.layers, 2, self.slot.slot_tokens, c.heads, c.head_dim)
        self.kv = torch.randn(shape, generator=self.generator) * 50  # junk: a key nobody wrote must not be seen
        self.text = torch.randn(TEXT_USED, c.text_dim, generator=self.generator)
        self.text_kv = self.ours.text_kv(F.pad(self.text, (0, 0, 0, 1)))
        self.table = RotaryTable(c.head_dim, c.rope_theta, ROWS // 2, COLUMNS // 2)
        self.levels = self.ours.level_table(LEVELS)

    def latents(self) -> torch.Tensor:
        return torch.randn(FRAMES, CHANNELS, ROWS, COLUMNS, generator=self.generator)

    def positions(self, chunk: int, pages) -> list[int]:
        if self.ours.config.rope_mode is RopeMode.RELATIVE:
            places = dict(enumerate(self.slot.page_positions(chunk)))
        else:
            places = {self.slot.page_of_chunk(chunk): chunk}
        return [places[page] * FRAMES + at for page in pages for at in range(FRAMES)]

    def segment(self, chunk: int, level: int, first_row: int = 0) -> PackedSegment:
        tokens, page = self.slot.page_tokens, self.slot.page_of_chunk(chunk)
        relative = self.ours.config.rope_mode is RopeMode.RELATIVE
        seen = self.slot.kv_tokens(chunk)
        return PackedSegment(
            rows=slice(first_row, first_row + tokens),
            level=level,
            kv_cache=self.kv,
            write=((page * tokens, tokens),),
            read=((0, seen),),
            query_rotation=self.table.at(self.positions(chunk, [page])),
            key_rotation=self.table.at(self.positions(chunk, range(seen // tokens))) if relative else None,
            text_kv=self.text_kv,
            text_pads=TEXT_PLACES - TEXT_USED,
        )

    def forward(self, chunk: int, level: int, latents: torch.Tensor) -> torch.Tensor:
        out = self.ours.forward_packed(to_tokens(latents), [self.segment(chunk, level)], self.levels)
        return from_tokens(out, latents)

    @torch.no_grad()
    def reference(self, chunks, levels, visible=None) -> torch.Tensor:
        """diffusers on whole clips [chunks] of latents, each chunk at its own level; the last chunk's output."""
        clip = torch.cat(chunks).transpose(0, 1)[None]
        tokens = self.slot.page_tokens
        timestep = torch.tensor([LEVELS[level] for level in levels]).repeat_interleave(tokens)[None]
        if visible is not None:
            mask = torch.zeros(len(chunks), len(chunks), dtype=torch.bool)
            for chunk, seen in enumerate(visible):
                mask[chunk, list(seen)] = True
            mask = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
            for block in self.theirs.blocks:
                block.attn1.set_processor(MaskedAttention(mask))
        padded = F.pad(self.text, (0, 0, 0, TEXT_PLACES - TEXT_USED))[None]
        out = self.theirs(clip, timestep, padded, return_dict=False)[0]
        return out[0].transpose(0, 1)[-FRAMES:]


def assert_close(ours, theirs):
    scale = theirs.abs().max()
    assert scale > 0.1
    error = (ours - theirs).abs().max()
    assert error <= TOLERANCE * scale, f"{error} at a scale of {scale}"


@pytest.mark.parametrize("rope_mode", list(RopeMode))
@pytest.mark.parametrize("level", [0, 1, 2])
def test_first_chunk_equals_diffusers(rope_mode, level):
    both = Both(rope_mode, sink=0, window=9)
    latents = both.latents()
    # diffusers' own attention, no mask of ours
    assert_close(both.forward(0, level, latents), both.reference([latents], [level]))


@pytest.mark.parametrize("rope_mode", list(RopeMode))
def test_committed_chunks_junk_and_a_later_step_equal_diffusers_with_a_block_causal_mask(rope_mode):
    """Until the window is full, places in it are frames of the stream: both rotary modes are the reference's."""
    both = Both(rope_mode, sink=0, window=9)
    clean = [both.latents() for _ in range(2)]
    for chunk, latents in enumerate(clean):
        both.forward(chunk, 1, both.latents())
        both.forward(chunk, 0, latents)
    noisy = both.latents()
    both.forward(2, 1, both.latents())  # junk at another level, in the page that the next pass overwrites
    ours = both.forward(2, 2, noisy)
    assert_close(ours, both.reference([*clean, noisy], [0, 0, 2], visible=[[0], [0, 1], [0, 1, 2]]))


def test_a_rolling_window_with_a_sink_equals_a_masked_recompute():
    both = Both(RopeMode.ABSOLUTE, sink=3, window=6)
    clean, visible = [], []
    for chunk in range(6):
        visible.append(sorted({0, *range(max(0, chunk - 1), chunk + 1)}))
        noisy = both.latents()
        ours = both.forward(chunk, 2, noisy)
        assert_close(ours, both.reference([*clean, noisy], [*[0] * chunk, 2], visible=visible))
        clean.append(both.latents())
        both.forward(chunk, 0, clean[-1])


def test_folded_padding_equals_padding_written_out():
    both = Both(RopeMode.ABSOLUTE, sink=0, window=9)
    latents = both.latents()
    folded = both.forward(0, 1, latents)
    written = both.ours.text_kv(F.pad(both.text, (0, 0, 0, TEXT_PLACES - TEXT_USED)))
    both.text_kv = written
    segment = both.segment(0, 1)
    object.__setattr__(segment, "text_pads", 1)
    out = from_tokens(both.ours.forward_packed(to_tokens(latents), [segment], both.levels), latents)
    assert (folded - out).abs().max() <= 1e-6 * out.abs().max()
    object.__setattr__(segment, "text_kv", written[:, :, : TEXT_USED + 1])
    unweighted = from_tokens(both.ours.forward_packed(to_tokens(latents), [segment], both.levels), latents)
    assert (unweighted - out).abs().max() > 1e-3  # the weight of the folded key matters


def test_segments_of_different_kinds_in_one_pass_are_each_as_alone():
    """Step 1 of one session, a later step of another, a context pass of a third: one packed pass."""
    sessions = [Both(RopeMode.ABSOLUTE, sink=3, window=6, seed=7) for _ in range(3)]
    sessions[1:] = [sessions[0].__class__(RopeMode.ABSOLUTE, 3, 6, seed=7) for _ in range(2)]
    jobs = []
    for index, (both, chunk, level) in enumerate(zip(sessions, (0, 2, 5), (1, 2, 0), strict=True)):
        both.generator.manual_seed(index)
        for past in range(chunk):
            both.forward(past, 0, both.latents())
        jobs.append((both, chunk, level, both.latents()))
    before = [both.kv.clone() for both in sessions]
    alone = [both.forward(chunk, level, latents) for both, chunk, level, latents in jobs]
    for both, kv in zip(sessions, before, strict=True):
        both.kv.copy_(kv)
    tokens = sessions[0].slot.page_tokens
    segments = [both.segment(chunk, level, at * tokens) for at, (both, chunk, level, _) in enumerate(jobs)]
    rows = torch.cat([to_tokens(latents) for *_, latents in jobs])
    out = sessions[0].ours.forward_packed(rows, segments, sessions[0].levels)
    for at, expected in enumerate(alone):
        assert_close(from_tokens(out[at * tokens : (at + 1) * tokens], expected), expected)
