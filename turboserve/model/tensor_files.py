"""Weights on disk: safetensors files opened lazily, and nothing else. No other format is read by a server.

A source is one file or one folder (shards with an index, or whatever `*.safetensors` lie in it). Pickled checkpoints
(.pt, .pth, .ckpt, .bin) are refused with the command that converts them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from turboserve.errors import CheckpointError

PICKLED_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_NAMED_KEYS_MAX = 8


class TensorFiles:
    """The tensors of one or several safetensors files under their names. Use as a context."""

    def __init__(self, paths: Sequence[Path], source: Path) -> None:
        self.source = source
        self.paths = tuple(paths)
        self.metadata: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        self._stack = ExitStack()
        for path in paths:
            try:
                handle = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                self._stack.close()
                raise CheckpointError(f"cannot read {path}: {error}", expected="a whole safetensors file") from None
            self.metadata |= handle.metadata() or {}
            self._handles |= dict.fromkeys(handle.keys(), handle)

    @classmethod
    def open(cls, source: Path) -> TensorFiles:
        """The tensors of a file or a folder; CheckpointError says what else was found there."""
        return cls(find_files(source), source)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self._handles)

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._handles[key].get_slice(key).get_shape())

    def get(self, key: str) -> Tensor:
        return self._handles[key].get_tensor(key)


def find_files(source: Path) -> list[Path]:
    """The safetensors files of a source, in order. Only names are looked at."""
    if source.is_file():
        if source.suffix in PICKLED_SUFFIXES:
            raise _pickled(source)
        if source.suffix != ".safetensors":
            raise CheckpointError(f"{source} is no weights file", expected="a .safetensors file or a folder of them")
        return [source]
    if not source.is_dir():
        raise CheckpointError(
            f"there is no {source}",
            expected="a .safetensors file or a folder of them",
            hint="`turboserve models pull REPO` fetches one; nothing is fetched unless asked",
        )
    indexes = sorted(source.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        shards = _shards(indexes[0])
        missing = [one.name for one in shards if not one.is_file()]
        if missing:
            raise CheckpointError(
                f"{source} lacks {', '.join(missing)}, which {indexes[0].name} names",
                hint="fetch it again: `turboserve models pull` goes on where it stopped",
            )
        return shards
    found = sorted(source.glob("*.safetensors"))
    if found:
        return found
    pickled = sorted(one for one in source.iterdir() if one.suffix in PICKLED_SUFFIXES)
    if pickled:
        raise _pickled(pickled[0])
    raise CheckpointError(
        f"no safetensors file in {source}", hint="`turboserve models inspect PATH` tells what is there"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"cannot read {index}: {error}") from None
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} names files outside its folder")
    return [index.parent / name for name in sorted(names)]


def _pickled(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickled checkpoint, which the server never opens",
        expected="safetensors",
        hint=f"turboserve models convert {path} -o {path.with_suffix('.safetensors').name}",
    )


def check_fit(
    wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], source: Path, what: str
) -> None:
    """CheckpointError that names missing, unexpected and misshapen keys, where there are any."""
    missing = sorted(wanted.keys() - given.keys())
    unexpected = sorted(given.keys() - wanted.keys())
    misshapen = [
        f"{key} {list(given[key])}, not {list(wanted[key])}"
        for key in sorted(wanted.keys() & given.keys())
        if given[key] != wanted[key]
    ]
    parts = [
        f"{len(keys)} {label}: {_some(keys)}"
        for label, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if keys
    ]
    if parts:
        raise CheckpointError(
            f"{source} does not fit {what}; {'; '.join(parts)}",
            hint="`turboserve models inspect PATH` tells what it holds",
        )


def _some(keys: list[str]) -> str:
    rest = len(keys) - _NAMED_KEYS_MAX
    return ", ".join(keys[:_NAMED_KEYS_MAX]) + (f" and {rest} more" if rest > 0 else "")


def fill(
    module: nn.Module,
    files: TensorFiles,
    rename: Callable[[str], str],
    *,
    what: str,
    dtype: torch.dtype,
    device: torch.device,
    ignored: tuple[str, ...] = (),
    adapt: Callable[[str, Tensor], Tensor] = lambda _key, value: value,
    adapted_shape: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda _key, shape: shape,
) -> None:
    """Put a file's tensors into a module made on the meta device, each read, adapted and moved by itself.

    `rename` maps the file's keys to the module's, `ignored` are prefixes (after renaming) that are known but not
    needed, `adapt` turns a tensor as it is stored into the module's form, whose shape `adapted_shape` foretells.
    """
    wanted = {key: tuple(one.shape) for key, one in module.state_dict().items()}
    names = {rename(key): key for key in files.keys}
    names = {ours: key for ours, key in names.items() if ours in wanted or not ours.startswith(ignored)}
    given = {ours: adapted_shape(ours, files.shape(key)) for ours, key in names.items()}
    check_fit(wanted, given, files.source, what)
    state = {ours: adapt(ours, files.get(key)).to(device=device, dtype=dtype) for ours, key in names.items()}
    module.load_state_dict(state, assign=True)
    module.eval().requires_grad_(False)
