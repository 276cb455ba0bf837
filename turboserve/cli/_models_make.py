"""`turboserve models convert` and `compose`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from turboserve.errors import CheckpointError, ConfigError


def run_conversion(
    source: Path, output: Path, lora: Path | None, lora_alpha: float | None, under: str
) -> dict[str, Any]:
    """Convert in a child process and return what it made; its error becomes ours."""
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}", expected="a name that ends in .safetensors")
    job = {
        "source": str(source.resolve()),
        "output": str(output.resolve()),
        "lora": str(lora.resolve()) if lora else "",
        "lora_alpha": lora_alpha,
        "under": under,
    }
    done = subprocess.run(
        [sys.executable, "-m", "turboserve.model.convert"], input=json.dumps(job), capture_output=True, text=True
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CheckpointError(f"converting {source} ended with code {done.returncode}: {last}") from None
    if "error" in answer:
        error = answer["error"]
        raise CheckpointError(error["message"], expected=error["expected"], hint=error["hint"])
    made: dict[str, Any] = answer["made"]
    return made


def compose_manifest(
    output: Path,
    *,
    transformer: Path,
    vae: Path | None,
    text_encoder: Path,
    tokenizer: Path | None,
    light_decoder: Path | None,
    decoder: str | None,
    preset: str | None,
    name: str | None,
    size: str | None,
    licence: str,
    text_device: str,
) -> dict[str, Any]:
    """Write a model.toml. Each weights file's header is read: what fits no preset is refused here, not at serving."""
    from turboserve.model.presets import find_preset, guess_preset
    from turboserve.model.tensor_files import TensorFiles
    from turboserve.model.wan.layout import transformer_config
    from turboserve.model.wan.manifest import DECODERS, ModelManifest, full_digest, to_toml
    from turboserve.model.weights import shape_of_transformer

    if vae is None and light_decoder is None:
        raise ConfigError("neither --vae nor --light-decoder", expected="one of them, to make pictures of latents")
    with TensorFiles.open(transformer) as files:
        layers, dim = shape_of_transformer(files)
        chosen = find_preset(preset) if preset else guess_preset(layers, dim)
    if chosen is None:
        raise CheckpointError(
            f"{transformer} has {layers} layers and is {dim} wide, as no preset; name one by --preset"
        )
    shape = transformer_config(chosen)
    if (layers, dim) != (shape.layers, shape.dim):
        raise CheckpointError(
            f"{transformer} has {layers} layers and is {dim} wide",
            expected=f"{shape.layers} and {shape.dim}, as preset {chosen.name}",
        )
    paths = {"transformer": transformer, "text_encoder": text_encoder, "tokenizer": _tokenizer(text_encoder, tokenizer)}
    paths |= {key: path for key, path in (("vae", vae), ("light_decoder", light_decoder)) if path}
    offered = tuple(one for one, part in DECODERS.items() if part in paths)
    decoders = (decoder,) if decoder else offered
    if decoder and decoder not in offered:
        raise ConfigError(f"--decoder {decoder} without its part", expected=f"one of {', '.join(offered)}")
    resolved = {key: path.resolve() for key, path in paths.items()}
    size = size or chosen.size
    chosen.latent_size(size)
    manifest = ModelManifest(
        name=name or chosen.name,
        preset=chosen,
        size=size,
        paths=resolved,
        decoders=decoders,
        text_device=text_device,
        licence=licence,
        sha256={key: full_digest(path) for key, path in resolved.items()},
    )
    manifest.check_parts()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(to_toml(manifest, output.resolve().parent))
    return {
        "output": str(output),
        "name": manifest.name,
        "preset": chosen.name,
        "size": size,
        "decoders": list(manifest.decoders),
        "sha256": dict(manifest.sha256),
    }


def _tokenizer(text_encoder: Path, tokenizer: Path | None) -> Path:
    """The tokenizer.json named, or the one in or beside the text encoder's folder."""
    if tokenizer is not None:
        return tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    places = [text_encoder / "tokenizer.json", text_encoder.parent / "tokenizer" / "tokenizer.json"]
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(
        "no --tokenizer", expected=f"the encoder's tokenizer.json; looked for {places[0]} and {places[1]}"
    )
