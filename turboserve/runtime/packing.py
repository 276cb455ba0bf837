"""Small pieces of device memory to and from one buffer, by the gather and scatter kernels instead of a copy for each.

Every copy that a copy engine runs costs about 4 us beside its bytes, so pieces of a few KiB move at a fraction of the
link's rate; one kernel launch brings hundreds of them together at the memory's own rate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from turboserve.errors import ConfigError
from turboserve.kernels.reference import UNIT_BYTES

PACK_COUNT_MIN = 8
"""Fewer pieces than this are not worth a launch, which with the upload of the pieces' places costs about 30 us of the
host's time where a copy costs about 4. Modelled, not measured."""
RUN_COUNT_MAX = 65_535
"""A CUDA grid's limit in y, which the CUDA C twin uses for the pieces."""


class ExtentKernels(Protocol):
    """kernels/extents.py or its CUDA C twin. Starts count from a buffer's first byte and may leave it either way."""

    def gather_extents(
        self, source: Tensor, starts: Tensor, extent_bytes: int, out: Tensor | None = None
    ) -> Tensor: ...

    def scatter_extents(self, packed: Tensor, target: Tensor, starts: Tensor, extent_bytes: int) -> None: ...


class StateKernels(ExtentKernels, Protocol):
    """kernels/extents.py."""

    def block_checksum(self, data: Tensor, block_bytes: int) -> Tensor: ...


def state_kernels(device: torch.device) -> StateKernels | None:
    """Triton's on CUDA; None elsewhere, where pieces are copied one by one. ConfigError where Triton is missing."""
    if device.type != "cuda":
        return None
    try:
        from turboserve.kernels import extents
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"packing on {device} needs the {error.name} package, which is not installed",
            hint="pip install 'turboserve[cuda13]' (or cuda12), or choose --device cpu",
        ) from error
    return extents


@dataclass(frozen=True, slots=True)
class Run:
    """`count` neighbours in a list of pieces, from `first` on; of `piece_bytes` each if they are `packed`."""

    first: int
    count: int
    piece_bytes: int
    packed: bool


def find_runs(pieces: Sequence[Any], device: torch.device, below_bytes: int | None = None) -> list[Run]:
    """All pieces in their order, as runs that a kernel can take and runs that it cannot.

    It can take PACK_COUNT_MIN or more flat uint8 tensors on `device`, of equal size (a multiple of 16, and less than
    `below_bytes` if that is given), that begin at multiples of 16 bytes.
    """
    sizes = [_size_to_pack(piece, device, below_bytes) for piece in pieces]
    found: list[Run] = []
    at = 0
    while at < len(sizes):
        end = at + 1
        while end < len(sizes) and end - at < RUN_COUNT_MAX and sizes[end] == sizes[at]:
            end += 1
        found.append(Run(at, end - at, sizes[at], sizes[at] > 0 and end - at >= PACK_COUNT_MIN))
        at = end
    return found


def _size_to_pack(piece: Any, device: torch.device, below_bytes: int | None) -> int:
    """The piece's bytes; 0 when no kernel can take it."""
    if not isinstance(piece, Tensor) or piece.device != device:
        return 0
    size = piece.numel()
    if size % UNIT_BYTES or piece.data_ptr() % UNIT_BYTES or (below_bytes is not None and size >= below_bytes):
        return 0
    return size


def gather_pieces(kernels: ExtentKernels, pieces: Sequence[Tensor], stage: Tensor) -> None:
    """Lays the pieces of a packed run end to end in `stage`, which has their size, on the current stream."""
    with on_device(stage.device):
        kernels.gather_extents(stage, _starts(pieces, stage), pieces[0].numel(), stage)


def scatter_pieces(kernels: ExtentKernels, stage: Tensor, pieces: Sequence[Tensor]) -> None:
    """The other way."""
    with on_device(stage.device):
        kernels.scatter_extents(stage, stage, _starts(pieces, stage), pieces[0].numel())


def _starts(pieces: Sequence[Tensor], stage: Tensor) -> Tensor:
    """Where pieces begin, from the stage's first byte: they lie in allocations of their own, on either side of it."""
    origin = stage.data_ptr()
    starts = torch.tensor([piece.data_ptr() - origin for piece in pieces], dtype=torch.int64)
    # From pageable memory the driver has taken the bytes when this returns; nothing waits for the device.
    return starts.to(stage.device, non_blocking=True)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the thread's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
