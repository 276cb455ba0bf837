"""Cards: JSON round trip, and errors that name the field."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboserve.card import Card, CardInput, StepsRun, steps_runs
from turboserve.digest import next_digest
from turboserve.errors import InvalidRequest

ONE = next_digest("", b"one")
TWO = next_digest(ONE, b"two")


def card(**changes: object) -> Card:
    values: dict = {
        "model": "shapes",
        "model_hash": "abc",
        "seed": 7,
        "size": "96x64",
        "inputs": (CardInput(0, "a red circle", 1), CardInput(1, "ein Quadrat, blau", 2)),
        "steps": (StepsRun(0, 4),),
        "chunk_count": 2,
        "digest": TWO,
    }
    return Card(**{**values, **changes})


def test_the_chain_is_sha256_over_the_previous_digest_and_the_frames() -> None:
    assert hashlib.sha256(b"one").hexdigest() == ONE
    assert hashlib.sha256(bytes.fromhex(ONE) + b"two").hexdigest() == TWO


def test_round_trip(tmp_path: Path) -> None:
    for one in (
        card(),
        card(digests=(ONE, TWO), approximate_from=1, numerics_id="x"),
        card(chunk_count=0, digest=""),
        card(decoder="light"),
    ):
        assert Card.from_json(one.to_json()) == one
        path = tmp_path / "card.json"
        path.write_text(one.to_json(indent=2))
        assert Card.read(path) == one


def test_what_says_nothing_is_left_out_and_unknown_keys_are_ignored() -> None:
    body = json.loads(card().to_json())
    assert "digests" not in body
    assert "approximate_from" not in body
    assert "decoder" not in body
    body["added_later"] = {"x": 1}
    assert Card.from_json(json.dumps(body)) == card()


def test_what_holds_at_an_index() -> None:
    one = card(steps=(StepsRun(0, 4), StepsRun(5, 2)))
    assert [one.input_at(i).prompt_version for i in (0, 1, 9)] == [1, 2, 2]
    assert [one.steps_at(i) for i in (0, 4, 5, 9)] == [4, 4, 2, 2]
    assert (one.width, one.height) == (96, 64)


@given(st.lists(st.integers(1, 5), min_size=1))
def test_runs_say_the_same_as_the_list(steps: list[int]) -> None:
    one = card(steps=steps_runs(steps))
    assert [one.steps_at(index) for index in range(len(steps))] == steps


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": "seven"}, "seed"),
        ({"size": "96"}, "size"),
        ({"digest": "00"}, "digest"),
        ({"digest": ""}, "digest"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [{"from_index": 1, "prompt": "x", "prompt_version": 1}]}, "inputs"),
        ({"steps": [{"from_index": 0, "steps": 4}, {"from_index": 0, "steps": 3}]}, "steps"),
        ({"steps": [{"from_index": 0, "steps": 0}]}, "steps is 0"),
        ({"steps": 4}, "steps"),
        ({"digests": [ONE]}, "1 entries"),
        ({"digests": [ONE, ONE]}, "last of digests"),
        ({"chunk_count": -1}, "chunk_count"),
        ({"version": 2}, "version"),
        ({"kind": "other"}, "kind"),
    ],
)
def test_a_wrong_card_says_what_is_wrong(change: dict, words: str) -> None:
    body = json.loads(card().to_json()) | change
    with pytest.raises(InvalidRequest, match="no card that can be replayed") as caught:
        Card.from_json(json.dumps(body))
    assert words in str(caught.value)


def test_a_card_without_a_field_and_a_file_without_a_card(tmp_path: Path) -> None:
    body = json.loads(card().to_json())
    del body["model_hash"]
    with pytest.raises(InvalidRequest, match="model_hash"):
        Card.from_json(json.dumps(body))
    with pytest.raises(InvalidRequest, match="truncated"):
        Card.from_json("{")
    with pytest.raises(InvalidRequest, match="No such file"):
        Card.read(tmp_path / "absent.json")


def test_a_card_checks_itself_when_made() -> None:
    with pytest.raises(InvalidRequest):
        replace(card(), size="wide")
