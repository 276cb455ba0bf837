"""One session as the gateway sees it: a state machine without I/O. Here its viewer's side, its time and its end;
what it does towards controller and worker is in session_credits.py."""

from __future__ import annotations

from dataclasses import dataclass

from turboserve.errors import Conflict, IndexOutOfRange, TurboServeError
from turboserve.server.effects import CloseViewer, ToViewer
from turboserve.server.log_records import Asked, Ended, Frontier, Rotated
from turboserve.server.pacing import Pace, Period
from turboserve.server.session_credits import IDLE_REPORT_S, RING_CHUNKS, SessionCredits
from turboserve.server.stream_shape import StoredChunk, StreamShape, Viewer
from turboserve.session import PublicState

__all__ = ["RING_CHUNKS", "SessionStream", "StoredChunk", "StreamShape"]


@dataclass(slots=True, kw_only=True)
class SessionStream(SessionCredits):
    """See the module's docstring. Every method takes the time; effects go to `outbox`."""

    # ------------------------------------------------------------------ viewer

    def attach(
        self, connection: int, token: str, next_index: int, format: str | None, pace: Pace, fresh: str, now_s: float
    ) -> None:
        """Take over the stream from `next_index`. A wrong index is an error and leaves everything as it was."""
        out = self.outbox
        if not self.tokens.accepts(token):
            out.put(CloseViewer(connection, 4401, "this token does not open the session"))
            return
        if self.ended_s is not None:
            if self.end_code == 1000:
                out.put(ToViewer(connection, {"type": "end", "delivered": self.delivered, "reason": self.end_reason}))
            out.put(CloseViewer(connection, self.end_code, self.end_reason))
            return
        newest = max(self.next_index, self.restored)
        if not self.delivered <= next_index <= newest:
            raise IndexOutOfRange(
                f"next_index {next_index} cannot be replayed or made next", expected=f"{self.delivered} to {newest}"
            )
        if self.viewer is not None:
            out.put(CloseViewer(self.viewer.connection, 4409, "attached elsewhere"))
        self.tokens.rotate(token, fresh)
        self.viewer = Viewer(connection, next_index, next_index, format or self.format)
        self.viewed_as, self.misfits = self.viewer.format, 0
        self._release_behind(now_s)
        self.counts.attaches += 1
        if self.first_attach_s is None:
            self.first_attach_s = now_s
        self.pace = pace
        if not self.paused:
            self.period = Period(now_s, next_index, pace)
        self.full_s = now_s if self._stands_full() else None
        record = Rotated(sid=self.sid, token_hash=self.tokens.current, token_hash_prev=self.tokens.previous)
        out.append(record, lambda later_s: self._attached(connection, fresh, later_s))
        self.pump(now_s)

    def _attached(self, connection: int, token: str, now_s: float) -> None:
        """The new token is durable: tell the viewer, then give it what the ring holds."""
        viewer = self.viewer
        if viewer is None or viewer.connection != connection:
            return
        viewer.ready = True
        hello = {
            "type": "attached",
            "token": token,
            "epoch": self.epoch,
            "next_index": viewer.next_index,
            "numerics_id": self.numerics_id,
            "format": viewer.format,
        }
        self.outbox.put(ToViewer(connection, hello))
        self.shown = None
        self._show()
        self._deliver_ready()

    def _release_behind(self, now_s: float) -> None:
        """When all that stands unacked lies before what this viewer asked for, it counts as received: the viewer
        would never ack it, and generation would wait for that for ever."""
        viewer = self.viewer
        if viewer is not None and viewer.first_index == self.delivered + RING_CHUNKS <= self.next_index:
            self._advance(viewer.first_index, now_s)

    def detach(self, connection: int, now_s: float) -> None:
        """The connection is gone. Generation stops by itself when credits end."""
        if self.viewer is None or self.viewer.connection != connection:
            return
        self.viewer = None
        self.detached_s = now_s
        self.full_s = None
        self.pump(now_s)

    def ack(self, connection: int, index: int, now_s: float) -> None:
        """The viewer holds every chunk up to `index`."""
        if self.viewer is None or self.viewer.connection != connection or not self.viewer.ready:
            raise Conflict("this connection is not attached", expected="an attach message first")
        made = min(self.next_index, self.viewer.next_index)
        if index >= made:
            raise IndexOutOfRange(f"chunk {index} was not sent yet", expected=f"at most {made - 1}")
        self.tokens.confirm()
        if index + 1 > self.delivered:
            self._advance(index + 1, now_s)
            self.pump(now_s)

    def _advance(self, delivered: int, now_s: float) -> None:
        was_full_s = self.full_s
        digest = next((chunk.digest for chunk in self.ring if chunk.index == delivered - 1), self.digest)
        self.delivered = delivered
        while self.ring and self.ring[0].index < delivered:
            self.ring.popleft()
        self.full_s = None
        if delivered <= self.next_index:
            self.outbox.append(Frontier(sid=self.sid, delivered=delivered, digest=digest))
        if was_full_s is not None and self.period is not None and now_s - was_full_s > self.clock.chunk_s:
            # The viewer stood still for longer than a chunk: it plays on from here, not from where it would have been.
            self.period = Period(now_s, self.bound, self.period.pace)
        if self.max_chunks is not None and delivered >= self.max_chunks:
            self.end("completed", 1000, now_s)

    def prompt(
        self,
        connection: int,
        text: str,
        event_id: str | None,
        from_index: int | None,
        now_s: float,
        remarks: dict[str, object] | None = None,
    ) -> None:
        """A new prompt, checked before; it is answered with the chunk it will reach, and what the check remarked."""
        if self.ended_s is not None:
            raise Conflict("the session has ended")
        accepted, superseded = self.prompts.accept(text, event_id, from_index, self.bound)
        if from_index is None and accepted in self.prompts.waiting:
            self.asked[accepted.version] = now_s
        told: list[dict[str, object]] = [{"type": "prompt_superseded", "event_id": one.event_id} for one in superseded]
        answer = {
            "type": "prompt_accepted",
            "event_id": event_id,
            "prompt_version": accepted.version,
            "from_index": accepted.from_index,
            **(remarks or {}),
        }
        record = Asked(
            sid=self.sid,
            version=accepted.version,
            from_index=accepted.from_index,
            prompt=accepted.text,
            event_id=event_id,
            asked_index=from_index,
        )
        self.outbox.append(record, lambda later_s: self._tell(connection, [*told, answer]))

    def _tell(self, connection: int, answers: list[dict[str, object]]) -> None:
        for answer in answers:
            self.outbox.put(ToViewer(connection, answer))

    def pause(self, now_s: float) -> None:
        """No further credit; the chunk in work is still delivered."""
        self._must_live()
        self.paused = True
        self.period = None
        self.full_s = None
        self.pump(now_s)

    def resume(self, now_s: float) -> None:
        self._must_live()
        if not self.paused:
            return
        self.paused = False
        if self.first_attach_s is not None:
            self.period = Period(now_s, self.bound, self.pace)
        self.full_s = now_s if self._stands_full() else None
        self.pump(now_s)

    def _must_live(self) -> None:
        if self.ended_s is not None:
            raise Conflict(f"the session has ended ({self.end_reason})", expected="a session that is not closed")

    # ------------------------------------------------------------------ time and end

    def wake_s(self) -> float | None:
        """When `tick` must be called even if nothing happens; None when never."""
        if self.ended_s is not None:
            return None
        times = [self.created_s + self.session_s]
        if self.viewer is None:
            times.append((self.created_s if self.first_attach_s is None else self.detached_s) + self.grace_s)
        elif self.full_s is not None:
            reported = self.reported is not None and not self.reported[0]
            times.append(self.full_s + (self.slow_close_s if reported else IDLE_REPORT_S))
        if self._may_bind():
            times.append(self._release_s())
        if (self.owned and self.in_flight) or self.refused_epoch == self.epoch > 0:
            times.append(self.credit_due_s)
        return min(times)

    def tick(self, now_s: float) -> None:
        """Time has passed: release what is due, let go what took too long."""
        if self.ended_s is not None:
            return
        if now_s >= self.created_s + self.session_s:
            self.end("session_limit", 4410, now_s)
        elif self.viewer is None:
            since_s = self.created_s if self.first_attach_s is None else self.detached_s
            if now_s >= since_s + self.grace_s:
                self.end("expired", 4410, now_s)
                return
        elif self.full_s is not None and now_s >= self.full_s + self.slow_close_s:
            self.outbox.put(CloseViewer(self.viewer.connection, 4413, "too slow; attach again to go on"))
            self.detach(self.viewer.connection, now_s)
        self._credit_overdue(now_s)
        self.pump(now_s)

    def fail(self, code: str, message: str, now_s: float) -> None:
        """End in failure: the viewer gets the code, then close 4500."""
        if self.ended_s is None and self.viewer is not None:
            error = {"type": "error", "code": code, "message": message, "retryable": False}
            self.outbox.put(ToViewer(self.viewer.connection, error))
        self.end(code, 4500, now_s)

    def end(self, reason: str, code: int, now_s: float) -> None:
        """Nothing is emitted for the session after this. Idempotent."""
        if self.ended_s is not None:
            return
        self.ended_s, self.end_reason, self.end_code = now_s, reason, code
        self.state = (PublicState.FAILED if code == 4500 else PublicState.CLOSED).value
        self.owned = self.in_flight = False
        self.period = None
        self.ring.clear()
        self.outbox.append(Ended(sid=self.sid, reason=reason, failed=code == 4500), None)
        if self.viewer is not None:
            if code != 4500:
                end = {"type": "end", "delivered": self.delivered, "reason": reason}
                self.outbox.put(ToViewer(self.viewer.connection, end))
            self.outbox.put(CloseViewer(self.viewer.connection, code, reason))
            self.viewer = None
        self.outbox.ended(self.sid, reason)

    def check_error(self, error: TurboServeError, now_s: float) -> None:
        """A chunk that cannot be right ends the session: wrong video is never shown."""
        self.fail(error.code, error.message, now_s)
