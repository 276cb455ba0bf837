"""csrc/ under the address, undefined-behaviour and thread sanitizers; `make sanitize` runs it longer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler here")
@pytest.mark.soak  # `make sanitize` runs them too
def test_the_stress_programs_are_clean_under_sanitizers():
    result = subprocess.run([CSRC / "sanitize.sh", "300"], capture_output=True, text=True, timeout=110, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(": fine") == 6
