"""Workers that a command of the user's starts and ends elsewhere: `--scale-hook CMD`.

The command is called as `CMD add` or `CMD remove` with one JSON object on its standard input:

    {"request_id", "action", "worker_id", "model", "controller": "HOST:PORT", "token_file"}

`add` has it start `turboserve worker --join` somewhere with that id, `remove` give the machine back; the worker itself
has been emptied and stopped by then. The same request_id may come again (a call that failed or took too long is
repeated with growing pauses): the command must take that as the same request. Exit code 0 means done.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turboserve.runtime import messages as m

CALL_TIMEOUT_S = 60.0
ATTEMPTS_MAX = 6
BACK_OFF_MIN_S, BACK_OFF_MAX_S = 0.5, 30.0
QUEUE_MAX = 256


@dataclass(frozen=True, slots=True)
class _Call:
    action: str
    worker_id: str
    request_id: str


class HookBackend:
    """Calls the command in a thread of its own, one call at a time, in the order of the wishes."""

    def __init__(self, command: str, facts: Mapping[str, Any], log: Any, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._command = command
        self._facts = dict(facts)
        self._log = log
        self._timeout_s = timeout_s
        self._calls: queue.Queue[_Call | None] = queue.Queue(QUEUE_MAX)
        self._events: queue.SimpleQueue[m.FleetEvent] = queue.SimpleQueue()
        self._ids: set[str] = set()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="scale-hook", daemon=True).start()

    def add(self, worker_id: str, request_id: str) -> None:
        if worker_id not in self._ids:
            self._ids.add(worker_id)
            self._put(_Call("add", worker_id, request_id))

    def remove(self, worker_id: str, request_id: str) -> None:
        if worker_id in self._ids:
            self._ids.discard(worker_id)
            self._put(_Call("remove", worker_id, request_id))

    def kill(self, worker_id: str) -> bool:
        return False

    def events(self) -> list[m.FleetEvent]:
        found = []
        while not self._events.empty():
            found.append(self._events.get_nowait())
        return found

    def present(self) -> list[m.FleetEvent]:
        return [m.FleetEvent(worker_id=one, kind="started") for one in sorted(self._ids)]

    def close(self) -> None:
        self._ended.set()

    def _put(self, call: _Call) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._say(call, "failed", f"{QUEUE_MAX} calls of the scale hook wait already")

    def _run(self) -> None:
        while not self._ended.is_set():
            call = self._calls.get()
            if call is not None:
                self._call(call)

    def _call(self, call: _Call) -> None:
        request = {"request_id": call.request_id, "action": call.action, "worker_id": call.worker_id, **self._facts}
        why = ""
        for attempt in range(ATTEMPTS_MAX):
            if attempt:
                self._ended.wait(min(BACK_OFF_MAX_S, BACK_OFF_MIN_S * 2 ** (attempt - 1)))
            if self._ended.is_set():
                return
            why = self._try(call.action, json.dumps(request))
            if not why:
                self._say(call, "started" if call.action == "add" else "exited", f"scale hook: {call.action} done")
                return
            self._log.error("scale hook", action=call.action, request=call.request_id, attempt=attempt + 1, error=why)
        self._ids.discard(call.worker_id)
        self._say(call, "failed", f"scale hook: {why}")

    def _try(self, action: str, request: str) -> str:
        """Why it did not work; empty when it did."""
        before_s = time.monotonic()
        try:
            done = subprocess.run(
                f"{self._command} {action}",
                shell=True,  # the operator's own command line, from the operator's own flag
                input=request,
                capture_output=True,
                text=True,
                timeout=self._timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"it took more than {self._timeout_s:g} s"
        except OSError as error:
            return str(error)
        if done.returncode == 0:
            self._log.info("scale hook", action=action, took_s=round(time.monotonic() - before_s, 2))
            return ""
        return f"exit code {done.returncode}: {done.stderr.strip()[-500:]}"

    def _say(self, call: _Call, kind: str, reason: str) -> None:
        self._events.put(
            m.FleetEvent(worker_id=call.worker_id, kind=kind, request_id=call.request_id, reason=reason[:1024])
        )
