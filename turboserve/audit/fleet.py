"""Workers: when each was asked for, ready and gone; the rules about that."""

from __future__ import annotations

import math
from dataclasses import dataclass

from turboserve.audit.findings import TOLERANCE_S, Findings


@dataclass
class Lifetime:
    """One worker's times; inf where the run has no such event."""

    request_s: float = math.inf
    ready_s: float = math.inf
    release_s: float = math.inf
    lost_s: float = math.inf

    @property
    def gone_s(self) -> float:
        """Released or lost, whichever came first."""
        return min(self.release_s, self.lost_s)


FIELD_OF_EVENT = {
    "worker_request": "request_s",
    "worker_ready": "ready_s",
    "worker_release": "release_s",
    "worker_lost": "lost_s",
}


def lifetimes(decisions: list[dict], findings: Findings) -> dict[str, Lifetime]:
    """Collect the four times of every worker; each may happen once."""
    fleet: dict[str, Lifetime] = {}
    for line in decisions:
        name = FIELD_OF_EVENT.get(line["event"])
        if name is None:
            continue
        if line.get("worker") is None:
            findings.add("worker_lifetime", f"{line['event']} names no worker", time_s=line["time_s"])
            continue
        worker = str(line["worker"])
        life = fleet.setdefault(worker, Lifetime())
        if getattr(life, name) != math.inf:
            findings.add("worker_lifetime", f"second {line['event']} of {worker}", time_s=line["time_s"], worker=worker)
            continue
        setattr(life, name, line["time_s"])
    return fleet


def check_lifetimes(
    fleet: dict[str, Lifetime], *, provision_s: float, initial: int, most: int | None, findings: Findings
) -> None:
    """`ready - request >= provision_s`, but for `initial` workers that are there from time 0.

    `most`: the bound --max-workers on workers billed at once, where the run was given one.
    """
    from_start = 0
    for worker, life in fleet.items():
        where = {"worker": worker}
        if life.request_s == math.inf:
            findings.add("worker_lifetime", f"{worker} is ready or gone but was never requested", **where)
            continue
        if life.gone_s < life.request_s - TOLERANCE_S:
            findings.add("worker_lifetime", f"{worker} is gone before its request", **where)
        if life.ready_s == math.inf:
            continue
        if life.ready_s > life.gone_s + TOLERANCE_S:
            findings.add("worker_lifetime", f"{worker} becomes ready after it is gone", **where)
        if life.ready_s <= TOLERANCE_S and from_start < initial:
            from_start += 1
        elif life.ready_s - life.request_s < provision_s - TOLERANCE_S:
            findings.add(
                "provision",
                f"{worker} is ready {life.ready_s - life.request_s:.6f} s after its request; "
                f"provisioning takes {provision_s} s",
                time_s=life.ready_s,
                **where,
            )
    if most is not None:
        changes = sorted(
            [(life.request_s, 1) for life in fleet.values() if life.request_s < math.inf]
            + [(life.gone_s, -1) for life in fleet.values() if life.gone_s < math.inf]
        )
        billed = 0
        for time_s, change in changes:
            billed += change
            if billed > most:
                findings.add("max_workers", f"{billed} workers billed at once, at most {most}", time_s=time_s)
                break
