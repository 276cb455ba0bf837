"""`turboserve serve`: start controller, gateway and workers on this machine and keep them running."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from turboserve.errors import ConfigError


@click.command()
@click.argument("model", default="shapes")
@click.option("--host", default="127.0.0.1", help="Address to listen on; anything but loopback needs a key.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="0 takes any free port.")
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    help="Worker processes; one GPU or CPU core each.  [default: 2, where there are two cores and the memory]",
)
@click.option("--min-workers", type=click.IntRange(1, 64), help="With --max-workers: the fleet follows the load.")
@click.option("--max-workers", type=click.IntRange(1, 64))
@click.option(
    "--scale-hook",
    help="Command that starts and ends the workers the fleet grows by: called with add or remove, JSON on stdin.",
)
@click.option(
    "--control-host",
    default="127.0.0.1",
    help="Address where workers from other machines join; one address, never all of them.",
)
@click.option(
    "--arena-bytes",
    type=click.IntRange(min=0),
    help="Shared memory for recovery points; 0 for none.  [default: a sixteenth of the memory, at most 1 GiB]",
)
@click.option(
    "--disk-bytes",
    default=16 << 30,
    show_default="16 GiB",
    type=click.IntRange(min=0),
    help="What recovery points may take under --data-dir.",
)
@click.option(
    "--paced-profile",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="For studies: each pass is padded by sleep to this latency profile.",
)
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--backend", default="local", type=click.Choice(["local", "ray"]), help="How worker processes start.")
@click.option("--capacity", default=8, type=click.IntRange(1, 1024), help="Active sessions a worker is given.")
@click.option("--slots", default=32, type=click.IntRange(1, 4096), help="Sessions a worker holds in memory.")
@click.option(
    "--chunk-target-s", type=click.FloatRange(min=0.001), help="Latency bound of a chunk.  [default: its length]"
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Logs, directory, videos.  [default: a per-user folder]",
)
@click.option("--api-key", help="One tenant, role admin. Prefer the environment variable to the flag.")
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Lines: tenant role=user|admin weight=N sha256=HEX.",
)
@click.option("--shutdown-timeout", default=10.0, type=click.FloatRange(min=0), help="Seconds that a stop may take.")
@click.option(
    "--playback-rate",
    default=1.0,
    type=click.FloatRange(0.05, 10),
    help="Below 1, live streams play slower than real time.",
)
@click.option(
    "--steps-floor",
    type=click.IntRange(1, 64),
    help="Allow fewer denoise steps under overload, down to this many.  [default: off]",
)
@click.option(
    "--record",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for every decision's inputs and answer, for `simulate --from-recording`; at most 128 MB.",
)
@click.option(
    "--video-pipeline",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A diffusers pipeline's folder for /v1/videos; live sessions go before it at every step's end.",
)
@click.option(
    "--record-trace",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File (.csv.gz) for a trace of what users did, for `simulate --trace`.",
)
@click.option("--root-path", default="", help="Path prefix a reverse proxy strips, like /video.")
@click.option(
    "--allowed-origins", default="", help="Comma-separated origins that may open the WebSocket besides our own."
)
@click.option("--ssl-certfile", type=click.Path(exists=True, dir_okay=False))
@click.option("--ssl-keyfile", type=click.Path(exists=True, dir_okay=False))
@click.option("--log-format", default="auto", type=click.Choice(["auto", "console", "json"]))
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
def command(**options: Any) -> int:
    """Start the server: pages, API, workers. MODEL is a name from `turboserve models`, a folder or a model.toml."""
    if options["backend"] == "ray":
        from turboserve.runtime.launch_ray import ray_backend

        ray_backend()
    from turboserve.model.registry import resolve
    from turboserve.server.fleet import ServeOptions, serve

    options["model"] = resolve(options["model"])
    _set_workers(options)
    options["device"] = _device(options["device"])
    options["data_dir"] = options["data_dir"] or default_data_dir(options["port"])
    origins = options.pop("allowed_origins")
    log_format = options.pop("log_format")
    return serve(
        ServeOptions(
            **options,
            allowed_origins=tuple(one.strip() for one in origins.split(",") if one.strip()),
            log_format=("console" if sys.stderr.isatty() else "json") if log_format == "auto" else log_format,
        )
    )


def _set_workers(options: dict[str, Any]) -> None:
    """`workers` and `workers_max` from the three options about the size of the fleet."""
    fixed, least, most = options["workers"], options.pop("min_workers"), options.pop("max_workers")
    if least is None and most is None:
        options["workers"] = options["workers_max"] = fixed or default_workers()
        return
    if fixed is not None:
        raise ConfigError(
            "--workers with --min-workers or --max-workers", expected="a fixed number, or bounds", hint="drop one"
        )
    least = least or 1
    most = most or max(least, default_workers())
    if least > most:
        raise ConfigError(f"--min-workers {least} --max-workers {most}", expected="the first not above the second")
    options["workers"], options["workers_max"] = least, most


def default_workers() -> int:
    """Two where there are two cores and 4 GiB of memory: one can be lost and the streams go on."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 2 if cores >= 2 and memory >= 4 << 30 else 1


def _device(asked: str) -> str:
    """`auto` is cuda where a driver is loaded; the launcher itself never imports torch."""
    has_cuda = Path("/proc/driver/nvidia/version").exists()
    if asked == "cuda" and not has_cuda:
        raise ConfigError("--device cuda, but no NVIDIA driver is loaded", expected="--device cpu or auto")
    return ("cuda" if has_cuda else "cpu") if asked == "auto" else asked


def default_data_dir(port: int) -> Path:
    """One folder per port, so that two servers of one user do not share a directory."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "turboserve" / str(port)
