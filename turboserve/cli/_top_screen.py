"""What `turboserve top` draws: one screen from one look at the server. No clock, no I/O: tests can read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from turboserve.cli._server import bar, sparkline

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

NARROW = 72
"""Columns below which only the most needed is shown."""
SIGNS = {"ready": "●", "starting": "◐", "draining": "◑", "lost": "✕"}
COLOURS = {"ready": "green", "starting": "yellow", "draining": "yellow", "lost": "red"}
STATE_MARKS = {"active": "", "idle": "·", "suspended": "z", "migrating": "→", "recovering": "!", "queued": "?"}


@dataclass(slots=True)
class Look:
    """One look at a server: its answers, or what went wrong since the last good one."""

    url: str
    cluster: dict[str, Any] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)
    age_s: float = 0.0
    trouble: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"url": self.url, "cluster": self.cluster, "history": self.history}


def screen(look: Look, width: int, height: int) -> RenderableType:
    """Everything that fits into `width` x `height` cells, the most needed first."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_head(look, width)]
    if look.trouble:
        parts.append(Text(f"✕ {look.trouble}; trying again", "bold red"))
    if look.cluster:
        lines = [*_figures(look, width), Text(""), *_workers(look, width), *_shelf(look, width)]
        parts += lines
        room = height - len(parts) - 3
        if room > 0:
            parts += [Text(""), *_decisions(look, width, room)]
    parts.append(Text("q quits", "dim"))
    return Group(*parts)


def _head(look: Look, width: int) -> Text:
    from rich.text import Text

    if look.trouble:
        state = Text(f"figures are {look.age_s:.0f} s old" if look.cluster else "no answer yet", "red")
    else:
        state = Text("live", "green")
    return _cut(Text.assemble(("TurboServe ", "bold"), look.url, "  ", state), width)


def _cut(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    text.no_wrap = True
    return text


def _share(value: float | None) -> str:
    # Never round a miss up to a perfect score.
    return "-" if value is None else "100 %" if value >= 1 else f"{min(99.99, 100 * value):.2f} %"


def _figures(look: Look, width: int) -> list[Text]:
    from rich.text import Text

    cluster, totals = look.cluster, look.cluster.get("totals") or {}
    states = cluster.get("sessions") or {}
    shown = [f"{count} {name}" for name, count in states.items() if count and name not in ("closed", "failed")]
    failed = states.get("failed", 0)
    bad = (f"{failed} failed, ", "red") if failed else ""
    lines = [Text.assemble("sessions  ", bad, ", ".join(shown) or "none")]
    on_time = Text.assemble("on time   ", (_share(totals.get("on_time_share_1m")), "bold"), " in the last minute")
    if width >= NARROW:
        on_time.append(f", {_share(totals.get('on_time_share'))} of {totals.get('live_chunks', 0)} live chunks")
    lines.append(on_time)
    cells = max(10, min(60, width - 34))
    latency = list(look.history.get("latency_p95_ms") or [])[-cells:]
    if latency:
        known = [value for value in latency if value is not None]
        newest, most = (known[-1], max(known)) if known else (0.0, 0.0)
        lines.append(Text(f"p95 ms    {sparkline(latency):>{cells}}  {newest:.0f}, highest {most:.0f}"))
    late = list(look.history.get("late") or [])[-cells:]
    if any(late):
        lines.append(Text(f"late      {sparkline(late):>{cells}}  {sum(late)} chunks", "yellow"))
    return [_cut(line, width) for line in lines]


def _workers(look: Look, width: int) -> list[Text]:
    from rich.text import Text

    lines = []
    sessions = look.cluster.get("session_list") or []
    for one in look.cluster.get("workers") or []:
        state = str(one.get("state", "?"))
        active, capacity = one.get("active", 0), one.get("capacity", 0)
        line = Text.assemble(
            (f"{SIGNS.get(state, '?')} ", COLOURS.get(state, "")),
            f"{one.get('id', '?'):<5}",
            (f"{state:<9}", COLOURS.get(state, "")),
            f"{active:>2} of {capacity:<2} ",
            (f"{bar(active / capacity if capacity else 0, 8):<8}", "red" if active > capacity else "green"),
        )
        if width >= NARROW:
            line.append(
                f" busy {100 * one.get('busy_share', 0):>3.0f} %  chunk {one.get('chunk_latency_ms', 0):>4.0f} ms "
            )
        mine = [row for row in sessions if row.get("worker") == one.get("id")]
        line.append(f" {len(mine)} held: ", "dim")
        line.append(" ".join(_chip(row) for row in mine))
        lines.append(_cut(line, width))
    return lines or [Text("no worker is up", "red")]


def _chip(row: dict[str, Any]) -> str:
    return f"{row['id'][:4]}{STATE_MARKS.get(str(row.get('state')), '')}"


def _shelf(look: Look, width: int) -> list[Text]:
    from rich.text import Text

    lines = []
    sessions = look.cluster.get("session_list") or []
    for name, rows in (
        ("host", [row for row in sessions if row.get("tier") == "host"]),
        ("disk", [row for row in sessions if row.get("tier") == "disk"]),
        ("queue", [row for row in sessions if row.get("state") == "queued"]),
    ):
        if rows:
            lines.append(_cut(Text(f"  {name:<5}{len(rows):>3}: " + " ".join(row["id"][:4] for row in rows)), width))
    return lines


def _decisions(look: Look, width: int, room: int) -> list[Text]:
    from rich.text import Text

    now_s = (look.cluster.get("clock") or {}).get("time_s")
    lines = []
    for one in reversed((look.cluster.get("decisions") or [])[-room:]):
        ago = f"{max(0.0, now_s - one['time_s']):>5.0f} s" if now_s is not None and "time_s" in one else ""
        where = " → ".join(str(one[key]) for key in ("source", "worker") if one.get(key))
        session = str(one.get("session", ""))[:4]
        line = Text.assemble((f"{ago}  ", "dim"), (f"{one.get('event', ''):<13} ", "bold"), f"{session:<4} {where:<8} ")
        line.append(str(one.get("reason", "")))
        lines.append(_cut(line, width))
    return lines
