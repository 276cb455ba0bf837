"""What an audit found: a list that says which rule was broken, where, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

TOLERANCE_S = 2e-6
"""Times in the files have 6 decimals: two roundings of half a microsecond, twice."""

SHOWN_PER_RULE = 20


@dataclass
class Findings:
    """Violations, the first few of every rule in full and all of them counted."""

    shown: list[dict] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, rule: str, message: str, **where: object) -> None:
        """Record one violation of `rule`; `where` names the time, worker, session or chunk."""
        self.counts[rule] = self.counts.get(rule, 0) + 1
        if self.counts[rule] <= SHOWN_PER_RULE:
            self.shown.append({"rule": rule, "message": message} | {k: _plain(v) for k, v in where.items()})

    def add_rows(self, rule: str, rows: np.ndarray, describe) -> None:
        """Record one violation for every row index; `describe(row)` gives (message, where) of those shown."""
        before = self.counts.get(rule, 0)
        for row in rows[: max(0, SHOWN_PER_RULE - before)].tolist():
            message, where = describe(row)
            self.add(rule, message, **where)
        hidden = len(rows) - (self.counts.get(rule, 0) - before)
        if hidden > 0:
            self.counts[rule] = self.counts.get(rule, 0) + hidden

    def __bool__(self) -> bool:
        return bool(self.counts)


def _plain(value: object) -> object:
    """A numpy scalar as the Python value that JSON knows."""
    return value.item() if isinstance(value, np.generic) else value
