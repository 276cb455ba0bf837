"""What `turboserve bench kernels` times: each kernel at the sizes that serving runs, beside what a user would pick.

On CUDA: the Triton kernels (and the Gluon one on Hopper, the CUDA C twins where CuPy is there) at the Wan family's
sizes, bfloat16. On a CPU: the PyTorch pass at small sizes, so that every case's code runs in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from turboserve.bench.kernel_attention_cases import attention_cases
from turboserve.bench.kernel_case import Case, Work, error_of
from turboserve.bench.kernel_row_cases import row_cases
from turboserve.kernels import reference


@dataclass(frozen=True, slots=True)
class Sizes:
    """Shapes of one device."""

    attention: tuple[tuple[int, int, int, int, int], ...]  # heads, head_dim, rows a segment, visible tokens, segments
    rows: tuple[tuple[int, int, int], ...]  # rows, heads, head_dim
    extents: tuple[tuple[int, int], ...]  # bytes, count
    dtype: torch.dtype


CUDA_SIZES = Sizes(
    attention=(
        (12, 128, 4680, 4680, 1), (12, 128, 4680, 32760, 1), (12, 128, 4680, 32760, 4), (24, 128, 4680, 18720, 2),
        (40, 128, 4680, 18720, 1), (12, 128, 4680, 512, 4),
    ),
    rows=((4680, 12, 128), (18720, 12, 128), (9360, 24, 128), (4680, 40, 128)),
    extents=((64 << 10, 4096), (1 << 20, 512), (4_792_320, 120)),
    dtype=torch.bfloat16,
)  # fmt: skip
CPU_SIZES = Sizes(
    attention=((6, 32, 36, 144, 4), (2, 128, 60, 240, 2)),
    rows=((144, 6, 32), (64, 2, 128)),
    extents=((4096, 64),),
    dtype=torch.float32,
)


def cases(device: torch.device) -> Iterator[Case]:
    sizes = CUDA_SIZES if device.type == "cuda" else CPU_SIZES
    for shape in sizes.attention:
        for ragged in (False, True):
            if not ragged or shape[-1] > 1:
                yield from attention_cases(device, sizes.dtype, *shape, ragged=ragged)
    for rows, heads, dim in sizes.rows:
        yield from row_cases(device, sizes.dtype, rows, heads, dim)
    for extent_bytes, count in sizes.extents:
        yield from _extents(device, extent_bytes, count)


def _extents(device: torch.device, extent_bytes: int, count: int) -> Iterator[Case]:
    """Gather, scatter and checksum of state extents; half of a buffer's extents, in random order."""
    generator = torch.Generator(device=device).manual_seed(0)
    buffer = torch.randint(256, (2 * count * extent_bytes,), dtype=torch.uint8, generator=generator, device=device)
    chosen = torch.randperm(2 * count, generator=generator, device=device)[:count]
    starts = chosen * extent_bytes
    packed = reference.gather_extents(buffer, starts, extent_bytes)
    target = torch.zeros_like(buffer)
    rows, target_rows = buffer.view(-1, extent_bytes), target.view(-1, extent_bytes)

    def indexed_scatter() -> None:
        target_rows[chosen] = packed.view(-1, extent_bytes)

    def scattered(work: Work) -> float:
        target.zero_()
        work()
        return error_of(target_rows[chosen], rows[chosen])

    families: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    if device.type == "cuda":
        from turboserve.kernels import extents

        families["triton"] = extents
        try:
            import cupy  # noqa: F401

            from turboserve.kernels import extents_cupy

            families["cupy"] = extents_cupy
        except ImportError as error:
            skipped["cupy twin"] = str(error)
    else:
        families["torch"] = reference
        skipped["triton extents"] = skipped["cupy twin"] = "no CUDA device"
    gather_baselines = {"torch index_select": lambda: rows[chosen]}
    for name, family in families.items():
        gather = lambda f=family: f.gather_extents(buffer, starts, extent_bytes)
        scatter = lambda f=family: f.scatter_extents(packed, target, starts, extent_bytes)
        shape = f"{count} x {extent_bytes} bytes"
        moved = 2.0 * count * extent_bytes
        yield Case(
            f"extents/gather/{name}", shape, torch.uint8, "copy", moved, gather, gather_baselines,
            lambda gather=gather: error_of(gather(), packed), skipped,
        )  # fmt: skip
        yield Case(
            f"extents/scatter/{name}", shape, torch.uint8, "copy", moved, scatter,
            {"torch index_put": indexed_scatter}, lambda scatter=scatter: scattered(scatter), skipped,
        )  # fmt: skip
    checksum = reference.block_checksum
    if device.type == "cuda":
        checksum = families["triton"].block_checksum
    yield Case(
        f"extents/checksum/{next(iter(families))}",
        f"{count} x {extent_bytes} bytes",
        torch.uint8,
        "copy",
        float(count * extent_bytes),
        lambda: checksum(packed, extent_bytes),
        {"torch sum of words": lambda: packed.view(torch.int32).view(count, -1).sum(-1)},
        lambda: float((checksum(packed, extent_bytes) != reference.block_checksum(packed, extent_bytes)).any()),
    )
