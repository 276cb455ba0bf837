"""`turboserve models inspect PATH`: what a file, folder or model.toml holds and what serving it would cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboserve.errors import TurboServeError

if TYPE_CHECKING:
    from turboserve.model.interface import Field

# Beside weights and sessions: activations of a pass and of a decode (reference figures at 480x832).
_WORKSPACE_BYTES = 8e9


def inspect_path(path: Path, profile: str | None, gpu_memory_gb: float, verify: bool) -> dict[str, Any]:
    """All that can be told without loading weights. `servable` is None where PATH is no whole model."""
    from turboserve.model.tensor_files import PICKLED_SUFFIXES

    if path.is_file() and path.suffix in PICKLED_SUFFIXES:
        return {
            "path": str(path),
            "kind": "pickled checkpoint",
            "servable": None,
            "bytes": path.stat().st_size,
            "hint": f"not opened; turboserve models convert {path}",
        }
    if path.is_file() and path.suffix == ".safetensors":
        return {"path": str(path), "kind": "weights file", "servable": None, **_weights(path)}
    from turboserve.model.wan.manifest import open_manifest

    try:
        manifest = open_manifest(path)
    except TurboServeError as error:
        if path.is_dir() and any(path.glob("*.safetensors")):
            return {"path": str(path), "kind": "weights folder", "servable": None, **_weights(path)}
        pickled = sorted(one.name for one in path.iterdir() if one.suffix in PICKLED_SUFFIXES) if path.is_dir() else []
        hint = f"convert what is pickled: {', '.join(pickled)}" if pickled else error.hint
        return {"path": str(path), "kind": "unknown", "servable": False, "problem": str(error), "hint": hint}
    return _model(path, manifest, profile, gpu_memory_gb, verify)


def _weights(path: Path) -> dict[str, Any]:
    """Kind, layout and shape of a weights file or folder, from its headers."""
    from turboserve.model.tensor_files import TensorFiles
    from turboserve.model.weights import describe_weights

    with TensorFiles.open(path) as files:
        found = describe_weights(files)
        found["bytes"] = sum(one.stat().st_size for one in files.paths)
        if files.metadata.get("source"):
            found["converted_from"] = files.metadata["source"]
    return found


def _model(path: Path, manifest: Any, profile: str | None, gpu_memory_gb: float, verify: bool) -> dict[str, Any]:
    from turboserve.model.interface import moved_bytes, session_layout, state_bytes
    from turboserve.model.wan.manifest import full_digest, weight_files

    preset, problems = manifest.preset, []
    parts: dict[str, dict[str, Any]] = {}
    for name, where in manifest.paths.items():
        if not where.exists():
            continue
        files = weight_files(where)
        parts[name] = {"path": str(where), "bytes": sum(one.stat().st_size for one in files)}
        if name in ("transformer", "vae", "light_decoder"):
            try:
                parts[name] |= _weights(where)
            except TurboServeError as error:
                problems.append(str(error))
    for name in manifest.needed:
        try:
            manifest.part(name)
        except TurboServeError as error:
            problems.append(str(error))
    layout = _layout(manifest)
    slot = preset.slot(manifest.size)
    slot_bytes = state_bytes(layout)
    by_decoder = {name: session_layout(layout, name) for name in manifest.decoders}
    on_gpu = [name for name in manifest.needed if name != "text_encoder" or manifest.text_device == "same"]
    weight_bytes = sum(_bytes_in_16_bits(manifest.paths[name]) for name in on_gpu if name in parts)
    room = gpu_memory_gb * 1e9 - weight_bytes - _WORKSPACE_BYTES
    found: dict[str, Any] = {
        "path": str(path),
        "kind": "model",
        "name": manifest.name,
        "preset": preset.name,
        "about": preset.about,
        "size": manifest.size,
        "decoders": list(manifest.decoders),
        "licence": manifest.licence,
        "notes": list(manifest.notes),
        "parts": parts,
        "window_latent_frames": slot.window_latent_frames,
        "sink_latent_frames": slot.sink_latent_frames,
        "timesteps": [round(one, 4) for one in preset.schedule.timesteps[1:]],
        "prompt_switch": [one.value for one in preset.prompt_switch],
        "max_chunks": preset.max_chunks,
        "state_bytes": {
            # A slot has room for a session with any of the decoders.
            "session": slot_bytes,
            "moved": moved_bytes(layout),
            "fields": {one.name: one.nbytes for one in layout if not one.decoder},
            "by_decoder": {
                name: {
                    "session": state_bytes(fields),
                    "moved": moved_bytes(fields),
                    "decoder": sum(one.nbytes for one in fields if one.decoder),
                }
                for name, fields in by_decoder.items()
            },
        },
        "sessions_per_gpu": {
            "gpu_memory_gb": gpu_memory_gb,
            "weights_bytes": weight_bytes,
            "workspace_bytes": int(_WORKSPACE_BYTES),
            "sessions": max(0, int(room // slot_bytes)),
        },
        "problems": problems,
        "servable": not problems,
    }
    if profile:
        from turboserve.sim.profile_files import load_profile

        known = load_profile(profile)
        found["expected"] = {
            "profile": known.name,
            "about": known.about,
            "chunk_s": known.chunk_s,
            "chunk_latency_s": known.batch_latency_s[0],
            "capacity": known.capacity,
        }
    if verify:
        digests = {name: full_digest(manifest.part(name)) for name in manifest.sha256 if name in parts}
        found["verified"] = bool(digests) and digests == dict(manifest.sha256)
        found["sha256"] = digests
        wrong = [name for name, one in digests.items() if one != manifest.sha256[name]]
        found["problems"] += [f"{name} is not what was recorded" for name in wrong]
        if not manifest.sha256:
            found["problems"].append("no SHA-256 is recorded: only a model.toml has them")
    return found


def _bytes_in_16_bits(path: Path) -> int:
    """What a part takes on a device, whatever it is stored in; a tokenizer takes nothing."""
    from turboserve.model.tensor_files import TensorFiles

    if path.suffix == ".json":
        return 0
    with TensorFiles.open(path) as files:
        return sum(2 * math.prod(files.shape(key)) for key in files.keys)


def _layout(manifest: Any) -> tuple[Field, ...]:
    """The session's fields as a 16-bit device would hold them."""
    import torch

    from turboserve.model.light_decoder import LightDecoder, LightDecoderConfig
    from turboserve.model.tensor_files import TensorFiles
    from turboserve.model.vae import VaeConfig, WanVaeDecoder
    from turboserve.model.wan.layout import FrameDecoder, state_layout
    from turboserve.model.wan.manifest import DECODERS
    from turboserve.model.wan.source import decoder_config

    decoders: dict[str, FrameDecoder] = {}
    for name in manifest.decoders:
        path = manifest.paths.get(DECODERS[name])
        config: LightDecoderConfig | VaeConfig = LightDecoderConfig() if name == "light" else VaeConfig()
        if path is not None and path.exists():
            with TensorFiles.open(path) as files:
                config = decoder_config(manifest, name, files)
        with torch.device("meta"):
            decoders[name] = LightDecoder(config) if isinstance(config, LightDecoderConfig) else WanVaeDecoder(config)
    return state_layout(manifest.preset, manifest.size, decoders, "bfloat16")


