"""One run audited: read its files, rebuild its story, apply every rule, compute its figures again."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from turboserve.audit import figures, rules
from turboserve.audit.findings import Findings
from turboserve.audit.fleet import check_lifetimes, lifetimes
from turboserve.audit.run_files import Run, TracePeriods, is_number, read_profile, read_run, read_trace
from turboserve.audit.whereabouts import rebuild
from turboserve.errors import ConfigError, TraceError

DEFAULTS = {
    "pace": "realtime",
    "batching": "chunk",
    "workers": None,
    "max_workers": None,
    "initial_workers": 2,
    "warmup_s": 600.0,
    "steps_floor": None,
}
SAID_AS = {"max_workers": "workers_max"}
"""Settings that report.json calls by another name than the flag."""
WORDS = {"pace": ("realtime", "closed"), "batching": ("chunk", "pass")}
MAY_BE_NONE = ("workers", "max_workers", "steps_floor")


def audit_run(directory: Path, trace_path: Path, profile_name: str, flags: dict) -> dict:
    """Answer {"violations", "violation_counts", "recomputed", "settings"} of the run in `directory`.

    `flags` are those the run was started with. One left out (None) is taken from the `settings` of
    report.json, then from the profile or the simulator's default; `settings` says what was used, so nothing
    is silent.
    """
    profile = read_profile(profile_name)
    trace = read_trace(trace_path, profile["chunk_s"])
    run = read_run(directory, trace)
    settings = _settings(flags, run.report, profile)
    if settings["batching"] != "chunk":
        raise TraceError(
            f"{directory} was simulated with --batching {settings['batching']}",
            expected="--batching chunk, whose files hold whole chunks",
            hint="simulate again with --batching chunk to audit",
        )
    findings = Findings()
    valid = rules.each_chunk_once(run, trace, findings)
    run = _only(run, valid, trace)
    rules.releases(run, trace, settings["pace"], profile["chunk_s"], findings)
    rules.order_of_chunks(run, trace, findings)

    fleet = lifetimes(run.decisions, findings)
    fixed = settings["workers"] is not None
    check_lifetimes(
        fleet,
        provision_s=settings["provision_s"],
        initial=settings["workers"] if fixed else settings["initial_workers"],
        most=None if fixed else settings["max_workers"],  # the bound is one on growth
        findings=findings,
    )
    floor = max(profile["denoise_steps_floor"], settings["steps_floor"] or 0)
    rules.batches(run, trace, fleet, profile, floor, findings)

    first_chunk, gone_s = _lives(run, trace)
    least_s = {"migrate": profile["migrate_s"], "suspend": profile["offload_s"], "resume": profile["resume_s"]}
    where = rebuild(run.decisions, fleet, first_chunk, gone_s, least_s, findings)
    rules.places_of_chunks(run, trace, where, findings)
    rules.transfers_at_once(where, findings)
    rules.memory(where, fleet, profile["resident_max"], findings)

    recomputed = figures.recompute(
        run, trace, fleet, where, profile, pace=settings["pace"], warmup_s=settings["warmup_s"]
    )
    if run.report is not None:
        figures.check_report(run.report, recomputed, findings)
    return {
        "violations": findings.shown,
        "violation_counts": findings.counts,
        "recomputed": recomputed,
        "settings": settings,
    }


def _settings(flags: dict, report: dict | None, profile: dict) -> dict:
    said = (report or {}).get("settings", {})
    defaults = DEFAULTS | {"provision_s": profile.get("provision_s", 0.0)}
    settings = {}
    for name, default in defaults.items():
        value, source = flags.get(name), f"--{name.replace('_', '-')}"
        if value is None:
            key = SAID_AS.get(name, name)
            value, source = said.get(key, default), f"settings.{key} of report.json"
        if name in WORDS:
            good, expected = value in WORDS[name], " | ".join(WORDS[name])
        else:
            good = (is_number(value) and value >= 0) or (value is None and name in MAY_BE_NONE)
            expected = "a number of at least 0"
        if not good:
            raise ConfigError(f"{source} is {value!r}", expected=expected, hint="give the flag that the run was given")
        settings[name] = value
    return settings


def _only(run: Run, valid: np.ndarray, trace: TracePeriods) -> Run:
    """The run without chunk and shed rows that name no chunk of the trace (already reported)."""
    periods = np.diff(trace.first_period)

    def known(table: dict[str, np.ndarray]) -> np.ndarray:
        session, period = table["session_id"], table["period"]
        return (session >= 0) & (period >= 0) & (period < (periods[session] if periods.size else 0))

    keep, keep_shed = valid & known(run.chunks), known(run.shed)
    return Run(
        chunks={name: column[keep] for name, column in run.chunks.items()},
        shed={name: column[keep_shed] for name, column in run.shed.items()},
        decisions=run.decisions,
        report=run.report,
        worker_names=run.worker_names,
    )


def _lives(run: Run, trace: TracePeriods) -> tuple[dict[str, tuple[float, str]], dict[str, float]]:
    """Per session: its first batch's (start, worker), and when it is over (departed and last chunk done)."""
    names = trace.names
    chunks = run.chunks
    done = np.where(trace.depart_s < math.inf, trace.depart_s, math.inf)
    for table, column in ((chunks, "finish_s"), (run.shed, "time_s")):
        np.maximum.at(done, table["session_id"], table[column])
    order = np.lexsort((chunks["start_s"], chunks["session_id"]))
    session, first = np.unique(chunks["session_id"][order], return_index=True)
    rows = order[first]
    first_chunk = {
        names[code]: (float(chunks["start_s"][row]), run.worker_names[chunks["worker"][row]])
        for code, row in zip(session.tolist(), rows.tolist(), strict=True)
    }
    return first_chunk, dict(zip(names, done.tolist(), strict=True))
