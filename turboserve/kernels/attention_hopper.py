"""`attn_varlen_slot` for Hopper in Gluon: one warp group loads, two compute in turns ("ping-pong").

Plain Triton leaves the tensor cores idle while a warp group does its softmax. Here two warp groups of four warps own 64
query rows each and take turns at issuing matrix products, so that one's softmax runs under the other's products; a
third warp group brings keys and values in by TMA through a ring of two stages. Work list, places, tile order within a
segment and the arithmetic depend on the segment alone: no split over keys, no atomics.

State of this file: compiled ahead of time for sm_90 (tests/kernels/test_aot.py), NEVER RUN: there was no Hopper GPU
where it was written, and Gluon has no interpreter. So nothing in serving calls it: `packed_triton.py` uses attention.py
until `make gpu` has shown that this one is right and faster (docs/kernels.md).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from turboserve.kernels.attention import LOG2_E
from turboserve.kernels.reference import UNIT_BYTES

BLOCK_M, BLOCK_N, STAGES = 128, 128, 2  # two warp groups share BLOCK_M rows
NUM_WARPS = 4  # of each warp group
# 2 * 240 + 24 registers are what three warp groups of 168 have; the first group gets what the others leave.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


@gluon.jit
def _load(k_desc, v_desc, k_ring, v_ring, k_full, v_full, k_free, v_free, kv_len):
    """The loading warp group. The last tile comes first: the ragged one is masked, the others need no mask."""
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[0]
    STAGES: gl.constexpr = k_ring.shape[0]
    tiles = (kv_len + BLOCK_N - 1) // BLOCK_N
    for i in range(tiles):
        stage = i % STAGES
        # A fresh barrier lets a wait for the phase before its first one pass: the ring begins free.
        phase = ((i // STAGES) & 1) ^ 1
        start = (tiles - 1 - i) * BLOCK_N
        mbarrier.wait(k_free.index(stage), phase)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [start, 0], k_full.index(stage), k_ring.index(stage))
        mbarrier.wait(v_free.index(stage), phase)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [start, 0], v_full.index(stage), v_ring.index(stage))


@gluon.jit
def _softmax_step(scores, peak, total, qk_scale_log2):
    """(weights, new peak, new total, factor for what was added up before) of one tile of scores."""
    new_peak = gl.maximum(peak, gl.max(scores, 1) * qk_scale_log2)
    weights = gl.exp2(scores * qk_scale_log2 - gl.expand_dims(new_peak, 1))
    shrink = gl.exp2(peak - new_peak)
    return weights, new_peak, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _compute(
    q_smem,
    k_ring,
    v_ring,
    q_full,
    k_full,
    v_full,
    k_free,
    v_free,
    turns,
    out_ptr,
    first_row,
    rows,
    stride_out_row,
    kv_len,
    qk_scale_log2,
    group: gl.constexpr,
):
    """A computing warp group: rows `group` * 64 to + 63 of the tile."""
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    HEAD_DIM: gl.constexpr = k_ring.shape[2]
    ROWS: gl.constexpr = q_smem.shape[1]
    dtype: gl.constexpr = k_ring.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    out_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    weight_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=out_layout, k_width=2)
    score_rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)

    tiles = (kv_len + BLOCK_N - 1) // BLOCK_N
    q = q_smem.index(group)
    peak = gl.full([ROWS], -float("inf"), gl.float32, score_rows)
    total = gl.zeros([ROWS], gl.float32, score_rows)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)
    no_scores = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)

    # The ragged tile, alone. What lies past kv_len came in as zeros, and its weight is exp2(-inf).
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(q, k_ring.index(0).permute((1, 0)), no_scores, use_acc=False)
    mbarrier.arrive(k_free.index(0), count=1)
    columns = (tiles - 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, score_layout))
    scores = gl.where(gl.expand_dims(columns, 0) < kv_len, scores, -float("inf"))
    weights, peak, total, shrink = _softmax_step(scores, peak, total, qk_scale_log2)
    operand = gl.convert_layout(weights.to(dtype), weight_layout)

    for i in range(1, tiles):
        stage = i % STAGES
        before = (i - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        # Group 0 goes first: its barrier is fresh, and waiting for the phase before the first one passes.
        mbarrier.wait(turns.index(group), ((i - 1) & 1) ^ (1 - group))
        next_scores = warpgroup_mma(
            q, k_ring.index(stage).permute((1, 0)), warpgroup_mma_init(no_scores), use_acc=False, is_async=True
        )
        added = warpgroup_mma(operand, v_ring.index(before), warpgroup_mma_init(acc), is_async=True)
        mbarrier.arrive(turns.index(1 - group), count=1)
        scores, added = warpgroup_mma_wait(1, deps=[next_scores, added])
        mbarrier.arrive(k_free.index(stage), count=1)
        weights, peak, total, shrink = _softmax_step(scores, peak, total, qk_scale_log2)
        acc = warpgroup_mma_wait(0, deps=[added])
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, out_rows), 1)
        operand = gl.convert_layout(weights.to(dtype), weight_layout)

    last = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((tiles - 1) // STAGES) & 1)
    acc = warpgroup_mma(operand, v_ring.index(last), acc)
    acc = acc / gl.expand_dims(gl.convert_layout(total, out_rows), 1)

    # Eight channels a thread: stores of 16 bytes.
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    out = gl.convert_layout(acc.to(dtype), store_layout)
    row = group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, store_layout))
    column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, store_layout))
    offsets = gl.expand_dims((first_row + row).to(gl.int64) * stride_out_row, 1) + gl.expand_dims(column, 0)
    gl.store(out_ptr + offsets, out, mask=gl.expand_dims(row < rows, 1))


@gluon.jit
def _compute_first(
    q, k, v, q_full, k_full, v_full, k_free, v_free, turns, out_ptr, first_row, rows, stride, kv_len, scale
):
    _compute(q, k, v, q_full, k_full, v_full, k_free, v_free, turns, out_ptr, first_row, rows, stride, kv_len, scale, 0)


@gluon.jit
def _compute_second(
    q, k, v, q_full, k_full, v_full, k_free, v_free, turns, out_ptr, first_row, rows, stride, kv_len, scale
):
    _compute(q, k, v, q_full, k_full, v_full, k_free, v_free, turns, out_ptr, first_row, rows, stride, kv_len, scale, 1)


@gluon.jit
def _attn_varlen_hopper_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    work_ptr,
    places_ptr,
    stride_q_row,
    stride_k_token,
    stride_v_token,
    qk_scale_log2,
    UNIT: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    tile = gl.program_id(0)
    head = gl.program_id(1)
    first_row = gl.load(work_ptr + tile * 4 + 0)
    rows = gl.load(work_ptr + tile * 4 + 1)
    place = gl.load(work_ptr + tile * 4 + 2)
    kv_len = gl.load(work_ptr + tile * 4 + 3)
    q_base = q_ptr + first_row.to(gl.int64) * stride_q_row + head * HEAD_DIM
    k_base = k_ptr + gl.load(places_ptr + place * 2 + 0) * UNIT + head * HEAD_DIM
    v_base = v_ptr + gl.load(places_ptr + place * 2 + 1) * UNIT + head * HEAD_DIM

    # Descriptors end at the segment's rows and at the tokens it sees: what lies beyond is filled with zeros.
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    ROWS: gl.constexpr = BLOCK_M // 2
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype)
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], dtype)
    q_desc = tma.make_tensor_descriptor(q_base, [rows, HEAD_DIM], [stride_q_row, 1], [ROWS, HEAD_DIM], q_layout)
    k_desc = tma.make_tensor_descriptor(k_base, [kv_len, HEAD_DIM], [stride_k_token, 1], [BLOCK_N, HEAD_DIM], kv_layout)
    v_desc = tma.make_tensor_descriptor(v_base, [kv_len, HEAD_DIM], [stride_v_token, 1], [BLOCK_N, HEAD_DIM], kv_layout)

    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], q_layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], kv_layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], kv_layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)  # both computing groups let a stage go
        mbarrier.init(v_free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()

    mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [0, 0], q_full, q_smem.index(0))
    tma.async_copy_global_to_shared(q_desc, [ROWS, 0], q_full, q_smem.index(1))
    out_base = out_ptr + head * HEAD_DIM
    compute = (
        q_smem, k_ring, v_ring, q_full, k_full, v_full, k_free, v_free, turns,
        out_base, first_row, rows, stride_q_row, kv_len, qk_scale_log2,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_compute_first, compute),
            (_compute_second, compute),
            (_load, (k_desc, v_desc, k_ring, v_ring, k_full, v_full, k_free, v_free, kv_len)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def attn_varlen_hopper(
    q: Tensor, k_base: Tensor, v_base: Tensor, places: Tensor, work: Tensor, scale: float | None = None
) -> Tensor:
    """As attention.attn_varlen_placed, with a work list made with BLOCK_M; 16-bit inputs, head_dim 64 or 128, sm_90."""
    heads, head_dim = q.shape[-2:]
    for one in (q, k_base, v_base):
        if one.stride(-1) != 1 or one.stride(-2) != head_dim or one.dtype != q.dtype:
            raise ValueError("attention: [H, D] of a token must be contiguous, and all inputs of one dtype")
    if q.element_size() != 2 or head_dim not in (64, 128):
        raise ValueError(f"{q.dtype} with head_dim {head_dim}; this kernel takes 16-bit numbers and 64 or 128")
    out = torch.empty_like(q)
    # The descriptors that programs make for themselves need a little memory.
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=q.device))
    _attn_varlen_hopper_kernel[(work.shape[0], heads)](
        q_ptr=q,
        k_ptr=k_base,
        v_ptr=v_base,
        out_ptr=out,
        work_ptr=work,
        places_ptr=places,
        stride_q_row=q.stride(0),
        stride_k_token=k_base.stride(0),
        stride_v_token=v_base.stride(0),
        qk_scale_log2=(head_dim**-0.5 if scale is None else scale) * LOG2_E,
        UNIT=UNIT_BYTES // q.element_size(),
        HEAD_DIM=head_dim,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        STAGES=STAGES,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=NUM_WARPS,
    )
    return out
