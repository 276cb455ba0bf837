"""Real processes, real kills: three workers, twelve sessions of which at most four play, and a fault again and again.

python tests/reliability/faults.py worker-kill --count 100 --out bench/results/reliability.worker-kill.json

Faults: worker-kill, migrate, controller-kill, gateway-kill, drain. After each fault the run waits until every stream
that plays has two further chunks and the fleet is whole. At the end every session's digests are held against a run in
one engine without faults, and nothing may be left on any worker. One JSON object on stdout; exit code 1 when a promise
broke.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import httpx  # noqa: E402
from fault_viewers import FaultViewer, open_viewer, undisturbed_chain  # noqa: E402
from real_server import RunningServer, start_server  # noqa: E402

SESSIONS = 12
PLAYING = 4
WORKERS = 3
CHUNK_S = 1 / 3
SETTLE_S = 90.0


class Run:
    """One server, its viewers, one kind of fault."""

    def __init__(
        self, server: RunningServer, rate: float, seed: int, sessions: int, playing: int, workers: int
    ) -> None:
        self.server = server
        self.rate = rate
        self.rng = random.Random(seed)
        self.sessions, self.playing = sessions, playing
        self.chunk_s = CHUNK_S / rate
        self.viewers: list[FaultViewer] = []
        self.events: list[tuple[float, float]] = []
        self.extra: list[dict[str, Any]] = []
        self.workers = workers
        self.http = httpx.AsyncClient(base_url=server.url, timeout=30)

    async def open(self) -> None:
        for number in range(self.sessions):
            viewer = await open_viewer(self.http, self.server.url, number, CHUNK_S, self.rate)
            self.viewers.append(viewer)
            viewer.start()
        for viewer in self.viewers[: self.playing]:
            await viewer.play(True)

    @property
    def on(self) -> list[FaultViewer]:
        return [one for one in self.viewers if one.on]

    async def take_turns(self) -> None:
        """One stops, another one goes on: over a run every session is played, suspended and resumed."""
        waiting = [one for one in self.viewers if not one.on]
        if waiting:
            await self.rng.choice(self.on).play(False)
            await self.rng.choice(waiting).play(True)

    async def cluster(self) -> dict[str, Any]:
        return dict((await self.http.get("/v1/cluster")).json())

    async def ready_workers(self) -> list[dict[str, Any]]:
        return [one for one in (await self.cluster())["workers"] if one["state"] == "ready"]

    async def settle(self, *, chunks: int = 2) -> None:
        """Every stream that plays moves on, and the fleet is whole."""
        goals = {one.sid: one.next_index + chunks for one in self.on}
        until_s = time.monotonic() + SETTLE_S
        while True:
            failed = [f"{one.sid}: {one.failed}" for one in self.viewers if one.failed]
            assert not failed, failed
            behind = [one for one in self.on if one.next_index < goals.get(one.sid, 0)]
            if not behind:
                try:
                    if len(await self.ready_workers()) == self.workers:
                        return
                except (httpx.HTTPError, KeyError, ValueError):
                    pass
            assert time.monotonic() < until_s, f"{[(one.sid, one.next_index) for one in behind]} stand still"
            await asyncio.sleep(0.05)

    def child(self, part: bytes) -> int:
        for pid in self._children():
            try:
                if part in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
            except OSError:
                continue
        raise AssertionError(f"no process {part!r}")

    def _children(self) -> list[int]:
        task = Path(f"/proc/{self.server.pid}/task/{self.server.pid}/children")
        return [int(one) for one in task.read_text().split()]

    # ------------------------------------------------------------------ faults

    async def worker_kill(self) -> None:
        """Half of the time one that makes a chunk now."""
        workers = await self.ready_workers()
        busy = [one for one in workers if one["active"]]
        victim = self.rng.choice(busy if busy and self.rng.random() < 0.75 else workers)
        os.kill(victim["pid"], signal.SIGKILL)

    async def migrate(self) -> None:
        viewer = self.rng.choice(self.on)
        here = (await self.http.get(f"/v1/sessions/{viewer.sid}")).json()["worker"]
        others = [one["id"] for one in await self.ready_workers() if one["id"] != here]
        target = self.rng.choice(others)
        answer = await self.http.post(f"/v1/admin/sessions/{viewer.sid}/migrate", json={"target": target})
        if answer.status_code != 200:  # it moves already, by the scheduler's own decision
            self.extra.append({"refused": answer.json()["error"]["message"]})
            return
        until_s = time.monotonic() + 20
        while (await self.http.get(f"/v1/sessions/{viewer.sid}")).json()["worker"] != target:
            assert time.monotonic() < until_s, f"{viewer.sid} does not arrive at {target}"
            await asyncio.sleep(0.05)

    async def controller_kill(self) -> None:
        told = "no answer"
        os.kill(self.child(b"control_loop"), signal.SIGKILL)
        began_s = time.monotonic()
        while True:
            try:
                body = {"prompt": "a red circle", "seed": 1}
                answer = await self.http.post("/v1/sessions", json=body, timeout=10)
                told = f"{answer.status_code} {answer.text[:300]}"
                if answer.status_code == 201:
                    break
            except httpx.HTTPError:
                pass
            assert time.monotonic() - began_s < 60, f"no admission 60 s after the controller was killed: {told}"
            await asyncio.sleep(0.05)
        self.extra.append({"admission_s": round(time.monotonic() - began_s, 3)})
        await self.http.delete(f"/v1/sessions/{answer.json()['id']}")

    async def gateway_kill(self) -> None:
        pid = self.child(b"server.process")
        os.kill(pid, signal.SIGKILL)
        began_s = time.monotonic()
        until_s = began_s + 60
        before = {one.sid: one.reconnects for one in self.viewers}
        while any(one._socket is None or one.reconnects == before[one.sid] for one in self.viewers):
            assert time.monotonic() < until_s, "not every viewer is back"
            await asyncio.sleep(0.02)
        self.extra.append({"all_attached_s": round(time.monotonic() - began_s, 3)})

    async def drain(self) -> None:
        workers = await self.ready_workers()
        victim = self.rng.choice(workers)
        said = len(self.server.log_text())
        answer = await self.http.post("/v1/admin/workers", json={"add": 1})
        assert answer.status_code == 200, answer.text
        answer = await self.http.post(f"/v1/admin/workers/{victim['id']}/drain")
        assert answer.status_code == 200, answer.text
        began_s = time.monotonic()
        while alive(victim["pid"]):
            assert time.monotonic() - began_s < 80, f"{victim['id']} does not end"
            await asyncio.sleep(0.05)
        self.extra.append({"drain_s": round(time.monotonic() - began_s, 3)})
        log = self.server.log_text()[said:]
        assert '"process died"' not in log, "a drained worker ended with an error"

    # ------------------------------------------------------------------ a run

    async def run(self, fault: Callable[[], Awaitable[None]], count: int) -> None:
        await self.open()
        await self.settle(chunks=3)
        await self.again(fault, count)

    async def again(self, fault: Callable[[], Awaitable[None]], count: int) -> None:
        """The fault so many times, each after the last one is over."""
        for number in range(count):
            await asyncio.sleep(self.rng.uniform(0.0, self.chunk_s))
            began_s = time.monotonic()
            await fault()
            await self.settle()
            self.events.append((began_s, time.monotonic()))
            await self.take_turns()
            await self.settle(chunks=1)
            await self.ledger()
            if (number + 1) % 10 == 0:
                print(f"{number + 1} of {count}", file=sys.stderr, flush=True)

    async def finish(self) -> dict[str, Any]:
        """Everybody stops; what is left, and what the viewers saw."""
        for viewer in self.viewers:
            await viewer.stop()
            await self.http.delete(f"/v1/sessions/{viewer.sid}")
        until_s = time.monotonic() + 20
        while True:
            cluster = await self.cluster()
            held = {one["id"]: one["resident"] for one in cluster["workers"]}
            if not any(held.values()) and not cluster.get("session_list"):
                break
            assert time.monotonic() < until_s, f"after the last close: {held}, {cluster.get('session_list')}"
            await asyncio.sleep(0.1)
        gaps = [gap for viewer in self.viewers for event in self.events for gap in viewer.gaps(*event)]
        pauses = sorted(self._pauses())
        return {
            "sessions": len(self.viewers),
            "playing": self.playing,
            "workers": self.workers,
            "playback_rate": self.rate,
            "chunk_s": round(self.chunk_s, 4),
            "faults": len(self.events),
            "chunks": sum(one.next_index for one in self.viewers),
            "reconnects": sum(one.reconnects for one in self.viewers),
            "gap_s": quantiles(gaps),
            "pause_s": quantiles(pauses),
            "pause_chunk_times": quantiles([one / self.chunk_s for one in pauses]),
            "stalls_two_chunk_buffer": sum(one.stalls() for one in self.viewers),
            "server_pauses": await self._server_pauses(),
            "ledger_after": await self.empty_ledger(),
            "extra": summary(self.extra),
        }

    def _pauses(self) -> list[float]:
        """For each fault the longest wait of any stream: the gap between two chunks, less the chunk time that lies
        between them anyway."""
        found = []
        for since_s, until_s in self.events:
            gaps = [gap for one in self.viewers for gap in one.gaps(since_s, until_s)]
            found.append(max(0.0, max(gaps, default=0.0) - self.chunk_s))
        return found

    async def ledger(self) -> dict[str, int]:
        """The arena's books, which must be exact at every look: free + reserved + committed == total."""
        until_s = time.monotonic() + 20
        while not (found := (await self.cluster()).get("storage")):  # a controller that has just started counts first
            assert time.monotonic() < until_s, "the controller tells nothing of the arena"
            await asyncio.sleep(0.2)
        held = found["arena_free_bytes"] + found["arena_reserved_bytes"] + found["arena_committed_bytes"]
        left = found["arena_total_bytes"] - held
        assert left == 0, f"the arena's ledger is off by {left} bytes: {found}"
        return dict(found)

    async def empty_ledger(self) -> dict[str, int]:
        """After the last close not a byte is held in the arena or on disk. What a killed process left is swept by the
        controller every ten seconds."""
        until_s = time.monotonic() + 40
        while True:
            found = await self.ledger()
            if not any(found[f"{one}_bytes"] for one in ("arena_reserved", "arena_committed", "disk_used")):
                return found
            assert time.monotonic() < until_s, f"after the last close: {found}"
            await asyncio.sleep(0.5)

    async def _server_pauses(self) -> dict[str, float]:
        """The gateway's own histogram; a killed gateway begins it anew."""
        found = {}
        for line in (await self.http.get("/metrics")).text.splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith("turboserve_stream_pause_seconds") and "_created" not in name and float(value):
                found[name.removeprefix("turboserve_stream_pause_seconds")] = float(value)
        return found

    def check(self) -> list[str]:
        """Sessions whose digests are not those of the undisturbed run."""
        return [one.sid for one in self.viewers if undisturbed_chain(one.seen) != one.digests]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def quantiles(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    if not values:
        return {"count": 0}

    def at(share: float) -> float:
        return round(values[min(len(values) - 1, int(share * len(values)))], 3)

    return {"count": len(values), "p50": at(0.5), "p99": at(0.99), "max": round(values[-1], 3)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    numbers: dict[str, list[float]] = {}
    other = 0
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float):
                numbers.setdefault(name, []).append(value)
            else:
                other += 1
    return {**{name: quantiles(values) for name, values in numbers.items()}, "refused": other}


FAULTS: dict[str, Callable[[Run], Callable[[], Awaitable[None]]]] = {
    "worker-kill": lambda run: run.worker_kill,
    "migrate": lambda run: run.migrate,
    "controller-kill": lambda run: run.controller_kill,
    "gateway-kill": lambda run: run.gateway_kill,
    "drain": lambda run: run.drain,
}


async def run_faults(
    kind: str,
    count: int,
    *,
    folder: Path,
    rate: float = 0.5,
    seed: int = 1,
    sessions: int = SESSIONS,
    playing: int = PLAYING,
    workers: int = WORKERS,
    also: str = "",
) -> dict[str, Any]:
    """One run, with `also` another kind of fault after the first; raises AssertionError when a promise broke."""
    options = ("--workers", str(workers), "--playback-rate", str(rate), "--slots", "16", "--log-format", "json")
    with start_server(folder, *options) as server:
        run = Run(server, rate, seed, sessions, playing, workers)
        async with run.http:
            began_s = time.monotonic()
            await run.run(FAULTS[kind](run), count)
            if also:
                await run.again(FAULTS[also](run), 1)
            result = await run.finish()
        took_s = time.monotonic() - began_s
        server.process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(server.process.wait, 30)
    wrong = run.check()
    assert not wrong, f"other digests than undisturbed: {wrong}"
    assert code == 0, f"the server ended with {code}"
    return {"fault": kind, **result, "chains_equal": len(run.viewers), "seconds": round(took_s, 1), "seed": seed}


def report(fault: str, run: Callable[[Path], Coroutine[Any, Any, dict[str, Any]]], out: Path | None) -> int:
    """Run it in a folder of its own; one line of JSON, to `out` too. Exit code 1: a promise was broken."""
    with tempfile.TemporaryDirectory(prefix="turboserve-faults-") as name:
        folder = Path(name)
        try:
            result = asyncio.run(run(folder))
        except AssertionError as error:
            log = folder / "server.log"
            print(log.read_text()[-6000:] if log.exists() else "", file=sys.stderr)
            print(json.dumps({"fault": fault, "broken": str(error)[:2000]}))
            return 1
    result["machine"] = f"{os.cpu_count()} cores"
    head = ["git", "rev-parse", "--short", "HEAD"]
    result["commit"] = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", choices=sorted(FAULTS))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--rate", type=float, default=0.5, help="playback rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()

    def run(folder: Path) -> Coroutine[Any, Any, dict[str, Any]]:
        return run_faults(asked.fault, asked.count, folder=folder, rate=asked.rate, seed=asked.seed)

    return report(asked.fault, run, asked.out)


if __name__ == "__main__":
    sys.exit(main())
