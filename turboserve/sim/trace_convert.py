"""Traces to and from the event schema of the released TurboServe code.

Root object {config, events}; an event is {time_s, sequence, event_type, session_id, user_id?, payload}.
Types: session_arrival (payload.active, true when left out), user_active, user_idle, session_departure. That
schema has no chunk counts: they are taken from `payload.chunks` where we wrote them, else from the time
until the period's end (one chunk a second of video).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from turboserve.errors import TraceError
from turboserve.sim.events import US
from turboserve.sim.trace import (
    ACTIVE,
    ARRIVE,
    CHUNKS_MAX,
    DEPART,
    IDLE,
    NAME_RULE,
    TIME_HINT,
    TIME_MAX_S,
    TIME_RULE,
    Trace,
    check_total,
    is_name,
    shown,
)

EVENT_TYPES = ("session_arrival", "user_active", "user_idle", "session_departure")
SEQUENCE_MAX = 2**53
"""Largest whole number up to which a float orders exactly."""
CODE_OF = dict(zip(EVENT_TYPES, (ARRIVE, ACTIVE, IDLE, DEPART), strict=True))


def to_events(trace: Trace) -> dict[str, Any]:
    """The trace as the released schema's root object."""
    first_active = _active_at_arrival(trace)
    events: list[dict[str, Any]] = []
    for row in range(trace.time_us.size):
        kind, session = int(trace.event[row]), int(trace.session[row])
        payload: dict[str, Any] = {}
        if kind == ACTIVE:
            if first_active.get(session) == row:
                continue  # said by the arrival
            payload["chunks"] = int(trace.chunks[row])
        elif kind == ARRIVE:
            payload["active"] = session in first_active
            if session in first_active:
                payload["chunks"] = int(trace.chunks[first_active[session]])
            if len(trace.tenants) > 1:
                payload["tenant"] = trace.tenants[int(trace.tenant[session])]
        events.append(
            {
                "time_s": int(trace.time_us[row]) / US,
                "sequence": len(events),
                "event_type": EVENT_TYPES[(ARRIVE, ACTIVE, IDLE, DEPART).index(kind)],
                "session_id": trace.session_ids[session],
                "payload": payload,
            }
        )
    return {"config": {"name": trace.name, "duration_s": trace.horizon_us / US}, "events": events}


