"""A tick's inputs and answer as bytes, and back: what `serve --record` writes and `simulate --from-recording` reads.

msgpack of plain values; nothing is unpickled. A recording is a header (how the ticks were configured, the profiles, the
memory before the first of them) and then one record a tick with the plan and with the view's columns, and the profiles
where a running fleet has measured anew, that changed since the record before. The memory of later ticks is not kept:
the replay carries its own on, so a plan that is equal speaks for the memory, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec
import numpy as np

from turboserve.errors import CorruptState
from turboserve.orchestrator import plan as plans
from turboserve.orchestrator.latency import LatencyProfile
from turboserve.orchestrator.plan import Action, Plan
from turboserve.orchestrator.scheduler import Memory, TickConfig
from turboserve.orchestrator.view import ClusterView, Observed, SessionColumns, WorkerColumns

FORMAT = 1
Columns: TypeAlias = dict[str, Any]
_ACTIONS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        plans.Place,
        plans.Migrate,
        plans.Suspend,
        plans.Resume,
        plans.AddWorker,
        plans.DrainWorker,
        plans.UndrainWorker,
        plans.ReleaseWorker,
        plans.SetSteps,
        plans.Queue,
        plans.Shed,
    )
}
_SCALARS = ("workers_max", "workers_min", "provision_s", "tenant_weights", "steps_floor")


def _encode_other(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "data": np.ascontiguousarray(value).tobytes()}
    if isinstance(value, (np.floating, np.integer, np.bool_)):
        return value.item()
    raise TypeError(f"a recording cannot hold a {type(value).__name__}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_other)
_decoder = msgspec.msgpack.Decoder()


def _array(value: Any) -> np.ndarray:
    """An array back from its bytes, writable. Only plain numbers and flags."""
    dtype = np.dtype(value["dtype"])
    if dtype.kind not in "fiub":
        raise CorruptState(f"a recording with an array of {dtype}", expected="numbers")
    return np.frombuffer(value["data"], dtype).copy()


def _rebuild(kind: type[Any], value: Any) -> Any:
    """A (nested, frozen) dataclass of ours from its fields; a field that this version does not know is left out."""
    if not isinstance(value, dict):
        raise CorruptState(f"a recording whose {kind.__name__} is no object")
    hints = {field.name: field for field in dataclasses.fields(kind)}
    found: dict[str, Any] = {}
    template = kind()
    for name, one in value.items():
        if name not in hints:
            continue
        now = getattr(template, name)
        if isinstance(now, np.ndarray):
            found[name] = _array(one)
        elif dataclasses.is_dataclass(now) and not isinstance(now, type):
            found[name] = _rebuild(type(now), one)
        elif isinstance(now, frozenset):
            found[name] = frozenset(one)
        elif isinstance(now, tuple):
            found[name] = tuple(tuple(inner) if isinstance(inner, list) else inner for inner in one)
        else:
            found[name] = one
    return kind(**found)


def _fields(value: Any) -> dict[str, Any]:
    """A dataclass as plain values, arrays and nested ones kept for the encoder."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        one = getattr(value, field.name)
        if dataclasses.is_dataclass(one) and not isinstance(one, type):
            one = _fields(one)
        elif isinstance(one, frozenset):
            one = sorted(one)
        found[field.name] = one
    return found


# ---------------------------------------------------------------- header


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """What the ticks of one file share."""

    config: TickConfig
    profiles: tuple[LatencyProfile, ...]
    memory: Memory
    began_unix_s: float


def encode_header(config: TickConfig, view: ClusterView, memory: Memory, began_unix_s: float) -> bytes:
    return _encoder.encode(
        {
            "format": FORMAT,
            "began_unix_s": began_unix_s,
            "config": _fields(config),
            "profiles": [_fields(one) for one in view.profiles],
            "memory": _fields(memory),
        }
    )


def decode_header(data: bytes) -> Header:
    """The header of a file; CorruptState when it is none of ours."""
    try:
        value = _decoder.decode(data)
        if value["format"] != FORMAT:
            raise CorruptState(f"a recording of format {value['format']}", expected=f"format {FORMAT}")
        profiles = _profiles(value["profiles"])
        config = _rebuild(TickConfig, value["config"])
        return Header(config, profiles, _rebuild(Memory, value["memory"]), float(value["began_unix_s"]))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise CorruptState(f"no header of a recording: {error}") from None


