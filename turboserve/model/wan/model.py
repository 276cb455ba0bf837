"""A causal Wan model behind the runtime's interface: transformer, frame decoder and prompt stage put together.

Per chunk: a recache where a prompt switch asks for one, the denoise steps, then a context pass at level 0 that makes
the chunk's keys permanent. The network predicts the velocity v = noise - clean; x0 = x_t - sigma * v is taken in
float64, and between steps fresh noise (by counter: seed, chunk, step, position) brings it to the next level.

A prompt switch: `swap` changes the text keys alone; `recache` also runs the latents of the window, but not the sink's,
through one pass under the new prompt (LongLive); `blend` moves the text embedding over in a few chunks.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from turboserve.errors import SessionPoisoned
from turboserve.kernels.packed import PackedSegment, Rotation
from turboserve.model.dit import CausalVideoTransformer
from turboserve.model.interface import (
    ChunkRequest,
    Control,
    Field,
    PackedBatch,
    PassKind,
    PromptSwitch,
    Segment,
    SessionTensors,
)
from turboserve.model.noise import normal
from turboserve.model.presets import WanPreset
from turboserve.model.rotary import RopeMode, RotaryTable
from turboserve.model.text import PromptStage
from turboserve.model.vae import to_uint8
from turboserve.model.wan import layout
from turboserve.model.wan.layout import KV_CACHE, LATENTS, TEXT_KV, WORK, FrameDecoder, from_tokens, to_tokens
from turboserve.model.wan.prompts import Mix, next_text
from turboserve.model.wan.spec import wan_spec

_log = logging.getLogger(__name__)
_CONTEXT_LEVEL = 0


class PromptEncoder(Protocol):
    def encode(self, prompt: str) -> Tensor:
        """Embedding [tokens, text_dim]."""
        ...


@dataclass(frozen=True)
class WanParts:
    """Loaded modules. The text encoder may lie on another device than the others. `decoders` by the name that a session
    chooses one by, the default first."""

    transformer: CausalVideoTransformer
    decoders: Mapping[str, FrameDecoder]
    text: PromptEncoder


class WanModel:
    """One instance serves all sessions of a worker."""

    def __init__(self, parts: WanParts, preset: WanPreset, *, size: str, name: str, model_hash: str) -> None:
        self.spec = wan_spec(preset, size, name, model_hash, tuple(parts.decoders))
        self.preset = preset
        self._transformer, self._decoders = parts.transformer, parts.decoders
        self._transformer.choose_kernels()
        self._config = parts.transformer.config
        weight = parts.transformer.patch_embedding.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._slot = self.spec.slot
        self._schedule = preset.schedule
        self._levels = self._transformer.level_table(self._schedule.timesteps)
        rows, columns = preset.latent_size(size)
        self._table = RotaryTable(self._config.head_dim, self._config.rope_theta, rows // 2, columns // 2)
        self._relative = self._config.rope_mode is RopeMode.RELATIVE
        self._layout = layout.state_layout(preset, size, parts.decoders, str(self._dtype).split(".")[-1], self._config)
        self._decoder_fields = {
            decoder: [one.name for one in self._layout if one.decoder == decoder] for decoder in parts.decoders
        }
        self._folds_pads = self._transformer.kernels.name == "torch"
        self._one_by_one = False
        self.prompts = PromptStage(parts.text.encode)

    @property
    def device(self) -> torch.device:
        return self._device

    def state_layout(self) -> tuple[Field, ...]:
        return self._layout

    # -- prompts --

    def begin(self, state: SessionTensors, control: Control) -> None:
        """Fresh state. `scalars`: "text" of the last committed chunk, "pending" of the one in work."""
        state.scalars.clear()
        state.control = control
        state.next_chunk_index = 0
        self.prompts.prefetch(control.prompt)

    def chunk_ready(self, state: SessionTensors, request: ChunkRequest) -> bool:
        """Whether the prompts of a chunk are encoded, so that `next_passes` does not wait; begins to where not."""
        pending = self._pending_text(state, request)
        ready = [self.prompts.ready(prompt) for prompt, _ in pending["mix"]]  # a list: each is asked for, not the first
        return all(ready)

    def _pending_text(self, state: SessionTensors, request: ChunkRequest) -> dict[str, Any]:
        committed = state.scalars.get("text")
        return next_text(committed, request.control.prompt, request.prompt_switch, self.preset.blend_chunks)

    def _embedding(self, mix: Mix) -> Tensor:
        """[tokens, text_dim] of weighted prompts; a prompt that ends early goes on as the zeros of padding."""
        parts = [(self.prompts.get(prompt).to(self._device, self._dtype), weight) for prompt, weight in mix]
        if len(parts) == 1:
            return parts[0][0]
        longest = max(len(one) for one, _ in parts)
        return torch.stack([F.pad(one, (0, 0, 0, longest - len(one))) * weight for one, weight in parts]).sum(0)

    def _write_text(self, state: SessionTensors, mix: Mix) -> None:
        """Text keys of the prompts, alone and at their own length.

        The reference attends to all `text_tokens` places, padding included. Padding is all the same key, so one row
        stands for all of it where the kernels can weigh it; elsewhere every place is written out.
        """
        embedding = self._embedding(mix)
        places, used = self._config.text_tokens, len(embedding)
        rows = min(used + 1, places) if self._folds_pads else places
        keys = self._transformer.text_kv(F.pad(embedding, (0, 0, 0, rows - used)))
        field = state.tensors[TEXT_KV]
        field.zero_()
        field[:, :, :rows].copy_(keys)
        state.prompt_writes += 1
        state.scalars["text_rows"] = rows
        state.scalars["text_pads"] = max(1, places - used) if self._folds_pads else 1
        state.scalars["text_written"] = mix

    # -- one chunk --

    def next_passes(self, state: SessionTensors, request: ChunkRequest) -> list[Segment]:
        chunk = request.chunk_index
        if chunk != state.next_chunk_index:
            raise ValueError(f"chunk {chunk} asked for where {state.next_chunk_index} comes next")
        pending = self._pending_text(state, request)
        if state.scalars.get("text_written") != pending["mix"]:
            self._write_text(state, pending["mix"])
        state.control = request.control
        state.scalars["pending"] = pending
        state.scalars["steps"] = request.steps
        state.tensors[WORK].copy_(self._noise(state, chunk, 0))
        segments = []
        committed = state.scalars.get("text")
        # Asked of the committed chunk: a chunk begun again asks for its recache again, and gets the same bits.
        changed = committed is not None and committed["mix"] != pending["mix"]
        if request.prompt_switch is PromptSwitch.RECACHE and changed and self._recached_pages(chunk):
            segments.append(self._recache(state, chunk))
        levels = self._schedule.levels(request.steps)
        for step, level in enumerate(levels):
            segments.append(self._segment(state, PassKind.DENOISE, chunk, step, level))
        segments[-1].completes_latents = True
        context = self._segment(state, PassKind.CONTEXT, chunk, len(levels), _CONTEXT_LEVEL)
        context.commits = True
        return [*segments, context]

    def _segment(self, state: SessionTensors, kind: PassKind, chunk: int, step: int, level: int) -> Segment:
        return Segment(
            state=state,
            kind=kind,
            chunk_index=chunk,
            step=step,
            level=level,
            tokens=self._slot.page_tokens,
            pages=(self._slot.page_of_chunk(chunk),),
            kv_tokens=self._slot.kv_tokens(chunk),
        )

    def _recached_pages(self, chunk: int) -> tuple[tuple[int, int], ...]:
        """(page, chunk) of the window's past chunks that chunk `chunk` sees, in the order of their pages."""
        slot = self._slot
        own = slot.page_of_chunk(chunk)
        return tuple(
            (page, past)
            for page, past in sorted(slot.resident_chunks(chunk))
            if page >= slot.sink_pages and page != own
        )

    def _recache(self, state: SessionTensors, chunk: int) -> Segment:
        """One pass over all past latents of the window at level 0; they see the sink and each other, unmasked."""
        pages = tuple(page for page, _ in self._recached_pages(chunk))
        tokens = self._slot.page_tokens
        seen = len(pages) + min(self._slot.sink_pages, chunk)
        segment = self._segment(state, PassKind.RECACHE, chunk, 0, _CONTEXT_LEVEL)
        segment.tokens, segment.pages, segment.kv_tokens = tokens * len(pages), pages, tokens * seen
        return segment

    def _noise(self, state: SessionTensors, chunk: int, step: int) -> Tensor:
        like = state.tensors[WORK]
        return normal(state.seed, chunk, step, like.numel(), self._device).view(like.shape)

    @torch.no_grad()
    def forward(self, batch: PackedBatch) -> Tensor:
        rows = [self._input(one) for one in batch.segments]
        if self._one_by_one and len(rows) > 1:
            alone = [self._packed(one, slice(0, one.tokens)) for one in batch.segments]
            passes = zip(rows, alone, strict=True)
            return torch.cat([self._transformer.forward_packed(row, [one], self._levels) for row, one in passes])
        packed = [self._packed(one, batch.rows(index)) for index, one in enumerate(batch.segments)]
        return self._transformer.forward_packed(torch.cat(rows), packed, self._levels)

    def _input(self, segment: Segment) -> Tensor:
        tensors = segment.state.tensors
        if segment.kind is PassKind.RECACHE:
            latents = torch.cat([tensors[LATENTS][page] for page in segment.pages])
        else:
            latents = tensors[WORK]
        return to_tokens(latents).to(self._dtype)

    def _packed(self, segment: Segment, rows: slice) -> PackedSegment:
        state, chunk, tokens = segment.state, segment.chunk_index, self._slot.page_tokens
        if segment.kind is PassKind.RECACHE:
            pages = (*range(min(self._slot.sink_pages, chunk)), *segment.pages)
            read = tuple((page * tokens, tokens) for page in pages)
        else:
            pages = tuple(range(segment.kv_tokens // tokens))
            read = ((0, segment.kv_tokens),)
        count = state.scalars["text_rows"]
        return PackedSegment(
            rows=rows,
            level=segment.level,
            kv_cache=_slot_view(state.tensors[KV_CACHE]),
            write=tuple((page * tokens, tokens) for page in segment.pages),
            read=read,
            query_rotation=self._rotation(self._frames(segment.pages, chunk)),
            key_rotation=self._rotation(self._frames(pages, chunk)) if self._relative else None,
            text_kv=state.tensors[TEXT_KV][:, :, :count],
            text_pads=state.scalars["text_pads"],
        )

    def _frames(self, pages: tuple[int, ...], chunk: int) -> tuple[int, ...]:
        """Latent frame positions of pages as chunk `chunk` sees them: in the window, or of the stream."""
        slot, length = self._slot, self._slot.chunk_latent_frames
        if self._relative:
            places = dict(enumerate(slot.page_positions(chunk)))
        else:
            places = {**dict(slot.resident_chunks(chunk)), slot.page_of_chunk(chunk): chunk}
        return tuple(places[page] * length + frame for page in pages for frame in range(length))

    @functools.lru_cache(maxsize=64)  # noqa: B019 - one model lives as long as its worker
    def _rotation(self, frames: tuple[int, ...]) -> Rotation:
        return self._table.at(frames, self._device)

    @torch.no_grad()
    def advance(self, segment: Segment, rows: Tensor) -> None:
        state = segment.state
        if segment.kind is PassKind.RECACHE:
            return
        work = state.tensors[WORK]
        if segment.kind is PassKind.CONTEXT:
            if LATENTS in state.tensors:
                state.tensors[LATENTS][segment.pages[0]].copy_(work)
            state.scalars["text"] = state.scalars.pop("pending")
            state.next_chunk_index = segment.chunk_index + 1
            return
        velocity = from_tokens(rows, work).double()
        clean = work.double() - self._schedule.sigma(segment.level) * velocity
        if segment.completes_latents:
            work.copy_(clean)
            return
        level = self._schedule.levels(state.scalars["steps"])[segment.step + 1]
        sigma = self._schedule.sigma(level)
        noise = self._noise(state, segment.chunk_index, segment.step + 1).double()
        work.copy_((1 - sigma) * clean + sigma * noise)

    @torch.no_grad()
    def decode(self, state: SessionTensors, chunk_index: int) -> np.ndarray:
        latents = state.tensors[WORK]
        if not bool(torch.isfinite(latents).all()):
            raise SessionPoisoned(f"chunk {chunk_index} of session {state.session_id} is not finite")
        decoder = self.spec.decoder(state.decoder)
        cache = {name: state.tensors[name] for name in self._decoder_fields[decoder]}
        return to_uint8(self._decoders[decoder].decode(latents, cache, chunk_index == 0)).cpu().numpy()

    # -- checks --

    def self_test(self) -> dict[str, Any]:
        """Whether each shape of linear layer treats packed rows as it treats them alone (design P1).

        Where one does not on a CPU, passes run segment by segment from here on.
        """
        shapes = layout.linear_shapes(self._transformer.blocks)
        differing = layout.packed_linears_equal(shapes, self._slot.page_tokens)
        self._one_by_one = self._device.type == "cpu" and bool(differing)
        self._transformer.kernels.linears_by_segment = self._device.type == "cuda" and bool(differing)
        if self._one_by_one:
            _log.warning("packed rows differ from the same rows alone in %s; segments run one by one", differing)
        return {
            "kernels": self._transformer.kernels.name,
            "dtype": str(self._dtype),
            "packed_linears_differ": differing,
            "one_by_one": self._one_by_one,
            "linears_by_segment": self._transformer.kernels.linears_by_segment,
        }


def _slot_view(kv_cache: Tensor) -> Tensor:
    """[layers, 2, pages, page tokens, H, D] -> [layers, 2, slot tokens, H, D]; never a copy, for it is written to."""
    return kv_cache.view(*kv_cache.shape[:2], -1, *kv_cache.shape[4:])
