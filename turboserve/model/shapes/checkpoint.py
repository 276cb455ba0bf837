"""The `shapes` weights as one safetensors file: network, codec, and how they were made. Nothing is unpickled.

Weights are stored as float16 and computed with as float32: widening is exact, so every machine starts from
the same numbers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from turboserve.errors import CheckpointError
from turboserve.model.shapes.codec import PatchCodec, random_codec
from turboserve.model.shapes.network import CONFIG, ShapesNetwork, fresh_network
from turboserve.model.shapes.sharpen import Sharpener
from turboserve.model.shapes.spec import WEIGHTS_PATH, weights_digest

FORMAT = "turboserve-shapes-1"


@dataclass(frozen=True)
class ShapesWeights:
    network: ShapesNetwork
    codec: PatchCodec
    sharpener: Sharpener
    digest: str
    metadata: dict[str, Any]


def save_weights(
    path: Path, network: ShapesNetwork, codec: PatchCodec, sharpener: Sharpener, training: dict[str, Any]
) -> None:
    """Write weights with their metadata: the config, and what `training` says (seed, steps, commit)."""
    tensors = {f"network.{name}": one for name, one in network.state_dict().items()}
    tensors |= {f"sharpener.{name}": one for name, one in sharpener.state_dict().items()}
    tensors |= {f"codec.{name}": one for name, one in codec.tensors().items()}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(asdict(CONFIG), sort_keys=True),
        "training": json.dumps(training, sort_keys=True),
        "licence": "Apache-2.0",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: one.detach().half().contiguous() for name, one in tensors.items()}, path, metadata=metadata)


def load_weights(path: Path = WEIGHTS_PATH) -> ShapesWeights:
    """Read a weights file; CheckpointError says what does not fit."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {path.name}: {error}",
            hint="reinstall the package, or make it: turboserve train-shapes",
        ) from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path.name} holds {metadata.get('format')!r}", expected=FORMAT)
    network, sharpener = ShapesNetwork(), Sharpener()
    for module, prefix in ((network, "network."), (sharpener, "sharpener.")):
        try:
            module.load_state_dict(_part(tensors, prefix))
        except RuntimeError as error:
            raise CheckpointError(f"{path.name} does not fit: {error}") from None
    codec = PatchCodec.from_tensors(_part(tensors, "codec."))
    return ShapesWeights(network.eval(), codec, sharpener.eval(), weights_digest(path), metadata)


def random_weights(seed: int) -> ShapesWeights:
    """Seeded random weights whose output is not all zero, for tests."""
    network = fresh_network(seed)
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        network.transformer.head.head.weight.normal_(0, 0.05, generator=generator)
    return ShapesWeights(network.eval(), random_codec(seed), Sharpener().eval(), f"random-{seed}", {})


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