def _profiles(values: list[dict[str, Any]]) -> tuple[LatencyProfile, ...]:
    return tuple(LatencyProfile(**{**one, "batch_latency_s": tuple(one["batch_latency_s"])}) for one in values)


# ---------------------------------------------------------------- ticks


def _columns(view: ClusterView) -> Columns:
    """Everything a tick reads of the view, by name; arrays cut to the rows in use."""
    found: Columns = {}
    for prefix, columns in (("s", view.sessions), ("w", view.workers)):
        for name in columns.__slots__:
            value = getattr(columns, name)
            if isinstance(value, np.ndarray):
                found[f"{prefix}.{name}"] = value[: columns.count].copy()
            elif isinstance(value, list):
                found[f"{prefix}.{name}"] = list(value)
    for name in _SCALARS:
        found[name] = getattr(view, name)
    found["observed"] = _fields(view.observed)
    found["profiles"] = [_fields(one) for one in view.profiles]
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and bool(a == b)


class TickEncoder:
    """Turns the ticks of one file into records; each holds what changed since the one before."""

    def __init__(self) -> None:
        self._last: Columns = {}

    def encode(self, view: ClusterView, now_s: float, plan: Plan) -> bytes:
        columns = _columns(view)
        last = self._last
        changed = {name: value for name, value in columns.items() if name not in last or not _same(value, last[name])}
        self._last = columns
        return _encoder.encode({"now_s": now_s, "view": changed, "plan": plan_values(plan)})


class TickDecoder:
    """Reads the records of one file in order."""

    def __init__(self, profiles: tuple[LatencyProfile, ...]) -> None:
        self._profiles = profiles
        self._last: Columns = {}

    def decode(self, data: bytes) -> tuple[ClusterView, float, Plan]:
        """(view, now_s, plan as it was recorded); CorruptState when the record does not fit."""
        try:
            value = _decoder.decode(data)
            self._last |= value["view"]
            if "profiles" in value["view"]:  # a recording of an older version has them in its header alone
                self._profiles = _profiles(value["view"]["profiles"])
            return self._view(), float(value["now_s"]), _plan(value["plan"])
        except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
            raise CorruptState(f"no record of a tick: {error}") from None

    def _view(self) -> ClusterView:
        sessions = _fill(SessionColumns, "s.", self._last)
        workers = _fill(WorkerColumns, "w.", self._last)
        scalars = {name: self._last[name] for name in _SCALARS}
        scalars["tenant_weights"] = tuple(scalars["tenant_weights"])
        return ClusterView(
            sessions=sessions,
            workers=workers,
            profiles=self._profiles,
            observed=Observed(**self._last["observed"]),
            **scalars,
        )


def _fill(kind: Callable[[int], Any], prefix: str, columns: Columns) -> Any:
    ids = columns[f"{prefix}ids"]
    made = kind(max(1, len(ids)))
    made.count = len(ids)
    for name in made.__slots__:
        value = columns.get(prefix + name)
        if isinstance(value, dict):
            getattr(made, name)[: made.count] = _array(value)
        elif isinstance(value, list):
            setattr(made, name, list(value))
    return made


def plan_values(plan: Plan) -> dict[str, Any]:
    """A plan as plain values, to be kept, compared and read."""
    actions = [{"kind": type(one).__name__, **_fields(one)} for one in plan.actions]
    return {"wake_at_s": plan.wake_at_s, "actions": actions}


def _plan(value: dict[str, Any]) -> Plan:
    actions: list[Action] = []
    for one in value["actions"]:
        kind = _ACTIONS.get(one["kind"])
        if kind is None:
            raise CorruptState(f"a recording with an action {one['kind']!r}", expected=", ".join(_ACTIONS))
        actions.append(kind(**{name: item for name, item in one.items() if name != "kind"}))
    return Plan(tuple(actions), value["wake_at_s"])
