"""Names of models to specs, prompt checks and loaded models.

A built-in model is a package with three modules: `spec` (function `spec()`, no torch), `text` (function
`check_prompt(text, seed)`, no torch) and `model` (function `load(device)`). The gateway uses the first two only.
"""

from __future__ import annotations

import difflib
import importlib
from functools import cache
from typing import TYPE_CHECKING, Any

from turboserve.errors import UnknownModel
from turboserve.model.interface import ModelSpec, PromptReport

if TYPE_CHECKING:
    from turboserve.model.interface import StreamingModel

BUILTIN = {"shapes": "turboserve.model.shapes"}
DEFAULT_MODEL = "shapes"


def model_names() -> tuple[str, ...]:
    """Built-in names, the default first."""
    return tuple(sorted(BUILTIN, key=lambda name: (name != DEFAULT_MODEL, name)))


def _module(name: str, part: str) -> Any:
    if name not in BUILTIN:
        near = difflib.get_close_matches(name, BUILTIN, n=1)
        raise UnknownModel(
            f"no model is called {name!r}",
            expected=f"one of {', '.join(model_names())}",
            hint=f"did you mean {near[0]!r}?" if near else "`turboserve models` lists what can be served",
        )
    return importlib.import_module(f"{BUILTIN[name]}.{part}")


@cache
def load_spec(name: str) -> ModelSpec:
    """Static facts of a model; needs neither torch nor weights in memory."""
    spec: ModelSpec = _module(name, "spec").spec()
    return spec


def check_prompt(name: str, text: str, seed: int) -> PromptReport:
    """What the model makes of a prompt, without loading it."""
    report: PromptReport = _module(name, "text").check_prompt(text, seed)
    return report


def load_model(name: str, device: str = "cpu") -> StreamingModel:
    """The model with its weights on a device."""
    model: StreamingModel = _module(name, "model").load(device)
    return model
