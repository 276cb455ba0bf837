"""What a model must offer, and all that the runtime may know of it.

A streaming model turns a session's prompt and seed into video, chunk by chunk. Per chunk it asks for a list of
*segments*: its denoise steps, then a context pass that writes the finished chunk's clean keys and values, and a
recache where a prompt switch needs one. The runtime packs ready segments of many sessions into one *pass*, calls
`forward` once, and hands each session its rows back through `advance`. It owns the memory (`state_layout` tells it
what to allocate, move and save) and never looks inside.

    state = SessionTensors(...)                    # the runtime's, one view per declared Field
    model.begin(state, control)
    for segment in model.next_passes(state, request):      # strictly in this order, for one session
        rows = model.forward(pack([segment, ...others]))   # [tokens, channels]
        model.advance(segment, rows[...])
        if segment.completes_latents: frames = model.decode(state, request.chunk_index)
    # after the segment with commits=True the chunk is part of the history

Importing this module needs neither torch nor weights, so that a gateway can read a spec.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from turboserve.errors import InvalidRequest
from turboserve.geometry import SlotGeometry, tensor_bytes

if TYPE_CHECKING:
    import numpy as np
    import torch


class Tier(StrEnum):
    """Where a field lives while its session is resident."""

    DEVICE = "device"
    HOST = "host"


class Update(StrEnum):
    """How a field changes, which decides how it is moved and saved."""

    APPEND_CHUNK = "append_chunk"  # a ring of pages; a committed page never changes until it is evicted
    PER_PROMPT = "per_prompt"  # rewritten when the prompt changes
    OVERWRITE = "overwrite"  # rewritten with every chunk: the tail of a migration
    SCRATCH = "scratch"  # lives inside a chunk only: never moved, never saved


class Rebuild(StrEnum):
    """What can restore a lost field."""

    NONE = "none"
    EXACT = "exact"  # from the prompt, to the bit
    APPROXIMATE = "approximate"


class PassKind(StrEnum):
    DENOISE = "denoise"
    CONTEXT = "context"
    RECACHE = "recache"


class PromptSwitch(StrEnum):
    """What a new prompt does to the keys already cached (declared by the model, chosen per session)."""

    SWAP = "swap"
    RECACHE = "recache"
    BLEND = "blend"


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of a session's state. `page_axis` is set for APPEND_CHUNK: that axis is page_count long.

    `decoder` names the sessions that have it: those that chose this decoder ("": all). A slot fits a session of either
    kind, so fields of different decoders share one place in it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    tier: Tier
    update: Update
    rebuild: Rebuild = Rebuild.NONE
    page_axis: int | None = None
    decoder: str = ""

    def __post_init__(self) -> None:
        # What is read ahead into a prepared slot is read before it is known which decoder the session has.
        assert not (self.decoder and self.update is Update.APPEND_CHUNK), f"{self.name}: pages belong to all sessions"

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.shape, self.dtype)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of an APPEND_CHUNK field."""
        assert self.page_axis is not None
        return self.nbytes // self.shape[self.page_axis]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Static facts of a model at one size; no weights are needed to know them. Sizes in pixels, rates per second."""

    name: str
    model_hash: str
    width: int
    height: int
    fps: float
    chunk_frames_first: int
    chunk_frames_rest: int
    slot: SlotGeometry
    denoise_steps: int
    denoise_steps_floor: int
    prompt_switch: tuple[PromptSwitch, ...] = (PromptSwitch.SWAP,)
    sizes: tuple[str, ...] = ()
    recovery_every_chunks: int = 1  # how often a session's recovery point is written as it goes
    max_chunks: int | None = None  # absolute rotary positions end somewhere; None: a stream may last for ever
    about: str = ""
    decoders: tuple[str, ...] = ()  # frame decoders a session may choose from, the default first; (): there is one

    @property
    def chunk_s(self) -> float:
        """Playback time of one chunk after the first."""
        return self.chunk_frames_rest / self.fps

    def chunk_frames(self, chunk_index: int) -> int:
        return self.chunk_frames_first if chunk_index == 0 else self.chunk_frames_rest

    def decoder(self, wanted: str | None) -> str:
        """The decoder a session gets: the one wanted, or the default. InvalidRequest for one that is not offered."""
        if wanted and wanted not in self.decoders:
            offered = f"one of {', '.join(self.decoders)}" if self.decoders else "no decoder: this model has one alone"
            raise InvalidRequest(f"decoder {wanted[:64]!r} is not offered by {self.name}", expected=offered)
        return wanted or (self.decoders[0] if self.decoders else "")

    def frames_before(self, chunk_index: int) -> int:
        """Pixel frames of all chunks before this one."""
        if chunk_index == 0:
            return 0
        return self.chunk_frames_first + (chunk_index - 1) * self.chunk_frames_rest

    def frames_for(self, video_s: float) -> int:
        """Pixel frames of so much video; a part of a frame counts as one."""
        return max(1, math.ceil(video_s * self.fps - 1e-6))

    def chunks_for(self, frame_count: int) -> int:
        """Fewest chunks that hold so many frames."""
        return 1 + max(0, math.ceil((frame_count - self.chunk_frames_first) / self.chunk_frames_rest))


