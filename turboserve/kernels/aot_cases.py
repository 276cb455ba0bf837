"""The kernels that ship, each with the configurations to compile: sizes of the Wan family and of `shapes`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# (WITH_GATE, WITH_NORM, AFFINE) of the residual kernel's forms.
_RESIDUALS = {
    "gated_residual": (True, False, False),
    "gated_residual_norm": (True, True, False),
    "residual_norm": (False, True, False),
    "gated_residual_affine": (True, True, True),
}


@dataclass(frozen=True, slots=True)
class AotCase:
    """One kernel at one configuration. `signature` maps argument to Triton type; constants are the constexprs."""

    kernel: str
    config: str
    fn: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    memory_bound: bool = True
    wide: bool = True
    """Whether its accesses must be 128 bits wide: not so for the little `shapes` sizes."""
    aligned: tuple[str, ...] = field(default=())
    """Arguments that the launcher would find divisible by 16: row strides (pointers are so anyhow)."""
    warp_specialised: bool = False
    """Whether warp groups must trade registers and bring tiles in by TMA."""


def cases(arch: int) -> Iterator[AotCase]:
    """All shipped Triton and Gluon kernels for an arch."""
    yield from _attention(arch)
    yield from _rows()
    yield from _keys()
    yield from _extents()


def _attention(arch: int) -> Iterator[AotCase]:
    import torch

    from turboserve.kernels import attention

    signature = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16"),
        "work_ptr": "*i32",
        "places_ptr": "*i64",
        **dict.fromkeys(("stride_q_row", "stride_k_token", "stride_v_token"), "i32"),
        "qk_scale_log2": "fp32",
    }
    strides = ("stride_q_row", "stride_k_token", "stride_v_token")
    for head_dim in (32, 64, 128):
        tile = attention.tile_config(arch, head_dim, torch.bfloat16)
        yield AotCase(
            "attn_varlen_slot",
            f"D{head_dim} {tile.block_m}x{tile.block_n} w{tile.num_warps} s{tile.num_stages} bf16",
            attention._attn_varlen_slot_kernel,
            signature,
            {"UNIT": 8, "HEAD_DIM": head_dim, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "UPCAST": False},
            tile.num_warps,
            tile.num_stages,
            memory_bound=False,
            aligned=strides,
        )
    if arch == 90:
        from turboserve.kernels import attention_hopper as hopper

        for head_dim in (64, 128):
            yield AotCase(
                "attn_varlen_hopper",
                f"D{head_dim} {hopper.BLOCK_M}x{hopper.BLOCK_N} 3x w{hopper.NUM_WARPS} s{hopper.STAGES} bf16",
                hopper._attn_varlen_hopper_kernel,
                signature,
                {
                    "UNIT": 8,
                    "HEAD_DIM": head_dim,
                    "BLOCK_M": hopper.BLOCK_M,
                    "BLOCK_N": hopper.BLOCK_N,
                    "STAGES": hopper.STAGES,
                    "CONSUMER_REGISTERS": hopper.CONSUMER_REGISTERS,
                    "PRODUCER_REGISTERS": hopper.PRODUCER_REGISTERS,
                },
                hopper.NUM_WARPS,
                memory_bound=False,
                aligned=strides,
                warp_specialised=True,
            )


def _rows() -> Iterator[AotCase]:
    from turboserve.kernels import norm

    for channels in (192, 1536, 3072, 5120):
        rows, block, warps = norm.row_block(channels)
        tables = dict.fromkeys(("shift_ptr", "scale_ptr"), "*fp32")
        numbers = {"row_count": "i32", "channels": "i32", "stride_table": "i32", "eps": "fp32"}
        constants = {"ROWS": rows, "BLOCK": block}
        yield AotCase(
            "layer_norm_modulate",
            f"C{channels} rows{rows} w{warps} bf16",
            norm._layer_norm_modulate_kernel,
            {"x_ptr": "*bf16", **tables, "level_ptr": "*i32", "out_ptr": "*bf16", **numbers},
            constants,
            warps,
            aligned=("channels", "stride_table"),
        )
        for name, flags in _RESIDUALS.items():
            yield AotCase(
                name,
                f"C{channels} rows{rows} w{warps} bf16",
                norm._gated_residual_kernel,
                {
                    **dict.fromkeys(("x_ptr", "y_ptr"), "*bf16"),
                    "gate_ptr": "*fp32",
                    **tables,
                    "level_ptr": "*i32",
                    **dict.fromkeys(("residual_ptr", "out_ptr"), "*bf16"),
                    "stride_gate": "i32",
                    **numbers,
                },
                constants | dict(zip(("WITH_GATE", "WITH_NORM", "AFFINE"), flags, strict=True)),
                warps,
                aligned=("channels", "stride_gate", "stride_table"),
            )
        yield AotCase(
            "rms_norm",
            f"C{channels} rows{rows} w{warps} bf16",
            norm._rms_norm_kernel,
            {
                **dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), "*bf16"),
                "row_count": "i32",
                "channels": "i32",
                "eps": "fp32",
            },
            constants,
            warps,
            aligned=("channels",),
        )


def _keys() -> Iterator[AotCase]:
    import triton

    from turboserve.kernels import rope

    for heads, head_dim in ((6, 32), (12, 128), (24, 128), (40, 128)):
        half = head_dim // 2
        yield AotCase(
            "qk_norm_rope_append",
            f"H{heads} D{head_dim} bf16",
            rope._qk_norm_rope_append_kernel,
            {
                **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr"), "*bf16"),
                **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
                **dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), "*bf16"),
                "places_ptr": "*i64",
                "out_ptr": "*bf16",
                "channels": "i32",
                "stride_in": "i32",
                "eps": "fp32",
                "heads": "i32",
            },
            {
                "ROTATE_KEYS": True,
                "UNIT": 8,
                "HALF": half,
                "HEADS": triton.next_power_of_2(heads),
                "PAIRS": triton.next_power_of_2(half),
            },
            rope.warp_count(heads * head_dim),
            wide=heads * head_dim >= 1024,
            aligned=("channels", "stride_in"),
        )
        yield AotCase(
            "gather_keys",
            f"H{heads} D{head_dim} bf16",
            rope._gather_keys_kernel,
            {
                **dict.fromkeys(("cache_ptr", "out_ptr"), "*bf16"),
                "places_ptr": "*i64",
                **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
                "channels": "i32",
                "heads": "i32",
            },
            {
                "ROTATE": True,
                "UNIT": 8,
                "HALF": half,
                "HEADS": triton.next_power_of_2(heads),
                "PAIRS": triton.next_power_of_2(half),
            },
            rope.warp_count(heads * head_dim),
            wide=heads * head_dim >= 1024,
            aligned=("channels",),
        )


def _extents() -> Iterator[AotCase]:
    from turboserve.kernels import extents

    for gather in (True, False):
        yield AotCase(
            "gather_extents" if gather else "scatter_extents",
            f"{extents.BLOCK_WORDS} words w8",
            extents._extents_kernel,
            {"packed_ptr": "*i32", "wide_ptr": "*i32", "starts_ptr": "*i64", "extent_words": "i32"},
            {"GATHER": gather, "BLOCK": extents.BLOCK_WORDS},
            8,
            aligned=("extent_words",),
        )
    yield AotCase(
        "block_checksum",
        f"{extents.CHECKSUM_WORDS} words w8",
        extents._checksum_kernel,
        {"data_ptr": "*i32", "out_ptr": "*i64", "block_words": "i32", "prime": "u32"},
        {"BLOCK": extents.CHECKSUM_WORDS},
        8,
        aligned=("block_words",),
    )
