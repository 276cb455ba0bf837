"""Which bytes of a session move: its pages and its tail, as they lie in memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from turboserve.geometry import SlotGeometry
from turboserve.model.interface import Field, SessionTensors, Tier, Update
from turboserve.model.shapes.model import ShapesModel
from turboserve.runtime.snapshot import SnapshotShape, contiguous_pieces, field_pieces


def test_every_shape_of_page_and_tail_comes_back():
    """Pages on any axis, small dtypes, host fields: what the pieces cover is the page, byte for byte."""
    generator = torch.Generator().manual_seed(3)
    for shape, axis in [((3, 4, 5), 0), ((3, 4, 5), 1), ((2, 3, 4, 5), 2), ((3, 4, 6), 2)]:
        whole = torch.randint(0, 100, shape, generator=generator, dtype=torch.int32).to(torch.bfloat16)
        for page in range(shape[axis]):
            pieces = contiguous_pieces(whole.select(axis, page))
            expected = whole.select(axis, page).contiguous().reshape(-1).view(torch.uint8)
            assert torch.equal(torch.cat(pieces), expected)
            assert all(piece.data_ptr() >= whole.data_ptr() for piece in pieces)


def test_a_layout_without_pages_is_all_tail():
    layout = (
        Field("x", (7,), "uint8", Tier.HOST, Update.OVERWRITE),
        Field("s", (9,), "int8", Tier.DEVICE, Update.SCRATCH),
    )
    spec = replace(ShapesModel.random(0).spec, slot=SlotGeometry(1, 4, 1, 3))
    shape = SnapshotShape(spec, layout, "n")
    assert (shape.page_bytes, shape.tail_bytes(), shape.page_chunks(9)) == (0, 7, ())
    state = SessionTensors("a" * 26, 0, 0, {"x": torch.arange(7, dtype=torch.uint8), "s": torch.zeros(9)})
    assert torch.cat(field_pieces(shape.tail_fields(), state.tensors)).tolist() == list(range(7))
