"""Latent frames <-> tokens <-> pages <-> bytes: all of that arithmetic, once.

A *page* holds the keys and values of one chunk. A session's *slot* is `sink_pages + window_pages` pages in a
row: the sink first, then a ring. The window counts the chunk in work, so while chunk c is denoised its page is
the one that held chunk c - window_pages, which c may not see: denoise passes use it as scratch, and the
context pass makes it permanent. Nothing is moved and nothing is masked: what a chunk sees is always the first
`kv_tokens(c)` tokens of the slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_DTYPE_BYTES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "uint8": 1,
    "int8": 1,
    "bool": 1,
}


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of the named dtype; a KeyError names an unknown one."""
    return _DTYPE_BYTES[dtype]


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * dtype_bytes(dtype)


@dataclass(frozen=True, slots=True)
class SlotGeometry:
    """How a session's chunks lie in its slot. Counts are latent frames, tokens and pages.

    `window_latent_frames` includes the chunk in work and excludes the sink (house words); both must be whole
    chunks.
    """

    chunk_latent_frames: int
    tokens_per_latent_frame: int
    sink_latent_frames: int
    window_latent_frames: int

    def __post_init__(self) -> None:
        for name in ("sink_latent_frames", "window_latent_frames"):
            if getattr(self, name) % self.chunk_latent_frames:
                raise ValueError(f"{name} must be whole chunks of {self.chunk_latent_frames} latent frames")
        if self.window_latent_frames < self.chunk_latent_frames:
            raise ValueError("the window must hold at least the chunk in work")

    @property
    def page_tokens(self) -> int:
        """Tokens of one chunk, which is one page."""
        return self.chunk_latent_frames * self.tokens_per_latent_frame

    @property
    def sink_pages(self) -> int:
        return self.sink_latent_frames // self.chunk_latent_frames

    @property
    def window_pages(self) -> int:
        return self.window_latent_frames // self.chunk_latent_frames

    @property
    def page_count(self) -> int:
        """Pages of a slot: sink and ring."""
        return self.sink_pages + self.window_pages

    @property
    def slot_tokens(self) -> int:
        return self.page_count * self.page_tokens

    def page_of_chunk(self, chunk_index: int) -> int:
        """The page chunk `chunk_index` writes to; a function of the index alone, so bits cannot depend on
        what happened to the session in between."""
        if chunk_index < self.sink_pages:
            return chunk_index
        return self.sink_pages + (chunk_index - self.sink_pages) % self.window_pages

    def kv_tokens(self, chunk_index: int) -> int:
        """Tokens that chunk `chunk_index` sees, its own included: a prefix of the slot."""
        return min(chunk_index + 1, self.page_count) * self.page_tokens

    def page_positions(self, chunk_index: int) -> tuple[int, ...]:
        """Window position of every visible page, in the order the pages lie in the slot.

        Positions count chunks: the sink is 0..sink_pages-1, then the window from oldest to the chunk in work.
        With relative rotary embeddings keys are cached un-rotated and rotated by these.
        """
        visible = min(chunk_index + 1, self.page_count)
        if chunk_index < self.page_count:
            return tuple(range(visible))
        newest = self.page_of_chunk(chunk_index) - self.sink_pages
        ring = tuple(
            self.sink_pages + self.window_pages - 1 - (newest - page) % self.window_pages
            for page in range(self.window_pages)
        )
        return tuple(range(self.sink_pages)) + ring

    def resident_chunks(self, next_chunk_index: int) -> tuple[tuple[int, int], ...]:
        """(page, chunk) of every committed page when `next_chunk_index` is about to begin."""
        last = next_chunk_index - 1
        chunks = list(range(min(self.sink_pages, next_chunk_index)))
        chunks += range(max(self.sink_pages, last - self.window_pages + 1), next_chunk_index)
        return tuple((self.page_of_chunk(chunk), chunk) for chunk in chunks)
