"""`turboserve top`: a running server live in the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from turboserve.cli._server import server_options
from turboserve.cli._top_screen import Look, screen
from turboserve.cli.options import console, json_option, print_json

if TYPE_CHECKING:
    from turboserve.client.http import Api

HISTORY_S = 120


@click.command("top")
@server_options("top")
@click.option("--interval", "interval_s", default=1.0, type=click.FloatRange(0.25, 60), help="Seconds between looks.")
@click.option("--once", is_flag=True, help="Look once, print, leave.")
@json_option
def command(url: str | None, api_key: str | None, interval_s: float, once: bool, as_json: bool) -> int:
    """Watch a running server live: workers, sessions, on-time share, latency, the newest decisions.

    It needs an admin key where the server has keys. `--json` prints one look and leaves, as `--once` does. While the
    server does not answer it says so and keeps trying; q leaves.
    """
    if as_json or once:
        look = asyncio.run(_once(url, api_key))
        if as_json:
            print_json(look.as_json())
        else:
            out = console()
            out.print(screen(look, out.width, 60))
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_watch(url, api_key, interval_s))
    return 0


async def _once(url: str | None, api_key: str | None) -> Look:
    from turboserve.client.http import Api

    api = Api(url, api_key, timeout_s=10.0)
    try:
        return await _look(api)
    finally:
        await api.close()


async def _look(api: Api) -> Look:
    from turboserve.errors import ProtocolError

    cluster = await api.call("GET", "/v1/cluster")
    history = await api.call("GET", f"/v1/admin/history?seconds={HISTORY_S}")
    if not isinstance(cluster, dict) or not isinstance(history, dict):
        raise ProtocolError(f"{api.base_url} did not describe a cluster", hint="is that a TurboServe server?")
    return Look(api.base_url, cluster, history)


async def _watch(url: str | None, api_key: str | None, interval_s: float) -> None:
    from rich.live import Live

    from turboserve.client.http import Api
    from turboserve.errors import TurboServeError

    api = Api(url, api_key, timeout_s=5.0)
    out = console()
    look, seen_s = Look(api.base_url), time.monotonic()
    leave = asyncio.Event()
    try:
        with _keys(leave), Live(console=out, screen=out.is_terminal, auto_refresh=False) as live:
            while not leave.is_set():
                try:
                    look, seen_s = await _look(api), time.monotonic()
                except TurboServeError as error:
                    if error.code in ("unauthenticated", "forbidden"):
                        raise  # no retry will change that
                    look.trouble, look.age_s = error.message, time.monotonic() - seen_s
                live.update(screen(look, out.width, out.height), refresh=True)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(leave.wait(), interval_s)
    finally:
        await api.close()


@contextlib.contextmanager
def _keys(leave: asyncio.Event) -> Iterator[None]:
    """Single keys while the block runs: q sets `leave`. Nothing where stdin is no terminal."""
    if not sys.stdin.isatty():
        yield
        return
    import os
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    loop = asyncio.get_running_loop()

    def pressed() -> None:
        if b"q" in os.read(descriptor, 64).lower():
            leave.set()

    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, pressed)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
