"""Prompts to conditioning: the umT5 encoder of the Wan family, on a stage of its own, with a bounded cache.

A prompt's embedding is computed once, alone, at its own length (padding would only be masked away) and on one thread
that does nothing else: passes of other sessions go on meanwhile, and the bits do not depend on who asks. The encoder
may lie on another device than the transformer: at 11.4 GB it is four times a 1.3B transformer.
"""

from __future__ import annotations

import html
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turboserve.errors import CheckpointError
from turboserve.model.key_maps import t5_to_transformers
from turboserve.model.tensor_files import TensorFiles, fill

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CACHE_BYTES_MAX = 256 << 20
FAILURES_KEPT_MAX = 64


def clean(prompt: str) -> str:
    """Entities resolved, white space folded: what the encoder was trained on."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


class TextEncoder:
    """umT5 with its tokenizer. `text_tokens` bounds a prompt, its end mark included; what is longer is cut."""

    def __init__(self, module: torch.nn.Module, tokenizer: Tokenizer, text_tokens: int) -> None:
        self._module = module
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.enable_truncation(text_tokens)
        self.text_dim: int = module.config.d_model  # type: ignore[assignment, union-attr]

    @classmethod
    def load(
        cls, folder: Path, tokenizer_file: Path, text_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> TextEncoder:
        """From a folder with config.json and safetensors (transformers' or original Wan names) and a tokenizer.json."""
        from transformers import UMT5Config, UMT5EncoderModel

        try:
            config = UMT5Config(**json.loads((folder / "config.json").read_text()))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read the text encoder's config: {error}", expected=f"{folder}/config.json of a umT5 encoder"
            ) from None
        with torch.device("meta"):
            module = UMT5EncoderModel(config)
        # One tensor under two names; files hold either or both.
        module.encoder.embed_tokens = torch.nn.Module()  # type: ignore[assignment]
        with TensorFiles.open(folder) as files:
            original = "token_embedding.weight" in files.keys
            fill(
                module,
                files,
                t5_to_transformers if original else lambda key: key,
                what="a umT5 encoder of this config",
                dtype=dtype,
                device=device,
                ignored=("encoder.embed_tokens.", "decoder.", "lm_head."),
            )
        module.encoder.embed_tokens = module.shared
        return cls(module, load_tokenizer(tokenizer_file), text_tokens)

    @property
    def device(self) -> torch.device:
        return next(self._module.parameters()).device

    def state_dict(self) -> dict[str, Tensor]:
        """The encoder's tensors under transformers' names."""
        return dict(self._module.state_dict())

    def token_ids(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(clean(prompt)).ids
        return ids

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Embedding [tokens, text_dim] of one prompt, on the encoder's device."""
        ids = torch.tensor([self.token_ids(prompt)], device=self.device)
        return self._module(input_ids=ids).last_hidden_state[0]


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json (rust tokenizers: no sentencepiece, no code in the file)."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise CheckpointError(
            f"there is no {path}",
            expected="the tokenizer.json that lies beside umT5 weights",
            hint="`turboserve models pull REPO` fetches the tokenizer with the rest",
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"cannot read {path}: {error}") from None


class PromptStage:
    """Embeddings on demand: one thread encodes, a cache bounded in bytes keeps the newest used.

    `prefetch` returns at once, `ready` tells whether `get` would wait. An encoder's error reaches whoever asks.
    """

    def __init__(self, encode: Callable[[str], Tensor], cache_bytes_max: int = CACHE_BYTES_MAX) -> None:
        self._encode = encode
        self._cache_bytes_max = cache_bytes_max
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._cache_bytes = 0
        self._pending: OrderedDict[str, Future[Tensor]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "text", initializer=_repeatable)
        self.encoded_count = 0

    @property
    def cache_bytes(self) -> int:
        return self._cache_bytes

    def prefetch(self, prompt: str) -> None:
        """Begin to encode a prompt unless it is known or under way."""
        with self._lock:
            self._begin(prompt)

    def ready(self, prompt: str) -> bool:
        """Whether `get` answers at once (be it with an error); begins to encode where it would not."""
        with self._lock:
            pending = self._begin(prompt)
            return pending is None or pending.done()

    def get(self, prompt: str) -> Tensor:
        """The embedding [tokens, text_dim]; waits for it."""
        with self._lock:
            pending = self._begin(prompt)
            if pending is None:
                self._cache.move_to_end(prompt)
                return self._cache[prompt]
        try:
            return pending.result()
        finally:
            with self._lock:
                if self._pending.get(prompt) is pending:  # it failed; the next to ask tries anew
                    del self._pending[prompt]

    def _begin(self, prompt: str) -> Future[Tensor] | None:
        """The work that will bring a prompt's embedding, None where it is cached. Call with the lock."""
        if prompt in self._cache:
            return None
        if prompt not in self._pending:
            # Errors nobody came back for are dropped, oldest first.
            for old in [one for one, work in self._pending.items() if work.done()][: -FAILURES_KEPT_MAX or None]:
                del self._pending[old]
            self._pending[prompt] = self._pool.submit(self._run, prompt)
        return self._pending[prompt]

    def _run(self, prompt: str) -> Tensor:
        embedding = self._encode(prompt)
        with self._lock:
            self.encoded_count += 1
            self._cache[prompt] = embedding
            self._cache_bytes += embedding.nbytes
            while self._cache_bytes > self._cache_bytes_max and len(self._cache) > 1:
                _, old = self._cache.popitem(last=False)
                self._cache_bytes -= old.nbytes
            self._pending.pop(prompt, None)
        return embedding

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _repeatable() -> None:
    """Both settings belong to the thread, not the process: bits repeat only where they are the same."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def encoder_bytes(config: dict[str, Any], dtype_bytes: int) -> int:
    """What an encoder of a config.json will take, for `inspect`: embedding, attention and gated feed-forward."""
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    per_layer = 4 * width * inner + 3 * width * config["d_ff"] + 2 * width
    per_layer += config.get("relative_attention_num_buckets", 32) * config["num_heads"]
    return int(dtype_bytes * (config["vocab_size"] * width + config["num_layers"] * per_layer + width))
