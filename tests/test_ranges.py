"""Ranges that follow a chunk: silent when nobody listens, seen by torch.profiler, and by a real NVTX tool."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from turboserve import ranges

TOOL = r"""
// The smallest NVTX tool: notes what our domain pushes and pops.
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static FILE* out;
static nvtxDomainHandle_t NVTX_API made(const char* name) { return (nvtxDomainHandle_t)strdup(name); }
static nvtxStringHandle_t NVTX_API text(nvtxDomainHandle_t d, const char* s) { return (nvtxStringHandle_t)strdup(s); }
static int NVTX_API pushed(nvtxDomainHandle_t d, const nvtxEventAttributes_t* a) {
    const char* message = a->messageType == NVTX_MESSAGE_TYPE_REGISTERED ? (const char*)a->message.registered
                                                                         : a->message.ascii;
    fprintf(out, "push %s|%s|%lld\n", (const char*)d, message, (long long)a->payload.llValue);
    return 0;
}
static int NVTX_API popped(nvtxDomainHandle_t d) { fprintf(out, "pop\n"); fflush(out); return 0; }
int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get) {
    out = fopen(getenv("RANGES_OUT"), "w");
    const NvtxExportTableCallbacks* table = (const NvtxExportTableCallbacks*)get(NVTX_ETID_CALLBACKS);
    NvtxFunctionTable functions;
    unsigned size = 0;
    if (!out || !table->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &functions, &size)) return 0;
    *functions[NVTX_CBID_CORE2_DomainCreateA] = (NvtxFunctionPointer)made;
    *functions[NVTX_CBID_CORE2_DomainRegisterStringA] = (NvtxFunctionPointer)text;
    *functions[NVTX_CBID_CORE2_DomainRangePushEx] = (NvtxFunctionPointer)pushed;
    *functions[NVTX_CBID_CORE2_DomainRangePop] = (NvtxFunctionPointer)popped;
    return 1;
}
"""
USE = """
from turboserve.ranges import listening, span, spans
assert listening()
for chunk in (3, 4):
    with span("pass"), spans([("denoise", "abcdefghijk", chunk), ("context pass", "zyxwvutsrqp", 7)]):
        pass
"""


def headers() -> Path | None:
    """The folder that holds nvtx3/, if the CUDA toolkit is here."""
    nvcc = shutil.which("nvcc")
    roots = [Path("/usr/local/cuda"), *([Path(nvcc).resolve().parent.parent] if nvcc else [])]
    return next((root / "include" for root in roots if (root / "include/nvtx3/nvToolsExt.h").exists()), None)


def test_a_real_tool_sees_kind_session_and_chunk(tmp_path):
    include, compiler = headers(), shutil.which("cc")
    if include is None or compiler is None:
        pytest.skip("needs a C compiler and the CUDA toolkit's NVTX headers")
    source, library, out = tmp_path / "tool.c", tmp_path / "libtool.so", tmp_path / "seen.txt"
    source.write_text(TOOL)
    flags = ["-shared", "-fPIC", "-w", f"-I{include}", "-o", str(library)]
    subprocess.run([compiler, *flags, str(source)], check=True)
    environment = os.environ | {"NVTX_INJECTION64_PATH": str(library), "RANGES_OUT": str(out)}
    subprocess.run([sys.executable, "-c", USE], check=True, env=environment, timeout=60)
    lines = out.read_text().splitlines()
    one = ["push turboserve|pass|-1", "push turboserve|denoise abcdefgh|{}", "push turboserve|context pass zyxwvuts|7"]
    assert lines == [line.format(chunk) for chunk in (3, 4) for line in [*one, "pop", "pop", "pop"]]


def test_nobody_listens_nothing_is_made():
    assert not ranges.listening()
    assert ranges.span("pass") is ranges.span("decode", "abc", 3) is ranges.spans([("denoise", "a", 1)])
    with ranges.span("pass"):
        pass


class Notes:
    """A recorder that keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, label: str):
        notes = self

        class One:
            def __enter__(self):
                notes.seen.append(f"+{label}")

            def __exit__(self, *raised):
                notes.seen.append(f"-{label}")

        return One()


def test_a_recorder_sees_nested_ranges_even_when_the_work_raises():
    notes = Notes()
    ranges.set_recorder(notes)
    try:
        with (
            pytest.raises(ValueError),
            ranges.span("pass"),
            ranges.spans([("denoise", "s" * 26, 1), ("recache", "t" * 26, 2)]),
        ):
            raise ValueError
    finally:
        ranges.set_recorder(None)
    down = ["pass", "denoise ssssssss #1", "recache tttttttt #2"]
    assert notes.seen == [f"+{one}" for one in down] + [f"-{one}" for one in reversed(down)]


def test_kept_attributes_are_bounded(monkeypatch):
    class Domain:
        def get_event_attributes(self, message, payload):
            return type("Attributes", (), {"payload": payload})()

        def push_range(self, attributes): ...

    monkeypatch.setattr(ranges, "KEPT_MAX", 3)
    kept = ranges._Nvtx(Domain())
    for index in range(10):
        kept.push("decode", f"session{index}", index)
    assert len(kept._kept) == 3
