"""Where a Wan model's parts lie: a model.toml, or a folder laid out as published checkpoints are.

    format = "turboserve-model-1"
    name = "longlive-1.3b"                 # what clients call it
    preset = "longlive-1.3b"               # model/presets.py; [overrides] changes single values
    licence = "Apache-2.0"
    transformer = "longlive.safetensors"   # files or folders, relative to this file
    text_encoder = "Wan2.1-T2V-1.3B-Diffusers/text_encoder"
    tokenizer = "Wan2.1-T2V-1.3B-Diffusers/tokenizer/tokenizer.json"
    vae = "Wan2.1-T2V-1.3B-Diffusers/vae"
    light_decoder = "taew2_1.safetensors"  # optional
    decoders = ["full", "light"]           # offered, the default first; without it: those whose part is named
    size = "832x480"
    text_device = "same"                   # or "cpu": leaves the accelerator's memory to sessions
    [sha256]
    transformer = "..."

Needs no torch: a gateway reads a model's spec from here.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turboserve.errors import CheckpointError, ConfigError
from turboserve.model.interface import ModelSpec
from turboserve.model.presets import WanPreset, find_preset, guess_preset
from turboserve.model.wan.spec import wan_spec

FORMAT = "turboserve-model-1"
FILE_NAME = "model.toml"
PARTS = ("transformer", "text_encoder", "tokenizer", "vae", "light_decoder")
DECODERS = {"full": "vae", "light": "light_decoder"}
_OLD_NAMES = {"vae": "full"}  # what earlier files call the full decoder
# A model with one decoder has the hash that it had when there was one a server.
_HASHED_ALONE = {"full": "vae", "light": "light"}
_TEXT_DEVICES = ("same", "cpu")
_TEXTS = {"format", "name", "preset", "licence", "decoder", "size", "text_device", *PARTS}
_KNOWN = {*_TEXTS, "decoders", "overrides", "sha256"}
_SAMPLE_BYTES, _SAMPLE_EVERY_BYTES = 1 << 16, 1 << 24
_FULL_BYTES_MAX = 1 << 26


@dataclass(frozen=True)
class ModelManifest:
    """A model's parts, found but not opened. `decoders` are those that sessions may choose, the default first. `notes`
    says what was assumed."""

    name: str
    preset: WanPreset
    size: str
    paths: Mapping[str, Path]
    decoders: tuple[str, ...] = ("full",)
    text_device: str = "same"
    licence: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """The parts without which it cannot be served."""
        return ("transformer", "text_encoder", "tokenizer", *(DECODERS[one] for one in self.decoders))

    def part(self, name: str) -> Path:
        """A part's path; CheckpointError with the command that fetches it where it is missing."""
        path = self.paths.get(name)
        if path is not None and path.exists():
            return path
        raise self.missing_part(name, path)

    def missing_part(self, name: str, path: Path | None) -> CheckpointError:
        repository = dict(self.preset.sources).get(name)
        where = f"there is no {path}" if path else "the model names none"
        flag = f"--{name.replace('_', '-')}"
        pull = f"turboserve models pull {repository}" if repository else "turboserve models pull REPO"
        return CheckpointError(
            f"model {self.name} lacks its {name.replace('_', ' ')}: {where}",
            expected=f"a file or folder under `{name}` of {FILE_NAME}",
            hint=f"fetch one with `{pull}`, then name it with `turboserve models compose {flag} PATH ...`",
        )

    def check_parts(self) -> None:
        """CheckpointError for the first needed part that is missing."""
        for name in self.needed:
            self.part(name)

    def model_hash(self) -> str:
        """16 hex digits: preset, size, decoders, and the parts' digests (recorded ones, else samples of the files)."""
        digests = {name: self.sha256.get(name) or sampled_digest(self.part(name)) for name in self.needed}
        facts = {
            "preset": self.preset.name,
            "overrides": dict(self.overrides),
            "size": self.size,
            "decoder": self.decoders if len(self.decoders) > 1 else _HASHED_ALONE[self.decoders[0]],
            "parts": digests,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def spec(self) -> ModelSpec:
        self.check_parts()
        return wan_spec(self.preset, self.size, self.name, self.model_hash(), self.decoders)


def open_manifest(path: Path) -> ModelManifest:
    """The model at a path: a model.toml, a folder with one, or a folder laid out like a published checkpoint."""
    if path.is_file() and path.suffix == ".toml":
        return read_manifest(path)
    if path.is_dir():
        own = path / FILE_NAME
        return read_manifest(own) if own.is_file() else discover(path)
    if path.is_file():
        raise CheckpointError(
            f"{path} is one part of a model",
            expected=f"a folder with all parts, or a {FILE_NAME} that names them",
            hint="`turboserve models compose --transformer FILE --vae DIR --text-encoder DIR` writes one",
        )
    raise CheckpointError(f"there is no {path}", expected=f"a folder or a {FILE_NAME}")


def read_manifest(path: Path) -> ModelManifest:
    """A model.toml; ConfigError says which key does not fit."""
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", expected="TOML") from None
    if data.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {data.get('format')!r}", expected=repr(FORMAT))
    unknown = sorted(data.keys() - _KNOWN)
    if unknown:
        raise ConfigError(f"{path} has unknown keys: {', '.join(unknown)}", expected=", ".join(sorted(_KNOWN)))
    for key in _TEXTS:
        if not isinstance(data.get(key, ""), str):
            raise ConfigError(f"{path}: {key} is {data[key]!r}", expected="text")
    for key in ("overrides", "sha256"):
        if not isinstance(data.get(key, {}), dict):
            raise ConfigError(f"{path}: {key} is {data[key]!r}", expected="a table")
    if "preset" not in data:
        raise ConfigError(f"{path} names no preset", expected="one of model/presets.py")
    overrides = data.get("overrides", {})
    preset = find_preset(data["preset"], overrides)
    size = data.get("size", preset.size)
    preset.latent_size(size)
    return ModelManifest(
        name=data.get("name", preset.name),
        preset=preset,
        size=size,
        paths={name: (path.parent / data[name]).resolve() for name in PARTS if name in data},
        decoders=_decoders(path, data),
        text_device=_one_of(path, "text_device", data.get("text_device", "same"), _TEXT_DEVICES),
        licence=data.get("licence", ""),
        sha256=data.get("sha256", {}),
        overrides=overrides,
    )


def _decoders(path: Path, data: Mapping[str, Any]) -> tuple[str, ...]:
    """What sessions may choose from: `decoders`; else `decoder` alone, as earlier files have it; else what is named."""
    known, key = (*DECODERS, *_OLD_NAMES), "decoders" if "decoders" in data else "decoder"
    if "decoders" not in data:
        named = tuple(one for one, part in DECODERS.items() if part in data)
        wanted: Any = [data["decoder"]] if "decoder" in data else list(named or ("full",))
    elif "decoder" in data:
        raise ConfigError(f"{path} has both decoder and decoders", expected="decoders, the default first")
    else:
        wanted = data["decoders"]
    if not isinstance(wanted, list) or not wanted or not all(isinstance(one, str) for one in wanted):
        raise ConfigError(f"{path}: decoders is {wanted!r}", expected=f"a list of {', '.join(DECODERS)}")
    found = tuple(_OLD_NAMES.get(one, one) for one in (_one_of(path, key, one, known) for one in wanted))
    if len(set(found)) != len(found):
        raise ConfigError(f"{path}: decoders names one twice: {', '.join(found)}")
    return found


def _one_of(path: Path, key: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ConfigError(f"{path}: {key} is {value!r}", expected=f"one of {', '.join(known)}")
    return value


_PLACES = {
    "transformer": ("transformer", "diffusion_pytorch_model.safetensors", "."),
    "text_encoder": ("text_encoder",),
    "tokenizer": (
        "tokenizer/tokenizer.json",
        "text_encoder/tokenizer.json",
        "google/umt5-xxl/tokenizer.json",
        "tokenizer.json",
    ),
    "vae": ("vae", "Wan2.1_VAE.safetensors"),
    "light_decoder": ("taew2_1.safetensors", "light_decoder"),
}


def discover(folder: Path) -> ModelManifest:
    """Parts of a diffusers or original Wan folder, by where they usually lie. The preset is told by the
    transformer's config.json, as far as that goes."""
    folder = folder.resolve()
    paths = {}
    for name, places in _PLACES.items():
        for place in places:
            found = (folder / place).resolve()
            weights = found.is_file() or (found.is_dir() and any(found.glob("*.safetensors")))
            if weights and (name != "transformer" or place != "." or (folder / "config.json").is_file()):
                paths[name] = found
                break
    if "transformer" not in paths:
        raise CheckpointError(
            f"{folder} is not laid out like a model",
            expected=f"{FILE_NAME}, or transformer/, text_encoder/, tokenizer/ and vae/",
            hint="`turboserve models compose` writes a model.toml of parts that lie elsewhere",
        )
    layers, dim = _transformer_shape(paths["transformer"])
    preset = guess_preset(layers, dim)
    if preset is None:
        raise CheckpointError(
            f"{folder} holds a transformer of {layers} layers, {dim} wide, which no preset describes",
            hint="`turboserve models compose --preset NAME ...` says which to use",
        )
    decoders = tuple(one for one, part in DECODERS.items() if part in paths) or ("full",)
    return ModelManifest(
        name=folder.name,
        preset=preset,
        size=preset.size,
        paths=paths,
        decoders=decoders,
        notes=(f"no {FILE_NAME}: preset {preset.name} assumed from the transformer's shape",),
    )


def _transformer_shape(path: Path) -> tuple[int, int]:
    """(layers, width) from config.json, in diffusers' or original Wan's words."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        data = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the transformer's config: {error}", expected=str(config)) from None
    try:
        if "num_attention_heads" in data:
            return int(data["num_layers"]), int(data["num_attention_heads"]) * int(data["attention_head_dim"])
        return int(data["num_layers"]), int(data["dim"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{config} tells no number of layers and width") from None


def weight_files(path: Path) -> list[Path]:
    """The files of a part: itself, or what lies in its folder."""
    if path.is_file():
        return [path]
    return sorted(one for one in path.iterdir() if one.suffix in (".safetensors", ".json"))


def sampled_digest(path: Path) -> str:
    """Identity of a part's files without reading all of them: names, sizes, and 64 KiB in every 16 MiB.

    Files up to 64 MiB are read whole. It tells models apart; whether bytes are right is `sha256`'s to say.
    """
    digest = hashlib.sha256()
    for one in weight_files(path):
        size = one.stat().st_size
        digest.update(f"{one.name} {size}\n".encode())
        with one.open("rb") as file:
            if size <= _FULL_BYTES_MAX:
                digest.update(file.read())
                continue
            for offset in (*range(0, size, _SAMPLE_EVERY_BYTES), size - _SAMPLE_BYTES):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def full_digest(path: Path) -> str:
    """SHA-256 of a file, or over (name, SHA-256) of a part's files."""
    files = weight_files(path)
    each = {}
    for one in files:
        with one.open("rb") as file:
            each[one.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if path.is_file():
        return each[path.name]
    return hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()


def to_toml(manifest: ModelManifest, folder: Path) -> str:
    """The model.toml of a manifest, its paths relative to `folder` where they lie in it."""

    def shown(path: Path) -> str:
        return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)

    lines = [f"format = {_text(FORMAT)}", f"name = {_text(manifest.name)}", f"preset = {_text(manifest.preset.name)}"]
    lines += [f"{name} = {_text(shown(path))}" for name, path in manifest.paths.items()]
    lines += [f"decoders = {_value(manifest.decoders)}", f"size = {_text(manifest.size)}"]
    lines += [f"text_device = {_text(manifest.text_device)}", f"licence = {_text(manifest.licence)}"]
    if manifest.overrides:
        lines += ["", "[overrides]", *(f"{key} = {_value(value)}" for key, value in manifest.overrides.items())]
    if manifest.sha256:
        lines += ["", "[sha256]", *(f"{key} = {_text(value)}" for key, value in manifest.sha256.items())]
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    # A JSON string of printable characters is a TOML basic string.
    return json.dumps(value, ensure_ascii=False)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(one) for one in value)}]"
    return _text(value) if isinstance(value, str) else repr(value)
