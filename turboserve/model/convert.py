"""Pickled checkpoints to safetensors, in a process of its own: `python -m turboserve.model.convert < JOB.json`.

This is the one place that opens a checkpoint that is not safetensors. It unpickles tensors and plain containers alone
(`weights_only=True`), and it does so in a child that does nothing else and ends: what a hostile file could still do to
the unpickler, it does to a process without sockets, keys or sessions. `turboserve models convert` starts it; no server
ever imports this module.

What comes in: Self-Forcing, CausVid and LongLive files ({"generator_ema" | "generator": tensors}), their LoRA beside
them, flat files of tensors (original Wan VAE and text encoder, light decoders). What goes out has original Wan names
without training wrappers, and says in its metadata what it was made of.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from turboserve.errors import CheckpointError, TurboServeError
from turboserve.model.key_maps import strip_wrappers

# Where training code keeps the weights, the averaged ones first.
_WEIGHTS_UNDER = ("generator_ema", "generator", "model_ema", "model", "state_dict", "module")
_LORA_UNDER = ("generator_lora", "lora", "state_dict")


@dataclass(frozen=True)
class Job:
    """One conversion. `output` is a file; for a text encoder its folder also gets a config.json."""

    source: str
    output: str
    lora: str = ""
    lora_alpha: float | None = None
    under: str = ""  # the entry that holds the weights; empty: the first of _WEIGHTS_UNDER that is there


def load_tensors(path: Path) -> Mapping[str, Any]:
    """A pickled file as plain containers of tensors; CheckpointError when it holds anything else."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", expected="a checkpoint saved by torch") from None
    except Exception as error:  # pickle's own errors have no common base
        raise CheckpointError(
            f"{path} holds more than tensors: {str(error).splitlines()[0]}",
            expected="tensors and plain containers",
            hint="it was not opened; ask whoever made it for a safetensors file",
        ) from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}", expected="a table of tensors")
    return loaded


def pick_weights(loaded: Mapping[str, Any], under: str, source: Path, known: tuple[str, ...]) -> dict[str, Tensor]:
    """The table of tensors in a checkpoint, under the entry asked for or the first that is there and not empty."""
    entries = [under] if under else [name for name in known if isinstance(loaded.get(name), dict) and loaded[name]]
    table = loaded.get(entries[0]) if entries else loaded
    if not isinstance(table, dict):
        there = ", ".join(str(key) for key in list(loaded)[:8])
        raise CheckpointError(f"{source} has no entry {under!r}", expected=f"one of {there}")
    tensors = {str(key): one for key, one in table.items() if isinstance(one, Tensor)}
    if not tensors:
        raise CheckpointError(f"{source} holds no tensors", expected="a table of tensors")
    return tensors


_LORA_KEY = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")


def merge_lora(weights: dict[str, Tensor], lora: Mapping[str, Tensor], alpha: float | None) -> int:
    """Add (alpha / rank) * B @ A to the weights it belongs to, in place; how many. PEFT's names; alpha None: the rank.

    CheckpointError names what belongs to no weight, or has only one half.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in lora.items():
        found = _LORA_KEY.fullmatch(key)
        if not found:
            unknown.append(key)
            continue
        module = strip_wrappers(found[1].removeprefix("base_model.model."))
        halves.setdefault(f"{module}.weight", {})[found[2]] = value
    unknown += [key for key, pair in halves.items() if key not in weights or set(pair) != {"A", "B"}]
    if unknown or not halves:
        some = ", ".join(sorted(unknown)[:8]) or "nothing"
        raise CheckpointError(f"the LoRA does not fit the weights: {some}", expected="PEFT pairs lora_A, lora_B")
    for key, pair in halves.items():
        down, up = pair["A"].float(), pair["B"].float()
        scale = (alpha if alpha is not None else down.shape[0]) / down.shape[0]
        weights[key] = (weights[key].float() + scale * (up @ down)).to(weights[key].dtype)
    return len(halves)


def kind_of(keys: set[str]) -> str:
    """transformer, vae, text_encoder or light_decoder; CheckpointError for anything else."""
    if {"patch_embedding.weight", "head.modulation"} <= keys or "condition_embedder.time_proj.weight" in keys:
        return "transformer"
    if "decoder.3.conv.0.weight" in keys:
        return "light_decoder"
    if "decoder.head.2.weight" in keys or "decoder.conv_out.weight" in keys:
        return "vae"
    if "token_embedding.weight" in keys or "shared.weight" in keys:
        return "text_encoder"
    some = ", ".join(sorted(keys)[:6])
    raise CheckpointError(
        f"the checkpoint is none we know (it has {some})", expected="a Wan transformer, VAE, umT5 or light decoder"
    )


def text_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """config.json of an original Wan text encoder, from its shapes."""
    embedding, bias = tensors["token_embedding.weight"], tensors["blocks.0.pos_embedding.embedding.weight"]
    layers = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    buckets, heads = bias.shape
    return {
        "model_type": "umt5",
        "vocab_size": embedding.shape[0],
        "d_model": embedding.shape[1],
        "d_kv": tensors["blocks.0.attn.q.weight"].shape[0] // heads,
        "d_ff": tensors["blocks.0.ffn.fc1.weight"].shape[0],
        "num_layers": layers,
        "num_decoder_layers": 0,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def convert(job: Job) -> dict[str, Any]:
    """Carry out a job; what was made. The output appears whole or not at all."""
    source, output = Path(job.source), Path(job.output)
    loaded = load_tensors(source)
    weights = {strip_wrappers(key): one for key, one in pick_weights(loaded, job.under, source, _WEIGHTS_UNDER).items()}
    kind = kind_of(set(weights))
    merged = 0
    if job.lora:
        if kind != "transformer":
            raise CheckpointError("a LoRA merges into a transformer only")
        lora = pick_weights(load_tensors(Path(job.lora)), "", Path(job.lora), _LORA_UNDER)
        merged = merge_lora(weights, lora, job.lora_alpha)
    output.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file:
        made_of = hashlib.file_digest(file, "sha256").hexdigest()
    metadata = {
        "format": "pt",
        "turboserve": "converted-1",
        "kind": kind,
        "source": source.name,
        "source_sha256": made_of,
    }
    half_done = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        save_file({key: one.detach().contiguous().clone() for key, one in weights.items()}, half_done, metadata)
        os.replace(half_done, output)
    finally:
        half_done.unlink(missing_ok=True)
    if kind == "text_encoder" and "token_embedding.weight" in weights:
        (output.parent / "config.json").write_text(json.dumps(text_config(weights), indent=2) + "\n")
    return {
        "output": str(output),
        "kind": kind,
        "tensors": len(weights),
        "bytes": output.stat().st_size,
        "lora_merged": merged,
        "source_sha256": made_of,
    }


def job_json(job: Job) -> str:
    return json.dumps(asdict(job))


def main() -> int:
    """A job on stdin, what was made or the error on stdout."""
    try:
        result = {"made": convert(Job(**json.loads(sys.stdin.read())))}
    except TurboServeError as error:
        result = {"error": {"message": error.message, "expected": error.expected, "hint": error.hint}}
    print(json.dumps(result))
    return 0 if "made" in result else 1


if __name__ == "__main__":
    sys.exit(main())
