"""The engine's thread: takes commands between passes, runs passes while there is work, blocks when there is none.

Commands come through a bounded queue from the thread that talks; results go back through `post`, which must not block.
A command never waits longer than one pass. Every result carries the epoch that the session was opened under, so that
what was made for an earlier owner is told apart from what a later one asked for.

A session that is told to stop is stopped here, at the first chunk boundary it reaches: its recovery point is written,
its slot freed where that was asked, and only then is anything said.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from turboserve.errors import NotFound, NotOffered, SessionPoisoned, TurboServeError, WorkerError
from turboserve.runtime import worker_events as e
from turboserve.runtime.engine import Engine, is_fatal
from turboserve.runtime.failpoints import failpoint
from turboserve.runtime.profile_window import ProfileWindow
from turboserve.runtime.worker_config import EXIT_DEVICE_LOST

log = logging.getLogger(__name__)

COMMANDS_MAX = 1 << 16
"""Credits are bounded per session, so this many waiting commands mean that the engine is stuck, not busy."""

NO_EPOCH = -1
"""What is posted for a prepared slot: its session has no epoch here yet."""


@dataclass(frozen=True, slots=True)
class Quit:
    """End the loop; `code` is the process's exit code."""

    code: int = 0


class EngineLoop:
    """One engine and its queue. `put` is for any thread, `run` for the one that owns the device."""

    def __init__(
        self, engine: Engine, post: Callable[[e.EngineEvent, int], None], profile_dir: Path | None = None
    ) -> None:
        self._engine = engine
        self._window = ProfileWindow(engine.pool.device)
        self._profile_dir = profile_dir
        self._profile_op = -1
        self._post = post
        self._commands: queue.Queue[e.EngineCommand | Quit] = queue.Queue(COMMANDS_MAX)
        self._epochs: dict[str, int] = {}
        self._stops: dict[str, e.Stop] = {}
        self._held = False

    def put(self, command: e.EngineCommand | Quit) -> None:
        """Hand a command over; never blocks. queue.Full means a stuck engine and should end the process."""
        self._commands.put_nowait(command)

    def run(self) -> int:
        """Until Quit, or until the device is lost; the exit code."""
        try:
            return self._run()
        except Exception as error:
            if not is_fatal(error):
                raise
            log.error("the device is lost, and with it every session here: %s", error)
            return EXIT_DEVICE_LOST

    def _run(self) -> int:
        while True:
            idle = self._held or not self._engine.has_work
            command = self._next(block=idle)
            if isinstance(command, Quit):
                return command.code
            if command is not None:
                self._obey(command)
            elif not idle:
                self._engine.run_pass_into(self._post_event)
            if self._window.is_due:
                log.info("profile of %s saved", self._window.close())
            if self._stops:
                self._stop_those_at_a_boundary()

    def _post_event(self, event: e.PassEvent) -> None:
        if self._window.is_open and isinstance(event, e.FinishedChunk):
            self._window.saw_chunk()
        self._post(event, self._epochs[event.session_id])

    def _next(self, *, block: bool) -> e.EngineCommand | Quit | None:
        try:
            # An open capture window ends in time even if no chunk is asked for.
            return self._commands.get(block, self._window.left_s)
        except queue.Empty:
            return None

    def _obey(self, command: e.EngineCommand) -> None:
        if isinstance(command, e.Hold):
            self._held = command.hold
        elif isinstance(command, e.Profile):
            self._post(self._profile(command), NO_EPOCH)
        elif isinstance(command, e.Open):
            self._open(command)
        elif isinstance(command, e.Prepare):
            self._prepare(command)
        elif isinstance(command, e.DropPrepared):
            self._engine.drop_prepared(command.session_id)
        elif self._epochs.get(command.session_id) != command.epoch:
            if isinstance(command, e.Close):
                self._post(e.Closed(command.session_id), command.epoch)  # it was never opened, or failed to
        elif isinstance(command, e.Close):
            self._free(command.session_id)
            self._post(e.Closed(command.session_id), command.epoch)
        elif isinstance(command, e.Stop):
            self._engine.forget_queue(command.session_id)
            self._stops[command.session_id] = command
        else:
            # A session may break while a credit for it is on its way; the news of that is on its way too.
            with contextlib.suppress(NotFound, SessionPoisoned):
                self._engine.submit(command.session_id, command.request, command.deadline_s, command.received_s)

    def _free(self, session_id: str) -> None:
        del self._epochs[session_id]
        self._stops.pop(session_id, None)
        self._engine.close(session_id)

    def _profile(self, command: e.Profile) -> e.Profiling:
        """Open a capture window; asked again under the same number, say again where it writes."""
        if command.op_id == self._profile_op:
            return e.Profiling(command.op_id, str(self._window.path))
        if self._profile_dir is None:
            return e.Profiling(command.op_id, code=NotOffered.code, message="this worker has no folder for traces")
        try:
            self._window.open(
                self._profile_dir / f"{time.strftime('%Y%m%d-%H%M%S')}-{command.op_id}.json", command.chunks
            )
        except TurboServeError as error:
            return e.Profiling(command.op_id, code=error.code, message=str(error))
        self._profile_op = command.op_id
        return e.Profiling(command.op_id, str(self._window.path))

    # ------------------------------------------------------------------ coming

    def _open(self, command: e.Open) -> None:
        session_id = command.session_id
        try:
            opened = self._opened(command)
        except Exception as error:  # whatever a model raises for one session must not end the others
            if is_fatal(error):
                raise
            # One that is held and cannot be adopted (it has just broken) is given up whole, not left without a name.
            self._epochs.pop(session_id, None)
            self._stops.pop(session_id, None)
            self._engine.close(session_id)
            self._post(e.OpenFailed(session_id, _code(error), str(error)), command.epoch)
            return
        self._epochs[session_id] = command.epoch
        self._post(opened, command.epoch)

    def _opened(self, command: e.Open) -> e.Opened:
        session_id = command.session_id
        if command.adopt_epoch is not None:
            if self._epochs.get(session_id) == command.adopt_epoch:
                self._stops.pop(session_id, None)
                return e.Opened(session_id, self._engine.adopt(session_id, command.epoch), adopted=True)
            if not command.restore:
                raise NotFound(f"session {session_id} is not on this worker any more")
        if command.restore:
            restored = self._engine.restore(
                session_id, command.seed, command.epoch, command.decoder, any_numerics=command.any_numerics
            )
            if restored is None and command.any_numerics:
                # Begun anew here, in other bits, it would fit neither what the viewer has nor what comes.
                raise NotFound(f"session {session_id} has no recovery point that this worker's model can read")
            if restored is not None:
                next_index = self._engine.next_chunk_index(session_id)
                return e.Opened(session_id, next_index, restored=True, made=restored.chunks)
        self._engine.open(session_id, command.seed, command.control, command.epoch, command.decoder)
        return e.Opened(session_id)

    def _prepare(self, command: e.Prepare) -> None:
        try:
            self._engine.prepare(command.session_id)
        except TurboServeError as error:
            self._post(e.PrepareFailed(command.session_id, command.move_id, error.code, str(error)), NO_EPOCH)
            return
        self._post(e.Prepared(command.session_id, command.move_id), NO_EPOCH)

    # ------------------------------------------------------------------ going

    def _stop_those_at_a_boundary(self) -> None:
        for session_id, command in list(self._stops.items()):
            if self._engine.at_boundary(session_id):
                del self._stops[session_id]
                self._stop(command)

    def _stop(self, command: e.Stop) -> None:
        session_id = command.session_id
        next_index = self._engine.next_chunk_index(session_id)
        failpoint("worker.stop.boundary")
        try:
            point_bytes = self._engine.save(session_id)
        except TurboServeError as error:
            log.warning("session %s stays: %s", session_id, error)
            self._post(e.StopFailed(session_id, next_index, error.code, str(error)), command.epoch)
            return
        failpoint("worker.stop.point")
        if command.release:
            self._free(session_id)
            failpoint("worker.stop.freed")
        self._post(e.Stopped(session_id, next_index, point_bytes), command.epoch)


def _code(error: Exception) -> str:
    return error.code if isinstance(error, TurboServeError) else WorkerError.code
