"""The compiled parts (`turboserve._native`), or why they are not there; their Python twins do the work then."""

from __future__ import annotations

import logging
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

from turboserve.errors import ConfigError
from turboserve.runtime import arena_table

log = logging.getLogger(__name__)

_USED = ("CopyEngine", "checksum64", "copy_now", "cuda_register", "cuda_unregister", "load_cuda", "touch_pages")
"""What this package calls of it: a build from before one of these must not be taken for a whole one."""


def _load() -> tuple[ModuleType | None, str]:
    """The module, or None and why not."""
    try:
        from turboserve import _native
    except ImportError as error:
        return None, f"turboserve._native is not there ({error})"
    lacks = [name for name in _USED if not hasattr(_native, name)]
    if lacks or getattr(_native, "ARENA_LAYOUT_VERSION", None) != arena_table.LAYOUT_VERSION:
        return None, "turboserve._native was built from other sources; build it again"
    return _native, ""


_native, _why_not = _load()
IMPLEMENTATION = "native" if _native else "python"


@cache
def _say_implementation() -> None:
    if _native:
        log.info("arena, checksum and copies: C++ (turboserve._native)")
    else:
        log.warning("arena, checksum and copies: the slower Python twins; %s", _why_not)


def choose(implementation: str | None) -> ModuleType | None:
    """The compiled module, or None for the Python twin: the default one, or the one a test or bench names."""
    if implementation is None:
        _say_implementation()
        return _native
    if implementation == "python":
        return None
    if implementation == "native" and _native:
        return _native
    raise ConfigError(f"implementation {implementation!r}; {_why_not}", expected="native or python")


@cache
def load_cuda() -> tuple[str, int]:
    """(which CUDA runtime was found or why none was, devices that can be used)."""
    if _native is None:
        return _why_not, 0
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    paths = [wheels / "cu13" / "lib" / "libcudart.so.13", wheels / "cuda_runtime" / "lib" / "libcudart.so.12"]
    found, device_count = _native.load_cuda([str(path) for path in paths if path.exists()])
    return found, device_count
