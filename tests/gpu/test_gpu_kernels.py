"""Every kernel compiled and run on the GPU: values, and bits alone, coalesced, permuted, offloaded and restored."""

from __future__ import annotations

import kernel_checks as checks
import pytest
import torch

from turboserve.kernels import attention

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16]
WAN = checks.Ragged(rows=(4680, 1560, 4680, 1), lens=(4680, 1561, 18720, 512), slot_tokens=18720, heads=12, dim=128)
SHAPES = checks.Ragged(rows=(36, 36, 35), lens=(36, 144, 72), slot_tokens=144, heads=6, dim=32)
ODD = checks.Ragged(rows=(1, 127, 129, 200), lens=(1, 130, 257, 64), slot_tokens=260, heads=5, dim=64)


def contender(name: str, shape: checks.Ragged, dtype: torch.dtype, device: torch.device) -> checks.Attend:
    major, minor = torch.cuda.get_device_capability(device)
    if name == "triton":
        return checks.triton_attention(attention.tile_config(10 * major + minor, shape.dim, dtype))
    if (major, minor) != (9, 0):
        pytest.skip(f"the Gluon kernel is for sm_90, this is sm_{major}{minor}")
    if shape.dim not in (64, 128):
        pytest.skip("the Gluon kernel has no tiles for this head_dim")
    return checks.hopper_attention()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [WAN, SHAPES, ODD], ids=["wan", "shapes", "odd"])
@pytest.mark.parametrize("name", ["triton", "gluon"])
def test_attention(name, shape, dtype, device):
    attend = contender(name, shape, dtype, device)
    checks.attention_equals_the_reference(attend, shape, dtype, device)
    checks.attention_has_the_same_bits(attend, shape, dtype, device)


def test_attention_in_float32(device):
    attend = checks.triton_attention(attention.TILES_FLOAT32)
    checks.attention_equals_the_reference(attend, SHAPES, torch.float32, device)
    checks.attention_has_the_same_bits(attend, SHAPES, torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels"), [(4680, 1536), (37, 192), (1001, 3072), (9, 5120), (3, 160)])
def test_norms(rows, channels, dtype, device):
    checks.norms_equal_the_reference(rows, channels, dtype, device)
    checks.rows_have_the_same_bits(rows, channels, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads", "dim"), [(4680, 12, 128), (36, 6, 32), (501, 24, 128), (7, 40, 128)])
def test_append(rows, heads, dim, dtype, device):
    checks.append_equals_the_reference(rows, heads, dim, dtype, device)


@pytest.mark.parametrize(("extent_bytes", "count"), [(16, 7), (65_536, 200), (4_792_320, 12)])
def test_extents(extent_bytes, count, device):
    checks.extents_go_there_and_back(extent_bytes, count, device)


@pytest.mark.parametrize(("extent_bytes", "count"), [(16, 7), (65_536, 200), (4_792_320, 12)])
def test_the_cuda_c_twins(extent_bytes, count, device):
    pytest.importorskip("cupy", reason="CuPy is not installed; its twins cannot run")
    from turboserve.kernels import extents_cupy

    checks.extents_go_there_and_back(extent_bytes, count, device, extents_cupy)


def test_checksum(device):
    checks.checksum_equals_the_reference(1 << 20, 40, device)
    checks.checksum_equals_the_reference(20_000, 3, device)
