"""`turboserve status`: a running server at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from turboserve.cli.options import console, json_option, print_json

if TYPE_CHECKING:
    from rich.table import Table

DECISIONS_SHOWN = 5


@click.command()
@click.option("--url", envvar=["TURBOSERVE_STATUS_URL", "TURBOSERVE_URL"], help="The server.  [default: this machine]")
@click.option(
    "--api-key",
    envvar=["TURBOSERVE_STATUS_API_KEY", "TURBOSERVE_API_KEY"],
    show_default=False,
    help="A key with role admin. Prefer the environment variable to the flag.",
)
@click.option("--timeout", "timeout_s", default=10.0, type=click.FloatRange(min=0.1), help="Seconds to wait.")
@json_option
def command(url: str | None, api_key: str | None, timeout_s: float, as_json: bool) -> int:
    """Show a running server at a glance: ready or why not, workers, sessions, the newest decisions.

    Exit code 0 means ready, 1 that it is not, or that it does not answer.
    """
    import asyncio

    state = asyncio.run(ask(url, api_key, timeout_s))
    if as_json:
        print_json(state)
    else:
        _show(state)
    return 0 if state["ready"] else 1


async def ask(url: str | None, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """/readyz and /v1/cluster in one object."""
    from turboserve.client.http import Api
    from turboserve.errors import ProtocolError, Refused, TurboServeError

    api = Api(url, api_key, timeout_s=timeout_s)
    try:
        ready, reason = True, ""
        try:
            await api.call("GET", "/readyz")
        except TurboServeError as error:
            if error.code == "unreachable" or not isinstance(error, Refused):
                raise
            ready, reason = False, error.message
        cluster = await api.call("GET", "/v1/cluster")
        if not isinstance(cluster, dict):
            raise ProtocolError(f"{api.base_url} did not describe a cluster", hint="is that a TurboServe server?")
        return {"url": api.base_url, "ready": ready, **({"reason": reason} if reason else {}), "cluster": cluster}
    finally:
        await api.close()


def _show(state: dict[str, Any]) -> None:
    from rich.text import Text

    cluster, out = state["cluster"], console()
    verdict = Text("ready", "bold green") if state["ready"] else Text(f"not ready: {state.get('reason')}", "bold red")
    out.print(Text.assemble(state["url"], "  ", verdict))
    sessions = cluster.get("sessions") or {}
    counts = ", ".join(f"{count} {name}" for name, count in sessions.items() if count) or "none"
    out.print(f"sessions: {counts}", markup=False)
    out.print(_workers(cluster.get("workers") or []))
    decisions = (cluster.get("decisions") or [])[-DECISIONS_SHOWN:]
    for one in decisions:
        what = " ".join(str(one[key]) for key in ("event", "session", "worker") if one.get(key))
        out.print(f"  {what}: {one.get('reason', '')}", markup=False, style="dim")


def _workers(workers: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("worker", "state", "node", "device", "active", "resident", "capacity", "chunk"):
        table.add_column(heading, justify="right" if heading in ("active", "resident", "capacity", "chunk") else "left")
    colours = {"ready": "green", "starting": "yellow", "draining": "yellow", "lost": "red"}
    for one in workers:
        latency = one.get("chunk_latency_ms")
        state = str(one.get("state", "?"))
        table.add_row(
            str(one.get("id", "?")),
            Text(state, colours.get(state, "")),
            str(one.get("node", "")),
            str(one.get("device", "")),
            *(str(one.get(key, "")) for key in ("active", "resident", "capacity")),
            f"{latency:.0f} ms" if isinstance(latency, (int, float)) and latency else "-",
        )
    return table
