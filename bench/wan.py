"""The causal Wan transformer with random weights: passes and chunks of 1..n sessions, against one by one and diffusers.

`pass`: one packed denoise pass of n sessions whose windows are full. Its floor is the work in FLOP at the rate of a
large matrix product measured in the same run, so that `of_floor` is the share of that rate which the transformer
reaches. `chunk`: the denoise passes, the context pass and the decode of a chunk of each session. The baseline of both
is the same work one session after the other. `first-chunk`: a pass without a past against diffusers' eager
WanTransformer3DModel, which has no cache: this is the one shape at which both do the same work.

It has not been run on a GPU yet: no row of it stands under bench/results/. On a CPU it runs the tiny preset, which
says that the code works and nothing about speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import click
import torch
from torch import Tensor

from turboserve.bench.command import bench_command
from turboserve.bench.device_timing import matmul_rate, measure
from turboserve.bench.report import Row, cpu_name, make_row, versions
from turboserve.cli.options import console
from turboserve.model.dit import CausalVideoTransformer, TransformerConfig
from turboserve.model.interface import ChunkRequest, Control, PackedBatch, Segment, SessionTensors, pack, state_bytes
from turboserve.model.light_decoder import LightDecoder, LightDecoderConfig
from turboserve.model.presets import PRESETS, WanPreset, find_preset
from turboserve.model.vae import WanVaeDecoder
from turboserve.model.wan.layout import to_tokens, transformer_config
from turboserve.model.wan.model import WanModel, WanParts
from turboserve.model.wan.tiny import tiny_vae_config
from turboserve.model.weights import diffusers_state
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.numerics import device_class

PROMPT = "bench"
TEXT_TOKENS = 48


class RandomText:
    """Stands for a text encoder: its time is no part of a pass."""

    def __init__(self, config: TransformerConfig) -> None:
        generator = torch.Generator().manual_seed(1)
        self._text = torch.randn(min(TEXT_TOKENS, config.text_tokens - 1), config.text_dim, generator=generator)

    def encode(self, prompt: str) -> Tensor:
        return self._text


def random_transformer(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> CausalVideoTransformer:
    """Weights drawn on the device itself: a 14B model drawn on a CPU takes minutes."""
    with torch.device("meta"):
        module = CausalVideoTransformer(config)
    module = module.to_empty(device=device).to(dtype).eval().requires_grad_(False)
    torch.manual_seed(1)
    for name, one in module.named_parameters():
        if one.ndim > 1:
            one.normal_(0, one.shape[-1] ** -0.5)
        else:
            one.normal_(1.0 if name.endswith("weight") else 0.0, 0.05)
    return module


def random_decoder(
    preset: WanPreset, light: bool, device: torch.device, dtype: torch.dtype
) -> WanVaeDecoder | LightDecoder:
    module: WanVaeDecoder | LightDecoder
    if light:
        module = LightDecoder(LightDecoderConfig(latent_channels=preset.latent_channels))
    else:
        tiny = preset.name == "wan-tiny"
        module = WanVaeDecoder(tiny_vae_config()) if tiny else WanVaeDecoder()
    return module.to(device, dtype).eval().requires_grad_(False)


def pass_flop(config: TransformerConfig, query_tokens: int, kv_tokens: int) -> float:
    """Of one session's pass: linear layers, self-attention over its slot, text attention over all text places."""
    dim = config.dim
    per_layer = 2 * query_tokens * (6 * dim * dim + 2 * dim * config.ffn_dim)  # q k v o, text q o, both ffn layers
    per_layer += 4 * query_tokens * dim * (kv_tokens + config.text_tokens)
    return config.layers * per_layer + 2 * query_tokens * 2 * config.patch_dim * dim


@dataclass
class Scene:
    """A model and sessions whose windows are full, about to begin a chunk."""

    model: WanModel
    states: list[SessionTensors]
    request: ChunkRequest

    def segments(self) -> list[list[Segment]]:
        return [self.model.next_passes(state, self.request) for state in self.states]


