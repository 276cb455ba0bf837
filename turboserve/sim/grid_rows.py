"""The rows that a grid has so far, and whether they were made from the files that are there today.

A row names its trace and its profile by file name and by digest: where a file has changed since, the case is run again
and the newer row counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turboserve.errors import ConfigError, TraceError
from turboserve.sim.cases import Case, profile_name, trace_name
from turboserve.sim.profile_files import load_profile, profile_file

DIGEST_DIGITS = 16


def digests_of(case: Case) -> dict[str, str]:
    """What a row says of the contents of its files: the first 16 digits of their SHA-256."""
    try:
        trace = Path(case.trace).read_bytes()
    except OSError as e:
        raise TraceError(f"{case.trace}: cannot read the trace ({e})", expected="gzip CSV") from e
    try:
        profile = profile_file(case.profile).read_bytes()
    except OSError as e:
        raise ConfigError(f"{case.profile}: cannot read the latency profile ({e})") from e
    return {
        "trace_sha256": hashlib.sha256(trace).hexdigest()[:DIGEST_DIGITS],
        "profile_sha256": hashlib.sha256(profile).hexdigest()[:DIGEST_DIGITS],
    }


@dataclass(frozen=True, slots=True)
class Contents:
    """Digests of the files that a grid's cases name today."""

    of_case: dict[str, dict[str, str]]
    """By the case's key: the fields of `digests_of`."""
    traces: dict[str, str]
    """By the name that rows carry, as are the profiles'."""
    profiles: dict[str, str]

    def fits(self, row: dict[str, Any]) -> bool:
        """Whether the row of one of the cases was made from these files."""
        return all(row.get(field) == digest for field, digest in self.of_case[row["key"]].items())


def contents_of(cases: Iterable[Case]) -> Contents:
    """Look at every file once; two that differ but have one name are an error: their rows could not be told apart."""
    of_files: dict[tuple[str, str], dict[str, str]] = {}
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    of_case, traces, profiles = {}, {}, {}

    def note(what: str, name: str, path: str, digest: str, hint: str) -> None:
        first, known = seen.setdefault((what, name), (path, digest))
        if known != digest:
            raise ConfigError(
                f"two different {what}s are called {name}: {first} and {path}", expected="a name for each", hint=hint
            )

    for case in cases:
        files = case.trace, case.profile
        if files not in of_files:
            of_files[files] = found = digests_of(case)
            trace, profile = found.values()
            called = load_profile(case.profile).name
            note("trace", trace_name(case.trace), case.trace, trace, "rename one of the files, or compare them apart")
            note("profile", profile_name(case.profile), case.profile, profile, "rename one of the files")
            note("profile", called, case.profile, profile, 'give each a "name" of its own in its file')
            traces[trace_name(case.trace)] = trace
            profiles[called] = profile
        of_case[case.key] = of_files[files]
    return Contents(of_case, traces, profiles)


def read_rows(path: Path, today: Contents | None = None) -> list[dict[str, Any]]:
    """Rows of a grid so far, of each case the newest; none when there is no file. A last line cut short by an
    interruption is left out.

    So are rows of a trace or profile that has changed under its name since: `today` (else the newest row of that name)
    says which one counts. Figures of different files never stand side by side.
    """
    if not path.exists():
        return []
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            found.pop(row["key"], None)
            found[row["key"]] = row
        except (ValueError, TypeError, KeyError):
            continue
    rows = list(found.values())
    traces: dict[Any, Any] = {row.get("trace"): row.get("trace_sha256") for row in rows}
    profiles: dict[Any, Any] = {row.get("profile"): row.get("profile_sha256") for row in rows}
    if today is not None:
        traces |= today.traces
        profiles |= today.profiles
    return [
        row
        for row in rows
        if row.get("trace_sha256") == traces[row.get("trace")]
        and row.get("profile_sha256") == profiles[row.get("profile")]
    ]
