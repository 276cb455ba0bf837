"""Device memory between two processes of one machine: the receiver maps the sender's memory and copies for itself.

For NVLink peers and for two processes on one GPU (which NCCL refuses). The copies run on copy engines, no kernel of the
model gives up its place. Chosen explicitly; it needs memory from cudaMalloc, so not expandable segments.

It has not been run: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import torch

from turboserve.errors import ConfigError, ProtocolError
from turboserve.runtime.arena import Extent
from turboserve.runtime.device_checksum import device_checksum
from turboserve.runtime.packing import state_kernels
from turboserve.runtime.transport import Buffer, Link, Pieces
from turboserve.runtime.transport_group import pack

_COPIED = b"copied"
_Handle = tuple[int, bytes, int, int, bytes, int, bytes, bool]


def _share(piece: Any) -> tuple[_Handle, int, int]:
    """(handle of the allocation, where the piece begins in it, its bytes)."""
    if not (isinstance(piece, torch.Tensor) and piece.is_cuda and piece.dtype == torch.uint8):
        raise ConfigError("only flat uint8 CUDA tensors go by CUDA IPC", hint="use another carrier for host memory")
    handle = piece.untyped_storage()._share_cuda_()
    return tuple(handle), piece.storage_offset(), piece.numel()  # type: ignore[return-value]


class CudaIpcCarrier:
    """Both ends on one machine; every buffer is made of flat uint8 CUDA tensors, cut alike at both ends or not."""

    name = "cuda-ipc"

    def extents(self, buffers: Sequence[Buffer]) -> tuple[Sequence[Extent], Callable[[], None]]:
        return (), lambda: None

    def checksum(self, pieces: Pieces) -> int:
        """By the kernel, where the bytes lie."""
        device = pieces[0].device if pieces else torch.device("cuda")
        kernels = state_kernels(device)
        assert kernels is not None
        return device_checksum(pieces, partial(pack, kernels=kernels), kernels, device)

    async def push(self, link: Link, buffers: Sequence[Pieces]) -> None:
        pieces = [piece for buffer in buffers for piece in buffer if len(piece)]
        shared = [_share(piece) for piece in pieces]
        if pieces:
            torch.cuda.current_stream(pieces[0].device).synchronize()  # what wrote them has ended
        await link.send(msgspec.msgpack.encode(shared))
        if bytes(await link.receive()) != _COPIED:  # until then our memory must stay as it is
            raise ProtocolError("the receiver did not say that it had copied")

    async def pull(self, link: Link, targets: Sequence[Pieces]) -> None:
        try:
            shared = msgspec.msgpack.decode(await link.receive(), type=list[tuple[_Handle, int, int]])
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"CUDA IPC handles that do not decode: {error}") from None
        waiting = [piece for buffer in targets for piece in buffer if len(piece)]
        if sum(bytes_ for _, _, bytes_ in shared) != sum(len(piece) for piece in waiting):
            raise ProtocolError("the sender's memory has another size than its offer")
        for handle, offset, bytes_ in shared:
            storage = torch.UntypedStorage._new_shared_cuda(*handle)
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, offset, (bytes_,), (1,))
            while len(source):
                target = waiting[0]
                count = min(len(source), len(target))
                target[:count].copy_(source[:count], non_blocking=True)
                source, waiting[0] = source[count:], target[count:]
                if not len(waiting[0]):
                    waiting.pop(0)
        if targets and torch.cuda.is_available():
            torch.cuda.synchronize()
        await link.send(_COPIED)
