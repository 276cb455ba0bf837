"""numerics_id names what changes bits, and the load-time check sees a model that is not batch-invariant."""

import pytest
import torch
from tiny_model import TinyModel

from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.numerics import check_numerics, compute_numerics_id, device_class, packed_equals_alone

pytestmark = pytest.mark.usefixtures("deterministic")
CPU = torch.device("cpu")


def test_the_id_depends_on_model_and_kernels_and_repeats():
    first = compute_numerics_id("m", CPU, {"linear": "packed"})
    assert first == compute_numerics_id("m", CPU, {"linear": "packed"})
    assert len({first, compute_numerics_id("n", CPU, {"linear": "packed"}), compute_numerics_id("m", CPU, {})}) == 3


def test_the_check_at_load_passes_and_holds_nothing():
    model = TinyModel()
    pool = KvPool(model.state_layout(), 4)
    report = check_numerics(model, pool)
    assert report.packed_equals_alone and report.device_class == device_class(CPU)
    assert pool.held_bytes() == 0


def test_a_model_whose_rows_depend_on_company_is_noticed():
    class Mixing(TinyModel):
        def forward(self, batch):
            rows = super().forward(batch)
            return rows + 1e-6 * rows.mean() if len(batch.segments) > 1 else rows

    model = Mixing()
    assert not packed_equals_alone(model, KvPool(model.state_layout(), 4))
