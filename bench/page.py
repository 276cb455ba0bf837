"""What a viewer of the page gets, measured in Chromium: time to the first pixel, words to picture, smoothness.

    turboserve bench page --attaches 50 --switches 40 --watch-s 300 --out bench/results/page.json

Starts a server of its own unless `--url` names one. All times are taken inside the page with its own clock: from the
attach message (or the key press) to the return of the `drawImage` call that changes the canvas. The display adds up to
one refresh to that.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turboserve.bench.chromium import chromium, serving

if TYPE_CHECKING:
    from playwright.sync_api import Page

# Notes when things were sent and drawn, without touching the page's own code.
TAP = """
(() => {
  const tap = (window.tap = { pressed: 0, attached: 0, first: 0, draws: [], submitted: 0, moments: [] });
  addEventListener("keydown", (event) => event.key === "Enter" && (tap.pressed = performance.now()), true);
  addEventListener("submit", () => (tap.submitted = performance.now()), true);
  const send = WebSocket.prototype.send;
  WebSocket.prototype.send = function (data) {
    if (typeof data === "string" && data.includes('"attach"')) tap.attached = performance.now();
    send.call(this, data);
  };
  const draw = CanvasRenderingContext2D.prototype.drawImage;
  CanvasRenderingContext2D.prototype.drawImage = function (...given) {
    draw.apply(this, given);
    const now = performance.now();
    if (!tap.first) tap.first = now;
    tap.draws.push(now);
  };
  new MutationObserver((changes) => {
    for (const { target } of changes) {
      if (target.classList?.contains("moment") && !target.hidden) tap.moments.push(performance.now());
    }
  }).observe(document, { subtree: true, attributes: true, attributeFilter: ["data-index"] });
})();
"""

SCENES = (
    "one large red circle drifting left on a black background",
    "two small yellow stars drifting right over a dark blue sky",
    "one large green square bouncing over dark purple",
    "two cyan rings moving up on grey",
)


def summary(values_ms: list[float]) -> dict[str, float]:
    """Count, quartiles and tail; empty when nothing was measured."""
    if not values_ms:
        return {"count": 0}
    ordered = sorted(values_ms)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)

    return {
        "count": len(ordered),
        "p50_ms": at(0.5),
        "p95_ms": at(0.95),
        "p99_ms": at(0.99),
        "max_ms": round(ordered[-1], 1),
    }


def measure_attaches(page: Page, count: int) -> list[dict[str, Any]]:
    """Start a stream from the keyboard, note its first picture, close it; `count` times."""
    from_attach, from_press = [], []
    with click.progressbar(range(count), label="attaches", file=sys.stderr) as bar:
        for turn in bar:
            page.evaluate("Object.assign(tap, { first: 0, attached: 0 })")
            page.fill("#prompt", SCENES[turn % len(SCENES)])
            page.press("#prompt", "Enter")
            page.wait_for_function("() => tap.first > 0", timeout=90_000)
            tap = page.evaluate("tap")
            from_attach.append(tap["first"] - tap["attached"])
            from_press.append(tap["first"] - tap["pressed"])
            page.click("[data-action=close]")
            page.wait_for_timeout(250)
    return [
        {"case": "attach_to_first_pixel", **summary(from_attach)},
        {"case": "start_to_first_pixel", **summary(from_press)},
    ]


def measure_switches(page: Page, count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Steer one stream at random moments; from the submitted words to the first frame that follows them."""
    page.fill("#prompt", SCENES[0])
    page.press("#prompt", "Enter")
    page.wait_for_selector(".tile[data-status=playing]")
    page.wait_for_timeout(4000)
    waits = []
    with click.progressbar(range(count), label="switches", file=sys.stderr) as bar:
        for turn in bar:
            page.evaluate("tap.moments.length = 0")
            page.fill(".steer input", SCENES[(turn + 1) % len(SCENES)])
            page.wait_for_timeout(rng.uniform(0, 700))
            page.press(".steer input", "Enter")
            page.wait_for_function("() => tap.moments.length > 0", timeout=90_000)
            tap = page.evaluate("tap")
            waits.append(tap["moments"][0] - tap["submitted"])
            page.wait_for_timeout(rng.uniform(500, 1200))
    chunk_ms = 1000 * page.evaluate(
        "fetch('v1/models').then((answer) => answer.json()).then(({ models }) => models[0].chunk_s)"
    )
    row = {"case": "words_to_picture", **summary(waits)}
    row["p95_chunk_times"] = round(row["p95_ms"] / chunk_ms, 2)
    page.click("[data-action=close]")
    return [row]


