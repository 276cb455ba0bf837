"""A long run under every fault, drawn at random: processes killed, stopped and drained, sessions moved, steered, ended
and begun again.

python tests/reliability/soak.py --minutes 20 --out bench/results/reliability.soak.json
python tests/reliability/soak.py --minutes 1440      a day and a night

After each fault: every stream that plays moves on, the fleet is whole, the arena's ledger is exact. Every session that
ended is made again in one engine without faults (a process of low priority) and its digests compared. At the end
nothing is held in the arena or on disk, and no process has grown by more than GROWTH_BYTES since the first tenth of
the run. One JSON object on stdout; exit code 1 when a promise broke.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Coroutine
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from fault_viewers import FaultViewer, Seen, open_viewer, undisturbed_chain  # noqa: E402
from faults import CHUNK_S, FAULTS, PLAYING, SESSIONS, WORKERS, Run, quantiles, report  # noqa: E402
from real_server import start_server  # noqa: E402

LIFE_CHUNKS = 120  # a session that has had so many is ended, and another one begun
ZOMBIE_S = 4.0  # longer than a lease
GROWTH_BYTES = 200 << 20
WEIGHTS = {
    "worker-kill": 3,
    "migrate": 4,
    "suspend": 3,
    "controller-kill": 2,
    "gateway-kill": 1,
    "drain": 2,
    "zombie": 1,
}


class Soak(Run):
    """One server for the whole time."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.counts: Counter[str] = Counter()
        self.refused = 0
        self.ended = 0
        self.chunks = 0
        self.reconnects = 0
        self.stalls = 0
        self.pauses: dict[str, list[float]] = {}
        self.memory: list[dict[str, int]] = []
        self.checks: list[Future[str]] = []
        self._opened = self.sessions

    async def zombie(self) -> None:
        """A worker stops for longer than its lease and goes on: what it says afterwards must change nothing."""
        victim = self.rng.choice(await self.ready_workers())
        os.kill(victim["pid"], signal.SIGSTOP)
        try:
            await asyncio.sleep(ZOMBIE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim["pid"], signal.SIGCONT)

    async def suspend(self) -> None:
        """An operator suspends a stream that plays; its viewer asks it back by playing on."""
        viewer = self.rng.choice(self.on)
        answer = await self.http.post(f"/v1/admin/sessions/{viewer.sid}/suspend")
        if answer.status_code != 200:
            self.refused += 1
        await viewer.play(True)

    async def renew(self, pool: ProcessPoolExecutor) -> None:
        """Sessions that have lived long enough end; others take their place."""
        for place, viewer in enumerate(self.viewers):
            if viewer.next_index < LIFE_CHUNKS:
                continue
            await self.end(viewer, pool)
            fresh = await open_viewer(self.http, self.server.url, self._opened, CHUNK_S, self.rate)
            self.viewers[place] = fresh
            self._opened += 1
            fresh.start()
            await fresh.play(viewer.on)

    async def end(self, viewer: FaultViewer, pool: ProcessPoolExecutor) -> None:
        await viewer.stop()
        answer = await self.http.delete(f"/v1/sessions/{viewer.sid}")
        assert answer.status_code in (200, 204), answer.text
        self.ended += 1
        self.chunks += viewer.next_index
        self.reconnects += viewer.reconnects
        self.stalls += viewer.stalls()
        if viewer.next_index:
            self.checks.append(pool.submit(_check, viewer.seen))
        self.hear_checks()

    def hear_checks(self, *, wait: bool = False) -> None:
        """Chains that have been made again: each must be as the viewer had it."""
        left = []
        for check in self.checks:
            if wait or check.done():
                assert not (wrong := check.result()), wrong
            else:
                left.append(check)
        self.checks = left

    def look_at_memory(self) -> None:
        """Resident bytes of launcher, controller and gateway. Workers are killed too often to grow."""
        now = {}
        for pid in (self.server.pid, *self._children()):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except OSError:
                continue
            name = next((n for n in ("control_loop", "server.process") if n in command), "")
            if pid == self.server.pid:
                name = "launcher"
            if name:
                now[name] = pages * os.sysconf("SC_PAGE_SIZE")
        self.memory.append(now)

    def growth(self) -> dict[str, int]:
        """By process: the most it has held in the last half of the run over the most in the first tenth."""
        first = self.memory[: max(1, len(self.memory) // 10)]
        last = self.memory[len(self.memory) // 2 :]
        names = {name for one in self.memory for name in one}
        return {
            name: max(one.get(name, 0) for one in last) - max(one.get(name, 0) for one in first)
            for name in sorted(names)
            if any(name in one for one in first)
        }

    async def soak(self, seconds: float, pool: ProcessPoolExecutor) -> None:
        await self.open()
        await self.settle(chunks=3)
        began_s = said_s = time.monotonic()
        own = {"zombie": self.zombie, "suspend": self.suspend}
        while time.monotonic() - began_s < seconds:
            kind = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            await asyncio.sleep(self.rng.uniform(0.0, self.chunk_s))
            at_s = time.monotonic()
            await (own[kind] if kind in own else FAULTS[kind](self))()
            await self.settle()
            gaps = [gap for one in self.viewers for gap in one.gaps(at_s, time.monotonic())]
            self.pauses.setdefault(kind, []).append(max(0.0, max(gaps, default=0.0) - self.chunk_s) / self.chunk_s)
            self.counts[kind] += 1
            await self.ledger()
            await self.renew(pool)
            await self.take_turns()
            await self.settle(chunks=1)
            self.look_at_memory()
            if time.monotonic() - said_s > 60:
                said_s = time.monotonic()
                spent = f"{(said_s - began_s) / 60:.0f} of {seconds / 60:.0f} min"
                print(f"{spent}: {dict(self.counts)}, {self.ended} sessions ended", file=sys.stderr, flush=True)

    async def close(self, pool: ProcessPoolExecutor) -> dict[str, Any]:
        for viewer in self.viewers:
            await self.end(viewer, pool)
        ledger = await self.empty_ledger()
        growth = self.growth()
        grown = {name: bytes_ for name, bytes_ in growth.items() if bytes_ > GROWTH_BYTES}
        assert not grown, f"processes that have grown: {grown}"
        return {
            "faults": dict(self.counts),
            "refused_suspends": self.refused,
            "sessions": self.ended,
            "chunks": self.chunks,
            "reconnects": self.reconnects,
            "stalls_two_chunk_buffer": self.stalls,
            "pause_chunk_times": {kind: quantiles(found) for kind, found in sorted(self.pauses.items())},
            "ledger_after": ledger,
            "growth_bytes": growth,
            "playback_rate": self.rate,
            "chunk_s": round(self.chunk_s, 4),
        }


def _check(seen: Seen) -> str:
    """Empty when the viewer's digests are those of a run without faults."""
    expected = undisturbed_chain(seen)
    if expected == seen.digests:
        return ""
    at = next(i for i, (a, b) in enumerate(zip(expected, seen.digests, strict=True)) if a != b)
    return f"{seen.sid}: chunk {at} has another digest than undisturbed"


async def run_soak(minutes: float, *, folder: Path, rate: float = 0.5, seed: int = 1) -> dict[str, Any]:
    """Raises AssertionError when a promise broke."""
    options = ("--workers", str(WORKERS), "--playback-rate", str(rate), "--slots", "16", "--log-format", "json")
    context = multiprocessing.get_context("spawn")
    with (
        start_server(folder, *options) as server,
        ProcessPoolExecutor(1, mp_context=context, initializer=os.nice, initargs=(19,)) as pool,
    ):
        run = Soak(server, rate, seed, SESSIONS, PLAYING, WORKERS)
        async with run.http:
            began_s = time.monotonic()
            await run.soak(minutes * 60, pool)
            took_s = time.monotonic() - began_s
            result = await run.close(pool)
        server.process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(server.process.wait, 30)
        assert code == 0, f"the server ended with {code}"
        await asyncio.to_thread(run.hear_checks, wait=True)
    return {"fault": "soak", **result, "chains_equal": run.ended, "minutes": round(took_s / 60, 2), "seed": seed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--rate", type=float, default=0.5, help="playback rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()

    def run(folder: Path) -> Coroutine[Any, Any, dict[str, Any]]:
        return run_soak(asked.minutes, folder=folder, rate=asked.rate, seed=asked.seed)

    return report("soak", run, asked.out)


if __name__ == "__main__":
    sys.exit(main())
