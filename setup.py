"""Builds csrc/ where there is a C++ compiler; without one the package still installs and uses the
Python twin.

Everything else about the package is in pyproject.toml. TURBOSERVE_WERROR=1 makes compiler warnings
and a failed build errors (CI sets it); TURBOSERVE_NO_NATIVE=1 leaves the extension out.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Wno-sign-conversion"]
SOURCES = ["bindings", "bindings_state", "checksum", "copy_engine", "cuda_runtime", "frame_ring", "pinned_arena"]
STRICT = os.environ.get("TURBOSERVE_WERROR") == "1"


def say(message: str) -> None:
    print(f"turboserve: {message}", file=sys.stderr)


class BuildOrGoWithout(build_ext):
    """A missing compiler is said, not raised, unless TURBOSERVE_WERROR=1."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:  # compilers fail in many types; every one of them means "no extension"
            if STRICT:
                raise
            say(f"csrc/ was not built ({error}); their Python twins will do the work")


def native_extensions() -> list[Extension]:
    if os.environ.get("TURBOSERVE_NO_NATIVE") == "1":
        say("TURBOSERVE_NO_NATIVE=1: csrc/ is not built; their Python twins will do the work")
        return []
    try:
        import pybind11
    except ImportError:
        say("no pybind11: csrc/ is not built; their Python twins will do the work")
        return []
    extension = Extension(
        "turboserve._native",
        [f"csrc/{name}.cpp" for name in SOURCES],
        depends=[str(header) for header in sorted(Path("csrc").glob("*.h"))],
        language="c++",
        # pybind11 comes as a system header, so that every warning is about our own lines.
        extra_compile_args=[
            *["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-isystem", pybind11.get_include()],
            *WARNINGS,
            *(["-Werror"] if STRICT else []),
        ],
        optional=not STRICT,
    )
    return [extension]


setup(
    # bench/ stands at the top of the tree and is installed as turboserve.bench.
    packages=[
        *find_packages(include=["turboserve", "turboserve.*"]),
        *(f"turboserve.{name}" for name in find_packages(include=["bench", "bench.*"])),
    ],
    package_dir={"turboserve.bench": "bench"},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildOrGoWithout},
)