def fill(model: WanModel, count: int) -> Scene:
    """Sessions with every page written, by context passes over noise."""
    pool = KvPool(model.state_layout(), count, model.device)
    states = []
    slot = model.spec.slot
    for index in range(count):
        name = f"bench{index:02d}".ljust(26, "a")
        number = pool.acquire(name)
        tensors = pool.tensors(name, model.spec.decoder(None))
        state = SessionTensors(session_id=name, seed=index, slot=number, tensors=tensors)
        model.begin(state, Control(PROMPT))
        chunks = min(slot.page_count, (model.spec.max_chunks or slot.page_count + 1) - 1)
        for chunk in range(chunks):
            *_, context = model.next_passes(state, ChunkRequest(chunk, 1, Control(PROMPT)))
            model.advance(context, model.forward(pack([context])))
        states.append(state)
    return Scene(model, states, ChunkRequest(chunks, model.spec.denoise_steps, Control(PROMPT)))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@bench_command
@click.option("--preset", default="longlive-1.3b", type=click.Choice(list(PRESETS)))
@click.option("--size", help="WxH.  [default: the preset's]")
@click.option("--sessions", default="1,2,3,4", help="Numbers of sessions, with commas.")
@click.option("--decoder", default="light", type=click.Choice(["light", "full"]))
@click.option("--device", default="cuda", type=click.Choice(["cpu", "cuda"]))
@click.option("--rounds", default=10, type=click.IntRange(1), help="Timings of each contender.")
def command(
    wanted: Callable[[str], bool],
    preset: str,
    size: str | None,
    sessions: str,
    decoder: str,
    device: str,
    rounds: int,
) -> Iterator[Row]:
    """Causal Wan with random weights: passes and chunks of 1..n sessions. Not yet run on a GPU."""
    where = torch.device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    chosen = find_preset(preset)
    with torch.inference_mode():
        config = transformer_config(chosen)
        parts = WanParts(
            random_transformer(config, where, dtype),
            {decoder: random_decoder(chosen, decoder == "light", where, dtype)},
            RandomText(config),
        )
        model = WanModel(parts, chosen, size=size or chosen.size, name=preset, model_hash="random")
        rate = matmul_rate(where, dtype)
        has_diffusers = find_spec("diffusers") is not None
        facts: dict[str, Any] = {
            "dtype": str(dtype).split(".")[-1],
            "device": cpu_name() if device == "cpu" else device_class(where),
            "versions": versions("torch", *(("diffusers",) if has_diffusers else ())),
        }
        counts = [int(one) for one in sessions.split(",")]
        if wanted("wan/pass") or wanted("wan/chunk"):
            yield from _coalesced(model, config, counts, rate, rounds, wanted, facts)
        if wanted("wan/first-chunk") and not has_diffusers:
            console().print("wan/first-chunk is left out: diffusers is not installed", style="yellow")
        elif wanted("wan/first-chunk"):
            yield _against_diffusers(model, config, rate, rounds, facts)


