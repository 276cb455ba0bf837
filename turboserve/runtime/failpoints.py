"""Named places where a test may break a process: `TURBOSERVE_FAILPOINTS="name:action[@N][,...]"`.

    kill       SIGKILL to this process
    stop       SIGSTOP: a zombie until somebody sends SIGCONT
    raise      FailpointError
    sleep=S    blocks the calling thread for S seconds
    enospc     OSError(ENOSPC)

`@N`: at the N-th time only, from 1; without it every time. `PROCESS/name` limits it to one process by the name that its
log bears (w0, controller, gateway). The variable is read once, when this module is imported: nothing that a running
process is sent can arm one, and unset, a failpoint is one test of an empty dict.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass

from turboserve.errors import ConfigError, TurboServeError

VARIABLE = "TURBOSERVE_FAILPOINTS"

FAILPOINTS: dict[str, str] = {
    "worker.open.begun": "a slot is held for it, nothing read of its point",
    "worker.open.read": "a point was read into the slot, SessionOpened not said",
    "worker.chunk.emitted": "the engine has handed frames on, the context pass not run",
    "worker.chunk.committed": "the context pass is done, no point written of it",
    "worker.point.pages_written": "the point's pages lie in the arena, the point does not",
    "worker.point.committed": "the point is committed, the one before not yet dropped",
    "worker.stop.boundary": "told to suspend or hand over: at the boundary, before the last point",
    "worker.stop.point": "the last point is committed, the slot not freed, nothing said",
    "worker.stop.freed": "a suspend's slot is free, SessionSuspended not said",
    "worker.prepare.slot": "a destination holds the slot, no page read",
    "worker.prepare.read": "its pages are read ahead, SessionPrepared not said",
    "worker.send.ahead": "linked to another node, nothing sent of a point whose session goes on",
    "worker.send.last": "likewise, of one that has stopped",
    "worker.send.done": "the other node has the point, nothing said",
    "worker.receive.point": "a point of another node is committed here, its sender not told",
    "worker.adopt": "a move was given up, the source takes its session back",
    "worker.emit.ring": "frames lie in the ring, ChunkReady not sent",
    "worker.emit.sent": "ChunkReady is sent",
    "controller.spill.begun": "a point is to be written to disk, nothing of it is there",
    "controller.spill.written": "a point is on disk, the directory does not say so, the arena still has it",
    "controller.event.written": "the directory has what an event changed, nobody has heard of it",
    "controller.started": "the directory is read, nobody is heard yet",
    "worker.say.SessionOpened": "the message is decided on, not sent",
    "worker.say.SessionSuspended": "likewise",
    "worker.say.SessionPrepared": "likewise",
    "worker.say.HandedOver": "likewise",
    "worker.say.SessionReleased": "likewise",
}
"""Every failpoint there is, with where it stands; one that is armed and not here is refused at start."""


class FailpointError(TurboServeError):
    """What `raise` raises; to a client it is an internal error like any other."""


@dataclass(slots=True)
class _Armed:
    action: str
    sleep_s: float
    at: int | None
    process: str
    hits: int = 0


def parse(text: str) -> dict[str, list[_Armed]]:
    """The variable's value; ConfigError for a name or an action that there is not."""
    armed: dict[str, list[_Armed]] = {}
    for part in filter(None, (one.strip() for one in text.split(","))):
        where, _, action = part.partition(":")
        process, _, name = where.rpartition("/")
        action, _, number = action.partition("@")
        action, _, seconds = action.partition("=")
        if name not in FAILPOINTS:
            raise ConfigError(f"{VARIABLE} names failpoint {name!r}", expected=f"one of {', '.join(FAILPOINTS)}")
        try:
            sleep_s = float(seconds) if action == "sleep" else 0.0
            at = int(number) if number else None
        except ValueError:
            raise ConfigError(f"{VARIABLE}: {part!r}", expected="name:action[@N], as in a:sleep=0.5@3") from None
        if action not in ("kill", "stop", "raise", "sleep", "enospc"):
            raise ConfigError(f"{VARIABLE}: action {action!r}", expected="kill, stop, raise, sleep=S or enospc")
        armed.setdefault(name, []).append(_Armed(action, sleep_s, at, process))
    return armed


_armed: Mapping[str, list[_Armed]] = parse(os.environ.get(VARIABLE, ""))
_process = ""


def set_process(name: str) -> None:
    """What `PROCESS/` in the variable is compared with; each process says it once, at start."""
    global _process
    _process = name


def failpoint(name: str) -> None:
    """Break here if the environment says so."""
    if _armed:
        _hit(name)


def _hit(name: str) -> None:
    assert name in FAILPOINTS, name
    for one in _armed.get(name, ()):
        if one.process not in ("", _process):
            continue
        one.hits += 1
        if one.at is None or one.hits == one.at:
            _do(name, one)


def _do(name: str, one: _Armed) -> None:
    if one.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif one.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif one.action == "sleep":
        time.sleep(one.sleep_s)
    elif one.action == "enospc":
        raise OSError(errno.ENOSPC, f"failpoint {name}")
    else:
        raise FailpointError(f"failpoint {name}")
