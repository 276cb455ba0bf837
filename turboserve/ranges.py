"""Named ranges on a profiler's time line that follow a chunk through its life.

A range says what is done (`kind`) and, where it is for one session, the session in its text and the chunk index as its
payload: `decode 4f7k2m3a`, payload 12. Kinds: tick, batch, pass, denoise, context pass, recache, attention, decode,
offload, restore, migrate (docs/profiling.md). The same ranges go to NVTX (Nsight Systems, Nsight Compute) and, while a
capture window is open, to torch.profiler.

With no profiler attached `span` is a look at two variables. With one, attributes are built once per kind and session
and used again. Any layer may use this module; it imports nothing of ours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

try:
    import nvtx
except ImportError:  # a GPU test machine has torch, numpy and safetensors alone
    nvtx = None

Recorder = Callable[[str], AbstractContextManager[Any]]

KEPT_MAX = 4096
SESSION_CHARS = 8


class _Nothing:
    """A range that nobody sees; one object for all of them."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *raised: object) -> None:
        return None


_NOTHING = _Nothing()


class _Nvtx:
    """Our NVTX domain, if a tool listens to it."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain
        self._kept: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def push(self, kind: str, session: str, chunk: int) -> None:
        key = (kind, session)
        attributes = self._kept.get(key)
        if attributes is None:
            attributes = self._domain.get_event_attributes(message=_label(kind, session), payload=chunk)
            self._kept[key] = attributes
            while len(self._kept) > KEPT_MAX:
                self._kept.popitem(last=False)
        attributes.payload = chunk
        self._domain.push_range(attributes)

    def pop(self) -> None:
        self._domain.pop_range()


def _find_nvtx() -> _Nvtx | None:
    if nvtx is None:
        return None
    domain = nvtx.get_domain("turboserve")
    # Without a tool the package hands out a dummy, whose attributes are None.
    return None if domain.get_event_attributes(message="probe") is None else _Nvtx(domain)


_nvtx = _find_nvtx()
_recorder: Recorder | None = None


def set_recorder(recorder: Recorder | None) -> None:
    """Also send ranges to `recorder` (torch.profiler.record_function), or to nobody else any more."""
    global _recorder
    _recorder = recorder


def listening() -> bool:
    """Whether any profiler would see a range now."""
    return _nvtx is not None or _recorder is not None


def _label(kind: str, session: str, chunk: int = -1) -> str:
    text = f"{kind} {session[:SESSION_CHARS]}" if session else kind
    return f"{text} #{chunk}" if chunk >= 0 else text


class _Range:
    __slots__ = ("_chunk", "_kind", "_nvtx", "_recorded", "_session")

    def __init__(self, kind: str, session: str, chunk: int) -> None:
        self._kind, self._session, self._chunk = kind, session, chunk
        self._nvtx = _nvtx
        self._recorded = None if _recorder is None else _recorder(_label(kind, session, chunk))

    def __enter__(self) -> None:
        if self._nvtx is not None:
            self._nvtx.push(self._kind, self._session, self._chunk)
        if self._recorded is not None:
            self._recorded.__enter__()

    def __exit__(self, *raised: Any) -> None:
        if self._recorded is not None:
            self._recorded.__exit__(*raised)
        if self._nvtx is not None:
            self._nvtx.pop()


def span(kind: str, session: str = "", chunk: int = -1) -> AbstractContextManager[None]:
    """A range for a `with` statement; for one session's chunk say whose and which."""
    if _nvtx is None and _recorder is None:
        return _NOTHING
    return _Range(kind, session, chunk)


def spans(parts: Iterable[tuple[str, str, int]]) -> AbstractContextManager[Any]:
    """Ranges (kind, session, chunk) that begin and end together, one inside the other: the segments of a pass. Ask
    `listening` first where making `parts` costs something."""
    if _nvtx is None and _recorder is None:
        return _NOTHING
    together = ExitStack()
    for kind, session, chunk in parts:
        together.enter_context(_Range(kind, session, chunk))
    return together
