"""What schedules must have reached for a run to count: moves of the session table, and faults in the states they matter
in. A run of fewer than 1,000 schedules is not asked."""

from __future__ import annotations

from collections import Counter

MOVES = (
    *("queued -> loading", "loading -> running", "loading -> stalled", "loading -> queued", "loading -> recovering"),
    *("running -> stalled", "stalled -> running", "running -> offloading", "stalled -> offloading"),
    *("offloading -> host", "offloading -> recovering", "host -> resuming", "resuming -> running"),
    *("resuming -> host", "running -> precopy", "stalled -> precopy", "precopy -> handover", "precopy -> running"),
    *("precopy -> recovering", "handover -> running", "handover -> recovering", "running -> recovering"),
    *("stalled -> recovering", "recovering -> loading", "recovering -> host", "running -> closing"),
    *("stalled -> closing", "closing -> closed", "running -> failed", "recovering -> failed"),
    *("host -> spilling", "spilling -> disk", "disk -> resuming"),
)
FAULTS = (
    *("kill_worker", "kill_gateway", "kill_controller", "crash_directory", "stop_worker", "stop_controller"),
    *("cut", "partition", "arena_full"),
)
FORMATS = ("encoded chunk", "chunk in another format")
MOMENTS = (
    *("kill_in_chunk", "stopped before a chunk is sent", "a poison is quarantined"),
    *("a point went to another node", "a point went to another node ahead"),
)
STATES = ("loading", "running", "stalled", "offloading", "host", "resuming", "precopy", "handover", "recovering")
BRIEF = ("offloading", "resuming")
"""A few milliseconds long: half as often is asked of them."""
TEN_THOUSAND = 10_000


def missing(coverage: Counter[str], schedules: int, per_ten_thousand: int = 100) -> list[str]:
    """What was reached less often than it must be."""
    if schedules < 1000:
        return []
    least = max(1, per_ten_thousand * schedules // TEN_THOUSAND)
    wanted = dict.fromkeys((*MOVES, *FORMATS, *MOMENTS), least)
    for fault in FAULTS:
        wanted |= {f"{fault} x {state}": least // 2 if state in BRIEF else least for state in STATES}
    return [f"{name}: {coverage[name]} of {count}" for name, count in wanted.items() if coverage[name] < count]
