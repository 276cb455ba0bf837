"""`turboserve replay CARD.json`: make a stream again from its card and verify its digest chain."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turboserve.cli.options import json_option, print_json

if TYPE_CHECKING:
    from turboserve.card import Card


@click.command()
@click.argument("card_path", metavar="CARD.json", type=click.Path(dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Also save the video as mp4.")
@click.option("--model", help="Where the model is: a name, a folder or a model.toml.  [default: the card's model]")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--force", is_flag=True, help="Make it even with other weights than the card's; it cannot match then.")
@json_option
def command(card_path: Path, output: Path | None, model: str | None, device: str, force: bool, as_json: bool) -> int:
    """Make a stream again from its card and verify its digest chain.

    Exit code 0 means that every chunk came out as it was. A chain is promised within one class of machines (the
    card's numerics_id); elsewhere the same card gives the same scene in other bits, and this says so. The card of a
    server that serves a folder names the model as the server does: say where it lies by --model.
    """
    from turboserve.card import Card
    from turboserve.errors import LayoutMismatch
    from turboserve.model.registry import load_spec

    card = Card.read(card_path)
    model = model or card.model
    spec = load_spec(model)
    if spec.model_hash != card.model_hash and not force:
        raise LayoutMismatch(
            f"the card was made with other weights of {card.model} ({card.model_hash})",
            expected=f"model_hash {spec.model_hash}, which is what is installed here",
            hint="install the release it was made with, or make it anyway with --force: the chain will differ",
        )
    result = _replay(card, model, output, device)
    if as_json:
        print_json(result)
    else:
        click.echo(_sentence(result, card))
        if output is not None:
            click.echo(f"saved as {output}")
    return 0 if result["verdict"] == "match" else 1


def _replay(card: Card, model: str, output: Path | None, device: str) -> dict[str, Any]:
    from turboserve.cli import _making as making
    from turboserve.model.registry import load_spec
    from turboserve.runtime.solo import Solo
    from turboserve.server.video_file import VideoFile

    spec = load_spec(model)
    digest, wrong = "", None
    with VideoFile(output, spec.width, spec.height, spec.fps) if output is not None else nullcontext() as file:
        solo = Solo.load(model, device)
        pace = making.Pace(spec)
        asked = making.requests(card.inputs, card.steps, card.chunk_count, card.prompt_switch)
        chunks = solo.stream(card.seed, asked, card.decoder)
        for chunk in making.with_progress(chunks, card.chunk_count, pace, "replay"):
            digest = chunk.digest
            if file is not None:
                file.write(chunk.frames)
            if card.digests is not None and wrong is None and digest != card.digests[chunk.chunk_index]:
                wrong = chunk.chunk_index
                if file is None:
                    break  # a chain that differs once differs for ever
    result: dict[str, Any] = {
        "verdict": "match" if digest == card.digest else "mismatch",
        "model": card.model,
        "chunks": card.chunk_count,
        "digest": digest,
        "expected_digest": card.digest,
        "numerics_id": solo.numerics.numerics_id,
        "card_numerics_id": card.numerics_id,
        "same_numerics": card.numerics_id in ("", solo.numerics.numerics_id),
        "same_model": card.model_hash == spec.model_hash,
        "realtime_factor": round(pace.realtime_factor, 2),
    }
    if wrong is not None:
        result["first_wrong_index"] = wrong
    if output is not None:
        result["output"] = str(output)
    return result


def _sentence(result: dict[str, Any], card: Card) -> str:
    """The verdict and, where it is no match, the likeliest reason."""
    if result["verdict"] == "match":
        return f"match: {card.chunk_count} chunks, chain {card.digest}"
    where = f" at chunk {result['first_wrong_index']}" if "first_wrong_index" in result else ""
    lines = [f"mismatch{where}: chain {result['digest']}, the card says {card.digest}"]
    if not result["same_model"]:
        lines.append(f"  other weights: the card was made with {card.model_hash}")
    elif not result["same_numerics"]:
        lines.append(
            f"  other numerics: the card was made under {card.numerics_id}, this machine is {result['numerics_id']};"
            " a chain is promised within one of them only"
        )
    elif card.approximate_from is not None:
        lines.append(f"  from chunk {card.approximate_from} on the card's stream ran under other numerics")
    else:
        lines.append("  same model and numerics: the card was changed, or this is a bug worth reporting")
    return "\n".join(lines)
