"""`turboserve bench serve`: an open-loop load from a trace over the public API, with the client SDK."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from turboserve.bench.chromium import serving
from turboserve.bench.report import machine_slug, report, table
from turboserve.bench.serve_figures import figures, predicted, rows
from turboserve.bench.serve_trace import SessionPlan, plans, scaled
from turboserve.bench.serve_viewer import LiveClock, LoadViewer, PeriodPlan, ViewerSeen
from turboserve.cli._server import server_options
from turboserve.cli.options import console, json_option, print_json
from turboserve.client.http import Api
from turboserve.errors import ConfigError, TurboServeError
from turboserve.sim.trace import read_trace, write_trace

LOOK_S = 0.25
ALONE_CHUNKS = 30


class WorkerMeter:
    """Worker-seconds and decisions of a running server, from looks at /v1/cluster."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._seen: set[tuple[Any, ...]] = set()
        self._first = True
        self.worker_seconds = 0.0
        self.workers = 0
        self.decided: Counter[str] = Counter()
        self.starts_s: dict[tuple[str, int], float] = {}
        """How long each worker took from being asked for to being ready."""

    async def run(self) -> None:
        """Look until cancelled. A worker counts from its being asked for to its being gone."""
        last_s: float | None = None
        while True:
            with contextlib.suppress(TurboServeError):
                picture = await self._api.call("GET", "/v1/cluster")
                now_s = time.monotonic()
                if last_s is not None:
                    self.worker_seconds += self.workers * (now_s - last_s)
                last_s = now_s
                self.workers = len(picture["workers"])
                for one in picture["workers"]:
                    if one.get("ready_s", 0.0) > one.get("requested_s", 0.0):
                        self.starts_s[one["id"], one["epoch"]] = one["ready_s"] - one["requested_s"]
                for one in picture["decisions"]:
                    key = (one.get("time_s"), one.get("event"), one.get("session"), one.get("worker"))
                    if key not in self._seen:
                        self._seen.add(key)
                        self.decided[one["event"]] += not self._first
                self._first = False
            await asyncio.sleep(LOOK_S)


async def run_load(
    url: str, api_key: str | None, load: list[SessionPlan], *, steer_share: float, seed: int, grace_s: float, say: Any
) -> tuple[list[ViewerSeen], WorkerMeter, float]:
    """All plans at once against a server; what the viewers saw, the workers' meter, and how long it took."""
    api = Api(url, api_key)
    meter = WorkerMeter(api)
    metering = asyncio.create_task(meter.run())
    await asyncio.sleep(2 * LOOK_S)
    meter.worker_seconds = 0.0
    started_s = time.monotonic()
    end_s = max(one.depart_s for one in load)
    delivered = 0

    def on_chunk() -> None:
        nonlocal delivered
        delivered += 1

    async def tell() -> None:
        while True:
            say(min(end_s, time.monotonic() - started_s), end_s, delivered, meter.workers)
            await asyncio.sleep(0.5)

    telling = asyncio.create_task(tell())
    options = {"base_url": url, "api_key": api_key, "format": "raw"}
    viewers = [
        LoadViewer(plan, options | {"seed": number}, started_s=started_s, steer_share=steer_share, seed=seed)
        for number, plan in enumerate(load)
    ]
    try:
        seen = await asyncio.gather(*(one.run(end_s + grace_s, on_chunk) for one in viewers))
    finally:
        for task in (metering, telling):
            task.cancel()
        await asyncio.gather(metering, telling, return_exceptions=True)
        await api.close()
    return list(seen), meter, time.monotonic() - started_s


async def live_clock(url: str, api_key: str | None) -> LiveClock:
    """The pace of the server's live streams."""
    api = Api(url, api_key)
    try:
        (model, *_) = (await api.call("GET", "/v1/models"))["models"]
        return LiveClock(model["live"]["chunk_s"], model["live"]["chunk_target_s"])
    finally:
        await api.close()


