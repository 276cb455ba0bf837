"""`turboserve doctor`: is this machine fit to serve, and if not, which command mends it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from turboserve.cli.options import console, json_option, print_json

if TYPE_CHECKING:
    from turboserve.doctor.findings import Finding

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}


def findings(model: str, device: str, host: str, port: int, data_dir: Path, *, deep: bool) -> Iterator[Finding]:
    """All checks, cheap ones first."""
    from turboserve.doctor import gpu, machine
    from turboserve.doctor import model as model_checks

    yield machine.check_python()
    yield from gpu.checks(device)
    on_gpu = device == "cuda" or (device == "auto" and _has_gpu())
    yield machine.check_memlock(needed=on_gpu)
    yield machine.check_shm(needed=on_gpu)
    yield machine.check_memory()
    yield machine.check_disk(data_dir)
    yield machine.check_port(host, port)
    yield machine.check_extension()
    yield model_checks.check_checkpoint(model)
    if deep:
        yield model_checks.check_numerics(model, "cuda" if on_gpu else "cpu")


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


@click.command()
@click.argument("model", default="shapes")
@click.option(
    "--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="What it is to be served on."
)
@click.option("--host", default="127.0.0.1", help="Address it is to listen on.")
@click.option("--port", default=8000, type=click.IntRange(1, 65535))
@click.option("--data-dir", type=click.Path(path_type=Path), help="As for serve.  [default: a per-user folder]")
@click.option("--deep", is_flag=True, help="Also load the model and check its bits.")
@json_option
def command(model: str, device: str, host: str, port: int, data_dir: Path | None, deep: bool, as_json: bool) -> int:
    """Check this machine: what is wrong for serving MODEL, and the command that mends it.

    Exit code 1 when a check failed; warnings and checks that do not apply do not count.
    """
    from turboserve.cli.serve import default_data_dir

    found = list(findings(model, device, host, port, data_dir or default_data_dir(port), deep=deep))
    failures = [one.name for one in found if one.status == "failed"]
    if as_json:
        print_json({"ok": not failures, "failed": failures, "checks": [asdict(one) for one in found]})
    else:
        _show(found)
    return 1 if failures else 0


def _show(found: list[Finding]) -> None:
    from rich.text import Text

    out = console()
    for one in found:
        line = Text.assemble((f"{one.status:<8}", COLOURS[one.status]), f"{one.name}: {one.found}")
        out.print(line, soft_wrap=True)
        if one.status in ("failed", "warning"):
            if one.expected:
                out.print(f"         expected: {one.expected}", markup=False, soft_wrap=True)
            if one.mend:
                out.print(f"         mend: {one.mend}", markup=False, soft_wrap=True)
