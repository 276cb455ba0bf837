"""The embedded `shapes` model behind the runtime's interface.

Per chunk: the denoise steps asked for, then a context pass at level 0 that makes the chunk's keys permanent.
Denoise passes write to the page that the chunk may not see, so a cancelled chunk leaves no trace. After a
prompt switch in recache mode the two past chunks of the window are first run again under the new prompt,
oldest first, each seeing the sink and what was already redone: doing it twice gives the same bits.

State of a session: keys and values, the clean latents of the resident chunks (what a recache needs), the text
keys of the prompt, and the latents in work.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turboserve.errors import SessionPoisoned
from turboserve.kernels.packed import PackedSegment, Rotation
from turboserve.model.interface import (
    ChunkRequest,
    Control,
    Field,
    PackedBatch,
    PassKind,
    PromptSwitch,
    Rebuild,
    Segment,
    SessionTensors,
    Tier,
    Update,
)
from turboserve.model.noise import normal
from turboserve.model.shapes import vocabulary as v
from turboserve.model.shapes.checkpoint import ShapesWeights, load_weights, random_weights
from turboserve.model.shapes.codec import TOKEN_DIM
from turboserve.model.shapes.network import rotary_table
from turboserve.model.shapes.spec import SCHEDULE, SLOT, TOKENS, spec
from turboserve.model.shapes.start_map import START_DIM, start_map
from turboserve.model.shapes.text import read_prompt, scene_from_json, scene_to_json

_log = logging.getLogger(__name__)
KV_CACHE, TEXT_KV, LATENTS, WORK = "kv_cache", "text_kv", "latents", "work"
_CONTEXT_LEVEL = 0


class ShapesModel:
    """One instance serves all sessions of a worker."""

    def __init__(self, weights: ShapesWeights, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._network = weights.network.to(self._device).eval().requires_grad_(False)
        self._codec = weights.codec.to(self._device)
        self._sharpener = weights.sharpener.to(self._device).eval().requires_grad_(False)
        self._transformer = self._network.transformer
        self._transformer.choose_kernels()
        self._config = self._transformer.config
        self._levels = self._transformer.level_table(SCHEDULE.timesteps)
        self._table = rotary_table(self._config)
        self._one_by_one = False
        self._no_start = torch.zeros(TOKENS, START_DIM, device=self._device)
        self.spec = spec(weights.digest)

    @classmethod
    def load(cls, device: torch.device | str = "cpu") -> ShapesModel:
        """The trained weights that ship with the package."""
        return cls(load_weights(), device)

    @classmethod
    def random(cls, seed: int = 0, device: torch.device | str = "cpu") -> ShapesModel:
        """Untrained weights, for tests that need no picture."""
        return cls(random_weights(seed), device)

    @property
    def device(self) -> torch.device:
        return self._device

    def state_layout(self) -> tuple[Field, ...]:
        heads, width, layers = self._config.heads, self._config.head_dim, self._config.layers
        kv_shape = (layers, 2, SLOT.page_count, SLOT.page_tokens, heads, width)
        return (
            Field(
                KV_CACHE,
                kv_shape,
                "float32",
                Tier.DEVICE,
                Update.APPEND_CHUNK,
                Rebuild.APPROXIMATE,
                page_axis=2,
            ),
            Field(
                LATENTS,
                (SLOT.page_count, TOKENS, TOKEN_DIM),
                "float32",
                Tier.DEVICE,
                Update.APPEND_CHUNK,
                page_axis=0,
            ),
            Field(
                TEXT_KV,
                (layers, 2, v.SLOT_COUNT, heads, width),
                "float32",
                Tier.DEVICE,
                Update.PER_PROMPT,
                Rebuild.EXACT,
            ),
            Field(WORK, (TOKENS, TOKEN_DIM), "float32", Tier.DEVICE, Update.SCRATCH),
        )

    # -- prompts --

    def begin(self, state: SessionTensors, control: Control) -> None:
        """Fresh state. `scalars`: the committed scene, and which prompt the text keys belong to."""
        state.scalars.clear()
        state.control = control
        state.next_chunk_index = 0
        self._write_text(state, control)

    def _write_text(self, state: SessionTensors, control: Control) -> None:
        """Text keys of a prompt, computed alone at a fixed shape; again after a cancel gives the same
        bits.
        """
        committed = state.scalars.get("scene")
        scene, _ = read_prompt(control.prompt, state.seed, scene_from_json(committed) if committed else None)
        tokens = torch.tensor(scene.tokens(), device=self._device)
        state.tensors[TEXT_KV].copy_(self._transformer.text_kv(self._network.text(tokens)))
        state.prompt_writes += 1
        state.scalars["pending_scene"] = scene_to_json(scene)
        state.scalars["text_prompt"] = [control.version, control.prompt]

    # -- one chunk --

    def next_passes(self, state: SessionTensors, request: ChunkRequest) -> list[Segment]:
        chunk, control = request.chunk_index, request.control
        if chunk != state.next_chunk_index:
            raise ValueError(f"chunk {chunk} asked for where {state.next_chunk_index} comes next")
        asked = [control.version, control.prompt]
        if state.scalars["text_prompt"] != asked:
            self._write_text(state, control)
        state.control = control
        state.tensors[WORK].copy_(self._noise(state, chunk, 0))
        segments = []
        # "prompt" is the one of the last committed chunk: a chunk begun again asks for its recache again.
        if request.prompt_switch is PromptSwitch.RECACHE and state.scalars.get("prompt", asked) != asked:
            segments += [self._recache_segment(state, past) for past in _recached_chunks(chunk)]
        levels = SCHEDULE.levels(request.steps)
        state.scalars["steps"] = request.steps
        for step, level in enumerate(levels):
            segments.append(
                self._segment(state, PassKind.DENOISE, chunk, step, level, completes=step == len(levels) - 1)
            )
        context = self._segment(state, PassKind.CONTEXT, chunk, len(levels), _CONTEXT_LEVEL)
        context.commits = True
        return [*segments, context]

    def _segment(
        self,
        state: SessionTensors,
        kind: PassKind,
        chunk: int,
        step: int,
        level: int,
        completes: bool = False,
    ) -> Segment:
        return Segment(
            state=state,
            kind=kind,
            chunk_index=chunk,
            step=step,
            level=level,
            tokens=TOKENS,
            pages=(SLOT.page_of_chunk(chunk),),
            kv_tokens=SLOT.kv_tokens(chunk),
            completes_latents=completes,
        )

    def _recache_segment(self, state: SessionTensors, past: int) -> Segment:
        return self._segment(state, PassKind.RECACHE, past, 0, _CONTEXT_LEVEL)

    def _noise(self, state: SessionTensors, chunk: int, step: int) -> Tensor:
        return normal(state.seed, chunk, step, TOKENS * TOKEN_DIM, self._device).view(TOKENS, TOKEN_DIM)

    @torch.no_grad()
    def forward(self, batch: PackedBatch) -> Tensor:
        rows = [self._input(one) for one in batch.segments]
        if self._one_by_one and len(rows) > 1:
            alone = slice(0, TOKENS)
            passes = zip(rows, batch.segments, strict=True)
            return torch.cat([self._transformer_pass([row], [self._packed(one, alone)]) for row, one in passes])
        return self._transformer_pass(rows, [self._packed(one, batch.rows(i)) for i, one in enumerate(batch.segments)])

    def _transformer_pass(self, rows: list[Tensor], packed: list[PackedSegment]) -> Tensor:
        return self._transformer.forward_packed(torch.cat(rows), packed, self._levels)

    def _input(self, segment: Segment) -> Tensor:
        """Rows [36, TOKEN_DIM + START_DIM]: latents, and the start map, which only the first chunk has."""
        state = segment.state
        if segment.kind is PassKind.RECACHE:
            latents = state.tensors[LATENTS][segment.pages[0]]
        else:
            latents = state.tensors[WORK]
        beside = self._no_start
        if segment.chunk_index == 0:
            scene = scene_from_json(state.scalars["pending_scene"])
            beside = start_map(scene.start, len(scene.objects) > 1).to(self._device)
        return torch.cat([latents, beside], -1)

    def _packed(self, segment: Segment, rows: slice) -> PackedSegment:
        chunk = segment.chunk_index
        if segment.kind is PassKind.RECACHE:
            read, query, key = self._recache_view(chunk, segment.state.next_chunk_index)
        else:
            read = ((0, segment.kv_tokens),)
            query, key = self._rotations(SLOT.page_positions(chunk), SLOT.page_of_chunk(chunk))
        return PackedSegment(
            rows=rows,
            level=segment.level,
            kv_cache=_slot_view(segment.state.tensors[KV_CACHE]),
            write=tuple((page * TOKENS, TOKENS) for page in segment.pages),
            read=read,
            query_rotation=query,
            key_rotation=key,
            text_kv=segment.state.tensors[TEXT_KV],
        )

    def _recache_view(self, past: int, next_chunk: int) -> tuple[tuple[tuple[int, int], ...], Rotation, Rotation]:
        """What a redone chunk sees: the sink, redone chunks before it, itself; at the positions it had at
        first.
        """
        positions = SLOT.page_positions(past)  # page p of the slot stands at positions[p]
        redone = [one for one in _recached_chunks(next_chunk) if one <= past]
        pages = [*range(SLOT.sink_pages), *(SLOT.page_of_chunk(one) for one in redone)]
        read = tuple((page * TOKENS, TOKENS) for page in pages)
        query, _ = self._rotations((positions[pages[-1]],), 0)
        _, key = self._rotations(tuple(positions[page] for page in pages), 0)
        return read, query, key

    @functools.lru_cache(maxsize=256)  # noqa: B019 - one model lives as long as its worker
    def _rotations(self, positions: tuple[int, ...], own: int) -> tuple[Rotation, Rotation]:
        """(queries at the position of page `own`, keys of all pages)."""
        return self._table.at([positions[own]], self._device), self._table.at(positions, self._device)

    @torch.no_grad()
    def advance(self, segment: Segment, rows: Tensor) -> None:
        state = segment.state
        if segment.kind is PassKind.RECACHE:
            return
        if segment.kind is PassKind.CONTEXT:
            state.tensors[LATENTS][segment.pages[0]].copy_(state.tensors[WORK])
            state.scalars["scene"] = state.scalars["pending_scene"]
            state.scalars["prompt"] = state.scalars["text_prompt"]
            state.next_chunk_index = segment.chunk_index + 1
            return
        work = state.tensors[WORK]
        if segment.completes_latents:
            work.copy_(rows)
            return
        level = SCHEDULE.levels(state.scalars["steps"])[segment.step + 1]
        sigma = SCHEDULE.sigma(level)
        work.copy_((1 - sigma) * rows + sigma * self._noise(state, segment.chunk_index, segment.step + 1))

    def decode(self, state: SessionTensors, chunk_index: int) -> np.ndarray:
        latents = state.tensors[WORK]
        if not bool(torch.isfinite(latents).all()):
            raise SessionPoisoned(f"chunk {chunk_index} of session {state.session_id} is not finite")
        with torch.no_grad():
            return self._codec.decode_uint8(latents, self._sharpener).cpu().numpy()

    # -- checks --

    @torch.no_grad()
    def self_test(self) -> dict[str, Any]:
        """Whether a session's rows come out of a packed pass with the same bits as alone.

        Where they do not (another CPU, another library), linear layers (on a GPU) or whole passes (on a CPU) run
        segment by segment from here on: slower, but a session's video still does not depend on its neighbours.
        """
        from turboserve.model.shapes.self_test import packed_equals_alone

        kernels = self._transformer.kernels
        kernels.linears_by_segment = False
        found = packed_equals_alone(self)
        if self._device.type == "cuda" and not found["packed_equals_alone"]:
            # Most likely the library picked other linear kernels for more rows. Each segment at its own shape, then.
            kernels.linears_by_segment = True
            found = packed_equals_alone(self)
            _log.warning("packed rows differ from the same rows alone; linear layers run segment by segment")
        self._one_by_one = self._device.type == "cpu" and not found["packed_equals_alone"]
        if self._one_by_one:
            _log.warning(
                "packed rows differ from the same rows alone by %g; segments run one by one",
                found["max_abs_difference"],
            )
        return {
            **found,
            "one_by_one": self._one_by_one,
            "kernels": kernels.name,
            "linears_by_segment": kernels.linears_by_segment,
        }


def _slot_view(kv_cache: Tensor) -> Tensor:
    """[layers, 2, pages, page tokens, H, D] -> [layers, 2, slot tokens, H, D]; never a copy, for it is written to."""
    return kv_cache.view(*kv_cache.shape[:2], -1, *kv_cache.shape[4:])


def _recached_chunks(next_chunk: int) -> range:
    """Past chunks that chunk `next_chunk` sees, but for the sink, whose keys stay as they are."""
    return range(max(SLOT.sink_pages, next_chunk - SLOT.window_pages + 1), next_chunk)


def load(device: str = "cpu") -> ShapesModel:
    """The shipped model on a device (the registry's entry)."""
    return ShapesModel.load(device)
