"""Names and paths of models to specs, prompt checks and loaded models.

MODEL is a built-in name, a folder laid out like a published checkpoint, or a model.toml (model/wan/manifest.py).
`shapes` is a package with three modules: `spec` (function `spec()`, no torch), `text` (function
`check_prompt(text, seed)`, no torch) and `model` (function `load(device)`). The gateway uses the first two only.
"""

from __future__ import annotations

import difflib
import importlib
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboserve.errors import ConfigError, UnknownModel
from turboserve.model.interface import ModelSpec, PromptReport

if TYPE_CHECKING:
    from turboserve.model.interface import StreamingModel

_SHAPES = "turboserve.model.shapes"
_WAN = "turboserve.model.wan.source"
BUILTIN = ("shapes", "wan-tiny")
DEFAULT_MODEL = "shapes"


def model_names() -> tuple[str, ...]:
    """Built-in names, the default first."""
    return BUILTIN


def resolve(name: str) -> str:
    """A built-in name as it is, a path made absolute; UnknownModel for anything else."""
    if name in BUILTIN:
        return name
    path = Path(name).expanduser()
    if path.exists():
        return str(path.resolve())
    near = difflib.get_close_matches(name, BUILTIN, n=1)
    if os.sep in name or path.suffix:
        raise UnknownModel(f"there is no {name!r}", expected="a folder with a model, or a model.toml")
    raise UnknownModel(
        f"no model is called {name!r}",
        expected=f"one of {', '.join(model_names())}, a folder, or a model.toml",
        hint=f"did you mean {near[0]!r}?" if near else "`turboserve models` lists what can be served",
    )


def _module(path: str) -> Any:
    return importlib.import_module(path)


@cache
def load_spec(name: str) -> ModelSpec:
    """Static facts of a model; needs neither torch nor weights in memory."""
    name = resolve(name)
    spec: ModelSpec
    if name == "shapes":
        spec = _module(f"{_SHAPES}.spec").spec()
    elif name in BUILTIN:
        spec = _module(_WAN).tiny_spec()
    else:
        spec = _module(_WAN).path_spec(Path(name))
    return spec


def check_prompt(name: str, text: str, seed: int) -> PromptReport:
    """What the model makes of a prompt, without loading it. A text encoder takes any words."""
    if resolve(name) == "shapes":
        report: PromptReport = _module(f"{_SHAPES}.text").check_prompt(text, seed)
        return report
    return PromptReport()


def load_model(name: str, device: str = "cpu", size: str | None = None) -> StreamingModel:
    """The model with its weights on a device, at a size WxH (None: its own). ConfigError for a size it cannot have."""
    name = resolve(name)
    model: StreamingModel
    if name == "shapes":
        if size is not None and size not in load_spec(name).sizes:
            raise ConfigError(f"shapes at {size}", expected=" or ".join(load_spec(name).sizes))
        model = _module(f"{_SHAPES}.model").load(device)
    elif name in BUILTIN:
        model = _module(_WAN).load_tiny(device, size)
    else:
        model = _module(_WAN).load_path(Path(name), device, size)
    return model
