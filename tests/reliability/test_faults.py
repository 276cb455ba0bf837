"""Real processes, real kills, in short: what `make soak-...` runs a hundred times."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import FAULTS, run_faults

pytestmark = pytest.mark.timeout(300)


async def test_a_killed_worker_and_a_migration_leave_every_chain_as_it_was(tmp_path: Path) -> None:
    result = await run_faults(
        "worker-kill", 1, folder=tmp_path, rate=0.5, sessions=3, playing=2, workers=2, also="migrate"
    )
    assert result["faults"] == 2 and result["chains_equal"] == 3
    assert result["chunks"] > 15


@pytest.mark.soak
@pytest.mark.parametrize("kind", sorted(FAULTS))
async def test_a_fault_again_and_again(kind: str, tmp_path: Path) -> None:
    result = await run_faults(kind, 10, folder=tmp_path)
    assert result["faults"] == 10
