"""The checksum of a buffer that lies on a device, so that what goes from device to device is verified without a copy in
host memory. Against torn and flipped bytes, not against an attacker; another number than checksum.py's.

The bytes are cut into blocks, the last one filled up with zeros; the block checksum kernel sums each (reference.py says
how), and the sums and the length go through checksum64. How the buffer is cut into pieces does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from turboserve.kernels.reference import UNIT_BYTES
from turboserve.runtime.arena import region
from turboserve.runtime.checksum import checksum64
from turboserve.runtime.packing import StateKernels, on_device

BLOCK_BYTES = 256 << 10
STAGE_BLOCKS = 64

Pack = Callable[[Sequence[Any], int, Tensor], None]
"""Fills a tensor with a buffer's bytes from an offset on."""


def device_checksum(
    pieces: Sequence[Any], pack: Pack, kernels: StateKernels, device: torch.device, *, stage_blocks: int = STAGE_BLOCKS
) -> int:
    """Of pieces laid end to end, host memory or flat uint8 tensors. Takes `stage_blocks` blocks on the device while it
    runs (16 MiB); what lies there in one piece is read where it lies."""
    total = sum(len(piece) for piece in pieces)
    stage_bytes = stage_blocks * BLOCK_BYTES
    sums: list[Tensor] = []
    stage: Tensor | None = None
    with on_device(device):
        for at in range(0, total, stage_bytes):
            count = min(stage_bytes, total - at)
            data = _in_place(region(pieces, at, count), device)
            if data is None:
                if stage is None:
                    stage = torch.empty(min(stage_bytes, _blocks_bytes(total)), dtype=torch.uint8, device=device)
                data = stage[: _blocks_bytes(count)]
                pack(pieces, at, data[:count])
                data[count:].zero_()
            sums.append(kernels.block_checksum(data, BLOCK_BYTES))
    numbers = torch.cat(sums).cpu().numpy().tobytes() if sums else b""
    return checksum64([numbers, total.to_bytes(8, "little")])


def _in_place(parts: Sequence[Any], device: torch.device) -> Tensor | None:
    """The one tensor of whole blocks that the parts are, if they are."""
    if len(parts) != 1 or not isinstance(parts[0], Tensor) or parts[0].device.type != device.type:
        return None
    one = parts[0]
    return None if len(one) % BLOCK_BYTES or one.data_ptr() % UNIT_BYTES else one


def _blocks_bytes(bytes_: int) -> int:
    return -(-bytes_ // BLOCK_BYTES) * BLOCK_BYTES
