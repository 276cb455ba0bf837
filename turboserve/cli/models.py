"""`turboserve models`: what can be served, what a path holds, and how checkpoints become models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from turboserve.cli.options import console, json_option, print_json

PATH = click.Path(exists=True, path_type=Path)
OUT_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List what can be served: size, rate, steps, and the bytes that one session holds.

    The commands below look into checkpoints, convert them, put models together and fetch parts.
    """
    if context.invoked_subcommand is not None:
        return
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
    """A built-in model's spec and the size of its state. Weights that are shipped are loaded, which tells that they
    are there; those of `wan-tiny` are made from a seed, so only their shapes are asked."""
    from turboserve.model.interface import Tier, moved_bytes, state_bytes
    from turboserve.model.registry import load_model, load_spec

    if name == "wan-tiny":
        from turboserve.model.wan.source import tiny_layout

        spec, layout = load_spec(name), tiny_layout()
    else:
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


@command.command()
@click.argument("path", type=PATH)
@click.option("--profile", help="Latency profile for the expected chunk time: a JSON file or a shipped name.")
@click.option("--gpu-memory-gb", type=click.FloatRange(min=1), default=141.0, help="Of the GPU that sessions share.")
@click.option("--verify", is_flag=True, help="Read every byte and compare with the recorded SHA-256.")
@json_option
def inspect(path: Path, profile: str | None, gpu_memory_gb: float, verify: bool, as_json: bool) -> int:
    """Tell what PATH holds: parts, layout, shape, state bytes per session, sessions per GPU.

    Nothing pickled is opened. Exit 1 when a needed part is missing, or bytes differ from what is recorded.
    """
    from turboserve.cli._models_inspect import inspect_path, lines_of

    found = inspect_path(path, profile, gpu_memory_gb, verify)
    if as_json:
        print_json(found)
    else:
        for line in lines_of(found):
            click.echo(line)
    return 0 if found["servable"] is not False and found.get("verified") is not False else 1


@command.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=OUT_FILE, help="The safetensors file to write.  [default: beside SOURCE]")
@click.option("--lora", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A LoRA to merge in.")
@click.option("--lora-alpha", type=click.FloatRange(min=0), help="Its alpha.  [default: its rank]")
@click.option("--under", default="", help="The entry that holds the weights.  [default: averaged ones where there are]")
@json_option
def convert(
    source: Path, output: Path | None, lora: Path | None, lora_alpha: float | None, under: str, as_json: bool
) -> None:
    """Turn a pickled checkpoint (.pt, .pth) into safetensors, in a process of its own.

    Training wrappers are stripped from the names. The server itself opens safetensors alone.
    """
    from turboserve.cli._models_make import run_conversion

    output = output or source.with_suffix(".safetensors")
    made = run_conversion(source, output, lora, lora_alpha, under)
    if as_json:
        print_json(made)
        return
    click.echo(made["output"])
    merged = f", {made['lora_merged']} LoRA pairs merged" if made["lora_merged"] else ""
    click.echo(f"  {made['kind']}, {made['tensors']} tensors, {human_bytes(made['bytes'])}{merged}")


@command.command()
@click.option("--transformer", type=PATH, required=True, help="File or folder of safetensors.")
@click.option("--vae", type=PATH, help="A Wan VAE; it or a light decoder is needed.")
@click.option("--text-encoder", type=PATH, required=True, help="Folder with config.json and safetensors.")
@click.option("--tokenizer", type=PATH, help="tokenizer.json.  [default: in or beside the text encoder]")
@click.option("--light-decoder", type=PATH, help="A TAEHV-class decoder.")
@click.option("--decoder", type=click.Choice(["full", "light"]), help="Offer only this.  [default: each given]")
@click.option("--preset", help="From model/presets.py.  [default: told by the transformer's shape]")
@click.option("--name", help="What clients call it.  [default: the preset's]")
@click.option("--size", help="WxH in pixels.  [default: the preset's]")
@click.option("--licence", default="", help="Of the weights, as their owner states it.")
@click.option("--text-device", default="same", type=click.Choice(["same", "cpu"]))
@click.option("-o", "--output", type=OUT_FILE, default=Path("model.toml"), help="The file to write.")
@json_option
def compose(as_json: bool, output: Path, **options: Any) -> None:
    """Write a model.toml: parts from several places as one model, with their SHA-256."""
    from turboserve.cli._models_make import compose_manifest

    made = compose_manifest(output, **options)
    if as_json:
        print_json(made)
        return
    click.echo(made["output"])
    click.echo(f"  {made['name']}: preset {made['preset']}, {made['size']}; serve it: turboserve serve {output}")


@command.command()
@click.argument("repository", metavar="REPO[@REV]")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder.  [default: its name]")
@click.option("--include", multiple=True, help="Only files that match, such as 'vae/*'. May be given again.")
@click.option("--list", "list_only", is_flag=True, help="Show files, bytes and licence; fetch nothing.")
@json_option
def pull(repository: str, output: Path | None, include: tuple[str, ...], list_only: bool, as_json: bool) -> None:
    """Fetch a repository's weights from the Hugging Face hub: progress, resume, hash check, licence shown."""
    from turboserve.cli._models_pull import pull_repository

    made = pull_repository(repository, output, include, list_only)
    if as_json:
        print_json(made)
        return
    if not list_only:
        click.echo(made["output"])
