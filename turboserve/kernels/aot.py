"""Every kernel and shipped configuration, compiled ahead of time without a GPU, and what the machine code looks like.

Registers, spills and shared memory come from the cubin; instruction counts from its disassembly (tools in Triton's own
wheel). Must run where TRITON_INTERPRET is not set: the interpreter's functions cannot be compiled. `compile_row` takes
0.5 to 5 s a kernel.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from turboserve.errors import ConfigError
from turboserve.kernels.aot_cases import AotCase, cases

# Every arch that the shipped table is held to; Triton 3.6 and 3.7 compile for all of them.
ARCHES = (80, 90, 100, 103, 120)
SHARED_BYTES_MAX = {80: 166_912, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
__all__ = ["ARCHES", "AotCase", "cases", "compile_row", "cuda_source_row", "problems"]
# Groups of SASS opcodes by what their presence proves.
_OPCODES = {
    "tensor_core": r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b",
    "load_128": r"\bLDG\.E(\.\w+)*\.128\b",
    "store_128": r"\bSTG\.E(\.\w+)*\.128\b",
    "store_16": r"\bSTG\.E(\.\w+)*\.U16\b",
    "async_copy": r"\b(LDGSTS|UTMALDG|UBLKCP)\b",
    "tma_load": r"\bUTMALDG\b",
    "register_realloc": r"\bUSETMAXREG\b",
    "local_load": r"\bLDL\b",
    "local_store": r"\bSTL\b",
}


def compile_row(case: AotCase, arch: int) -> dict[str, Any]:
    """Compile one case; a row {"kernel", "config", "arch", "registers", "spill_bytes", "shared_bytes", "instructions"}.

    Raises ConfigError under the interpreter, and whatever Triton raises when the code does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

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
    kind = GluonASTSource if case.fn.is_gluon() else ASTSource
    source = kind(fn=case.fn, signature=signature, constexprs=constants, attrs=attrs)
    built = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    return _row(case, arch, built.asm["cubin"], int(built.metadata.shared))


def cuda_source_row(kernel: str, arch: int) -> tuple[AotCase, dict[str, Any]]:
    """The CUDA C twin `kernel` of extents_cupy.py, compiled by this machine's nvcc. ConfigError where there is none."""
    from turboserve.kernels import extents_cupy

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise ConfigError("no nvcc on the PATH", hint="install the CUDA toolkit to check the CUDA C twins")
    case = AotCase(f"{kernel}_cupy", f"{extents_cupy.THREADS} threads uint4", None, {}, {}, extents_cupy.THREADS // 32)
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "extents.cu", Path(folder) / "extents.cubin"
        source.write_text(extents_cupy.SOURCE)
        flags = ["-cubin", f"-arch=sm_{arch}", "--std=c++17", *extents_cupy.DEFINES, "-o", str(cubin)]
        done = subprocess.run([nvcc, *flags, str(source)], capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"nvcc does not compile {kernel} for sm_{arch}: {done.stderr.strip()[-400:]}")
        return case, _row(case, arch, cubin.read_bytes(), 0, function=kernel)


def _row(case: AotCase, arch: int, cubin: bytes, shared_bytes: int, function: str = "") -> dict[str, Any]:
    usage, sass = _inspect(cubin, function)
    return {
        "kernel": case.kernel,
        "config": case.config,
        "arch": arch,
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"],
        "shared_bytes": shared_bytes,
        "instructions": {name: len(re.findall(pattern, sass)) for name, pattern in _OPCODES.items()},
    }


def _inspect(cubin: bytes, function: str = "") -> tuple[dict[str, int], str]:
    """Resource usage and disassembly of a cubin's one function, or of the one named. STACK counts bytes a thread keeps
    in local memory: its spills."""
    tool = _cuobjdump()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output([tool, "--dump-resource-usage", file.name])
        only = ["-fun", function] if function else []
        sass = _output([tool, "-sass", *only, file.name])
    if function:
        usage = usage[usage.index(f"Function {function}:") :].split("Function", 2)[1]
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return found, sass


def _output(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(
            f"{argv[0]} cannot read this code: {done.stderr.strip()[-200:] or done.returncode}",
            expected="a Triton whose tools know the architecture (3.6's do not know sm_103)",
        )
    return done.stdout


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
    if case.warp_specialised and not (ops["register_realloc"] and ops["tma_load"]):
        found.append(f"{name}: warp groups do not trade registers or use no TMA")
    stores = row["kernel"] != "block_checksum"  # one number a block is stored
    if case.memory_bound and case.wide and not (ops["load_128"] and (ops["store_128"] or not stores)):
        found.append(f"{name}: memory accesses are not 128 bits wide")
    if case.memory_bound and ops["store_16"]:
        found.append(f"{name}: {ops['store_16']} stores of 2 bytes")
    return found