def _coalesced(
    model: WanModel,
    config: TransformerConfig,
    counts: list[int],
    rate: float,
    rounds: int,
    wanted: Callable[[str], bool],
    facts: dict[str, Any],
) -> Iterator[Row]:
    scene = fill(model, max(counts))
    page, resident = model.spec.slot.page_tokens, _resident(model)
    kv_tokens = model.spec.slot.kv_tokens(scene.request.chunk_index)
    own_flop = pass_flop(config, page, kv_tokens)
    for count in counts:
        lists = scene.segments()[:count]
        shape = f"{count} sessions, {count * page} tokens over {kv_tokens} keys each; {resident} sessions fit"
        if wanted("wan/pass"):
            first = [one[0] for one in lists]
            batch, alone = pack(first), [pack([one]) for one in first]
            together = model.forward(batch).clone()
            apart = torch.cat([model.forward(one).clone() for one in alone])
            times = measure(
                {"together": _work(model, [batch]), "apart": _work(model, alone)}, device=model.device, rounds=rounds
            )
            yield make_row(
                case="wan/pass",
                shape=shape,
                timing=times["together"],
                floor="its FLOP at the rate of a large matrix product",
                floor_ms=1e3 * count * own_flop / rate,
                baseline="the same sessions' passes one by one",
                baseline_ms=times["apart"].median_ms,
                max_rel_err=relative_error(together, apart),
                **facts,
            )
        if wanted("wan/chunk"):
            contenders = {"together": _chunk(scene, count, 1 << 30), "apart": _chunk(scene, count, 1)}
            finished = {name: work() for name, work in contenders.items()}
            times = measure(contenders, device=model.device, rounds=max(2, rounds // 3), warmup=1)
            passes = scene.request.steps + 1
            yield make_row(
                case="wan/chunk",
                shape=shape,
                timing=times["together"],
                floor="the FLOP of its passes at the rate of a large matrix product, decode left out",
                floor_ms=1e3 * count * passes * own_flop / rate,
                baseline="the same sessions' chunks one by one",
                baseline_ms=times["apart"].median_ms,
                max_rel_err=relative_error(finished["together"], finished["apart"]),
                **facts,
            )


def _work(model: WanModel, batches: list[PackedBatch]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            model.forward(batch)

    return run


def _chunk(scene: Scene, count: int, width: int) -> Callable[[], Tensor]:
    """One whole chunk of `count` sessions in passes of up to `width` segments; nothing is committed, so it repeats."""

    def run() -> Tensor:
        lists = scene.segments()[:count]
        done = []
        for start in range(0, count, width):
            group = lists[start : start + width]
            for segments in zip(*group, strict=True):
                batch = pack(segments)
                rows = scene.model.forward(batch)
                for index, segment in enumerate(segments):
                    if segment.commits:
                        continue
                    scene.model.advance(segment, rows[batch.rows(index)])
                    if segment.completes_latents:
                        done.append(segment.state.tensors["work"].clone())
                        scene.model.decode(segment.state, segment.chunk_index)
        return torch.stack(done)

    return run


def _against_diffusers(
    model: WanModel, config: TransformerConfig, rate: float, rounds: int, facts: dict[str, Any]
) -> Row:
    """The first chunk's first pass: no past, so diffusers' transformer does the same work."""
    from diffusers import WanTransformer3DModel

    channels = config.patch_dim // 4
    with model.device:
        theirs = WanTransformer3DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            in_channels=channels,
            out_channels=channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.layers,
        )
    theirs = theirs.to(weight_dtype(model)).eval()
    theirs.load_state_dict(diffusers_state(model._transformer))
    pool = KvPool(model.state_layout(), 1, model.device)
    name = "bench".ljust(26, "a")
    slot = pool.acquire(name)
    tensors = pool.tensors(name, model.spec.decoder(None))
    state = SessionTensors(session_id=name, seed=1, slot=slot, tensors=tensors)
    model.begin(state, Control(PROMPT))
    first = model.next_passes(state, ChunkRequest(0, model.spec.denoise_steps, Control(PROMPT)))[0]
    batch = pack([first])
    latents = state.tensors["work"].transpose(0, 1)[None].to(weight_dtype(model))
    text = model.prompts.get(PROMPT)
    padded = torch.nn.functional.pad(text, (0, 0, 0, config.text_tokens - len(text)))[None].to(latents)
    timestep = torch.tensor([1000.0], device=model.device)

    def diffusers_pass() -> Tensor:
        return theirs(latents, timestep, padded, return_dict=False)[0]

    ours = model.forward(batch)
    expected = to_tokens(diffusers_pass()[0].transpose(0, 1))
    contenders = {"ours": _work(model, [batch]), "diffusers": diffusers_pass}
    times = measure(contenders, device=model.device, rounds=rounds)
    page = model.spec.slot.page_tokens
    return make_row(
        case="wan/first-chunk",
        shape=f"1 session, {page} tokens, no past",
        timing=times["ours"],
        floor="its FLOP at the rate of a large matrix product",
        floor_ms=1e3 * pass_flop(config, page, page) / rate,
        baseline="diffusers' WanTransformer3DModel, eager",
        baseline_ms=times["diffusers"].median_ms,
        max_rel_err=relative_error(ours, expected),
        **facts,
    )


def weight_dtype(model: WanModel) -> torch.dtype:
    return model._transformer.patch_embedding.weight.dtype


def _resident(model: WanModel) -> int:
    """Sessions that fit beside the weights in what is free now; 0 where that cannot be asked."""
    if model.device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(free // state_bytes(model.state_layout()))
