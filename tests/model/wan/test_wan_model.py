"""The tiny Wan model behind the runtime's interface: frames, promises, prompt switches, and the bytes of a session."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers_wan import MaskedAttention, diffusers_transformer

from turboserve.errors import SessionPoisoned
from turboserve.model.interface import (
    ChunkRequest,
    Control,
    PassKind,
    PromptSwitch,
    SessionTensors,
    Tier,
    Update,
    moved_bytes,
    pack,
    session_layout,
    state_bytes,
)
from turboserve.model.light_decoder import LightDecoder
from turboserve.model.noise import normal
from turboserve.model.presets import PRESETS, find_preset
from turboserve.model.vae import WanVaeDecoder
from turboserve.model.wan import layout
from turboserve.model.wan.model import WanModel
from turboserve.model.wan.tiny import tiny_parts, tiny_vae_config
from turboserve.runtime.kv_pool import KvPool

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def repeatable():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    yield
    torch.set_num_threads(before)


def make(preset=PRESETS["wan-tiny"], decoder="full") -> WanModel:
    return WanModel(tiny_parts(decoder), preset, size=preset.size, name=preset.name, model_hash="tiny")


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def endless():
    return make(find_preset("wan-tiny", {"rope_mode": "relative", "latent_frames_max": 0}), "light")


@pytest.fixture(params=["absolute, vae", "relative, light"])
def either(request, model, endless):
    return model if request.param.startswith("absolute") else endless


def allocate(model, session_id="s", seed=1) -> SessionTensors:
    tensors = {one.name: torch.zeros(one.shape, dtype=getattr(torch, one.dtype)) for one in model.state_layout()}
    return SessionTensors(session_id=session_id, seed=seed, slot=0, tensors=tensors)


def start(model, seed=1, prompt="a fox", session_id="s") -> SessionTensors:
    state = allocate(model, session_id, seed)
    model.begin(state, Control(prompt))
    return state


def run_chunk(
    model, state, prompt="a fox", switch=PromptSwitch.SWAP, steps=STEPS, stop_after=None
) -> np.ndarray | None:
    request = ChunkRequest(state.next_chunk_index, steps, Control(prompt), switch)
    frames = None
    for index, segment in enumerate(model.next_passes(state, request)):
        if index == stop_after:
            return None
        model.advance(segment, model.forward(pack([segment])))
        if segment.completes_latents:
            frames = model.decode(state, request.chunk_index)
    return frames


def snapshot(state: SessionTensors, model) -> SessionTensors:
    """What leaves with a session, as bytes, and back; everything else is junk at the other end."""
    moved = allocate(model, state.session_id, state.seed)
    for one in model.state_layout():
        if one.update is Update.SCRATCH:
            moved.tensors[one.name].fill_(3.0)
        else:
            data = state.tensors[one.name].numpy().tobytes()
            moved.tensors[one.name].copy_(torch.frombuffer(bytearray(data), dtype=torch.float32).view(one.shape))
    moved.scalars = json.loads(json.dumps(state.scalars))
    moved.next_chunk_index = state.next_chunk_index
    return moved


def test_frames_are_bytes_of_the_declared_shape_and_not_all_alike(either):
    state, spec = start(either), either.spec
    for chunk in range(2):
        frames = run_chunk(either, state)
        assert frames.dtype == np.uint8 and frames.shape == (spec.chunk_frames(chunk), spec.height, spec.width, 3)
        assert frames.std() > 5
    assert (spec.chunk_frames_first, spec.chunk_frames_rest) == (9, 12)


def test_packed_sessions_make_what_each_makes_alone_to_the_bit(either):
    """Different prompts, seeds, steps and places in the stream, all in the same passes."""
    plans = [(f"prompt number {'x' * i}", 10 + i, STEPS if i % 2 else 2) for i in range(4)]

    def stream(index: int) -> list[bytes]:
        prompt, seed, steps = plans[index]
        state = start(either, seed, prompt)
        return [run_chunk(either, state, prompt, steps=steps).tobytes() for _ in range(5)]

    states = [start(either, seed, prompt, f"s{i}") for i, (prompt, seed, _) in enumerate(plans)]
    made: list[list[bytes]] = [[] for _ in plans]
    waiting = [[] for _ in plans]
    turn = 0
    while any(len(one) < 5 for one in made) or any(waiting):
        ready = []
        for i, (prompt, _, steps) in enumerate(plans):
            if not waiting[i] and len(made[i]) < 5 and turn >= 2 * i:  # they join one after the other
                request = ChunkRequest(states[i].next_chunk_index, steps, Control(prompt))
                waiting[i] = either.next_passes(states[i], request)
            if waiting[i]:
                ready.append((i, waiting[i].pop(0)))
        batch = pack([segment for _, segment in ready])
        rows = either.forward(batch)
        for place, (i, segment) in enumerate(ready):
            either.advance(segment, rows[batch.rows(place)])
            if segment.completes_latents:
                made[i].append(either.decode(states[i], segment.chunk_index).tobytes())
        turn += 1
    for i in range(4):
        assert made[i] == stream(i), f"session {i}"


def test_a_session_restored_from_its_bytes_goes_on_to_the_bit(either):
    """The snapshot is taken at every boundary up to a ring that has wrapped; the copy replaces the original."""
    plain, moving = start(either), start(either)
    for _ in range(6):
        expected = run_chunk(either, plain)
        moving = snapshot(moving, either)
        assert np.array_equal(expected, run_chunk(either, moving))


@pytest.mark.parametrize("switch", list(PromptSwitch))
def test_a_chunk_begun_again_after_any_pass_gives_the_same_video(either, switch):
    plain, broken = start(either), start(either)
    for chunk in range(6):
        prompt = "a fox" if chunk < 3 else "an owl at night"
        # Before the frames are out a chunk may be dropped after any of its passes.
        run_chunk(either, broken, prompt, switch, stop_after=chunk % STEPS)
        expected = run_chunk(either, plain, prompt, switch)
        assert np.array_equal(expected, run_chunk(either, broken, prompt, switch))


def test_prompt_switches_differ_and_the_past_is_theirs(model):
    frames = {}
    for switch in (None, *PromptSwitch):
        state = start(model)
        for _ in range(4):
            run_chunk(model, state)
        prompt = "a fox" if switch is None else "an owl at night"
        before = state.tensors[layout.KV_CACHE].clone()
        frames[switch] = [run_chunk(model, state, prompt, switch or PromptSwitch.SWAP) for _ in range(4)]
        changed = {
            page
            for page in range(model.spec.slot.page_count)
            if not torch.equal(before[:, :, page], state.tensors[layout.KV_CACHE][:, :, page])
        }
        assert 0 not in changed  # the sink stays as it was, in every mode
    first = {name: one[0] for name, one in frames.items()}
    names = list(first)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not np.array_equal(first[one], first[other]), (one, other)


def test_blend_moves_over_in_the_declared_number_of_chunks(model):
    state, mixes = start(model), []
    for chunk in range(8):
        run_chunk(model, state, "a fox" if chunk < 2 else "an owl", PromptSwitch.BLEND)
        mixes.append(dict(state.scalars["text"]["mix"]))
    assert mixes[1] == {"a fox": 1.0} and mixes[5] == mixes[7] == {"an owl": 1.0}
    assert [one["an owl"] for one in mixes[2:5]] == pytest.approx([0.25, 0.5, 0.75])
    # Switching on in mid-blend starts from what was seen last.
    state = start(model)
    for prompt in ("a", "b", "b", "c"):
        run_chunk(model, state, prompt, PromptSwitch.BLEND)
    assert dict(map(tuple, state.scalars["text"]["mix"])) == pytest.approx({"a": 0.375, "b": 0.375, "c": 0.25})


def test_a_first_chunk_from_prompt_to_pixels_equals_diffusers(model):
    """Our sampler against one written down here over diffusers' transformer and VAE: prompt, four steps, pixels."""
    from diffusers import AutoencoderKLWan

    from turboserve.model.key_maps import vae_to_diffusers

    config, preset = tiny_vae_config(), model.preset
    transformer = diffusers_transformer(model._transformer, preset.latent_channels)
    vae = AutoencoderKLWan(
        base_dim=config.base_channels, z_dim=config.latent_channels, dim_mult=list(config.channel_factors[::-1]),
        num_res_blocks=config.res_blocks, temperal_downsample=list(config.time_doubling[::-1]),
    ).eval()  # fmt: skip
    rename = vae_to_diffusers(config.res_blocks)
    vae.load_state_dict({rename(k): v for k, v in model._decoders["full"].state_dict().items()}, strict=False)
    text = model.prompts.get("a fox")
    text = F.pad(text, (0, 0, 0, preset.text_tokens - len(text)))[None]
    shape = (3, preset.latent_channels, *preset.latent_size())
    x = normal(1, 0, 0, int(np.prod(shape))).view(shape)
    for step, sigma in enumerate((1.0, 0.9375, 5 / 6, 0.625)):
        with torch.no_grad():
            v = transformer(x.transpose(0, 1)[None], torch.tensor([1000 * sigma]), text, return_dict=False)[0][0]
        x0 = x.double() - sigma * v.transpose(0, 1).double()
        if step < 3:
            after = (0.9375, 5 / 6, 0.625)[step]
            x = ((1 - after) * x0 + after * normal(1, 0, step + 1, x.numel()).view(shape)).float()
    state = start(model)
    frames = run_chunk(model, state)
    latents = state.tensors[layout.WORK]
    assert (latents - x0).abs().max() <= 1e-5 * x0.abs().max()
    mean, std = (torch.tensor(one).view(1, -1, 1, 1, 1) for one in (config.latent_mean, config.latent_std))
    with torch.no_grad():
        pixels = vae.decode(x0.float().transpose(0, 1)[None] * std + mean).sample[0]
    expected = ((pixels.permute(1, 2, 3, 0) * 0.5 + 0.5) * 255).round()
    assert (torch.from_numpy(frames).float() - expected).abs().max() <= 1  # a rounding at a half apart


