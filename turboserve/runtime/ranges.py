"""NVTX ranges around passes and decodes, so that a profiler's time line shows chunks by name.

Without the `nvtx` package, or with no profiler attached, a range costs next to nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

try:
    import nvtx
except ImportError:  # a GPU test machine has torch, numpy and safetensors alone
    nvtx = None


def span(name: str) -> AbstractContextManager[object]:
    """A named range for a `with` statement."""
    if nvtx is None:
        return nullcontext()
    return nvtx.annotate(message=name, domain="turboserve")