@dataclass(frozen=True, slots=True)
class Control:
    """What steers a chunk. `version` counts the prompts of a session from 1."""

    prompt: str
    version: int = 1


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What a model made of a prompt: words it does not know, and a note when it chose a scene by itself."""

    ignored_words: tuple[str, ...] = ()
    random_scene: bool = False
    canonical: str = ""


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """One chunk's bound inputs. `control` is the prompt of this chunk, whether it changed or not."""

    chunk_index: int
    steps: int
    control: Control
    prompt_switch: PromptSwitch = PromptSwitch.SWAP


@dataclass(slots=True)
class SessionTensors:
    """All that one session keeps: views into the runtime's slabs, one per declared field, and small scalars.

    `scalars` holds JSON-able values only (they are saved and moved with the session); `next_chunk_index` is the
    chunk that comes next and moves on when a context pass commits. `decoder` is one of the spec's ("": its default).
    `prompt_writes` counts how often a model wrote PER_PROMPT fields, which it may do without a new prompt (a blend): it
    tells whether what was saved of them is what they are. It is not saved.
    """

    session_id: str
    seed: int
    slot: int
    tensors: Mapping[str, torch.Tensor]
    next_chunk_index: int = 0
    control: Control | None = None
    scalars: dict[str, Any] = field(default_factory=dict)
    decoder: str = ""
    prompt_writes: int = 0


@dataclass(slots=True)
class Segment:
    """One session's part of a pass.

    `pages` are the slot pages its rows read as their own and write keys to, in row order; `kv_tokens` is the
    prefix of the slot that its queries see (own rows included). `level` picks the noise level, a row of the
    model's table, so that no per-session arithmetic enters the pass.
    """

    state: SessionTensors
    kind: PassKind
    chunk_index: int
    step: int
    level: int
    tokens: int
    pages: tuple[int, ...]
    kv_tokens: int
    completes_latents: bool = False
    commits: bool = False


@dataclass(slots=True)
class PackedBatch:
    """Segments of one pass with their rows laid end to end. `offsets` has one entry more than `segments`."""

    segments: tuple[Segment, ...]
    offsets: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.offsets[-1]

    def rows(self, index: int) -> slice:
        return slice(self.offsets[index], self.offsets[index + 1])


def pack(segments: Sequence[Segment]) -> PackedBatch:
    """Lay segments end to end, in the order given."""
    offsets = [0]
    for segment in segments:
        offsets.append(offsets[-1] + segment.tokens)
    return PackedBatch(tuple(segments), tuple(offsets))


class StreamingModel(Protocol):
    """A loaded model on one device. One instance serves all sessions of a worker."""

    spec: ModelSpec

    @property
    def device(self) -> torch.device: ...

    def state_layout(self) -> tuple[Field, ...]:
        """Every tensor of a session's state. Admission, offload order, manifests and snapshots follow from it.

        Where sessions choose their decoder it lists the fields of every decoder; `session_layout` tells what one has.
        """
        ...

    def begin(self, state: SessionTensors, control: Control) -> None:
        """Fill a fresh (zeroed) state for its first chunk."""
        ...

    def next_passes(self, state: SessionTensors, request: ChunkRequest) -> list[Segment]:
        """The segments of one chunk, in order. Starting a chunk again after it was cancelled gives the same ones
        and the same video: until the context pass nothing permanent is written."""
        ...

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """One packed pass: [batch.tokens, channels]. The only effect is on the pages the segments declare."""
        ...

    def advance(self, segment: Segment, rows: torch.Tensor) -> None:
        """Take a segment's rows: next noise level, finished latents, or, on commit, the next chunk index."""
        ...

    def decode(self, state: SessionTensors, chunk_index: int) -> np.ndarray:
        """Frames uint8 [n, height, width, 3] of the chunk whose latents are complete.

        Called once per chunk, before its context pass. Raises SessionPoisoned when latents are not finite.
        """
        ...

    def self_test(self) -> dict[str, Any]:
        """Compare packed with alone rows per layer shape (design P1) and return what was found; called at load."""
        ...


class PreparesChunks(Protocol):
    """What a model may offer besides (the engine asks whether it has the method): work that a chunk needs first and
    that runs beside the passes, such as encoding a new prompt. Its session waits for it; the others' passes go on."""

    def chunk_ready(self, state: SessionTensors, request: ChunkRequest) -> bool:
        """Whether `next_passes` would answer without waiting; begins the work where it would not. Never blocks."""
        ...


def layout_hash(layout: Sequence[Field]) -> str:
    """Identity of a state layout; sessions never move between different ones."""
    text = json.dumps([asdict(one) for one in layout], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def session_layout(layout: Sequence[Field], decoder: str) -> tuple[Field, ...]:
    """The fields that a session with this decoder has."""
    return tuple(one for one in layout if one.decoder in ("", decoder))


def state_bytes(layout: Sequence[Field], tier: Tier | None = None) -> int:
    """Bytes of a slot, of one tier or of all; scratch included. Of the decoders' fields those of the largest count,
    so for the `session_layout` of one decoder this is what such a session has."""
    tiers = Tier if tier is None else (tier,)
    return sum(_largest_bytes([field for field in layout if field.tier is one]) for one in tiers)


def moved_bytes(layout: Sequence[Field]) -> int:
    """Bytes that leave with a session: everything but scratch, with the decoder whose fields are largest."""
    return _largest_bytes([one for one in layout if one.update is not Update.SCRATCH])


def _largest_bytes(layout: Sequence[Field]) -> int:
    decoders = {one.decoder for one in layout} - {""}
    common = sum(one.nbytes for one in layout if not one.decoder)
    return common + max((sum(one.nbytes for one in layout if one.decoder == name) for name in decoders), default=0)
