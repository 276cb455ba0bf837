"""One packed pass as the kernels see it, and which of them do the work.

A packed pass holds the rows of many sessions end to end. Linear layers run over all rows; what is between them (norms,
rotary embedding, writing keys, attention) goes through a `PackedPass`. There are two: PyTorch (packed_torch.py, any
device, the one a CPU uses) and Triton (packed_triton.py, CUDA). `kernels_for` picks one by device, once, at load.

Letters: R packed rows, N segments, H heads, D head_dim, C = H * D channels, S text tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from turboserve.errors import ConfigError

_log = logging.getLogger(__name__)
HEAD_DIMS = (32, 64, 128)
"""Head sizes that the attention kernels have tiles for (attention.TILES)."""


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of a run of tokens, float32 [tokens, 1, D / 2]."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class LevelTable:
    """Modulation of every noise level, blocks' own tables added in: the only thing a pass needs to know of
    time.
    """

    blocks: Tensor  # [levels, layers, 6, C]
    head: Tensor  # [levels, 2, C]


@dataclass(frozen=True)
class PackedSegment:
    """One session's rows in a packed pass, and where its keys lie.

    Runs are (first slot token, count). Own keys go to `write` first, in row order; then queries see `read`,
    which for all but a recache is one run from the start of the slot. `key_rotation` covers the tokens of
    `read` in that order, or is None when keys are cached rotated.
    """

    rows: slice
    level: int
    kv_cache: Tensor  # [layers, 2, slot_tokens, H, D]
    write: tuple[tuple[int, int], ...]
    read: tuple[tuple[int, int], ...]
    query_rotation: Rotation
    key_rotation: Rotation | None
    text_kv: Tensor  # [layers, 2, S, H, D]
    # How many equal keys the last text key stands for: padding, which is attended to, is one key many times.
    text_pads: int = 1


class PackedPass(Protocol):
    """The work of one pass between its linear layers. Rows are [R, C] in the model's dtype.

    Modulation comes as opaque handles from `modulation` and `head_modulation`; only the pass that gave them may
    read them.
    """

    def linear(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A layer that treats rows one by one (a linear layer, the feed-forward), over all rows of the pass."""
        ...

    def modulation(self, layer: int) -> tuple[Tensor, ...]:
        """Six handles of a block: shift, scale, gate of attention; shift, scale, gate of the feed-forward."""
        ...

    def head_modulation(self) -> tuple[Tensor, ...]:
        """Two handles of the output head: shift, scale."""
        ...

    def normalise(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """LayerNorm(x) * (1 + scale) + shift."""
        ...

    def residual(
        self, x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x + y * gate (no gate: x + y), and that `normalise`d."""
        ...

    def residual_affine(
        self, x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x + y * gate, and LayerNorm of it with weight and bias [C]."""
        ...

    def append(self, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, layer: int) -> Tensor:
        """RMS-normalise q and k, rotate, write keys and values into the slots; returns the queries [R, H, D]."""
        ...

    def attend_slots(self, q: Tensor, layer: int) -> Tensor:
        """Queries [R, H, D] over what their segments read of their slots, after `append`; [R, C]."""
        ...

    def text_query(self, q: Tensor, weight: Tensor) -> Tensor:
        """RMS-normalised queries of the text attention, [R, H, D]."""
        ...

    def attend_text(self, q: Tensor, layer: int) -> Tensor:
        """Queries [R, H, D] over their segments' text keys; [R, C]."""
        ...


class Kernels(Protocol):
    """A family of kernels: makes the pass object. `name` is part of a worker's numerics id.

    `linears_by_segment`: linear layers run once for every segment, at its own shape, not over all rows. A library picks
    its kernel by the number of rows; where that changes bits, this is what keeps a session's bits its own.
    """

    name: str
    linears_by_segment: bool

    def begin(
        self, segments: Sequence[PackedSegment], levels: LevelTable, *, heads: int, eps: float, rotate_keys: bool
    ) -> PackedPass:
        """Everything that all layers of a pass share, worked out once. `rotate_keys`: keys are cached rotated."""
        ...


def kernels_for(device: torch.device, head_dim: int) -> Kernels:
    """Triton on CUDA, PyTorch elsewhere, and for heads that the attention kernel has no tiles for (toy models; the log
    says so). ConfigError where a CUDA device has no Triton: PyTorch would do the work many
    times slower, so that is for the one who runs it to choose, not for us."""
    from turboserve.kernels.packed_torch import TorchKernels

    if device.type != "cuda":
        return TorchKernels()
    try:
        from turboserve.kernels.packed_triton import TritonKernels
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{device} needs the {error.name} package, which is not installed",
            hint="pip install 'turboserve[cuda13]' (or cuda12), or choose --device cpu",
        ) from error
    if head_dim not in HEAD_DIMS:
        _log.warning("no attention tiles for head_dim %d; PyTorch's path runs on %s", head_dim, device)
        return TorchKernels()
    return TritonKernels(device)