def from_events(document: Any, name: str) -> Trace:
    """A trace from the released schema; `name` stands in errors and becomes the trace's."""
    if not isinstance(document, dict) or not isinstance(document.get("events"), list):
        raise TraceError(f"{name}: no list of events at the root", expected='{"config": {...}, "events": [...]}')
    ordered = sorted(enumerate(document["events"]), key=lambda pair: _order(pair, name))
    ids: dict[str, int] = {}
    tenants: dict[str, int] = {}
    tenant_of: list[int] = []
    state: list[int] = []  # last event of each session
    open_row: dict[int, tuple[int, bool]] = {}  # session -> (row of its running period, count to be found out)
    rows: list[list[int]] = []  # time, session, event, chunks

    def bad(number: int, message: str) -> TraceError:
        return TraceError(
            f"{name}: event {number}: {message}",
            expected="session_arrival, then user_active and user_idle in turn, then session_departure",
        )

    def begin(number: int, session: int, time_us: int, payload: dict[str, Any]) -> None:
        chunks = payload.get("chunks")
        if chunks is not None and (not isinstance(chunks, int) or not 1 <= chunks <= CHUNKS_MAX):
            raise bad(number, f"payload.chunks is {shown(chunks)}, not a count from 1 to {CHUNKS_MAX}")
        open_row[session] = (len(rows), chunks is None)
        rows.append([time_us, session, ACTIVE, chunks or 1])

    def end(session: int, time_us: int) -> None:
        row, unknown = open_row.pop(session)
        if unknown:
            rows[row][3] = max(1, math.ceil((time_us - rows[row][0]) / US - 1e-9))

    for number, event in ordered:
        time_us, kind = round(event["time_s"] * 1000) * (US // 1000), CODE_OF[event["event_type"]]
        payload = event.get("payload") or {}
        session_id = str(event["session_id"])
        if kind == ARRIVE:
            if session_id in ids:
                raise bad(number, f"session {session_id} arrives twice")
            session = ids[session_id] = len(ids)
            tenant = payload.get("tenant", "default")
            if not _is_name(tenant):
                raise TraceError(f"{name}: event {number}: payload.tenant is {shown(tenant)}", expected=NAME_RULE)
            tenant_of.append(tenants.setdefault(str(tenant), len(tenants)))
            state.append(ARRIVE)
            rows.append([time_us, session, ARRIVE, 0])
            if payload.get("active", True):
                begin(number, session, time_us, payload)
                state[session] = ACTIVE
            continue
        if session_id not in ids or state[ids[session_id]] == DEPART:
            raise bad(number, f"{event['event_type']} of session {session_id}, which is not open")
        session = ids[session_id]
        if kind == ACTIVE:
            if state[session] == ACTIVE:
                raise bad(number, f"session {session_id} is active already")
            begin(number, session, time_us, payload)
        else:
            if kind == IDLE and state[session] != ACTIVE:
                raise bad(number, f"session {session_id} is idle already")
            if state[session] == ACTIVE:
                end(session, time_us)
            rows.append([time_us, session, kind, 0])
        state[session] = kind
    last_us = rows[-1][0] if rows else 0
    for session in list(open_row):
        end(session, last_us)
    for session, kind in enumerate(state):
        if kind != DEPART:  # open when the recording stops: closed there
            rows.append([last_us, session, DEPART, 0])
    check_total(sum(row[3] for row in rows), name)
    columns = np.array(rows, np.int64).reshape(-1, 4)
    return Trace(
        name=name,
        time_us=columns[:, 0],
        session=columns[:, 1],
        event=columns[:, 2].astype(np.int8),
        chunks=columns[:, 3],
        session_ids=tuple(ids),
        tenant=np.array(tenant_of, np.int64),
        tenants=tuple(tenants) or ("default",),
    )


def read_events(path: Path) -> Trace:
    """A JSON file in the released schema."""
    try:
        document = json.loads(path.read_text("utf-8-sig"))
    except OSError as e:
        raise TraceError(f"{path}: cannot read the events ({e})", expected="a JSON file") from e
    except RecursionError as e:
        raise TraceError(f"{path} is nested too deeply", expected="the released event schema (traces/README.md)") from e
    except ValueError as e:
        raise TraceError(f"{path} is not JSON: {e}", expected="the released event schema (traces/README.md)") from e
    return from_events(document, path.name.removesuffix(".json"))


def _order(pair: tuple[int, Any], name: str) -> tuple[float, float]:
    number, event = pair
    if not isinstance(event, dict):
        raise TraceError(f"{name}: event {number} is no object", expected="time_s, event_type, session_id, payload")
    missing = [key for key in ("time_s", "event_type", "session_id") if key not in event]
    if missing:
        raise TraceError(
            f"{name}: event {number} lacks {', '.join(missing)}", expected="time_s, event_type, session_id"
        )
    kind, time_s, sequence = event["event_type"], event["time_s"], event.get("sequence", number)
    where = f"{name}: event {number}"
    if not isinstance(kind, str) or kind not in CODE_OF:
        raise TraceError(f"{where} has type {shown(kind)}", expected=" | ".join(EVENT_TYPES))
    if not _is_number(time_s) or not 0 <= time_s <= TIME_MAX_S:  # not a number compares false
        late = _is_number(time_s) and time_s > TIME_MAX_S
        raise TraceError(f"{where} has time_s {shown(time_s)}", expected=TIME_RULE, hint=TIME_HINT if late else None)
    if not _is_number(sequence) or not abs(sequence) <= SEQUENCE_MAX:
        raise TraceError(f"{where} has sequence {shown(sequence)}", expected="a number, or none for file order")
    if not _is_name(event["session_id"]):
        raise TraceError(f"{where} has session_id {shown(event['session_id'])}", expected=NAME_RULE)
    if not isinstance(event.get("payload"), dict | None):
        raise TraceError(
            f"{where} has payload {shown(event['payload'])}", expected='an object, as {"active": true, "chunks": 30}'
        )
    return float(time_s), float(sequence)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_name(value: Any) -> bool:
    """A session or tenant may be a text or a whole number."""
    return isinstance(value, str | int) and not isinstance(value, bool) and is_name(str(value))


def _active_at_arrival(trace: Trace) -> dict[int, int]:
    """Sessions whose first period begins as they arrive -> row of that `active`."""
    found: dict[int, int] = {}
    arrived: dict[int, int] = {}
    for row in range(trace.time_us.size):
        session, kind = int(trace.session[row]), int(trace.event[row])
        if kind == ARRIVE:
            arrived[session] = int(trace.time_us[row])
        elif kind == ACTIVE and arrived.pop(session, None) == int(trace.time_us[row]):
            found[session] = row
        else:
            arrived.pop(session, None)
    return found
