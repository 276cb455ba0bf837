"""The checks that a GPU is held to (tests/gpu), here on the interpreter with small shapes."""

from __future__ import annotations

import kernel_checks as checks
import pytest
import torch

from turboserve.kernels.attention import TileConfig

CPU = torch.device("cpu")
SMALL = checks.Ragged(rows=(5, 20, 9), lens=(33, 40, 7), slot_tokens=40, heads=2, dim=32)
DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype):
    attend = checks.triton_attention(TileConfig(16, 16, 4, 2))
    checks.attention_equals_the_reference(attend, SMALL, dtype, CPU)
    checks.attention_has_the_same_bits(attend, SMALL, dtype, CPU)


def test_a_kernel_whose_bits_depend_on_its_neighbours_is_found():
    """Right within tolerance, but a little different for every number of segments: the check must see that."""

    def attend(q, k, v, rows, slots, lens):
        right = checks.triton_attention(TileConfig(16, 16, 4, 2))(q, k, v, rows, slots, lens)
        return right * (1 + 1e-6 * len(rows))

    checks.attention_equals_the_reference(attend, SMALL, torch.float32, CPU)
    with pytest.raises(AssertionError):
        checks.attention_has_the_same_bits(attend, SMALL, torch.float32, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype):
    checks.norms_equal_the_reference(7, 160, dtype, CPU)
    checks.rows_have_the_same_bits(9, 192, dtype, CPU)
    checks.append_equals_the_reference(6, 3, 32, dtype, CPU)


def test_bytes():
    checks.extents_go_there_and_back(4096, 3, CPU)
    checks.checksum_equals_the_reference(20_000, 3, CPU)
