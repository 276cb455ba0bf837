"""The shipped weights: small, safe to read, and they draw what is asked for."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from turboserve.errors import CheckpointError
from turboserve.model.shapes.checkpoint import load_weights, random_weights, save_weights
from turboserve.model.shapes.model import ShapesModel
from turboserve.model.shapes.score_run import Plan, score
from turboserve.model.shapes.spec import WEIGHTS_PATH


def test_they_are_at_most_20_mb():
    assert WEIGHTS_PATH.stat().st_size <= 20 * 2**20


def test_a_round_trip_keeps_the_numbers(tmp_path):
    weights = random_weights(3)
    path = tmp_path / "w.safetensors"
    save_weights(path, weights.network, weights.codec, weights.sharpener, {"seed": 3})
    once, twice = load_weights(path), load_weights(path)
    assert '"seed": 3' in once.metadata["training"]
    assert once.digest == twice.digest
    for name, one in once.network.state_dict().items():
        assert torch.equal(one, weights.network.state_dict()[name].half().float())


def test_a_file_that_does_not_fit_says_so(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(CheckpointError, match="cannot read"):
        load_weights(path)
    path.write_bytes(b"\x80\x04pickle is not safetensors")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_weights(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="holds"):
        load_weights(path)
    tensors = load_file(WEIGHTS_PATH)
    tensors.pop("network.words.weight")
    save_file(tensors, path, metadata={"format": "turboserve-shapes-1"})
    with pytest.raises(CheckpointError, match=r"words\.weight"):
        load_weights(path)


@pytest.mark.timeout(600)
def test_streams_show_what_their_prompts_ask_for():
    """10 prompts of 8 s, 10 prompt switches, one stream of 60 s: seeded, with room above the promised 95%."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = score(ShapesModel.load(), Plan.quick(), seed=1)
    finally:
        torch.set_num_threads(threads)
    for part in (result["steady"], result["switch"]["second_chunk"], result["long"]["first"], result["long"]["last"]):
        assert all(part[name] is None or part[name] >= 0.95 for name in ("colour", "count", "direction")), result
