"""`turboserve calibrate`: the latency profile of a model on this device, as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import click

from turboserve.cli.options import console, json_option, print_json


@click.command()
@click.argument("model", default="shapes")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--size", metavar="WxH", help="For models that can have another.  [default: the model's]")
@click.option("--segments", default=8, type=click.IntRange(1, 64), help="Largest batch of sessions to time.")
@click.option("--repeats", default=5, type=click.IntRange(1, 100), help="Timings of each pass; the median counts.")
@click.option("--chunk-target-s", type=click.FloatRange(min=0, min_open=True), help="[default: a chunk's own length]")
@click.option("--resident-max", type=click.IntRange(min=1), help="Sessions a worker may hold.  [default: what fits]")
@click.option("--provision-s", default=30.0, type=click.FloatRange(min=0), help="From request to a ready worker.")
@click.option("--price-per-worker-hour", default=1.0, type=click.FloatRange(min=0))
@click.option("--name", help="Of the profile.  [default: model and device]")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="The JSON file to write.")
@json_option
def command(
    model: str,
    device: str,
    size: str | None,
    segments: int,
    repeats: int,
    chunk_target_s: float | None,
    resident_max: int | None,
    provision_s: float,
    price_per_worker_hour: float,
    name: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure pass times of MODEL over sessions and steps, and write its latency profile.

    Placement, autoscaling and `turboserve simulate --profile FILE` read it. Nothing else should run meanwhile.
    """
    import torch

    from turboserve.errors import ConfigError
    from turboserve.model.registry import load_model
    from turboserve.runtime.latency_profile import ProfileOptions, measure_profile
    from turboserve.runtime.numerics import device_class, set_up_determinism

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here", expected="--device cpu")
    set_up_determinism(torch.device(device))
    loaded = load_model(model, device, size)
    loaded.self_test()
    options = ProfileOptions(segments, repeats, chunk_target_s, resident_max, price_per_worker_hour, provision_s)
    say = console()
    profile = measure_profile(
        loaded,
        options,
        name or f"{loaded.spec.name}-{device_class(loaded.device)}",
        lambda text: say.print(text, style="dim", markup=False),
    )
    text = json.dumps(profile, indent=1, allow_nan=False) + "\n"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
    if as_json or output is None:
        print_json(profile)
        return
    click.echo(output)
    table = profile["batch_latency_s"]
    click.echo(f"  one chunk {table[0] * 1000:.1f} ms, {len(table)} together {table[-1] * 1000:.1f} ms")
    click.echo(f"  {profile['capacity']} sessions keep {profile['chunk_target_s']:g} s a chunk")
    for steps, error in profile["measured"]["latent_error_by_steps"].items():
        click.echo(f"  at {steps} of {profile['denoise_steps']} steps latents are {error:.1%} off")