def lines_of(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    from turboserve.cli.models import human_bytes

    lines = [f"{found['path']}: {found['kind']}"]
    if found["kind"] == "model":
        state, gpu = found["state_bytes"], found["sessions_per_gpu"]
        lines += [
            f"  {found['name']}, preset {found['preset']}: {found['about']}",
            f"  {found['size']}, steps at {', '.join(f'{one:g}' for one in found['timesteps'])}; "
            f"prompt switch {', '.join(found['prompt_switch'])}; licence {found['licence'] or 'not stated'}",
            f"  a slot: {human_bytes(state['session'])} in 16 bits ("
            + ", ".join(f"{name} {human_bytes(size)}" for name, size in state["fields"].items())
            + ", and the largest decoder's memory)",
            *(
                f"  a session with the {name} decoder: {human_bytes(one['session'])}, of which "
                f"{human_bytes(one['decoder'])} are the decoder's"
                for name, one in state["by_decoder"].items()
            ),
            f"  {gpu['sessions']} sessions fit a GPU of {gpu['gpu_memory_gb']:g} GB beside "
            f"{human_bytes(gpu['weights_bytes'])} of weights and {human_bytes(gpu['workspace_bytes'])} of workspace",
        ]
        lines += [
            f"  {name}: {human_bytes(part['bytes'])} {_part_words(part)}" for name, part in found["parts"].items()
        ]
        if "expected" in found:
            one = found["expected"]
            lines.append(
                f"  by profile {one['profile']}: {one['chunk_latency_s'] * 1000:.0f} ms a chunk of "
                f"{one['chunk_s']:g} s, {one['capacity']} sessions keep pace. {one['about']}"
            )
        if "verified" in found:
            lines.append(f"  recorded SHA-256: {'all equal' if found['verified'] else 'DIFFERENT or none'}")
        lines += [f"  note: {one}" for one in found["notes"]]
        lines += [f"  problem: {one}" for one in found["problems"]]
        return lines
    lines += [f"  {key}: {value}" for key, value in found.items() if key not in ("path", "kind", "servable") and value]
    return lines


def _part_words(part: dict[str, Any]) -> str:
    shape = part.get("shape")
    words = [str(part.get("layout", "")), ", ".join(f"{k} {v}" for k, v in shape.items()) if shape else ""]
    return "; ".join(one for one in words if one)
