"""`turboserve profile`: a run under torch.profiler, Nsight Systems or Nsight Compute, or a window on a live server."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from turboserve.cli.options import console, json_option, print_json
from turboserve.errors import ConfigError

INSTALL = {
    "nsys": "install Nsight Systems (package nsight-systems-cli, or with the CUDA toolkit) and put nsys on the PATH",
    "ncu": "install Nsight Compute (package nsight-compute, or with the CUDA toolkit) and put ncu on the PATH",
}


def nsight_command(tool: str, out: Path, inner: list[str], nvtx_range: str) -> list[str]:
    """The command line that runs `inner` under `tool` ("nsys" or "ncu")."""
    if tool == "nsys":
        return [
            "nsys", "profile", "--trace=cuda,nvtx,osrt,cudnn,cublas", "--capture-range=cudaProfilerApi",
            "--capture-range-end=stop", "--cuda-graph-trace=node", "--force-overwrite=true",
            f"--output={out / 'turboserve'}", *inner,
        ]  # fmt: skip
    return [
        "ncu", "--nvtx", f"--nvtx-include={nvtx_range}", "--set=full", "--launch-count=20", "--force-overwrite",
        f"--export={out / 'turboserve'}", *inner,
    ]  # fmt: skip


@click.command()
@click.option("--torch", "tool", flag_value="torch", help="torch.profiler: a Chrome trace and a table; needs no GPU.")
@click.option("--nsys", "tool", flag_value="nsys", help="Nsight Systems around the run.")
@click.option("--ncu", "tool", flag_value="ncu", help="Nsight Compute on the kernels of one NVTX range.")
@click.option("--none", "tool", flag_value="none", help="The run alone, for a profiler of your own around it.")
@click.option("--worker", metavar="ID", help="Instead of a run: a capture window on this worker of a live server.")
@click.option("--url", envvar=["TURBOSERVE_PROFILE_URL", "TURBOSERVE_URL"], help="The live server.")
@click.option(
    "--api-key",
    envvar=["TURBOSERVE_PROFILE_API_KEY", "TURBOSERVE_API_KEY"],
    show_default=False,
    help="A key with role admin. Prefer the environment variable to the flag.",
)
@click.option("--model", default="shapes", help="What to run.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--sessions", default=4, type=click.IntRange(1, 64), help="Sessions that share the passes.")
@click.option("--chunks", default=8, type=click.IntRange(1, 1000), help="Chunks to record, of each session in a run.")
@click.option("--range", "nvtx_range", default="turboserve@pass/", help="--ncu: the NVTX range whose kernels it takes.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("profile"), help="A folder.")
@json_option
def command(
    tool: str | None,
    worker: str | None,
    url: str | None,
    api_key: str | None,
    model: str,
    device: str,
    sessions: int,
    chunks: int,
    nvtx_range: str,
    out: Path,
    as_json: bool,
) -> int:
    """Run sessions under a profiler, or open a capture window on a worker of a live server.

    docs/profiling.md walks through a first session with each of them.
    """
    if (tool is None) == (worker is None):
        raise ConfigError(
            "one thing at a time", expected="one of --torch, --nsys, --ncu, --none, or --worker ID for a live server"
        )
    if worker is not None:
        found = _live(worker, url, api_key, chunks)
    elif tool in ("torch", "none"):
        from turboserve.runtime.profile_run import run

        found = run(model, device, sessions, chunks, out / "turboserve.json" if tool == "torch" else None)
    else:
        assert tool is not None
        inner = [sys.executable, "-m", "turboserve", "profile", "--none", "--model", model, "--device", device]
        inner += ["--sessions", str(sessions), "--chunks", str(chunks)]
        return _nsight(tool, out, inner, nvtx_range)
    if as_json:
        print_json(found)
    else:
        for name, value in found.items():
            console().print(f"{name}: {value}", markup=False, soft_wrap=True)
    return 0


def _nsight(tool: str, out: Path, inner: list[str], nvtx_range: str) -> int:
    argv = nsight_command(tool, out, inner, nvtx_range)
    if shutil.which(tool) is None:
        raise ConfigError(f"{tool} is not on the PATH", expected=shlex.join(argv), hint=INSTALL[tool])
    out.mkdir(parents=True, exist_ok=True)
    console().print(shlex.join(argv), markup=False, soft_wrap=True)
    return subprocess.run(argv).returncode


def _live(worker: str, url: str | None, api_key: str | None, chunks: int) -> dict[str, Any]:
    import asyncio

    from turboserve.client.http import Api

    async def ask() -> Any:
        api = Api(url, api_key)
        try:
            return await api.call("POST", f"/v1/admin/workers/{worker}/profile", {"chunks": chunks})
        finally:
            await api.close()

    return dict(asyncio.run(ask()))