def test_a_recache_equals_the_past_run_again_under_the_new_prompt():
    """Without a sink: the next chunk's first step against diffusers with past chunks that see each other."""
    model = make(find_preset("wan-tiny", {"sink_latent_frames": 0, "window_latent_frames": 9}))
    reference = diffusers_transformer(model._transformer, model.preset.latent_channels)
    state = start(model)
    latents = []
    for _ in range(2):
        run_chunk(model, state)
        latents.append(state.tensors[layout.WORK].clone())
    request = ChunkRequest(2, STEPS, Control("an owl"), PromptSwitch.RECACHE)
    recache, first, *_ = model.next_passes(state, request)
    assert recache.kind is PassKind.RECACHE and recache.tokens == 2 * model.spec.slot.page_tokens
    assert len(recache.pages) == 2
    model.advance(recache, model.forward(pack([recache])))
    noisy = state.tensors[layout.WORK].clone()
    ours = layout.from_tokens(model.forward(pack([first])), noisy)
    tokens = model.spec.slot.page_tokens
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    for block in reference.blocks:
        block.attn1.set_processor(MaskedAttention(mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)))
    text = model.prompts.get("an owl")
    text = F.pad(text, (0, 0, 0, model.preset.text_tokens - len(text)))[None]
    timestep = torch.tensor([0.0, 0.0, 1000.0]).repeat_interleave(tokens)[None]
    with torch.no_grad():
        clip = torch.cat([*latents, noisy]).transpose(0, 1)[None]
        expected = reference(clip, timestep, text, return_dict=False)[0][0].transpose(0, 1)[-3:]
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_memory_of_a_session_is_the_declared_layout_to_the_byte(either):
    state = allocate(either)
    assert sum(one.nbytes for one in state.tensors.values()) == state_bytes(either.state_layout())
    for one in either.state_layout():
        assert state.tensors[one.name].nbytes == one.nbytes, one.name


