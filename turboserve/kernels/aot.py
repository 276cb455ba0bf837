"""Every kernel and shipped configuration, compiled ahead of time without a GPU, and what the machine code looks like.

Registers, spills and shared memory come from the cubin; instruction counts from its disassembly (tools in Triton's own
wheel). Must run where TRITON_INTERPRET is not set: the interpreter's functions cannot be compiled. `compile_row` takes
0.5 to 5 s a kernel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turboserve.errors import ConfigError

ARCHES = (80, 90, 100)
SHARED_BYTES_MAX = {80: 166_912, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
# Groups of SASS opcodes by what their presence proves.
_OPCODES = {
    "tensor_core": r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b",
    "load_128": r"\bLDG\.E(\.\w+)*\.128\b",
    "store_128": r"\bSTG\.E(\.\w+)*\.128\b",
    "store_16": r"\bSTG\.E(\.\w+)*\.U16\b",
    "async_copy": r"\b(LDGSTS|UTMALDG|UBLKCP)\b",
    "local_load": r"\bLDL\b",
    "local_store": r"\bSTL\b",
}
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
    """Arguments that the launcher would find divisible by 16: pointers, row strides."""


def cases(arch: int) -> Iterator[AotCase]:
    """All shipped kernels for an arch, at the sizes of the Wan family and of `shapes`."""
    from turboserve.kernels import attention, extents, norm, rope

    for head_dim in (32, 64, 128):
        import torch

        tile = attention.tile_config(arch, head_dim, torch.bfloat16)
        yield AotCase(
            "attn_varlen_slot",
            f"D{head_dim} {tile.block_m}x{tile.block_n} w{tile.num_warps} s{tile.num_stages} bf16",
            attention._attn_varlen_slot_kernel,
            {
                **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16"),
                "work_ptr": "*i32",
                "places_ptr": "*i64",
                **dict.fromkeys(("stride_q_row", "stride_k_token", "stride_v_token"), "i32"),
                "qk_scale_log2": "fp32",
            },
            {"UNIT": 8, "HEAD_DIM": head_dim, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "UPCAST": False},
            tile.num_warps,
            tile.num_stages,
            memory_bound=False,
            aligned=("stride_q_row", "stride_k_token", "stride_v_token"),
        )
    for channels in (192, 1536, 5120):
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
    for heads, head_dim in ((6, 32), (12, 128), (40, 128)):
        import triton

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


def compile_row(case: AotCase, arch: int) -> dict[str, Any]:
    """Compile one case; a row {"kernel", "config", "arch", "registers", "spill_bytes", "shared_bytes", "instructions"}.

    Raises ConfigError under the interpreter, and whatever Triton raises when the code does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(case.fn, triton.runtime.JITFunction):
        raise ConfigError("TRITON_INTERPRET is set; its functions cannot be compiled", hint="unset TRITON_INTERPRET")
    names = case.fn.arg_names
    signature = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    divisible = [["tt.divisibility", 16]]
    attrs = {
        (index,): divisible
        for index, name in enumerate(names)
        if name in case.aligned or signature[name].startswith("*")
    }
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(fn=case.fn, signature=signature, constexprs=constants, attrs=attrs)
    built = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    usage, sass = _inspect(built.asm["cubin"])
    return {
        "kernel": case.kernel,
        "config": case.config,
        "arch": arch,
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"],
        "shared_bytes": int(built.metadata.shared),
        "instructions": {name: len(re.findall(pattern, sass)) for name, pattern in _OPCODES.items()},
    }


def _inspect(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and disassembly of a cubin. STACK counts bytes a thread keeps in local memory: its spills."""
    tool = _cuobjdump()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return found, sass


def _cuobjdump() -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        raise ConfigError(f"no cuobjdump at {path}", expected="a Triton wheel with its NVIDIA tools")
    return str(path)


def problems(row: dict[str, Any], case: AotCase) -> list[str]:
    """What is wrong with a compiled row by our rules; empty when it may ship."""
    found = []
    name = f"{row['kernel']} {row['config']} sm_{row['arch']}"
    ops = row["instructions"]
    if row["spill_bytes"]:
        found.append(f"{name}: spills {row['spill_bytes']} bytes")
    if row["shared_bytes"] > SHARED_BYTES_MAX[row["arch"]]:
        found.append(f"{name}: {row['shared_bytes']} bytes of shared memory")
    if not case.memory_bound and not ops["tensor_core"]:
        found.append(f"{name}: no tensor-core instruction")
    stores = row["kernel"] != "block_checksum"  # one number a block is stored
    if case.memory_bound and case.wide and not (ops["load_128"] and (ops["store_128"] or not stores)):
        found.append(f"{name}: memory accesses are not 128 bits wide")
    if case.memory_bound and ops["store_16"]:
        found.append(f"{name}: {ops['store_16']} stores of 2 bytes")
    return found
