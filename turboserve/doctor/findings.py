"""What one check found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    OK = "ok"
    WARNING = "warning"  # works, with something to know
    FAILED = "failed"  # serving as asked will not work
    SKIPPED = "skipped"  # does not apply here


@dataclass(frozen=True, slots=True)
class Finding:
    """`found` says what is there; what is wrong comes with what was `expected` and the command that would `mend` it."""

    name: str
    status: Status
    found: str
    expected: str = ""
    mend: str = ""


def ok(name: str, found: str) -> Finding:
    return Finding(name, Status.OK, found)


def skipped(name: str, why: str) -> Finding:
    return Finding(name, Status.SKIPPED, why)


def failed(name: str, found: str, expected: str, mend: str) -> Finding:
    return Finding(name, Status.FAILED, found, expected, mend)


def warning(name: str, found: str, expected: str, mend: str) -> Finding:
    return Finding(name, Status.WARNING, found, expected, mend)