@click.command("serve")
@click.option("--trace", "trace_file", required=True, metavar="FILE", help="Session trace (traces/README.md).")
@click.option("--speed", default=1.0, type=click.FloatRange(0.01), help="Times and periods shrink by this.")
@click.option("--from-s", default=0.0, type=click.FloatRange(0), help="Start of the window, in the trace's seconds.")
@click.option("--length-s", type=click.FloatRange(1), help="Length of the window.  [default: to the end]")
@click.option("--keep", default=1.0, type=click.FloatRange(0, 1, min_open=True), help="Share of the sessions to keep.")
@click.option(
    "--active-max", type=click.IntRange(1), help="Leave sessions out with which more would be active at once."
)
@click.option(
    "--steer-share", default=0.2, type=click.FloatRange(0, 1), help="Share of periods with new words in them."
)
@click.option("--grace-s", default=15.0, type=click.FloatRange(0), help="Wait so long for chunks after the last event.")
@click.option("--serve-args", default="", help="Start a server of its own with these flags, unless --url is given.")
@click.option("--profile", metavar="FILE|NAME", help="Put the simulator's prediction with this profile beside it.")
@click.option("--max-workers", type=click.IntRange(1), help="For the prediction: the fleet scales up to so many.")
@click.option(
    "--initial-workers", default=1, type=click.IntRange(1), help="For the prediction: the fleet at the start."
)
@click.option("--save-trace", type=click.Path(dir_okay=False, path_type=Path), help="Write the scaled trace.")
@click.option("--seed", default=0)
@click.option("--out", type=click.Path(path_type=Path), metavar="F.json|DIR", help="Save rows and figures.")
@server_options("bench-serve")
@json_option
def command(
    trace_file: str,
    speed: float,
    from_s: float,
    length_s: float | None,
    keep: float,
    active_max: int | None,
    steer_share: float,
    grace_s: float,
    serve_args: str,
    profile: str | None,
    max_workers: int | None,
    initial_workers: int,
    save_trace: Path | None,
    seed: int,
    out: Path | None,
    url: str | None,
    api_key: str | None,
    as_json: bool,
) -> None:
    """Load a server with the sessions of a trace over its public API, and say what their viewers saw.

    Sessions open, pause, go on and leave when the trace says so, whether or not the server keeps up; a simulated
    player says where the picture would have stood still. The cluster's figures need an admin key.
    """
    trace = scaled(
        read_trace(trace_file),
        speed=speed,
        from_s=from_s,
        length_s=length_s,
        keep=keep,
        active_max=active_max,
        seed=seed,
    )
    if save_trace is not None:
        write_trace(trace, save_trace)
    if url and serve_args:
        raise ConfigError("--serve-args is for a server of our own", expected="either --url or --serve-args")
    with contextlib.ExitStack() as stack:
        address = url or stack.enter_context(serving(*shlex.split(serve_args))).rstrip("/")
        found = asyncio.run(_measure(address, api_key, trace, steer_share=steer_share, seed=seed, grace_s=grace_s))
    result: dict[str, Any] = {"bench": "serve", "trace": trace.name, "serve_args": serve_args, **found}
    if profile is not None:
        from turboserve.sim.profile_files import load_profile

        fixed = None if max_workers else initial_workers
        result["predicted"] = predicted(
            trace,
            load_profile(profile),
            workers=fixed,
            workers_max=max_workers or initial_workers,
            initial=initial_workers,
            batching="pass",
        )
    _say(result)
    if out is not None:
        path = out / f"serve.{machine_slug()}.json" if out.is_dir() else out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        console().print(f"saved {path}", soft_wrap=True)
    if as_json:
        print_json(result)


async def _measure(
    url: str, api_key: str | None, trace: Any, *, steer_share: float, seed: int, grace_s: float
) -> dict[str, Any]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    clock = await live_clock(url, api_key)
    load = plans(trace, clock.chunk_s)
    alone_plan = [
        SessionPlan("alone", 0.0, (PeriodPlan(0.0, ALONE_CHUNKS),), (ALONE_CHUNKS + 1) * clock.chunk_s),
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console()) as progress:
        task = progress.add_task("one session alone", total=1.0, note="")

        def say(at_s: float, end_s: float, delivered: int, workers: int) -> None:
            progress.update(task, completed=at_s, total=end_s, note=f"{delivered} chunks, {workers} workers")

        alone, _, _ = await run_load(url, api_key, alone_plan, steer_share=1.0, seed=seed, grace_s=grace_s, say=say)
        progress.update(task, description=f"{len(load)} sessions")
        seen, meter, wall_s = await run_load(
            url, api_key, load, steer_share=steer_share, seed=seed, grace_s=grace_s, say=say
        )
    shape = f"{len(load)} sessions, {sum(one.wanted for one in seen)} chunks"
    return {
        **report(rows(seen, clock, alone, shape)),
        "figures": figures(seen, clock, meter.worker_seconds, wall_s, meter.decided),
    }


def _say(result: dict[str, Any]) -> None:
    from turboserve.bench.report import Row

    terminal = console()
    terminal.print(table([Row(**one) for one in result["rows"]]), soft_wrap=True)
    found, beside = result["figures"], result.get("predicted", {})
    lines = [
        ("on-time share", found["on_time_share"], beside.get("on_time_share")),
        ("worker-seconds", found["worker_seconds"], beside.get("worker_seconds")),
        ("chunks wanted", found["chunks_wanted"], beside.get("chunks")),
        ("chunks delivered", found["chunks_delivered"], None),
        ("stalls", f"{found['stalls']['count']} ({found['stalls']['seconds']} s)", None),
        ("sessions without a stall", found["sessions_without_stall_share"], None),
        ("continuous-play ratio", found["continuous_play_ratio"], None),
        ("failed sessions", found["failed_sessions"] or "none", None),
    ]
    for name, value, simulated in lines:
        terminal.print(
            f"{name:<25}{value}" + (f"   simulated: {simulated}" if simulated is not None else ""), markup=False
        )
