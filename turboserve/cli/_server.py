"""What commands share that look at a running server: where it is, the key, and one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_Function = TypeVar("_Function", bound=Callable[..., Any])


def server_options(command: str) -> Callable[[_Function], _Function]:
    """Adds `--url` and `--api-key`, which also come from TURBOSERVE_URL and TURBOSERVE_API_KEY."""
    name = command.upper().replace("-", "_")

    def add(function: _Function) -> _Function:
        url = click.option(
            "--url",
            envvar=[f"TURBOSERVE_{name}_URL", "TURBOSERVE_URL"],
            help="The server.  [default: this machine]",
        )
        key = click.option(
            "--api-key",
            envvar=[f"TURBOSERVE_{name}_API_KEY", "TURBOSERVE_API_KEY"],
            show_default=False,
            help="The key. Prefer the environment variable to the flag.",
        )
        return url(key(function))

    return add


async def ask(url: str | None, api_key: str | None, path: str, timeout_s: float = 10.0) -> Any:
    """GET `path`; typed errors as everywhere."""
    from turboserve.client.http import Api

    api = Api(url, api_key, timeout_s=timeout_s)
    try:
        return await api.call("GET", path)
    finally:
        await api.close()


def bar(share: float, width: int) -> str:
    """A bar of eighths of a cell, `width` cells when share is 1."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def sparkline(values: list[float | None], top: float | None = None) -> str:
    """One character a value, low to high; a gap where there is none. `top` is the value of a full block."""
    known = [value for value in values if value is not None]
    most = top if top is not None else max(known, default=0.0)
    if most <= 0:
        return " " * len(values)
    return "".join(" " if value is None else "▁▂▃▄▅▆▇█"[min(7, max(0, int(8 * value / most)))] for value in values)
