from __future__ import annotations

from pathlib import Path

import pytest

from tests.orchestrator.stories import Story

SCENARIOS = sorted((Path(__file__).parent.parent / "scenarios").glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_story_ends_as_written(path: Path, rewrite: bool) -> None:
    text = path.read_text()
    told = Story().run(text)
    if rewrite:
        path.write_text(told)
    assert told == path.read_text()


def test_there_are_stories() -> None:
    assert len(SCENARIOS) >= 10
