"""`turboserve worker --join`: a worker on this machine for a server that runs elsewhere."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from pathlib import Path
from typing import Any

import click

from turboserve.errors import ConfigError


@click.command()
@click.option("--join", "controller", required=True, metavar="HOST:PORT", help="The server's control address.")
@click.option(
    "--token-file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The server's cluster.token, copied here with mode 0600.",
)
@click.option("--advertise", default="", metavar="IP", help="This machine's address as others see it.")
@click.option("--model", default="shapes", help="Name or path; it must be the model that the server serves.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--capacity", default=8, type=click.IntRange(1, 1024), help="Active sessions the worker is given.")
@click.option("--slots", default=32, type=click.IntRange(1, 4096), help="Sessions it holds in memory.")
@click.option(
    "--arena-bytes",
    type=click.IntRange(min=0),
    help="Shared memory for recovery points; 0 for none.  [default: a sixteenth of the memory, at most 1 GiB]",
)
@click.option("--paced-profile", type=click.Path(exists=True, dir_okay=False), help="Pad passes to this profile.")
@click.option("--shutdown-timeout", default=10.0, type=click.FloatRange(min=0), help="Seconds that a stop may take.")
@click.option("--log-format", default="auto", type=click.Choice(["auto", "console", "json"]))
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
def command(**options: Any) -> None:
    """Join a running server as a worker on this machine. Ctrl-C or SIGTERM asks to be drained; a second one suspends
    what is left and ends.

    Both sides prove that they hold the server's token before anything else is said. Chunks go over the network
    encoded in their viewers' formats (by PyAV, which must be installed); only of those that ask for `raw` do all pixels
    cross. Recovery points lie in the worker's own
    memory: sessions come and go with them, over one more port of the advertised address; when the worker dies they go
    with it, and its sessions are made again from the input log.
    """
    from turboserve.cli.serve import _device
    from turboserve.model.registry import resolve
    from turboserve.runtime.channel import read_token
    from turboserve.runtime.launcher import child_environment
    from turboserve.runtime.worker import run_worker
    from turboserve.runtime.worker_config import WorkerConfig
    from turboserve.server.fleet import make_arena

    host, port = address(options["controller"])
    log_format = options["log_format"]
    worker_id = f"j-{socket.gethostname()[:40]}-{secrets.token_hex(3)}"
    config = WorkerConfig(
        worker_id=worker_id,
        worker_epoch=1,
        token=read_token(options["token_file"]).hex(),
        controller_host=host,
        controller_port=port,
        gateway_host=host,
        gateway_port=0,
        node=worker_id,  # a node of its own even on the server's machine: it shares no memory with anybody
        model=resolve(options["model"]),
        device=_device(options["device"]),
        slots=options["slots"],
        capacity=options["capacity"],
        joined=True,
        advertise=options["advertise"],
        arena_fd=make_arena(options["arena_bytes"], name=worker_id, partition_count=1),
        paced_profile=options["paced_profile"] or "",
        shutdown_timeout_s=options["shutdown_timeout"],
        log_format=("console" if sys.stderr.isatty() else "json") if log_format == "auto" else log_format,
        log_level=options["log_level"],
    )
    os.environ.update(child_environment())  # before torch is imported: it reads the thread counts then
    run_worker(config)


def address(text: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 host in brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--join {text!r}", expected="HOST:PORT, as `serve --control-host` prints it")
    return host.removeprefix("[").removesuffix("]"), int(port)
