"""The `wan-tiny` parts: every piece of a Wan model at toy size with seeded random weights.

Its pictures are noise. It lets every path of the real thing run on a laptop and in tests, and it can be written to disk
in each layout that checkpoints come in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORDS = 96


def tiny_text_config() -> dict[str, Any]:
    """config.json of the tiny text encoder."""
    return {
        "model_type": "umt5",
        "vocab_size": _WORDS + 3,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 0,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def tiny_tokenizer() -> Tokenizer:
    """One token per character of printable ASCII, with umT5's end mark."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {chr(32 + at): 3 + at for at in range(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer
