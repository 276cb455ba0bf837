"""Runs a local diffusers pipeline, one video at a time, and asks before every step whether it may go on.

    python -m turboserve.runtime.pipeline_worker      a child of the gateway; JSON lines on stdin and stdout

It says `loaded`, then for each job: `step` at every step's end, after which it waits for `go` (or `cancel`), and at
last `done` with a file of RGB24 frames, `failed` or `cancelled`. Waiting is what lets live sessions have the device:
between two steps this process runs nothing. It ends when its stdin does.

The folder is opened as data: safetensors alone, pipeline classes of diffusers alone, no code from the folder.
"""

from __future__ import annotations

import inspect
import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from turboserve.errors import CheckpointError, TurboServeError
from turboserve.runtime.lifeline import die_with_parent

FPS = 16.0  # of the Wan family; a pipeline's folder does not say


class Cancelled(Exception):
    """The job in work is not wanted any more."""


def check_folder(folder: Path) -> str:
    """The pipeline's class name; CheckpointError for a folder that would bring code or pickles along."""
    index = folder / "model_index.json"
    try:
        data = json.loads(index.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {index}: {error}", expected="the folder of a diffusers pipeline") from None
    import diffusers

    name = data.get("_class_name")
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise CheckpointError(f"{folder} wants pipeline class {name!r}", expected="a class of diffusers itself")
    code = sorted(str(one.relative_to(folder)) for one in folder.rglob("*.py"))
    if code:
        raise CheckpointError(f"{folder} holds code, which is not run: {', '.join(code[:4])}")
    return name


def load(folder: Path, device: str) -> Any:
    """The pipeline on a device: 16-bit on CUDA, float32 on a CPU."""
    name = check_folder(folder)
    import diffusers
    import torch

    if device == "cpu":
        torch.set_num_threads(1)  # live workers have the other cores
    kind = getattr(diffusers, name)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    parts = load_parts(folder, torch.device(device), dtype)
    try:
        pipeline = kind.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, **parts)
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"cannot load the pipeline in {folder}: {said}", expected="a whole folder, weights as safetensors"
        ) from None
    known = inspect.signature(pipeline.__call__).parameters
    needed = {"prompt", "num_inference_steps", "generator", "callback_on_step_end", "num_frames", "output_type"}
    if not needed <= known.keys():
        raise CheckpointError(
            f"{kind.__name__} takes no {', '.join(sorted(needed - known.keys()))}", expected="a text-to-video pipeline"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype) if device == "cuda" else pipeline


def load_parts(folder: Path, device: Any, dtype: Any) -> dict[str, Any]:
    """The pipeline's diffusers models, read by our own loader: theirs would need another package for Wan."""
    import diffusers
    import torch

    from turboserve.model.tensor_files import TensorFiles, fill

    parts = {}
    for name, entry in json.loads((folder / "model_index.json").read_text()).items():
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == "diffusers"):
            continue
        kind = getattr(diffusers, str(entry[1]), None)
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
            continue
        model_class: Any = kind  # diffusers' mixins, of which torch's Module knows nothing
        module = model_class.from_config(model_class.load_config(str(folder / name), local_files_only=True))
        with TensorFiles.open(folder / name) as files:
            fill(module, files, lambda key: key, what=f"{entry[1]} of its config", dtype=dtype, device=device)
        parts[name] = module
    return parts


def facts(pipeline: Any) -> dict[str, Any]:
    """What the pipeline makes when it is not told otherwise."""
    known = inspect.signature(pipeline.__call__).parameters
    return {
        "class": type(pipeline).__name__,
        "width": known["width"].default,
        "height": known["height"].default,
        "steps": known["num_inference_steps"].default,
        "fps": FPS,
    }


def make_frames(pipeline: Any, job: dict[str, Any], on_step: Any) -> Any:
    """Frames uint8 [n, h, w, 3] of a job; `on_step(done)` is called at every step's end and may raise Cancelled."""
    import numpy as np
    import torch

    def step_ended(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1)
        return tensors

    frames = int(job["frames"])
    per_latent = int(getattr(pipeline, "vae_scale_factor_temporal", 4))
    whole = 1 + -(-(frames - 1) // per_latent) * per_latent  # what the VAE can make; the rest is cut
    with torch.inference_mode():
        made = pipeline(
            prompt=job["prompt"],
            width=job["width"],
            height=job["height"],
            num_frames=whole,
            num_inference_steps=job["steps"],
            generator=torch.Generator("cpu").manual_seed(job["seed"]),
            callback_on_step_end=step_ended,
            output_type="np",
        ).frames[0]
    return (np.asarray(made)[:frames].clip(0, 1) * 255).round().astype(np.uint8)


class Worker:
    """The protocol's end in the child. Commands come through a queue, so that `cancel` is seen between steps."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._commands: queue.Queue[dict[str, Any]] = queue.Queue(maxsize=64)

    def read(self, lines: TextIO) -> None:
        """The reading thread: commands into the queue; the end of stdin ends the process, whatever it is doing."""
        for line in lines:
            self._commands.put(json.loads(line))
        os._exit(0)

    def say(self, **message: Any) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def run(self, folder: Path, device: str) -> int:
        try:
            pipeline = load(folder, device)
        except TurboServeError as error:
            self.say(failed_to_load=str(error))
            return 1
        self.say(loaded=facts(pipeline))
        while True:
            command = self._commands.get()
            if "job" in command:
                self._make(pipeline, command["job"])

    def _make(self, pipeline: Any, job: dict[str, Any]) -> None:
        def on_step(done: int) -> None:
            self.say(step=done, job=job["id"])
            while True:
                command = self._commands.get()
                if command.get("cancel") == job["id"]:
                    raise Cancelled
                if command.get("go") == job["id"]:
                    return

        try:
            frames = make_frames(pipeline, job, on_step)
            Path(job["output"]).write_bytes(frames.tobytes())
            self.say(done=len(frames), job=job["id"])
        except Cancelled:
            self.say(cancelled=True, job=job["id"])
        except Exception as error:  # a pipeline may raise anything; the next job may still be fine
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.say(failed=f"{type(error).__name__}: {said}", job=job["id"])


def main() -> int:
    die_with_parent()
    # Libraries print; what they say must not get between the protocol's lines.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    worker = Worker(out)
    threading.Thread(target=worker.read, args=(sys.stdin,), daemon=True, name="commands").start()
    return worker.run(Path(settings["folder"]), settings["device"])


if __name__ == "__main__":
    sys.exit(main())
