"""Moving and checking bytes of session state, in Triton: gather and scatter of equal extents, block checksum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboserve.kernels.reference import CHECKSUM_PRIME, UNIT_BYTES

BLOCK_WORDS = 4096
CHECKSUM_WORDS = 4096


@triton.jit
def _extents_kernel(packed_ptr, wide_ptr, starts_ptr, extent_words, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    """Copies words between extent i of `wide` (from starts[i]) and place i of `packed`."""
    extent = tl.program_id(0).to(tl.int64)
    words = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = words < extent_words
    # Starts count 16-byte units: the factor 4 tells the compiler that every access is aligned to 128 bits.
    wide = wide_ptr + tl.load(starts_ptr + extent) * 4 + words
    packed = packed_ptr + extent * extent_words + words
    if GATHER:
        tl.store(packed, tl.load(wide, mask=mask), mask=mask)
    else:
        tl.store(wide, tl.load(packed, mask=mask), mask=mask)


@triton.jit
def _checksum_kernel(data_ptr, out_ptr, block_words, prime, BLOCK: tl.constexpr):
    """Two wrapping sums of a block's 32-bit words, one of them weighted by place; see reference.block_checksum."""
    block = tl.program_id(0).to(tl.int64)
    plain = tl.zeros([BLOCK], tl.uint32)
    mixed = tl.zeros([BLOCK], tl.uint32)
    for start in tl.range(0, block_words, BLOCK):
        index = start + tl.arange(0, BLOCK)
        word = tl.load(data_ptr + block * block_words + index, mask=index < block_words, other=0).to(tl.uint32)
        plain += word
        mixed += word * (index.to(tl.uint32) * prime.to(tl.uint32) + 1)
    low = tl.sum(plain, 0).to(tl.uint64)
    high = tl.sum(mixed, 0).to(tl.uint64)
    tl.store(out_ptr + block, ((high << 32) | (low & 0xFFFFFFFF)).to(tl.int64, bitcast=True))


def _as_words(data: Tensor) -> Tensor:
    if data.numel() % 4 or data.data_ptr() % 4:
        raise ValueError("byte buffers must be whole aligned 32-bit words")
    return data.view(torch.int32)


def _copy(packed: Tensor, wide: Tensor, starts: Tensor, extent_bytes: int, *, gather: bool) -> None:
    if extent_bytes % UNIT_BYTES:
        raise ValueError(f"extents of {extent_bytes} bytes; they must be multiples of {UNIT_BYTES}")
    words = extent_bytes // 4
    _extents_kernel[(starts.numel(), triton.cdiv(words, BLOCK_WORDS))](
        packed_ptr=_as_words(packed),
        wide_ptr=_as_words(wide),
        starts_ptr=starts // UNIT_BYTES,
        extent_words=words,
        GATHER=gather,
        BLOCK=BLOCK_WORDS,
        num_warps=8,
    )


def gather_extents(source: Tensor, starts: Tensor, extent_bytes: int, out: Tensor | None = None) -> Tensor:
    """Equal extents laid end to end, in `out` if given. `starts`: int64 byte offsets from the first byte of `source`,
    multiples of 16; they may name memory of other allocations, on either side of it."""
    size = starts.numel() * extent_bytes
    packed = torch.empty(size, dtype=torch.uint8, device=source.device) if out is None else out
    if packed.numel() != size:
        raise ValueError(f"{starts.numel()} extents of {extent_bytes} bytes into {packed.numel()} bytes")
    _copy(packed, source, starts, extent_bytes, gather=True)
    return packed


def scatter_extents(packed: Tensor, target: Tensor, starts: Tensor, extent_bytes: int) -> None:
    """The reverse of `gather_extents`, in place; `starts` count from the first byte of `target`. No overlaps."""
    _copy(packed, target, starts, extent_bytes, gather=False)


def block_checksum(data: Tensor, block_bytes: int) -> Tensor:
    """int64 [blocks]: see reference.block_checksum."""
    if block_bytes % 4 or data.numel() % block_bytes:
        raise ValueError(f"{data.numel()} bytes in blocks of {block_bytes}; they must be whole blocks of whole words")
    out = torch.empty(data.numel() // block_bytes, dtype=torch.int64, device=data.device)
    _checksum_kernel[(out.numel(),)](
        data_ptr=_as_words(data),
        out_ptr=out,
        block_words=block_bytes // 4,
        prime=CHECKSUM_PRIME,
        BLOCK=CHECKSUM_WORDS,
        num_warps=8,
    )
    return out
