"""The model this server offers, and what a caller may ask of it: names, sizes, steps, lengths, prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from turboserve.errors import InvalidRequest, UnknownModel
from turboserve.model import registry
from turboserve.model.interface import ModelSpec, PromptReport
from turboserve.server.gateway_config import GatewayConfig
from turboserve.server.log_records import LoggedSession
from turboserve.server.pacing import StreamClock
from turboserve.server.session_stream import StreamShape


@dataclass(frozen=True, slots=True)
class Choice:
    """What a session will be made with, checked."""

    shape: StreamShape
    clock: StreamClock
    steps: int
    prompt_switch: str
    decoder: str
    max_chunks: int | None


class Catalogue:
    """One served model. Importing it needs neither torch nor weights."""

    def __init__(self, config: GatewayConfig, spec: ModelSpec | None = None) -> None:
        self.spec = spec or registry.load_spec(config.model)
        self._config = config
        self.sizes = self.spec.sizes or (f"{self.spec.width}x{self.spec.height}",)

    @property
    def clock(self) -> StreamClock:
        """Live pacing: the playback rate stretches both a chunk and its target."""
        rate = self._config.playback_rate
        return StreamClock(self.spec.chunk_s / rate, (self._config.chunk_target_s or self.spec.chunk_s) / rate)

    def shape(self, size: str | None) -> StreamShape:
        size = size or f"{self.spec.width}x{self.spec.height}"
        if size not in self.sizes:
            raise _field("size", "is not a size of this model", f"one of {', '.join(self.sizes)}")
        width, height = (int(one) for one in size.split("x"))
        return StreamShape(
            model=self.spec.name,
            model_hash=self.spec.model_hash,
            width=width,
            height=height,
            fps=self.spec.fps,
            chunk_frames_first=self.spec.chunk_frames_first,
            chunk_frames_rest=self.spec.chunk_frames_rest,
        )

    def choose(
        self,
        *,
        model: str | None,
        size: str | None,
        steps: int | None,
        prompt_switch: str | None,
        decoder: str | None,
        max_duration_s: float | None,
    ) -> Choice:
        """Check a wish against the model; InvalidRequest names the field and what would do."""
        spec = self.spec
        if model is not None and model != spec.name:
            raise UnknownModel(f"this server does not serve {model[:64]!r}", expected=repr(spec.name))
        shape = self.shape(size)
        if steps is not None and not spec.denoise_steps_floor <= steps <= spec.denoise_steps:
            raise _field("steps", "is out of range", f"{spec.denoise_steps_floor} to {spec.denoise_steps}")
        switches = [one.value for one in spec.prompt_switch]
        if prompt_switch is not None and prompt_switch not in switches:
            raise _field("prompt_switch", "is not offered by this model", f"one of {', '.join(switches)}")
        return Choice(
            shape=shape,
            clock=self.clock,
            steps=steps or spec.denoise_steps,
            prompt_switch=prompt_switch or switches[0],
            decoder=self._decoder(decoder),
            max_chunks=self.chunks_for(max_duration_s),
        )

    def _decoder(self, wanted: str | None) -> str:
        try:
            return self.spec.decoder(wanted)
        except InvalidRequest as error:
            raise _field("decoder", "is not offered by this model", error.expected or "") from None

    def chunks_for(self, video_s: float | None) -> int | None:
        """Fewest chunks that hold so much video; the model's own end if that comes first."""
        spec = self.spec
        wanted = None
        if video_s is not None:
            wanted = spec.chunks_for(spec.frames_for(video_s))
        bounds = [one for one in (wanted, spec.max_chunks) if one is not None]
        return min(bounds, default=None)

    def restore(self, logged: LoggedSession) -> tuple[StreamShape, StreamClock] | None:
        """Shape and clock of a session of an earlier gateway; None when this server serves another model now."""
        opened = logged.opened
        if opened.model != self.spec.name or opened.model_hash != self.spec.model_hash:
            return None
        try:
            return self.shape(f"{opened.width}x{opened.height}"), self.clock
        except InvalidRequest:
            return None

    def check_prompt(self, text: str, seed: int) -> PromptReport:
        return registry.check_prompt(self._config.model, text, seed)

    def as_json(self) -> dict[str, Any]:
        """One entry of GET /v1/models."""
        spec = self.spec
        return {
            "id": spec.name,
            "object": "model",
            "owned_by": "turboserve",
            "model_hash": spec.model_hash,
            "about": spec.about,
            "default_size": f"{spec.width}x{spec.height}",
            "sizes": list(self.sizes),
            "fps": spec.fps,
            "chunk_frames": {"first": spec.chunk_frames_first, "rest": spec.chunk_frames_rest},
            "chunk_s": spec.chunk_s,
            "steps": spec.denoise_steps,
            "steps_floor": spec.denoise_steps_floor,
            "prompt_switch": [one.value for one in spec.prompt_switch],
            "decoders": list(spec.decoders),
            "max_chunks": spec.max_chunks,
            "formats": ["h264", "jpeg", "mp4", "raw"],
            "playback_rate": self._config.playback_rate,
            # Of live streams, in seconds by the wall clock.
            "live": {"chunk_s": self.clock.chunk_s, "chunk_target_s": self.clock.chunk_target_s},
        }


def _field(name: str, what: str, expected: str) -> InvalidRequest:
    error = InvalidRequest(f"{name} {what}", expected=expected)
    error.param = name  # type: ignore[attr-defined]
    return error
