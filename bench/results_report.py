"""`turboserve bench report`: the rows of a results folder as tables and plots that people can read.

Every figure of a plot is in the rows: the median with its 20th to 80th percentile, the floor of the same run and the
baseline a user would pick instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from turboserve.cli.options import console
from turboserve.errors import ConfigError

CASES_MAX = 40
"""Rows a plot shows; the table has all."""
INTRODUCTION = """# Measurements

Made from the rows in this folder by `turboserve bench report {folder}`; each row names its machine, commit and load.
`of floor` is the limit measured in the same run over the median (100% stands on the floor), `speedup` the baseline over
the median.
Results of other shapes (scores, simulations, runs under faults) are described where they are used.
"""


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path), default="bench/results")
def command(folder: Path) -> None:
    """Tables and plots of the rows in FOLDER (bench/results): FOLDER/README.md and FOLDER/plots/*.svg."""
    found = {path: rows for path in sorted(folder.glob("*.json")) if (rows := timed_rows(path))}
    if not found:
        raise ConfigError(f"no rows with times in {folder}", expected="files that `turboserve bench ... --out` wrote")
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    parts = [INTRODUCTION.format(folder=folder)]
    for path, rows in found.items():
        draw(path.stem, rows, plots / f"{path.stem}.svg")
        parts.append(f"## {path.stem}\n\n{about(rows)}\n\n![{path.stem}](plots/{path.stem}.svg)\n\n{markdown(rows)}\n")
    (folder / "README.md").write_text("\n".join(parts))
    console().print(f"{len(found)} files, {sum(map(len, found.values()))} rows: {folder / 'README.md'}", soft_wrap=True)


def timed_rows(path: Path) -> list[dict[str, Any]]:
    """The file's rows that have a median and a floor; none for results of another shape."""
    try:
        rows = json.loads(path.read_text())["rows"]
    except (ValueError, KeyError, TypeError):
        return []
    return [row for row in rows if isinstance(row, dict) and {"median_ms", "floor_ms", "baseline_ms"} <= row.keys()]


def about(rows: list[dict[str, Any]]) -> str:
    """Where and when the rows were taken."""
    devices = sorted({row["device"] for row in rows})
    commits = sorted({row["commit"] for row in rows})
    loads = [row["load_1min"] for row in rows if "load_1min" in row]
    load = f"; load {min(loads):g} to {max(loads):g}" if loads else ""
    return f"{', '.join(devices)}; commit {', '.join(commits)}{load}."


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| case | shape | median ms | p20 - p80 | of floor | speedup | against |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = (
            row["case"],
            row["shape"],
            f"{row['median_ms']:.3g}",
            f"{row['p20_ms']:.3g} - {row['p80_ms']:.3g}",
            f"{row['of_floor']:.0%}",
            f"{row['speedup']:.2f}x",
            f"{row['baseline']} ({row['baseline_ms']:.3g} ms)",
        )
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def draw(title: str, rows: list[dict[str, Any]], path: Path) -> None:
    """One line a row on a logarithmic axis of milliseconds."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib", hint="pip install 'turboserve[plots]'") from None
    shown = rows[:CASES_MAX]
    # A fixed salt and no date: the same rows give the same file.
    with rc_context({"svg.hashsalt": "turboserve", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 1.4 + 0.28 * len(shown)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(shown):
            axes.plot([row["p20_ms"], row["p80_ms"]], [place, place], color="#1f5fa8", linewidth=5, alpha=0.35)
        places = range(len(shown))
        axes.plot([row["median_ms"] for row in shown], places, "o", color="#1f5fa8", label="median, p20 to p80")
        axes.plot([row["floor_ms"] for row in shown], places, "|", color="#2b7a3d", markersize=12, label="floor")
        axes.plot([row["baseline_ms"] for row in shown], places, "x", color="#b3541e", label="baseline")
        axes.set_yticks(list(places), [f"{row['case']} {row['shape']}" for row in shown], fontsize=7)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("milliseconds")
        axes.grid(axis="x", alpha=0.3)
        cut = f" (the first {CASES_MAX} of {len(rows)} rows)" if len(rows) > CASES_MAX else ""
        axes.set_title(title + cut, fontsize=9)
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})
