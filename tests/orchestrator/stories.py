"""Scheduler stories: a text of cluster lines and ticks in, the same text with the plans filled in out.

    profile k4 resident_max=4 provision_s=30      # changes to the profile named
    fleet min=2 max=2 floor=2                     # omit for a scaling fleet of 1..100
    worker w0 node=0 holds=a,b*,c*                # * = active; state=starting|draining
    session d* tenant=1 deadline=12.5             # open, on no worker; `host` = suspended
    slack a=0.4                                   # seconds from the last tick to its next deadline
    when b=190                                    # idle since
    moved a=9.5                                   # end of its last transfer
    idle a b        active c                      # activity changes
    tenants 1 1     off slack brownout            # tenant weights; switches of TickConfig
    carry                                         # carry the last plan out: moves are over at once
    tick now_s=10
    > migrate c  w0 -> w1  reason

Lines that begin with > are the answer and are renewed by --rewrite.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from turboserve.orchestrator import plan as p
from turboserve.orchestrator.latency import LatencyProfile
from turboserve.orchestrator.scheduler import Memory, TickConfig, tick
from turboserve.orchestrator.view import (
    ABSENT,
    DRAINING,
    HELD,
    HOST,
    NOWHERE,
    READY,
    STARTING,
    ClusterView,
    add_session,
    add_worker,
    make_view,
)

K4 = LatencyProfile(
    name="k4",
    chunk_s=1.0,
    chunk_target_s=1.0,
    batch_latency_s=tuple(round(0.4 + 0.2 * n, 1) for n in range(16)),
    capacity=4,
    resident_max=24,
    denoise_steps=4,
    denoise_steps_floor=2,
    step_latency_share=0.8,
    state_bytes=3.62e9,
    offload_s=0.075,
    resume_s=0.075,
    migrate_s=0.03,
    migrate_cross_node_s=0.12,
    provision_s=30.0,
)
_STATES = {"ready": READY, "starting": STARTING, "draining": DRAINING}


class Story:
    def __init__(self) -> None:
        self.profile = K4
        self.fleet = {"min": 1, "max": 100, "floor": 0}
        self.view: ClusterView | None = None
        self.memory = Memory()
        self.config = TickConfig()
        self.sessions: dict[str, int] = {}
        self.workers: dict[str, int] = {}
        self.plan = p.Plan()
        self.now_s = 0.0

    def run(self, text: str) -> str:
        out: list[str] = []
        for line in text.splitlines():
            if line.startswith(">"):
                continue
            out.append(line)
            words = line.split("#")[0].split()
            if words:
                out += getattr(self, f"_{words[0]}")(*words[1:]) or []
        return "\n".join(out) + "\n"

    def _ensure(self) -> ClusterView:
        if self.view is None:
            self.view = make_view(
                (self.profile,),
                workers_min=int(self.fleet["min"]),
                workers_max=int(self.fleet["max"]),
                steps_floor=int(self.fleet["floor"]) or None,
            )
        return self.view

    def _profile(self, _name: str, *pairs: str) -> None:
        values = dict(pair.split("=") for pair in pairs)
        kinds = {f.name: type(getattr(K4, f.name)) for f in dataclasses.fields(K4)}
        self.profile = dataclasses.replace(K4, **{k: kinds[k](v) for k, v in values.items()})

    def _fleet(self, *pairs: str) -> None:
        self.fleet |= {k: int(v) for k, v in (pair.split("=") for pair in pairs)}

    def _tenants(self, *weights: str) -> None:
        self._ensure().tenant_weights = tuple(float(x) for x in weights)

    def _off(self, *switches: str) -> None:
        self.config = dataclasses.replace(self.config, **dict.fromkeys(switches, False))

    def _worker(self, name: str, *pairs: str) -> None:
        view = self._ensure()
        words = dict(pair.split("=") for pair in pairs)
        row = add_worker(
            view,
            name,
            state=_STATES[words.get("state", "ready")],
            request_s=0.0,
            ready_at_s=float(words.get("ready_at", 0)),
            node=int(words.get("node", 0)),
            unit=int(words["unit"]) if "unit" in words else None,
        )
        self.workers[name] = row
        for entry in filter(None, words.get("holds", "").split(",")):
            self._open(entry, HELD, row, {})

    def _session(self, entry: str, *words: str) -> None:
        pairs = dict(w.split("=") for w in words if "=" in w)
        self._open(entry, HOST if "host" in words else 1, NOWHERE, pairs)

    def _open(self, entry: str, state: int, worker: int, pairs: dict[str, str]) -> None:
        view = self._ensure()
        name, _, load = entry.rstrip("*").partition(":")
        row = add_session(
            view, name, now_s=self.now_s - 100, tenant=int(pairs.get("tenant", 0)), load=float(load or 1.0)
        )
        s = view.sessions
        s.state[row], s.worker[row], s.active[row] = state, worker, entry.endswith("*")
        s.next_deadline_s[row] = float(pairs.get("deadline", 1e6)) if s.active[row] else np.inf
        if "idle_since" in pairs:
            s.idle_since_s[row] = float(pairs["idle_since"])
        self.sessions[name] = row

    def _idle(self, *names: str) -> None:
        for name in names:
            self._ensure().sessions.active[self.sessions[name]] = False

    def _active(self, *names: str) -> None:
        for name in names:
            self._ensure().sessions.active[self.sessions[name]] = True

    def _slack(self, *pairs: str) -> None:
        for name, seconds in (pair.split("=") for pair in pairs):
            self._ensure().sessions.next_deadline_s[self.sessions[name]] = self.now_s + float(seconds)

    def _when(self, *pairs: str) -> None:
        for name, at_s in (pair.split("=") for pair in pairs):
            self._ensure().sessions.idle_since_s[self.sessions[name]] = float(at_s)

    def _moved(self, *pairs: str) -> None:
        for name, at_s in (pair.split("=") for pair in pairs):
            self._ensure().sessions.moved_s[self.sessions[name]] = float(at_s)

    def _carry(self) -> None:
        """Everything of the last plan is over: moves have arrived, new workers are ready."""
        view = self._ensure()
        s, w = view.sessions, view.workers
        for a in self.plan.actions:
            if isinstance(a, p.Place | p.Migrate | p.Resume):
                s.state[self.sessions[a.session]] = HELD
                s.worker[self.sessions[a.session]] = self.workers[a.worker]
            elif isinstance(a, p.Suspend):
                s.state[self.sessions[a.session]] = HOST
                s.worker[self.sessions[a.session]] = NOWHERE
            elif isinstance(a, p.SetSteps):
                s.steps[self.sessions[a.session]] = a.steps
            elif isinstance(a, p.DrainWorker):
                w.state[self.workers[a.worker]] = DRAINING
            elif isinstance(a, p.UndrainWorker):
                w.state[self.workers[a.worker]] = READY
            elif isinstance(a, p.ReleaseWorker):
                w.state[self.workers[a.worker]] = ABSENT
            elif isinstance(a, p.AddWorker):
                for _ in range(a.count):
                    name = f"n{len(self.workers)}"
                    self.workers[name] = add_worker(
                        view, name, state=READY, request_s=self.now_s, ready_at_s=self.now_s
                    )

    def _tick(self, *pairs: str) -> list[str]:
        self.now_s = float(dict(pair.split("=") for pair in pairs)["now_s"])
        self.plan, self.memory = tick(self._ensure(), self.memory, self.now_s, self.config)
        return [f"> {said(a)}" for a in self.plan.actions] or ["> nothing"]


def said(a: p.Action) -> str:
    """One action as a line."""
    if isinstance(a, p.Migrate):
        return f"migrate {a.session}  {a.source} -> {a.worker}  {a.reason}"
    if isinstance(a, p.Place | p.Resume):
        return f"{type(a).__name__.lower()} {a.session} on {a.worker}  {a.reason}"
    if isinstance(a, p.Suspend):
        return f"suspend {a.session} from {a.worker}  {a.reason}"
    if isinstance(a, p.AddWorker):
        return f"add {a.count}  {a.reason}"
    if isinstance(a, p.DrainWorker | p.UndrainWorker | p.ReleaseWorker):
        return f"{type(a).__name__.removesuffix('Worker').lower()} {a.worker}  {a.reason}"
    if isinstance(a, p.SetSteps):
        return f"steps {a.session} {a.steps}  {a.reason}"
    return f"{type(a).__name__.lower()} {a.session}  {a.reason}"