def test_memory_of_a_session_with_either_decoder_is_its_declared_layout_to_the_byte():
    both = WanModel(tiny_parts(), PRESETS["wan-tiny"], size="32x32", name="both", model_hash="tiny")
    fields, pool = both.state_layout(), KvPool(both.state_layout(), 2)
    sizes = {}
    for name in both.spec.decoders:
        pool.acquire(name)
        tensors, declared = pool.tensors(name, name), session_layout(fields, name)
        assert {key: one.nbytes for key, one in tensors.items()} == {one.name: one.nbytes for one in declared}
        spans = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors.values())
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans)), "two fields share memory"
        sizes[name] = state_bytes(declared)
        alone = make(decoder=name).state_layout()
        assert sizes[name] == state_bytes(alone) == sum(one.nbytes for one in alone)
    assert both.spec.decoders == ("full", "light") and sizes["light"] < sizes["full"]
    # A slot has room for either, and not a byte more: choosing costs no memory beside the larger decoder's.
    assert state_bytes(fields) == max(sizes.values()) and pool.total_bytes() == 2 * max(sizes.values())
    assert moved_bytes(session_layout(fields, "light")) < moved_bytes(fields)


@pytest.mark.parametrize(
    ("preset", "kv_bytes", "text_bytes"),
    [
        ("longlive-1.3b", 3_450_470_400, 94_371_840),
        ("self-forcing-1.3b", 6_038_323_200, 94_371_840),
        ("causal-wan-14b", 15_335_424_000, 419_430_400),
    ],
)
def test_layouts_at_480p_are_as_large_as_the_reference_says(preset, kv_bytes, text_bytes):
    chosen = find_preset(preset)
    with torch.device("meta"):
        decoders = {1_888_573_440: WanVaeDecoder(), 67_092_480: LightDecoder()}
    for decoder_bytes, decoder in decoders.items():
        fields = layout.state_layout(chosen, "832x480", {"one": decoder}, "bfloat16")
        sizes = {one.name: one.nbytes for one in fields}
        assert sizes[layout.KV_CACHE] == kv_bytes and sizes[layout.TEXT_KV] == text_bytes
        assert sum(size for name, size in sizes.items() if name.startswith(("vae_", "light_"))) == decoder_bytes
        assert all(one.tier is Tier.DEVICE for one in fields)
        pages = next(one for one in fields if one.name == layout.KV_CACHE)
        assert pages.page_bytes * chosen.slot().page_count == kv_bytes
    full, light = decoders.values()
    either = layout.state_layout(chosen, "832x480", {"full": full, "light": light}, "bfloat16")
    assert state_bytes(either) == state_bytes(layout.state_layout(chosen, "832x480", {"full": full}, "bfloat16"))
    saved = state_bytes(either) - state_bytes(session_layout(either, "light"))
    assert saved == 1_888_573_440 - 67_092_480


def test_latents_that_are_not_finite_poison_the_session_only(model):
    state, other = start(model, 1), start(model, 2)
    expected = run_chunk(model, start(model, 2))
    segments = [model.next_passes(one, ChunkRequest(0, STEPS, Control("a fox"))) for one in (state, other)]
    for pair in zip(*segments, strict=True):
        batch = pack(pair)
        rows = model.forward(batch)
        if pair[0].step == 1:
            rows[batch.rows(0)] = float("nan")
        for index, segment in enumerate(pair):
            model.advance(segment, rows[batch.rows(index)])
        if pair[1].completes_latents:
            assert np.array_equal(model.decode(other, 0), expected)
            with pytest.raises(SessionPoisoned):
                model.decode(state, 0)


def test_a_prompt_is_encoded_beside_the_passes(model):
    state = start(model)
    request = ChunkRequest(0, STEPS, Control("words nobody has said before"))
    while not model.chunk_ready(state, request):
        pass
    before = model.prompts.encoded_count
    model.next_passes(state, request)
    assert model.prompts.encoded_count == before


def test_the_load_time_check_finds_packed_rows_equal(either):
    found = either.self_test()
    assert found["packed_linears_differ"] == [] and found["one_by_one"] is False
