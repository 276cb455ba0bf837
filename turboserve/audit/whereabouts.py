"""Where every session's state was at every moment, rebuilt from the decision log.

A session's state comes to be on the worker it is placed on; after that only a migrate, a suspend with a later
resume, or the loss of its worker with a later resume brings it elsewhere. From that story follow the stays
(intervals in which a worker may run the session), the transfers, and the holds (intervals in which a worker's
memory counts the session: during a transfer both ends do).
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from turboserve.audit.findings import TOLERANCE_S, Findings
from turboserve.audit.fleet import Lifetime

TRANSFERS = ("migrate", "suspend", "resume")


@dataclass
class Whereabouts:
    """Intervals as (session, worker, from_s, to_s); a transfer is (event, session, source, target, from,
    to)."""

    stays: list[tuple[str, str, float, float]] = field(default_factory=list)
    holds: list[tuple[str, str, float, float]] = field(default_factory=list)
    transfers: list[tuple[str, str, str | None, str | None, float, float]] = field(default_factory=list)
    unplaced: set[str] = field(default_factory=set)
    """Sessions that the log never places: their first chunk says where they began."""


def rebuild(
    decisions: list[dict],
    fleet: dict[str, Lifetime],
    first_chunk: dict[str, tuple[float, str]],
    gone_s: dict[str, float],
    least_s: dict[str, float],
    findings: Findings,
) -> Whereabouts:
    """Follow every session through its decisions.

    `first_chunk`: per session (start, worker) of its first batch: from then on it has state to move.
    `gone_s`: when the session departed and its last chunk was done. `least_s`: least seconds of each
    transfer.
    """
    by_session: dict[str, list[dict]] = defaultdict(list)
    for line in decisions:
        if line["event"] in ("place", *TRANSFERS) and line.get("session") is not None:
            by_session[str(line["session"])].append(line)
    found = Whereabouts()
    for session, (start_s, worker) in first_chunk.items():
        if not any(line["event"] == "place" for line in by_session[session]):
            found.unplaced.add(session)
            by_session[session].append({"event": "place", "time_s": start_s, "worker": worker})
    for session, lines in by_session.items():
        story = _Story(session, found, fleet, gone_s.get(session, math.inf), findings)
        begins_s = first_chunk.get(session, (math.inf, ""))[0]
        for line in sorted(lines, key=lambda line: line["time_s"]):
            if line["event"] == "place":
                story.place(str(line.get("worker")), line["time_s"], has_state=begins_s < line["time_s"])
            else:
                story.transfer(line, least_s[line["event"]])
        story.end()
    return found


class _Story:
    """One session, decision by decision."""

    def __init__(
        self, session: str, found: Whereabouts, fleet: dict[str, Lifetime], gone_s: float, findings: Findings
    ) -> None:
        self.session = session
        self.found = found
        self.fleet = fleet
        self.gone_s = gone_s
        self.findings = findings
        self.worker: str | None = None
        self.on_host = False
        """Suspended, or its worker was lost: a resume may bring it back."""
        self.stay_from_s = 0.0
        self.hold_from_s = 0.0
        self.busy_until_s = -math.inf
        self.target_lost_s = -math.inf
        """When a transfer's target was lost last: from then on a resume is allowed in place of the source."""

    def place(self, worker: str, time_s: float, *, has_state: bool) -> None:
        self._lose_before(time_s)
        if worker == self.worker:
            return
        if has_state or (self.on_host and self.worker is None and time_s < self.busy_until_s - TOLERANCE_S):
            self._bad(
                "worker_change",
                f"placed on {worker} while its state is {self._where()}; that takes a migrate or a resume",
                time_s,
            )
        if self.worker is not None:
            self._leave(time_s, time_s)
        self.on_host = False
        self._enter(worker, time_s, time_s)

    def transfer(self, line: dict, least_s: float) -> None:
        event, from_s = line["event"], line["time_s"]
        to_s = float(line.get("end_s", from_s))
        source, target = _ends(line)
        self._lose_before(from_s)
        if to_s - from_s < least_s - TOLERANCE_S:
            self._bad("transfer_time", f"{event} takes {to_s - from_s:.6f} s; at least {least_s} s", from_s)
        if from_s < self.busy_until_s - TOLERANCE_S:
            self._bad("transfer_overlap", f"{event} begins while another transfer of it runs", from_s)
        if event == "resume":
            if self.worker is not None and self.target_lost_s > -math.inf:
                self._leave(self.target_lost_s, self.target_lost_s)
                self.on_host = True
            if self.worker is not None or not self.on_host:
                self._bad("worker_change", f"resume on {target} while its state is {self._where()}", from_s)
        elif source is None or source != self.worker:
            self._bad("worker_change", f"{event} from {source} while its state is {self._where()}", from_s)
        # A lost end cuts the transfer short. Without the source only the host copy is left. Without the
        # target the source may go on, or the session (held at both ends, so the lost worker's too) is
        # resumed.
        source_lost_s = self._lost_s(source)
        target_lost_s = self._lost_s(target)
        if target_lost_s < to_s and target_lost_s <= source_lost_s:
            self.found.transfers.append((event, self.session, source, target, from_s, target_lost_s))
            if target is not None:
                self.found.holds.append((self.session, target, from_s, min(target_lost_s, self.gone_s)))
            self.busy_until_s = self.target_lost_s = target_lost_s
            if self.worker is not None:
                self.found.stays.append((self.session, self.worker, self.stay_from_s, from_s))
                self.stay_from_s = target_lost_s
            return
        to_s = min(to_s, source_lost_s)
        self.found.transfers.append((event, self.session, source, target, from_s, to_s))
        self.busy_until_s = to_s
        if self.worker is not None:
            self._leave(from_s, to_s)
        if source_lost_s < float(line.get("end_s", from_s)) or event == "suspend":
            self.on_host = True
            if target is not None:
                self.found.holds.append((self.session, target, from_s, min(to_s, self.gone_s)))
        elif target is not None:
            self.on_host = False
            self._enter(target, from_s, to_s)

    def end(self) -> None:
        self._lose_before(math.inf)
        if self.worker is not None:
            self._leave(math.inf, math.inf)

    def _enter(self, worker: str, hold_from_s: float, stay_from_s: float) -> None:
        self.worker, self.hold_from_s, self.stay_from_s = worker, hold_from_s, stay_from_s
        self.target_lost_s = -math.inf

    def _leave(self, stay_to_s: float, hold_to_s: float) -> None:
        assert self.worker is not None
        self.found.stays.append((self.session, self.worker, self.stay_from_s, stay_to_s))
        self.found.holds.append((self.session, self.worker, self.hold_from_s, min(hold_to_s, self.gone_s)))
        self.worker = None

    def _lose_before(self, time_s: float) -> None:
        """Close the stay at the loss of its worker, if that came by now."""
        lost_s = self._lost_s(self.worker)
        if self.worker is not None and lost_s < math.inf and lost_s <= time_s:
            self._leave(lost_s, lost_s)
            self.on_host = True

    def _lost_s(self, worker: str | None) -> float:
        life = self.fleet.get(worker) if worker is not None else None
        return life.lost_s if life is not None else math.inf

    def _where(self) -> str:
        if self.worker is not None:
            return f"on {self.worker}"
        return "on the host" if self.on_host else "nowhere"

    def _bad(self, rule: str, message: str, time_s: float) -> None:
        self.findings.add(rule, f"session {self.session}: {message}", time_s=time_s, session=self.session)


def _ends(line: dict) -> tuple[str | None, str | None]:
    """(source, target) of a transfer; a suspend may name its worker as `source` or as `worker`."""
    worker = str(line["worker"]) if line.get("worker") is not None else None
    source = str(line["source"]) if line.get("source") is not None else None
    if line["event"] == "suspend":
        return source or worker, None
    return (None if line["event"] == "resume" else source), worker
