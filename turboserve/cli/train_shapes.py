"""`turboserve train-shapes`: trains the embedded model again."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from turboserve.cli.options import console, json_option, print_json

if TYPE_CHECKING:
    from turboserve.model.shapes.train import Progress


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/shapes"), show_default=True)
@click.option("--minutes", type=click.FloatRange(min=0.1), default=80.0, show_default=True, help="Time to train.")
@click.option("--steps", type=click.IntRange(min=1), help="Train this many steps instead: the same run everywhere.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--batch", type=click.IntRange(min=2), default=16, show_default=True, help="Clips a step.")
@click.option("--sharpen-steps", type=click.IntRange(min=1), default=4000, show_default=True, help="For the decoder.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
@click.option("--install", is_flag=True, help="Put the weights into the package when done.")
@json_option
def command(
    out: Path,
    minutes: float,
    steps: int | None,
    seed: int,
    batch: int,
    sharpen_steps: int,
    resume: bool,
    install: bool,
    as_json: bool,
) -> None:
    """Train the `shapes` model on its own synthetic clips, on one CPU thread.

    Writes OUT/checkpoint.pt as it goes and OUT/shapes.safetensors at the end.
    """
    import torch

    from turboserve.bench.report import commit
    from turboserve.model.shapes.checkpoint import save_weights
    from turboserve.model.shapes.sharpen import alternating, encoded_pairs, predicted_pairs, train_sharpener
    from turboserve.model.shapes.spec import WEIGHTS_PATH
    from turboserve.model.shapes.train import TrainConfig, Trainer

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    source = commit()  # of the code that trains, not of what the checkout becomes meanwhile
    trainer = Trainer(TrainConfig(out=out, minutes=minutes, steps=steps, seed=seed, batch=batch))
    if resume and trainer.resume():
        console().print(f"going on from step {trainer.step}")
    with _display() as report:
        trainer.run(report)
    encoded, predicted = (
        encoded_pairs(trainer.codec, seed),
        predicted_pairs(trainer.codec, trainer.predict_last_step(), seed),
    )
    sharpener = train_sharpener(
        trainer.codec, alternating(encoded, predicted), seed, sharpen_steps, report=_sharpen_line(sharpen_steps)
    )
    training = {**trainer.summary(), "sharpen_steps": sharpen_steps, "commit": source}
    paths = [out / "shapes.safetensors", *([WEIGHTS_PATH] if install else [])]
    for path in paths:
        save_weights(path, trainer.ema_network(), trainer.codec, sharpener, training)
    if as_json:
        print_json({**training, "weights": [str(path) for path in paths]})
    else:
        console().print(f"{training['steps']} steps; weights in {', '.join(str(path) for path in paths)}")


def _sharpen_line(steps: int) -> Callable[[int, float], None]:
    """A line every tenth of the decoder's training."""

    def line(step: int, loss: float) -> None:
        if step % max(1, steps // 10) == 0:
            click.echo(f"decoder: step {step} of {steps}  loss {loss:.4f}", err=True)

    return line


@contextlib.contextmanager
def _display() -> Iterator[Callable[[Progress], None]]:
    """A progress bar on a terminal, a line every half minute elsewhere."""
    if not sys.stderr.isatty():
        last = 0.0

        def line(progress: Progress) -> None:
            nonlocal last
            if time.monotonic() - last >= 30:
                last = time.monotonic()
                click.echo(
                    f"step {progress.step}  {progress.share:.1%}  loss {progress.loss:.4f}"
                    f"  {progress.step_ms:.0f} ms a step  {progress.clips} clips",
                    err=True,
                )

        yield line
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("training shapes"),
        BarColumn(),
        TextColumn("{task.percentage:.1f}%"),
        TextColumn("step {task.fields[step]}  loss {task.fields[loss]:.4f}  {task.fields[step_ms]:.0f} ms a step"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console()) as bar:
        task = bar.add_task("", total=1.0, step=0, loss=0.0, step_ms=0.0)

        def move(progress: Progress) -> None:
            bar.update(task, completed=progress.share, step=progress.step, loss=progress.loss, step_ms=progress.step_ms)

        yield move
