"""`turboserve models`: what can be served, and what one session of it costs."""

from __future__ import annotations

from typing import Any

import click

from turboserve.cli.options import console, json_option, print_json


@click.command()
@json_option
def command(as_json: bool) -> None:
    """List what can be served: size, rate, steps, and the bytes that one session holds."""
    from turboserve.model.registry import model_names

    models = [describe(name) for name in model_names()]
    if as_json:
        print_json({"models": models})
        return
    from rich.table import Table

    out = console()
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "size", "fps", "chunk", "steps", "bytes per session"):
        table.add_column(heading)
    for one in models:
        table.add_row(
            one["name"],
            ", ".join(one["sizes"]),
            f"{one['fps']:g}",
            f"{one['chunk_frames']['rest']} frames, {one['chunk_s'] * 1000:.0f} ms",
            f"{one['steps']}, floor {one['steps_floor']}",
            human_bytes(one["state_bytes"]["device"] + one["state_bytes"]["host"]),
        )
    out.print(table)
    for one in models:
        out.print(f"{one['name']} ({one['model_hash']}): {one['about']}", markup=False, style="dim")


def describe(name: str) -> dict[str, Any]:
    """A model's spec and the size of its state; loads the weights, which is what tells that they are there."""
    from turboserve.model.interface import Tier, moved_bytes, state_bytes
    from turboserve.model.registry import load_model

    model = load_model(name, "cpu")
    spec, layout = model.spec, model.state_layout()
    return {
        "name": spec.name,
        "about": spec.about,
        "model_hash": spec.model_hash,
        "sizes": list(spec.sizes) or [f"{spec.width}x{spec.height}"],
        "fps": spec.fps,
        "chunk_s": spec.chunk_s,
        "chunk_frames": {"first": spec.chunk_frames_first, "rest": spec.chunk_frames_rest},
        "steps": spec.denoise_steps,
        "steps_floor": spec.denoise_steps_floor,
        "prompt_switch": [one.value for one in spec.prompt_switch],
        "max_chunks": spec.max_chunks,
        "state_bytes": {
            "device": state_bytes(layout, Tier.DEVICE),
            "host": state_bytes(layout, Tier.HOST),
            "moved": moved_bytes(layout),
        },
    }


def human_bytes(count: int) -> str:
    """Bytes as people read them: 412 KiB, 1.9 GiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
