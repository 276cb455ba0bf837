"""`turboserve explain`: where a chunk's time went, and the decision behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from turboserve.cli._server import ask, bar, server_options
from turboserve.cli.options import console, json_option, print_json

if TYPE_CHECKING:
    from rich.table import Table

WHAT = {
    "queue": "could have begun, had no owner or no room",
    "input_log": "its inputs on their way to the disk",
    "moved": "a worker had it and lost the session",
    "batch_wait": "at the worker, waiting for a pass",
    "denoise": "first to last denoise step, other sessions' passes between included",
    "decode": "latents to frames",
    "transport": "sockets, frame ring, digest check",
    "hand_over": "chunk at the gateway, encoder busy or viewer not attached",
    "encode": "frames to the viewer's format",
    "send": "into the viewer's socket",
}
BAR_CELLS = 30
WORDS_FROM = 110
"""Columns from which on there is room to say what each stage is."""


@click.command("explain")
@click.argument("session")
@click.option("--chunk", type=click.IntRange(0), help="Index of the chunk.  [default: the newest]")
@server_options("explain")
@json_option
def command(session: str, chunk: int | None, url: str | None, api_key: str | None, as_json: bool) -> None:
    """Show where the time of one chunk of SESSION went, and why it was made where it was.

    The server keeps the newest 128 chunks of every session. An admin key sees every session, another one its own.
    """
    import asyncio
    from urllib.parse import quote

    query = "" if chunk is None else f"?chunk={chunk}"
    found = asyncio.run(ask(url, api_key, f"/v1/sessions/{quote(session, safe='')}/explain{query}"))
    if as_json:
        print_json(found)
    else:
        _say(found)


def _say(found: dict[str, Any]) -> None:
    out = console()
    where = f"worker {found['worker']}, epoch {found['epoch']}" if found["worker"] else "no worker yet"
    out.print(f"chunk {found['index']} of {found['id']}, {where}", style="bold", markup=False)
    verdict = ""
    if "on_time" in found:
        slack_ms = found["slack_ms"]
        verdict = f", {slack_ms:.0f} ms before it was due" if found["on_time"] else f", LATE by {-slack_ms:.0f} ms"
    out.print(
        f"{found['total_ms']:.0f} ms from when it could begin{verdict}; {found['steps']} steps, "
        f"prompt version {found['prompt_version']}, {found['batch_size']:.1f} sessions in its passes",
        markup=False,
    )
    out.print(_stages(found, words=out.width >= WORDS_FROM))
    if found.get("context_ms") is not None:
        out.print(
            f"then, off the viewer's path: context pass {found['context_ms']:.1f} ms after the frames", markup=False
        )
    if found["credits"] > 1:
        out.print(f"it was asked for {found['credits']} times: its owner changed", markup=False)
    for one in found["decisions"]:
        what = " ".join(str(one[key]) for key in ("event", "source", "worker") if one.get(key))
        out.print(f"decision: {what}: {one.get('reason', '')}", markup=False, soft_wrap=True)


def _stages(found: dict[str, Any], *, words: bool) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("ms", justify="right")
    table.add_column("", min_width=8, max_width=BAR_CELLS, no_wrap=True)
    if words:
        table.add_column("what it waited for or did", style="dim")
    total_ms = max(found["total_ms"], 1e-9)
    for stage, spent_ms in found["stages_ms"].items():
        cells = [stage, f"{spent_ms:.1f}", bar(spent_ms / total_ms, BAR_CELLS)]
        table.add_row(*cells, *([WHAT.get(stage, "")] if words else []))
    return table
