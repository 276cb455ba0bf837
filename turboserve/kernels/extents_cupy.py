"""Gather and scatter of state extents as CUDA C, for machines with CuPy: the twin of the Triton kernel in extents.py.

The source is compiled where it runs (NVRTC, through cupy.RawKernel). It is without includes and typeless: 16-byte units
only. Which of the two is used is for `turboserve bench kernels` on a GPU to say; until it has, transport uses Triton.
Here, without a GPU, the source is compiled by nvcc and its machine code looked at (aot.py).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from turboserve.kernels.reference import UNIT_BYTES

THREADS = 256
UNITS_A_THREAD = 4
UNITS_A_BLOCK = THREADS * UNITS_A_THREAD

SOURCE = r"""
// Extent blockIdx.y; threads of a block copy UNITS 16-byte units each, a block's width apart, all loads before stores.
// starts: where an extent begins in `wide`, in units. packed: extents end to end.
template <bool GATHER>
__device__ __forceinline__ void copy_extents(uint4* __restrict__ packed, uint4* __restrict__ wide,
                                             const long long* __restrict__ starts, int extent_units) {
    uint4* one = wide + starts[blockIdx.y];
    uint4* place = packed + (long long)blockIdx.y * extent_units;
    const uint4* source = GATHER ? one : place;
    uint4* target = GATHER ? place : one;
    const int first = blockIdx.x * (THREADS * UNITS) + threadIdx.x;
    uint4 held[UNITS];
#pragma unroll
    for (int i = 0; i < UNITS; ++i)
        if (first + i * THREADS < extent_units) held[i] = source[first + i * THREADS];
#pragma unroll
    for (int i = 0; i < UNITS; ++i)
        if (first + i * THREADS < extent_units) target[first + i * THREADS] = held[i];
}

extern "C" __global__ void __launch_bounds__(THREADS)
gather_extents(uint4* packed, uint4* wide, const long long* starts, int extent_units) {
    copy_extents<true>(packed, wide, starts, extent_units);
}

extern "C" __global__ void __launch_bounds__(THREADS)
scatter_extents(uint4* packed, uint4* wide, const long long* starts, int extent_units) {
    copy_extents<false>(packed, wide, starts, extent_units);
}
"""
DEFINES = (f"-DTHREADS={THREADS}", f"-DUNITS={UNITS_A_THREAD}")
KERNELS = ("gather_extents", "scatter_extents")


@functools.lru_cache(maxsize=2)
def _raw_kernel(name: str) -> Any:
    import cupy

    return cupy.RawKernel(SOURCE, name, options=("--std=c++17", *DEFINES))


def _launch(name: str, packed: Tensor, wide: Tensor, starts: Tensor, extent_bytes: int) -> None:
    import cupy

    if extent_bytes % UNIT_BYTES:
        raise ValueError(f"extents of {extent_bytes} bytes; they must be multiples of {UNIT_BYTES}")
    if not (packed.is_cuda and wide.is_cuda) or any(one.data_ptr() % UNIT_BYTES for one in (packed, wide)):
        raise ValueError(f"both buffers must be on a CUDA device and begin at multiples of {UNIT_BYTES} bytes")
    units = extent_bytes // UNIT_BYTES
    placed = (starts // UNIT_BYTES).contiguous()
    grid = ((units + UNITS_A_BLOCK - 1) // UNITS_A_BLOCK, starts.numel())
    arguments = (packed.data_ptr(), wide.data_ptr(), placed.data_ptr(), cupy.int32(units))
    # On torch's own stream: what was written there before is seen, and what comes after waits.
    stream = torch.cuda.current_stream(packed.device)
    with cupy.cuda.Device(packed.device.index), cupy.cuda.ExternalStream(stream.cuda_stream):
        _raw_kernel(name)(grid, (THREADS,), arguments)
    # Torch's allocator may hand the memory out again once Python lets go of it, but only behind this stream's work.
    placed.record_stream(stream)


def gather_extents(source: Tensor, starts: Tensor, extent_bytes: int, out: Tensor | None = None) -> Tensor:
    """As extents.gather_extents. `starts`: int64 byte offsets on the device, multiples of 16; 65,535 at most."""
    size = starts.numel() * extent_bytes
    packed = torch.empty(size, dtype=torch.uint8, device=source.device) if out is None else out
    if packed.numel() != size:
        raise ValueError(f"{starts.numel()} extents of {extent_bytes} bytes into {packed.numel()} bytes")
    _launch("gather_extents", packed, source, starts, extent_bytes)
    return packed


def scatter_extents(packed: Tensor, target: Tensor, starts: Tensor, extent_bytes: int) -> None:
    """As extents.scatter_extents."""
    _launch("scatter_extents", packed, target, starts, extent_bytes)
