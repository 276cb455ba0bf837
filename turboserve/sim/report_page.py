"""`report.html` of a run: one page that stands alone and says what happened, in plots people can read."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from turboserve.sim.batch_steps import R_DEADLINE, R_FINISH, R_READY, R_RELEASE, R_START, R_STEPS
from turboserve.sim.events import US, to_us
from turboserve.sim.replay import Run
from turboserve.sim.svg import Series, line_plot
from turboserve.sim.trace import demand

BIN_S = 20  # of the time plots
STYLE = """
:root{--bg:#fff;--ink:#1b1f24;--soft:#5b6470;--grid:#e3e6ea;
--s0:#9db7d5;--s1:#1f5fa8;--s2:#c8553d;--s3:#3a8a57;--s4:#8a5fb0}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--ink:#e6e8ea;--soft:#9aa4ae;--grid:#2a3037;
--s0:#3b5068;--s1:#7db2ea;--s2:#ef8c74;--s3:#78c795;--s4:#c09be0}}
body{background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif;max-width:920px;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}td{padding:.2rem .9rem .2rem 0;
text-align:left;vertical-align:top}td:nth-child(2){font-variant-numeric:tabular-nums}.soft,figcaption{color:var(--soft)}
figure{margin:1.2rem 0}svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:11px}svg .grid{stroke:var(--grid)}
path{fill:none;stroke-width:1.6}path.area{stroke:none}path.s0{stroke:var(--s0)}path.s1{stroke:var(--s1)}
path.s2{stroke:var(--s2)}path.s3{stroke:var(--s3)}path.s4{stroke:var(--s4)}path.area.s0{fill:var(--s0)}
.key{margin-right:1.2rem;font-size:.85rem}.key::before{content:"";display:inline-block;width:.9em;height:.9em;
margin-right:.4em;vertical-align:-.1em}.key.s0::before{background:var(--s0)}.key.s1::before{background:var(--s1)}
.key.s2::before{background:var(--s2)}.key.s3::before{background:var(--s3)}.key.s4::before{background:var(--s4)}
"""


def write_page(run: Run, report: dict[str, Any], path: Path) -> None:
    """Write the page."""
    title = f"{run.policy} on {run.trace.name}"
    body = "".join(
        [
            f"<h1>{escape(title)}</h1>",
            f'<p class="soft">Simulated. Profile {escape(run.profile.name)}: {escape(run.profile.about)}</p>',
            _figures(report),
            "<h2>Fleet against demand</h2>",
            _fleet(run),
            "<h2>Latency</h2>",
            _latency(run),
            _late(run),
            "<h2>Moves</h2>",
            _moves(run),
        ]
    )
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><body>{body}</body></html>\n"
    )


def _figures(r: dict[str, Any]) -> str:
    reference = r["reference"]["worker_hours"]
    beside = f" ({r['worker_hours'] / reference:.2f}x the clairvoyant's {reference:.2f})" if reference else ""
    bound = r["reference"]["service_max_s"]
    rows = [
        ("Chunks", f"{r['chunks']}, {100 * r['on_time_share']:.3f} % on time, {r['shed']} shed"),
        ("Chunks with fewer denoise steps", f"{100 * r['reduced_step_share']:.2f} %"),
        ("Worker-hours", f"{r['worker_hours']:.2f}{beside}"),
        ("Workers", f"mean {r['workers']['mean']:.1f}, most {r['workers']['max']}"),
        (
            "Service latency (batch start to finish)",
            _spread(r["service_s"]) + (f"; bound {bound:g} s" if bound else ""),
        ),
        ("Latency (ready to delivered)", _spread(r["latency_s"])),
        ("First chunk of a period", _spread(r["first_chunk_s"])),
        ("Migrations, resumes, suspends", f"{r['migrations']}, {r['resumes']}, {r['suspends']}"),
        ("Scale-outs, scale-ins", f"{r['scale_outs']}, {r['scale_ins']}"),
        ("Balance excess", f"{r['balance_excess']:.3f} sessions on the fullest worker beyond the even share"),
        ("Settings", ", ".join(f"{k} {v}" for k, v in r["settings"].items() if v not in (None, []))),
    ]
    for name, t in r.get("tenants", {}).items():
        rows.append((f"Tenant {name}", f"{t['chunks']} chunks, {100 * t['on_time_share']:.3f} % on time"))
    cells = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in rows)
    return f'<table>{cells}</table><p class="soft">After {r["settings"]["warmup_s"]:g} s of warm-up.</p>'


def _spread(s: dict[str, float | None]) -> str:
    return ", ".join(f"{k} {v:.3g} s" for k, v in s.items() if v is not None)


def _fleet(run: Run) -> str:
    capacity = run.profile.capacity
    wanted = demand(run.trace)
    t = np.array(run.timeline.time_us) / US / 60
    need = -(-wanted.count // capacity)
    series = [
        Series(
            "demand / capacity (the bound)", (wanted.time_us / US / 60).tolist(), need.tolist(), steps=True, area=True
        ),
        Series("workers billed", t.tolist(), run.timeline.billed, steps=True),
        Series("workers ready", t.tolist(), run.timeline.ready, steps=True),
    ]
    return line_plot(_thinned(series), x_label="minutes", y_label="workers", title="Workers held and workers needed")


def _latency(run: Run) -> str:
    warm = run.rows[run.rows[:, R_RELEASE] >= to_us(run.settings.warmup_s)]
    if len(warm) == 0:
        return ""
    share = np.linspace(0, 100, 201)
    service = np.quantile(warm[:, R_FINISH] - warm[:, R_START], share / 100) / US
    total = np.quantile(warm[:, R_FINISH] - warm[:, R_READY], share / 100) / US
    target = run.profile.chunk_target_s
    series = [
        Series("", [], []),
        Series("service (batch start to finish)", share.tolist(), service.tolist()),
        Series("latency (ready to delivered)", share.tolist(), total.tolist()),
        Series(f"target {target:g} s", [0.0, 100.0], [target, target]),
    ]
    return line_plot(
        series, x_label="% of chunks at or below", y_label="seconds", title="Chunk latency by share of chunks"
    )


def _late(run: Run) -> str:
    bins = np.arange(0, run.end_us + BIN_S * US, BIN_S * US)
    at = np.digitize(run.rows[:, R_FINISH], bins) - 1
    all_ = np.bincount(at, minlength=len(bins)).astype(float)
    late = np.bincount(at, weights=run.rows[:, R_FINISH] > run.rows[:, R_DEADLINE] + 2, minlength=len(bins))
    fewer = np.bincount(at, weights=run.rows[:, R_STEPS] < run.profile.denoise_steps, minlength=len(bins))
    per = np.maximum(all_, 1) / 100
    x = (bins / US / 60).tolist()
    series = [
        Series("", [], []),
        Series("with fewer denoise steps", x, (fewer / per).tolist()),
        Series("late", x, (late / per).tolist()),
    ]
    title = f"Late and reduced chunks, % of those finished in {BIN_S} s"
    return line_plot(series, x_label="minutes", y_label="%", title=title)


def _moves(run: Run) -> str:
    bins = np.arange(0, run.end_us / US + BIN_S, BIN_S)
    x = (bins[:-1] / 60).tolist()
    series = [Series("", [], [])]
    for name, event in (("migrations", "migrate"), ("resumes", "resume"), ("suspends", "suspend"), ("drains", "drain")):
        times = [d["time_s"] for d in run.log.decisions if d["event"] == event]
        count: npt.NDArray[np.int64] = np.histogram(times, bins)[0]
        series.append(Series(name, x, count.tolist()))
    return line_plot(series, x_label="minutes", y_label=f"per {BIN_S} s", title="Sessions moved and workers drained")


def _thinned(series: list[Series], most: int = 3000) -> list[Series]:
    """At most `most` points a line; of each stretch that is left out the highest point stays."""
    out = []
    for s in series:
        if len(s.x) <= most:
            out.append(s)
            continue
        y = np.array(s.y)
        edges = np.linspace(0, len(y), most + 1).astype(int)[:-1]
        heights = np.maximum.reduceat(y, edges)
        out.append(Series(s.name, np.array(s.x)[edges].tolist(), heights.tolist(), s.steps, s.area))
    return out
