"""The umT5 encoder at a prompt's own length against transformers' padded and masked call, and the stage in front."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from safetensors.torch import save_file

from turboserve.errors import CheckpointError
from turboserve.model.key_maps import t5_from_transformers
from turboserve.model.text import PromptStage, TextEncoder, clean
from turboserve.model.wan.tiny import tiny_text_config, tiny_tokenizer

PROMPT = "a red fox &amp; its\n shadow"
TOKENS = 32


@pytest.fixture(scope="module")
def umt5():
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(3)
    config = UMT5Config(**tiny_text_config())
    return config, UMT5EncoderModel(config).eval()


def write(folder, umt5, original: bool):
    config, module = umt5
    state = {key: one.clone() for key, one in module.state_dict().items() if key != "encoder.embed_tokens.weight"}
    if original:
        state = {t5_from_transformers(key): one for key, one in state.items()}
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def load(folder, text_tokens=TOKENS):
    return TextEncoder.load(folder, folder / "tokenizer.json", text_tokens, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("original", [False, True])
def test_encoding_equals_the_padded_call_of_transformers(umt5, tmp_path, original):
    encoder = load(write(tmp_path / "t5", umt5, original))
    ids = encoder.token_ids(PROMPT)
    assert ids[-1] == 1 and 4 < len(ids) < TOKENS  # ends with the end mark
    padded = torch.tensor([ids + [0] * (TOKENS - len(ids))])
    with torch.no_grad():
        expected = umt5[1](input_ids=padded, attention_mask=(padded > 0).long()).last_hidden_state[0, : len(ids)]
    ours = encoder.encode(PROMPT)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    other = encoder.encode(PROMPT.replace("red", "der"))
    assert other.shape == ours.shape and not torch.allclose(ours, other, atol=1e-2)


def test_a_long_prompt_is_cut_to_the_bound(umt5, tmp_path):
    encoder = load(write(tmp_path / "t5", umt5, False), text_tokens=8)
    ids = encoder.token_ids("word " * 100)
    assert len(ids) == 8 and ids[-1] == 1


def test_a_partial_encoder_names_what_is_missing(umt5, tmp_path):
    folder = write(tmp_path / "t5", umt5, False)
    state = {key: one.clone() for key, one in umt5[1].state_dict().items() if "embed_tokens" not in key}
    del state["encoder.block.1.layer.0.SelfAttention.q.weight"]
    state["surplus.weight"] = torch.zeros(1)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: encoder\.block\.1.*q\.weight; 1 unexpected: surplus"):
        load(folder)


def test_prompts_are_cleaned():
    assert clean(" a &amp;amp; b\n\tc ") == "a & b c"


def test_stage_encodes_once_and_forgets_the_oldest():
    def encode(prompt: str) -> torch.Tensor:
        assert threading.current_thread() is not threading.main_thread()
        return torch.full((4, 4), float(len(prompt)))

    stage = PromptStage(encode, cache_bytes_max=2 * 64)
    assert stage.get("a")[0, 0] == 1 and stage.get("a") is stage.get("a")
    assert stage.encoded_count == 1
    stage.prefetch("bb")
    assert stage.get("bb")[0, 0] == 2
    stage.get("a")  # newest used again
    stage.get("ccc")
    assert stage.cache_bytes == 128 and stage.ready("a") and stage.ready("ccc")
    stage.get("bb")
    assert stage.encoded_count == 4
    stage.close()


def test_stage_works_while_nobody_waits_and_hands_on_errors():
    begun, go = threading.Event(), threading.Event()

    def encode(prompt: str) -> torch.Tensor:
        if prompt == "bad":
            raise ValueError("no such word")
        begun.set()
        assert go.wait(10)
        return torch.zeros(1)

    stage = PromptStage(encode)
    assert not stage.ready("slow")
    assert begun.wait(10) and not stage.ready("slow")
    go.set()
    assert stage.get("slow").shape == (1,) and stage.ready("slow")
    for _ in range(2):  # an error is not remembered for ever
        with pytest.raises(ValueError, match="no such word"):
            stage.get("bad")
    stage.close()
