"""A test double: a streaming model small enough for thousands of chunks, whose faults can be placed.

It keeps every promise of `model/interface.py` the way a real one does: packed linears, attention per session over the
slot, noise from (seed, chunk, step), one field of every tier and update kind. `faults` maps (session_id, chunk_index)
to what happens there: "raise" in forward, "nan" in the latents, "decode" in decode, "begin" in next_passes.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from turboserve.errors import SessionPoisoned
from turboserve.geometry import SlotGeometry
from turboserve.model.interface import Field, ModelSpec, PassKind, Rebuild, Segment, Tier, Update

DIM = 64
CHANNELS = 16
TOKENS = 16
FRAMES = 4
SIZE = 8
STEPS = 4

GEOMETRY = SlotGeometry(
    chunk_latent_frames=1, tokens_per_latent_frame=TOKENS, sink_latent_frames=1, window_latent_frames=3
)


class InjectedFault(RuntimeError):
    pass


class TinyModel:
    """Random weights from a seed; fp32; one instance serves all sessions."""

    def __init__(self, device: str = "cpu", seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weight(rows: int, columns: int) -> torch.Tensor:
            return (torch.randn(rows, columns, generator=generator) / rows**0.5).to(device)

        self.device = torch.device(device)
        self.faults: dict[tuple[str, int], str] = {}
        self.passes: list[list[tuple[str, int, int]]] = []
        self.w_in, self.w_out = weight(CHANNELS, DIM), weight(DIM, CHANNELS)
        self.w_qkv, self.w_mlp = weight(DIM, 3 * DIM), weight(DIM, DIM)
        self.w_pixels = weight(CHANNELS, FRAMES * SIZE * SIZE * 3 // TOKENS)
        self.levels = weight(STEPS + 1, DIM)
        self.spec = ModelSpec(
            name="tiny",
            model_hash=hashlib.sha256(f"tiny {seed}".encode()).hexdigest()[:16],
            width=SIZE,
            height=SIZE,
            fps=12.0,
            chunk_frames_first=FRAMES,
            chunk_frames_rest=FRAMES,
            slot=GEOMETRY,
            denoise_steps=STEPS,
            denoise_steps_floor=1,
        )

    def state_layout(self) -> tuple[Field, ...]:
        pages, tokens = GEOMETRY.page_count, GEOMETRY.page_tokens
        device, host = Tier.DEVICE, Tier.HOST
        return (
            Field("kv", (pages, 2, tokens, DIM), "float32", device, Update.APPEND_CHUNK, page_axis=0),
            Field("text", (DIM,), "float32", device, Update.PER_PROMPT, Rebuild.EXACT),
            Field("latents", (TOKENS, CHANNELS), "float32", device, Update.SCRATCH),
            Field("carried", (TOKENS, CHANNELS), "float32", device, Update.OVERWRITE),
            Field("counts", (2,), "int64", host, Update.OVERWRITE),
        )

    def _noise(self, seed: int, chunk_index: int, step: int) -> torch.Tensor:
        generator = np.random.Generator(np.random.Philox(key=[seed & (2**63 - 1), chunk_index * 64 + step]))
        values = generator.standard_normal((TOKENS, CHANNELS), dtype=np.float32)
        return torch.from_numpy(values).to(self.device)

    def _set_prompt(self, state, control) -> None:
        digest = hashlib.sha256(control.prompt.encode()).digest()
        values = np.frombuffer(digest * (DIM // 32), np.uint8).astype(np.float32) / 255
        state.tensors["text"].copy_(torch.from_numpy(values))
        state.prompt_writes += 1
        state.control = control

    def begin(self, state, control) -> None:
        for name, tensor in state.tensors.items():
            assert not tensor.any(), f"{name} was not wiped"
        self._set_prompt(state, control)

    def next_passes(self, state, request) -> list[Segment]:
        assert request.chunk_index == state.next_chunk_index
        if self.faults.get((state.session_id, request.chunk_index)) == "begin":
            raise InjectedFault("begin")
        if state.control != request.control:
            self._set_prompt(state, request.control)
        index = request.chunk_index
        state.tensors["latents"].copy_(self._noise(state.seed, index, 0))
        common = {
            "state": state,
            "chunk_index": index,
            "tokens": TOKENS,
            "pages": (GEOMETRY.page_of_chunk(index),),
            "kv_tokens": GEOMETRY.kv_tokens(index),
        }
        passes = [
            Segment(
                kind=PassKind.DENOISE,
                step=step,
                level=step + 1,
                completes_latents=step == request.steps - 1,
                **common,
            )
            for step in range(request.steps)
        ]
        return [*passes, Segment(kind=PassKind.CONTEXT, step=request.steps, level=0, commits=True, **common)]

    def forward(self, batch) -> torch.Tensor:
        self.passes.append([(one.state.session_id, one.chunk_index, one.step) for one in batch.segments])
        for one in batch.segments:
            if self.faults.get((one.state.session_id, one.chunk_index)) == "raise" and one.step == 1:
                raise InjectedFault("forward")
        x = torch.cat([one.state.tensors["latents"] for one in batch.segments]) @ self.w_in
        x = torch.cat(
            [
                x[batch.rows(i)] + one.state.tensors["text"] + self.levels[one.level]
                for i, one in enumerate(batch.segments)
            ]
        )
        qkv = x @ self.w_qkv
        attended = []
        for i, one in enumerate(batch.segments):
            q, k, v = qkv[batch.rows(i)].split(DIM, dim=1)
            kv = one.state.tensors["kv"]
            kv[one.pages[0], 0], kv[one.pages[0], 1] = k, v
            pages = one.kv_tokens // TOKENS
            keys, values = kv[:pages, 0].reshape(-1, DIM), kv[:pages, 1].reshape(-1, DIM)
            attended.append(torch.softmax(q @ keys.T / DIM**0.5, dim=1) @ values)
        x = x + torch.cat(attended)
        return torch.relu(x @ self.w_mlp) @ self.w_out

    def advance(self, segment, rows) -> None:
        state = segment.state
        if segment.commits:
            state.next_chunk_index += 1
            return
        fault = self.faults.get((state.session_id, segment.chunk_index))
        if fault == "nan" and segment.step == 1:
            rows = rows * float("nan")
        latents = torch.tanh(rows)
        if not segment.completes_latents:
            latents = latents + 0.5 * self._noise(state.seed, segment.chunk_index, segment.step + 1)
        state.tensors["latents"].copy_(latents)

    def decode(self, state, chunk_index) -> np.ndarray:
        latents = state.tensors["latents"]
        if not bool(torch.isfinite(latents).all()):
            raise SessionPoisoned(f"latents of chunk {chunk_index} are not finite")
        if self.faults.get((state.session_id, chunk_index)) == "decode":
            raise InjectedFault("decode")
        smooth = 0.5 * latents + 0.5 * state.tensors["carried"]
        state.tensors["carried"].copy_(smooth)
        state.tensors["counts"][0] += 1
        pixels = torch.sigmoid(smooth @ self.w_pixels).mul(255).to(torch.uint8).cpu().numpy()
        return np.ascontiguousarray(pixels.reshape(FRAMES, SIZE, SIZE, 3))

    def self_test(self) -> dict:
        return {"packed_rows_equal": True}


def session_id(name: str) -> str:
    """A valid id that starts with `name`."""
    return name.ljust(26, "a")
