"""`turboserve score-shapes`: does the embedded model draw what its prompts ask for?"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from turboserve.cli.options import console, json_option, print_json


@click.command()
@click.option("--full", is_flag=True, help="200 prompts of 30 s, 200 switches, four streams of 10 minutes.")
@click.option("--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Instead of the shipped.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the result here as JSON too.")
@json_option
def command(full: bool, weights: Path | None, seed: int, out: Path | None, as_json: bool) -> None:
    """Generate streams for random prompts and measure colour, count and direction in every chunk.

    The measuring shares no code with the training data. Without --full a small set runs, a minute on one core.
    """
    import torch

    from turboserve.bench.report import commit, cpu_name
    from turboserve.model.shapes.checkpoint import load_weights
    from turboserve.model.shapes.model import ShapesModel
    from turboserve.model.shapes.score_run import Plan, score
    from turboserve.model.shapes.spec import WEIGHTS_PATH

    torch.set_num_threads(1)
    setting = {"machine": cpu_name(), "commit": commit(), "torch": torch.__version__}
    model = ShapesModel(load_weights(weights or WEIGHTS_PATH))
    with _display() as report:
        result = score(model, Plan.full() if full else Plan.quick(), seed, report)
    result = {**setting, **result}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    if as_json:
        print_json(result)
    else:
        _table(result)


@contextlib.contextmanager
def _display() -> Iterator[Callable[[float], None]]:
    """A progress bar on a terminal, every tenth elsewhere."""
    if not sys.stderr.isatty():
        said = 0

        def line(share: float) -> None:
            nonlocal said
            if int(share * 10) > said:
                said = int(share * 10)
                click.echo(f"{said * 10}% of the chunks", err=True)

        yield line
        return
    from rich.progress import Progress

    with Progress(console=console()) as bar:
        task = bar.add_task("scoring", total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = {
        "steady (after the second chunk)": result["steady"],
        "first two chunks": result["first_chunks"],
        "second chunk after a switch": result["switch"]["second_chunk"],
        "later chunks after a switch": result["switch"]["later_chunks"],
        "long stream, first part": result["long"]["first"],
        "long stream, last part": result["long"]["last"],
    }
    table = Table("share of chunks that are right", *next(iter(rows.values())))
    for name, shares in rows.items():
        table.add_row(name, *("-" if one is None else f"{one:.1%}" for one in shares.values()))
    Console().print(table)
