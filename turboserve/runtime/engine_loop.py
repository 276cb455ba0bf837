"""The engine's thread: takes commands between passes, runs passes while there is work, blocks when there is none.

Commands come through a bounded queue from the thread that talks; results go back through `post`, which must not block.
A command never waits longer than one pass. Every result carries the epoch that the session was opened under, so that
what was made for an earlier owner is told apart from what a later one asked for.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable
from dataclasses import dataclass

from turboserve.errors import NotFound, SessionPoisoned, TurboServeError, WorkerError
from turboserve.runtime import worker_events as e
from turboserve.runtime.engine import Engine

COMMANDS_MAX = 1 << 16
"""Credits are bounded per session, so this many waiting commands mean that the engine is stuck, not busy."""


@dataclass(frozen=True, slots=True)
class Quit:
    """End the loop; `code` is the process's exit code."""

    code: int = 0


class EngineLoop:
    """One engine and its queue. `put` is for any thread, `run` for the one that owns the device."""

    def __init__(self, engine: Engine, post: Callable[[e.EngineEvent, int], None]) -> None:
        self._engine = engine
        self._post = post
        self._commands: queue.Queue[e.EngineCommand | Quit] = queue.Queue(COMMANDS_MAX)
        self._epochs: dict[str, int] = {}
        self._held = False

    def put(self, command: e.EngineCommand | Quit) -> None:
        """Hand a command over; never blocks. queue.Full means a stuck engine and should end the process."""
        self._commands.put_nowait(command)

    def run(self) -> int:
        """Until Quit; the exit code."""
        while True:
            idle = self._held or not self._engine.has_work
            command = self._next(block=idle)
            if isinstance(command, Quit):
                return command.code
            if command is not None:
                self._obey(command)
                continue
            self._engine.run_pass_into(self._post_event)

    def _post_event(self, event: e.PassEvent) -> None:
        self._post(event, self._epochs[event.session_id])

    def _next(self, *, block: bool) -> e.EngineCommand | Quit | None:
        try:
            return self._commands.get(block)
        except queue.Empty:
            return None

    def _obey(self, command: e.EngineCommand) -> None:
        if isinstance(command, e.Hold):
            self._held = command.hold
        elif isinstance(command, e.Open):
            self._open(command)
        elif self._epochs.get(command.session_id) != command.epoch:
            if isinstance(command, e.Close):
                self._post(e.Closed(command.session_id), command.epoch)  # it was never opened, or failed to
        elif isinstance(command, e.Close):
            del self._epochs[command.session_id]
            self._engine.close(command.session_id)
            self._post(e.Closed(command.session_id), command.epoch)
        else:
            # A session may break while a credit for it is on its way; the news of that is on its way too.
            with contextlib.suppress(NotFound, SessionPoisoned):
                self._engine.submit(command.session_id, command.request, command.deadline_s, command.received_s)

    def _open(self, command: e.Open) -> None:
        try:
            self._engine.open(command.session_id, command.seed, command.control)
        except Exception as error:  # whatever a model raises for one session must not end the others
            code = error.code if isinstance(error, TurboServeError) else WorkerError.code
            self._post(e.OpenFailed(command.session_id, code, str(error)), command.epoch)
            return
        self._epochs[command.session_id] = command.epoch
        self._post(e.Opened(command.session_id), command.epoch)
