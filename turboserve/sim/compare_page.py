"""The page of a comparison: one self-contained HTML file over the rows of a grid and what was concluded from them."""

from __future__ import annotations

from collections import Counter, defaultdict
from html import escape
from pathlib import Path
from typing import Any

from turboserve.sim.averages import average
from turboserve.sim.compare_plots import Line, plot
from turboserve.sim.grid import QUANTILES
from turboserve.sim.studies import Row, ablations, label, part_off, settings_of

LATE_SHOWN_LEAST = 1e-5
FLEETS_SHOWN = ("turboserve", "hpa", "lcp", "static-least")
STYLE = """
:root{--bg:#fff;--ink:#1b1f24;--soft:#5b6470;--grid:#e3e6ea;--row:#f5f7f9}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--ink:#e6e8ea;--soft:#9aa4ae;--grid:#2a3037;--row:#1b2025}}
body{background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;
padding:0 1rem}h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.4rem}h3{font-size:1rem;margin:1.6rem 0 .4rem}
.soft,figcaption{color:var(--soft)}.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .7rem .2rem 0;font-size:.92rem;text-align:left;white-space:nowrap}
tbody tr:nth-child(odd){background:var(--row)}
.ours{font-weight:650}figure{margin:1.2rem 0}svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:12px}
.grid{stroke:var(--grid)}.guide{stroke:var(--soft);stroke-dasharray:5 4}.key{margin-right:1.1rem;font-size:.85rem}
.key i{display:inline-block;width:.8em;height:.8em;margin-right:.4em;border-radius:2px}
"""