def measure_smoothness(page: Page, streams: int, watch_s: float) -> list[dict[str, Any]]:
    """Gaps between the frames of the canvas, and the stalls that the page counted itself."""
    if streams == 4:
        page.click("#open-four")
    else:
        page.fill("#prompt", SCENES[0])
        page.press("#prompt", "Enter")
    page.wait_for_function(
        "n => document.querySelectorAll('.tile[data-status=playing]').length === n", arg=streams, timeout=90_000
    )
    page.wait_for_timeout(3000)
    page.evaluate(PER_CANVAS)
    with click.progressbar(range(int(watch_s)), label=f"watching {streams}", file=sys.stderr) as bar:
        for _ in bar:
            page.wait_for_timeout(1000)
    per_canvas = page.evaluate("tap.perCanvas")
    gaps = [b - a for times in per_canvas for a, b in itertools.pairwise(times)]
    page.evaluate("document.querySelectorAll('.more').forEach((more) => (more.open = true))")
    page.wait_for_timeout(700)
    figures = {
        name: page.locator(f"[data-figure={name}]").all_inner_texts()
        for name in ("stalls", "onTime", "latency", "batch", "fps")
    }
    for _ in range(streams):
        page.locator("[data-action=close]").first.click()
    late = sum(gap > 1.5 * 1000 / 12 for gap in gaps)
    return [
        {
            "case": f"frame_gap_{streams}_streams",
            "watched_s": watch_s,
            **summary(gaps),
            "over_125_ms": late,
            "page": figures,
        }
    ]


PER_CANVAS = """() => {
  const times = new Map([...document.querySelectorAll("canvas")].map((canvas) => [canvas, []]));
  const draw = CanvasRenderingContext2D.prototype.drawImage;
  CanvasRenderingContext2D.prototype.drawImage = function (...given) {
    draw.apply(this, given);
    times.get(this.canvas)?.push(performance.now());
  };
  Object.defineProperty(tap, "perCanvas", { configurable: true, get: () => [...times.values()] });
}"""


def commit() -> str:
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


@click.command("page")
@click.option("--url", help="A running server without keys.  [default: starts one]")
@click.option("--attaches", default=50, show_default=True)
@click.option("--switches", default=40, show_default=True)
@click.option("--watch-s", default=300.0, show_default=True, help="Seconds to watch one stream, and then four.")
@click.option("--seed", default=1, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path))
def command(url: str | None, attaches: int, switches: int, watch_s: float, seed: int, out: Path | None) -> None:
    """Measure the page in headless Chromium; rows as JSON."""
    rows: list[dict[str, Any]] = []
    load_before = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        address = url or stack.enter_context(serving())
        browser = stack.enter_context(chromium())
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        context.add_init_script(TAP)
        page = context.new_page()
        page.goto(f"{address.rstrip('/')}/?tour=off")
        if attaches:
            rows += measure_attaches(page, attaches)
        if switches:
            rows += measure_switches(page, switches, random.Random(seed))
        if watch_s:
            rows += measure_smoothness(page, 1, watch_s)
            rows += measure_smoothness(page, 4, watch_s)
        machine = {
            "cpu": _cpu(),
            "load_1min_before": round(load_before, 1),
            "niceness": os.nice(0),
            "python": platform.python_version(),
            "chromium": browser.version,
        }
    report = {"bench": "page", "commit": commit(), "machine": machine, "rows": rows}
    text = json.dumps(report, indent=1)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    print(text)


def _cpu() -> str:
    """Count and name of the processors."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"{len(names)} x {names[0]}" if names else platform.machine()
    return platform.machine()


if __name__ == "__main__":
    command()
