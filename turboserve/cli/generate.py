"""`turboserve generate PROMPT -o out.mp4`: one session in this process, no server, into a file."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any

import click

from turboserve.cli.options import console, json_option, print_json

_AT = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*s?\s*=(.*)$", re.DOTALL)
SEED_MAX = (1 << 53) - 1


class AtType(click.ParamType):
    """`5s=a blue square`: a time of the video and the prompt from there on."""

    name = "TIME=PROMPT"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[float, str]:
        if isinstance(value, tuple):
            return value
        found = _AT.match(str(value))
        if not found or not found.group(2).strip():
            self.fail(f'{value!r}; expected a time and a prompt, like --at 5s="a blue square"', param, context)
        return float(found.group(1)), found.group(2).strip().strip("\"'")


@click.command()
@click.argument("prompt")
@click.option(
    "-o", "--output", default="out.mp4", type=click.Path(dir_okay=False, path_type=Path), help="The mp4 to write."
)
@click.option("--seconds", default=8.0, type=click.FloatRange(min=0, min_open=True, max=86_400), help="Of video.")
@click.option("--seed", type=click.IntRange(0, SEED_MAX), help="The same seed gives the same video.  [default: random]")
@click.option("--at", "switches", multiple=True, type=AtType(), help='A new prompt from a time on: 5s="new prompt".')
@click.option("--model", default="shapes", help="A name from `turboserve models`, a folder or a model.toml.")
@click.option("--steps", type=click.IntRange(1, 64), help="Denoise steps per chunk.  [default: the model's own]")
@click.option("--prompt-switch", help="What a new prompt does to the past: swap, recache or blend.  [default: model's]")
@click.option("--decoder", help="What makes frames of latents, such as full or light.  [default: the model's first]")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--scale", default=1, type=click.IntRange(1, 16), help="Enlarge every pixel so many times in the file.")
@click.option(
    "--card",
    "card_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the stream's card, for `turboserve replay`.",
)
@json_option
def command(
    prompt: str,
    output: Path,
    seconds: float,
    seed: int | None,
    switches: tuple[tuple[float, str], ...],
    model: str,
    steps: int | None,
    prompt_switch: str | None,
    decoder: str | None,
    device: str,
    scale: int,
    card_path: Path | None,
    as_json: bool,
) -> None:
    """Make one video into a file, without a server.

    The same model, seed, prompts and steps give the same digest chain here and on a server.
    """
    from turboserve.card import Card, CardInput, StepsRun
    from turboserve.cli import _making as making
    from turboserve.model.registry import check_prompt, load_spec
    from turboserve.server.protocol import clean_prompt
    from turboserve.server.video_file import VideoFile

    spec = load_spec(model)
    switch = _switch(spec, prompt_switch)
    step_count = _steps(spec, steps)
    decoder = _decoder(spec, decoder)
    frame_count = spec.frames_for(seconds)
    chunk_count = spec.chunks_for(frame_count)
    if spec.max_chunks is not None and chunk_count > spec.max_chunks:
        raise click.BadParameter(f"{model} can make {spec.max_chunks} chunks of {spec.chunk_s:g} s at most")
    if card_path is not None and not card_path.parent.is_dir():
        raise click.BadParameter(f"--card: no folder {str(card_path.parent)!r}")
    seed = secrets.randbelow(1 << 31) if seed is None else seed

    # The first prompt is chunk 0's; two for one chunk: the later one wins, as it would in a live session.
    prompts = {0: clean_prompt(prompt)}
    for time_s, text in sorted(switches, key=lambda one: one[0]):
        index = making.chunk_at(spec, time_s)
        if index >= chunk_count:
            raise click.BadParameter(f"--at {time_s:g}s lies beyond the video's {seconds:g} s")
        prompts[index] = clean_prompt(text)
    ignored: list[str] = []
    for text in prompts.values():
        report = check_prompt(model, text, seed)
        ignored += [word for word in report.ignored_words if word not in ignored]
        if report.random_scene:
            console().print(f"no word of {text!r} is known to {model}: it makes a scene of its own", markup=False)
    inputs = tuple(CardInput(index, text, 1 + n) for n, (index, text) in enumerate(sorted(prompts.items())))
    runs = (StepsRun(0, step_count),)

    from turboserve.runtime.solo import Solo

    digests: list[str] = []
    # The file first: a path that cannot be written should not cost the seconds that a model takes to load.
    with VideoFile(output, spec.width * scale, spec.height * scale, spec.fps) as file:
        solo = Solo.load(model, device)
        pace = making.Pace(spec)
        chunks = solo.stream(seed, making.requests(inputs, runs, chunk_count, switch), decoder)
        for chunk in making.with_progress(chunks, chunk_count, pace, output.name):
            digests.append(chunk.digest)
            frames = chunk.frames[: frame_count - file.frame_count]
            file.write(frames.repeat(scale, axis=1).repeat(scale, axis=2) if scale > 1 else frames)
        wall_s = pace.wall_s

    card = Card(
        model=model,
        model_hash=spec.model_hash,
        seed=seed,
        size=f"{spec.width}x{spec.height}",
        inputs=inputs,
        steps=runs,
        chunk_count=chunk_count,
        digest=digests[-1],
        digests=tuple(digests),
        numerics_id=solo.numerics.numerics_id,
        prompt_switch=switch,
        decoder=decoder,
    )
    if card_path is not None:
        card_path.write_text(card.to_json(indent=2) + "\n")
    result = {
        "output": str(output),
        "model": model,
        "model_hash": spec.model_hash,
        "numerics_id": solo.numerics.numerics_id,
        "seed": seed,
        "steps": step_count,
        "decoder": decoder or None,
        "width": spec.width * scale,
        "height": spec.height * scale,
        "fps": spec.fps,
        "frames": file.frame_count,
        "seconds": round(file.frame_count / spec.fps, 3),
        "chunks": chunk_count,
        "digest": digests[-1],
        "inputs": [{"from_index": one.from_index, "prompt": one.prompt} for one in inputs],
        "ignored_words": ignored,
        "wall_s": round(wall_s, 3),
        "realtime_factor": round(chunk_count * spec.chunk_s / wall_s, 2),
    }
    if card_path is not None:
        result["card"] = str(card_path)
    if as_json:
        print_json(result)
        return
    click.echo(output)
    size = f"{result['width']}x{result['height']}"
    click.echo(
        f"  {result['seconds']:g} s, {size} at {spec.fps:g} fps, made at {result['realtime_factor']:g}x real time"
    )
    click.echo(f"  seed {seed}, {chunk_count} chunks, chain {digests[-1]}")
    if ignored:
        click.echo(f"  words that {model} does not know: {', '.join(ignored)}")


def _switch(spec: Any, wanted: str | None) -> str:
    offered = [one.value for one in spec.prompt_switch]
    if wanted is not None and wanted not in offered:
        raise click.BadParameter(f"{spec.name} does not offer {wanted!r}; expected one of {', '.join(offered)}")
    return wanted or offered[0]


def _decoder(spec: Any, wanted: str | None) -> str:
    from turboserve.errors import InvalidRequest

    try:
        return str(spec.decoder(wanted))
    except InvalidRequest as error:
        raise click.BadParameter(f"--decoder: {error.message}; expected {error.expected}") from None


def _steps(spec: Any, wanted: int | None) -> int:
    if wanted is not None and not spec.denoise_steps_floor <= wanted <= spec.denoise_steps:
        raise click.BadParameter(f"--steps {wanted}; expected {spec.denoise_steps_floor} to {spec.denoise_steps}")
    return wanted or spec.denoise_steps
