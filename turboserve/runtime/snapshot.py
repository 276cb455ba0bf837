"""What of a session lies where as bytes: derived from the model's `state_layout` alone.

Per session there is

- *pages*: for each finished chunk that later ones can see, its slice of every APPEND_CHUNK field;
- the *tail*: every PER_PROMPT and OVERWRITE field that its decoder gives it, whole, in the order of the layout.

SCRATCH never moves, and neither does the page that the next chunk overwrites before it reads. Bytes lie as in memory,
row-major; both ends have equal layout hashes, so no shapes travel. `session_points.SessionPoints` writes and reads
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from turboserve.model.interface import Field, ModelSpec, Update, layout_hash, session_layout
from turboserve.runtime.arena import address_of


def contiguous_pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Flat uint8 views that together are the tensor, row-major; one when it is contiguous."""
    if tensor.numel() == 0:
        return []
    if tensor.is_contiguous():
        return [tensor.reshape(-1).view(torch.uint8)]
    return [piece for row in tensor.unbind(0) for piece in contiguous_pieces(row)]


def field_pieces(fields: Sequence[Field], tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The memory of whole fields, in their order."""
    return [piece for one in fields for piece in contiguous_pieces(tensors[one.name])]


class SnapshotShape:
    """What a worker's sessions look like as bytes: from its model, whose runtime numerics have an id."""

    def __init__(self, spec: ModelSpec, layout: Sequence[Field], numerics_id: str) -> None:
        self.spec = spec
        self.numerics_id = numerics_id
        self.layout_hash = layout_hash(layout)
        self.page_fields = tuple(one for one in layout if one.update is Update.APPEND_CHUNK)
        self.page_bytes = sum(one.page_bytes for one in self.page_fields)
        self._tail_fields = tuple(one for one in layout if one.update in (Update.PER_PROMPT, Update.OVERWRITE))

    def tail_fields(self, decoder: str = "", update: Update | None = None) -> tuple[Field, ...]:
        """What the tail of a session with this decoder ("": the default) is made of; of one kind of update, or all."""
        fields = session_layout(self._tail_fields, self.spec.decoder(decoder))
        return tuple(one for one in fields if update in (None, one.update))

    def tail_bytes(self, decoder: str = "") -> int:
        return sum(one.nbytes for one in self.tail_fields(decoder))

    def page_chunks(self, next_chunk_index: int) -> tuple[int, ...]:
        """The chunks whose pages a session needs when `next_chunk_index` comes next, oldest first."""
        if not self.page_fields:
            return ()
        slot = self.spec.slot
        scratch = slot.page_of_chunk(next_chunk_index)
        return tuple(chunk for page, chunk in slot.resident_chunks(next_chunk_index) if page != scratch)

    def page_pieces(self, tensors: Mapping[str, torch.Tensor], chunk: int) -> list[torch.Tensor]:
        """The session's memory of one chunk's page, in the order of its bytes: field by field, layer by layer."""
        page = self.spec.slot.page_of_chunk(chunk)
        pieces = []
        for one in self.page_fields:
            assert one.page_axis is not None
            pieces += contiguous_pieces(tensors[one.name].select(one.page_axis, page))
        return pieces


def tensor_addresses(pieces: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """(address, bytes) of flat uint8 tensors."""
    return [(piece.data_ptr(), piece.numel()) for piece in pieces]


def view_addresses(views: Sequence[memoryview]) -> list[tuple[int, int]]:
    """(address, bytes) of buffers."""
    return [(address_of(view), len(view)) for view in views if len(view)]