def write_page(rows: list[Row], summary: dict[str, Any], path: Path) -> None:
    """Write the page for the rows of all studies so far."""
    parts = [
        "<h1>Policies compared</h1>",
        f"<p>{summary['runs']} simulated runs over {len({row['trace'] for row in rows})} traces. Nothing here was "
        "measured on a GPU; the latency profiles say what they stand for. Averages are means over source groups "
        "(traces of one source count as one), with a bootstrap 95% interval over groups, traces and seeds.</p>",
        _audited(summary),
    ]
    shown = Counter((row["profile"], row["provision_s"]) for row in rows)
    for profile, delay_s in sorted(settings_of(rows), key=lambda setting: -shown[setting]):
        mine = [row for row in rows if (row["profile"], row["provision_s"]) == (profile, delay_s)]
        found = summary["studies"][f"{profile} D={delay_s:g}"]
        parts.append(f"<h2>Profile {escape(profile)}, provisioning delay {delay_s:g} s</h2>")
        if found["service"]:
            parts += [_service_table(found["service"]), _frontier(mine), _tail_frontier(mine), _fleets(mine)]
        for fleet, policies in found["latency"].items():
            parts.append(_latency_table(fleet, policies))
            parts.append(_distributions([row for row in mine if row["fleet"] == fleet]))
    parts += [_ablations(rows), _by_trace(summary["by_trace"]), _cheaper(summary["cheaper_baselines"]), _all_rows(rows)]
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Policies compared</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def interval(found: dict[str, Any], *, scale: float = 1.0, digits: int = 2, unit: str = "") -> str:
    """`1.21 [1.15, 1.30]`, or a dash for no value."""
    if found["mean"] is None:
        return "-"
    mean, low, high = (f"{found[key] * scale:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean}{unit} [{low}, {high}]"


def _table(heads: list[str], body: list[tuple[bool, list[str]]]) -> str:
    """Rows as (ours, cells)."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    lines = "".join(
        f"<tr{' class=ours' if ours else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for ours, cells in body
    )
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"


def _audited(summary: dict[str, Any]) -> str:
    if not summary["audited_runs"]:
        return '<p class="soft">No run of this grid was held against the rules (--audit).</p>'
    return (
        f"<p>{summary['audited_runs']} of {summary['runs']} runs were held against every rule by the independent "
        f"auditor: {summary['violations']} violations.</p>"
    )


def _service_table(found: dict[str, Any]) -> str:
    heads = ["policy", "runs at equal service", "worker-hours / clairvoyant", "saved against static-least"]
    heads += ["on time", "reduced steps", "$ per on-time video hour"]
    body = [
        (
            name == "turboserve",
            [
                name,
                f"{one['runs_at_equal_service']} of {one['runs']}",
                interval(one["over_clairvoyant"]),
                interval(one["saved_against_static_least"], scale=100, digits=1, unit="%"),
                interval(one["on_time_share"], scale=100, digits=3, unit="%"),
                interval(one["reduced_step_share"], scale=100, digits=2, unit="%"),
                interval(one["dollars_per_on_time_video_hour"], digits=3),
            ],
        )
        for name, one in found.items()
    ]
    return (
        "<h3>Cost at equal service</h3><p class=soft>Equal service: at least 99.9% of chunks on time, none shed, at "
        "most 2% with reduced steps. Fixed fleets are the smallest that give it. Savings count only such runs.</p>"
        + _table(heads, body)
    )


def _ablations(rows: list[Row]) -> str:
    found = ablations(rows)
    if not found:
        return ""
    heads = ["turned off", "runs at equal service", "windows", "worker-hours over the whole policy's", "least on time"]
    body = [
        (
            False,
            [
                one["off"],
                f"{one['runs_at_equal_service']} of {one['runs']}",
                str(one["cost"]["traces"]),
                interval(one["cost"]),
                f"{100 * one['least_on_time']:.2f}%",
                f"{100 * one['reduced']:.2f}%",
            ],
        )
        for one in found
    ]
    return (
        "<h2>What each part contributes</h2><p class=soft>One part off at a time, beside the whole policy on the "
        "same windows and seeds. Without scaling: the smallest fixed fleet that serves, chosen in hindsight.</p>"
        + _table([*heads, "reduced steps"], body)
    )


def _points(rows: list[Row], figure: Any) -> list[Line]:
    """Per policy its knob settings as points (cost over the clairvoyant's, figure), cheapest first."""
    found: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["fleet"] in ("scale", "least") and row["reference_worker_hours"] and not part_off(row):
            by_label[label(row)].append(row)
    for name, mine in by_label.items():
        cost = average((r["group"], r["trace"], r["worker_hours"] / r["reference_worker_hours"]) for r in mine)
        value = average((r["group"], r["trace"], figure(r)) for r in mine)
        found[mine[0]["policy"]].append(
            (cost["mean"], value["mean"], f"{name}: {cost['mean']:.2f}x, {value['mean']:.4g}")
        )
    return [
        Line(policy, policy, [p[0] for p in points], [p[1] for p in points], marks=[p[2] for p in points])
        for policy, points in ((policy, sorted(points)) for policy, points in sorted(found.items()))
    ]


def _frontier(rows: list[Row]) -> str:
    return plot(
        _points(rows, lambda row: max(LATE_SHOWN_LEAST, 1 - row["on_time_share"])),
        title="Cost against late chunks (means over groups; knob settings joined; left and low is better)",
        x_label="worker-hours / clairvoyant",
        y_label="share of chunks late",
        x_low=1.0,
        y_log=True,
        y_low=LATE_SHOWN_LEAST,
        guides=((1e-3, "equal service: 0.1% late"),),
    )


def _tail_frontier(rows: list[Row]) -> str:
    return plot(
        _points(rows, lambda row: row["latency_s"]["p99"] or 0.0),
        title="Cost against p99 chunk latency (ready to delivered)",
        x_label="worker-hours / clairvoyant",
        y_label="seconds",
        x_low=1.0,
    )


def _fleets(rows: list[Row]) -> str:
    """Per trace the fleets of a few policies over the demand."""
    out = ["<h3>Fleet against demand and bound</h3>"]
    for trace in sorted({row["trace"] for row in rows}):
        shown = {
            row["policy"]: row
            for row in rows
            if row["trace"] == trace and row.get("curve") and row["fleet"] in ("scale", "least")
            if row["policy"] in FLEETS_SHOWN and (row["policy"] != "turboserve" or label(row) == "turboserve")
        }
        if not shown:
            continue
        first = next(iter(shown.values()))
        minutes = [t / 60 for t in first["curve"]["time_s"]]
        capacity = first["capacity"]
        lines = [
            Line(
                "demand",
                "active / capacity (the bound)",
                minutes,
                [a / capacity for a in first["curve"]["active"]],
                area=True,
            )
        ]
        for policy, row in shown.items():
            lines.append(
                Line(policy, label(row), [t / 60 for t in row["curve"]["time_s"]], row["curve"]["billed"], steps=True)
            )
        out.append(plot(lines, title=f"{trace}: workers billed", x_label="minutes", y_label="workers", height=240))
    return "".join(out) if len(out) > 1 else ""


def _latency_table(fleet: str, found: dict[str, Any]) -> str:
    heads = ["policy", "worst below static-least", "worst below static-rr", "service p50 / mean / p99 s"]
    heads += ["latency p50 / mean / p99 s", "balance excess", "moves / session-hour", "on time", "worst, azure s"]

    def spread(one: dict[str, Any], kind: str) -> str:
        parts = [one[f"{kind}_{part}_s"]["mean"] for part in ("p50", "mean", "p99")]
        return " / ".join("-" if part is None else f"{part:.2f}" for part in parts)

    body = [
        (
            name == "turboserve",
            [
                name,
                interval(one["worst_service_lower_than_static-least"], scale=100, digits=1, unit="%"),
                interval(one["worst_service_lower_than_static-rr"], scale=100, digits=1, unit="%"),
                spread(one, "service"),
                spread(one, "latency"),
                interval(one["balance_excess"], digits=3),
                interval(one["moves_per_session_hour"]),
                interval(one["on_time_share"], scale=100, digits=2, unit="%"),
                interval(one["worst_service_s_azure"]),
            ],
        )
        for name, one in found.items()
    ]
    factor = fleet.removeprefix("peak*")
    return (
        f"<h3>Latency at equal fleets: {factor}x of ceil(peak active / capacity)</h3><p class=soft>Full steps. Means "
        "over the groups other than azure, whose sessions never pause (shown apart).</p>" + _table(heads, body)
    )


def _distributions(rows: list[Row]) -> str:
    out = []
    for trace in sorted({row["trace"] for row in rows}):
        mine = [row for row in rows if row["trace"] == trace and row.get("service_quantiles_s")]
        lines = [Line(row["policy"], label(row), list(QUANTILES), row["service_quantiles_s"]) for row in mine]
        out.append(
            plot(
                lines,
                title=f"{trace}: service latency (batch start to finish) by share of chunks",
                x_label="% of chunks at or below",
                y_label="seconds",
                height=240,
            )
        )
    return "<details><summary>Latency distributions by trace</summary>" + "".join(out) + "</details>" if out else ""


def _by_trace(found: list[dict[str, Any]]) -> str:
    def hours(one: dict[str, Any], key: str) -> str:
        if one[key] is None:
            return "-"
        return f"{one[key]:.2f}" + (f" ({one[key] / one['clairvoyant']:.2f}x)" if one["clairvoyant"] else "")

    if not found:
        return ""
    heads = [
        "trace",
        "profile",
        "D s",
        "clairvoyant",
        "turboserve",
        "cheapest baseline",
        "its worker-hours",
        "static-least",
    ]
    body = [
        (
            False,
            [
                one["trace"],
                one["profile"],
                f"{one['provision_s']:g}",
                f"{one['clairvoyant']:.2f}",
                hours(one, "turboserve"),
                one["best_baseline"] or "none",
                hours(one, "best_baseline_worker_hours"),
                hours(one, "static_least"),
            ],
        )
        for one in found
    ]
    return (
        "<h2>By trace: worker-hours at equal service</h2><p class=soft>A dash: not at equal service, or not run. The "
        "baseline's knobs are chosen in hindsight for each trace.</p>" + _table(heads, body)
    )


def _cheaper(found: list[dict[str, Any]]) -> str:
    if not found:
        return "<h2>Where a baseline is cheaper</h2><p>At equal service: nowhere in these runs.</p>"
    heads = ["trace", "profile", "D s", "seed", "ours", "equal service", "baseline", "its worker-hours"]
    body = [
        (
            False,
            [
                one["trace"],
                one["profile"],
                f"{one['provision_s']:g}",
                str(one["seed"]),
                f"{one['ours']:.2f}",
                "yes" if one["ours_at_equal_service"] else "no",
                one["rival"],
                f"{one['rival_worker_hours']:.2f}",
            ],
        )
        for one in found
    ]
    return "<h2>Where a baseline is cheaper</h2>" + _table(heads, body)


def _all_rows(rows: list[Row]) -> str:
    heads = ["trace", "profile", "D s", "seed", "policy", "fleet", "on time %", "reduced %", "shed", "worker-hours"]
    heads += ["/ clairvoyant", "service p99 / worst s", "latency p99 s", "migrations", "resumes", "outs / ins"]
    body = []
    for row in sorted(rows, key=lambda r: (r["profile"], r["provision_s"], r["trace"], r["fleet"], r["worker_hours"])):
        reference = row["reference_worker_hours"]
        cells = [row["trace"], row["profile"], f"{row['provision_s']:g}", str(row["seed"]), label(row)]
        cells += [str(row["fixed_workers"] or "scales"), f"{100 * row['on_time_share']:.3f}"]
        cells += [f"{100 * row['reduced_step_share']:.2f}", str(row["shed"]), f"{row['worker_hours']:.2f}"]
        cells += [f"{row['worker_hours'] / reference:.2f}" if reference else "-"]
        cells += [f"{row['service_s']['p99'] or 0:.2f} / {row['service_s']['max'] or 0:.2f}"]
        cells += [f"{row['latency_s']['p99'] or 0:.2f}", str(row["migrations"]), str(row["resumes"])]
        cells += [f"{row['scale_outs']} / {row['scale_ins']}"]
        body.append((row["policy"] == "turboserve", cells))
    return "<h2>All runs</h2><details><summary>Table</summary>" + _table(heads, body) + "</details>"
