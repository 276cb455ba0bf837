"""Which session may have killed its worker, and what is done about it.

A session that had chunks to make when its worker died gets a strike. Strikes go when it is `STRIKE_CHUNKS` past the
chunk where it happened. With two it is tried once more on a worker of its own; with three it is quarantined (it fails,
`session_poisoned`), provided that it was alone in the last death. Where several are suspected nobody knows which it
was: from two strikes on they are kept on different workers, so that the next death tells. Only where there are too few
workers for that, and one dies again and again in company, the only one with `STRIKES_IN_COMPANY` is given up.

**How it died.** Of a worker of this machine the launcher says how it ended, and what its engine was working on at that
moment (`work_board.py`): only then are strikes given. One that SIGKILL ended was killed from outside, or by a session's
own doing while its chunk was in work (the kernel's out-of-memory killer, a failpoint): a session that was not being
worked on has no part in it. After any other end all are suspected that wanted chunks (a fault of a device may show
late); but one that was not being worked on while others were is never given up for it. A worker that was cut off or
stood still has not died, and the launcher says nothing. Of a worker that joined from elsewhere nobody says how it
ended: losing it counts as its death, until the same process is back.

**Acquittal.** When one is given up, the deaths that others shared with it are explained: their strikes for those go.
A new controller knows the strikes (the directory has them), not whom they were shared with.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from turboserve.runtime import messages as m
from turboserve.runtime.controller_books import Live, Worker
from turboserve.runtime.controller_moves import ControllerMoves
from turboserve.runtime.controller_records import Suspected
from turboserve.session import SessionState

QUARANTINED = "workers ended while they made it; it is not tried again"
STRIKES_MAX = 3
STRIKES_GRAVE = 2
STRIKES_IN_COMPANY = 5
STRIKE_CHUNKS = 3
VERDICT_S = 1.0
"""So long a session that has strikes already waits to hear how its worker ended, before it goes to the next."""
OWN_WORKER_S = 5.0
"""So long one with two strikes waits for a worker without other sessions at work, and any other for one without a
session that has two; about what a restart takes."""

_COMES = frozenset({SessionState.LOADING, SessionState.RESUMING})
"""On its way to the worker: what it says of its opening is not heard yet, and the board names it while it is opened."""
_WAITS = frozenset({SessionState.QUEUED, SessionState.RECOVERING, SessionState.HOST, SessionState.DISK})


class ControllerSuspects(ControllerMoves):
    """Strikes, and where sessions that have some may go."""

    # ------------------------------------------------------------------ who it was

    def _suspect(self, worker: Worker, held: list[Live]) -> Live | None:
        """A worker is gone: note who was at work. The session that did it, when that is certain already."""
        there = [one for one in held if one.record.state not in (SessionState.CLOSING, *_WAITS)]
        hello = worker.hello
        next_index = {one.record.session_id: one.next_index for one in there}
        told = hello.ring_fd >= 0  # the launcher has started it, and says how it ended
        idle = frozenset(
            one.record.session_id for one in there if not one.wanted or (told and one.record.state in _COMES)
        )
        self.suspected[hello.worker_id] = suspected = Suspected(hello.pid, hello.worker_epoch, next_index, idle)
        return None if told else self._strike(suspected, suspected.at_work())

    def _hold_suspects(self, worker_id: str, now_s: float) -> None:
        """Those that were suspected before do not go on until it is known whether they did it again."""
        suspected = self.suspected.get(worker_id)
        if suspected is None or suspected.struck:
            return
        for live in (self.sessions.get(one) for one in suspected.sessions):
            if live is not None and live.record.strikes and live.record.owner is None:
                live.retry_at_s = now_s + VERDICT_S
                self._show(live)

    def _judge(self, event: m.FleetEvent, now_s: float) -> None:
        """How a process ended that was lost a moment ago."""
        suspected = self.suspected.get(event.worker_id)
        if suspected is None or suspected.pid != event.pid or event.pid == 0 or suspected.struck:
            return
        del self.suspected[event.worker_id]
        guilty = None
        # It may be a chunk that nobody wants any more.
        doing = [one for one in suspected.sessions if one in event.at_work]
        if event.exit_code == -signal.SIGKILL:
            if spared := len(set(suspected.at_work()) - set(doing)):
                reason = f"SIGKILL; {spared} sessions there had no chunk in work and are not suspected"
                self._note(now_s, "killed", worker=event.worker_id, reason=reason)
            guilty = self._strike(suspected, doing, doing)
        elif event.exit_code != 0:
            guilty = self._strike(suspected, suspected.at_work(doing), doing)
        for live in (self.sessions.get(one) for one in suspected.sessions):
            if live is not None and live.retry_at_s is not None and live.record.owner is None:
                live.retry_at_s = None
                self._show(live)
        if guilty is not None:
            self._quarantine(guilty, now_s)

    def _strike(self, suspected: Suspected, session_ids: list[str], doing: Sequence[str] = ()) -> Live | None:
        """Give strikes; the one that is given up for them. `doing`: those of them that were being worked on."""
        struck = []
        for live in (self.sessions.get(one) for one in session_ids):
            if live is None:
                continue
            spared = doing and live.record.session_id not in doing
            if not spared or live.record.strikes < STRIKES_GRAVE:
                struck.append(live)
        suspected.struck = [one.record.session_id for one in struck]
        for live in struck:
            live.record.strikes += 1
            live.strike_index = max(live.strike_index, suspected.sessions[live.record.session_id])
            live.struck_with.update(one for one in suspected.struck if one != live.record.session_id)
            self._keep_strikes(live)
        alone = len(doing or session_ids) == 1
        guilty = [one for one in struck if one.record.strikes >= (STRIKES_MAX if alone else STRIKES_IN_COMPANY)]
        return guilty[0] if len(guilty) == 1 else None

    def _keep_strikes(self, live: Live) -> None:
        record = live.record
        self._store.set_state(record.session_id, record.state, record.reason, record.strikes)

    def _quarantine(self, live: Live, now_s: float) -> None:
        message = f"{live.record.strikes} {QUARANTINED}"
        self._note(now_s, "quarantine", session=live.record.session_id, reason=message)
        self._drop_prepared(live)
        if live.record.owner is not None:
            self._send_close(live.record.owner, live.record.session_id, live.record.epoch)
        for other in self.sessions.values():
            shared = other.struck_with.pop(live.record.session_id, 0)
            if other is not live and shared > 0 and other.record.strikes:
                other.record.strikes = max(0, other.record.strikes - shared)
                self._keep_strikes(other)
        self._fail(live, "session_poisoned", message)

    def _take_strikes_back(self, hello: m.WorkerHello) -> None:
        """The same process is back: it was cut off or stood still, and no session had killed it."""
        suspected = self.suspected.get(hello.worker_id)
        if suspected is None or suspected.epoch != hello.worker_epoch:
            return
        del self.suspected[hello.worker_id]
        for live in (self.sessions.get(one) for one in suspected.struck):
            if live is not None and live.record.strikes:
                live.record.strikes -= 1
                live.struck_with.subtract(one for one in suspected.struck if one != live.record.session_id)
                self._keep_strikes(live)

    def _progress(self, source: str, beat: m.Heartbeat) -> None:
        """Chunks made clear a session of suspicion."""
        for session_id, next_index in beat.progress.items():
            live = self.sessions.get(session_id)
            if live is not None and live.record.owner == source:
                self._made(live, next_index)

    def _made(self, live: Live, next_index: int) -> None:
        if live.move is not None:
            return
        live.next_index = max(live.next_index, next_index)
        if live.record.strikes and next_index >= live.strike_index + STRIKE_CHUNKS:
            live.record.strikes, live.strike_index = 0, -1
            live.struck_with.clear()
            self._keep_strikes(live)

    # ------------------------------------------------------------------ where it may go

    def _apart(self, live: Live, wanted: str, now_s: float) -> str | None:
        """The worker to put it on when the tick says `wanted`: away from where it broke and from other suspects.

        None: it must wait, because every worker with room has a suspect as grave as itself, or would make other bits,
        or, for a while, because it is to have a worker of its own.
        """
        grave = live.record.strikes >= STRIKES_GRAVE
        suspects: dict[str, int] = {}
        busy = set()
        for other in self.sessions.values():
            if other is live or not other.record.owner:
                continue
            if other.record.strikes:
                suspects[other.record.owner] = max(suspects.get(other.record.owner, 0), other.record.strikes)
            if other.wanted:
                busy.add(other.record.owner)
        alone = {one for one, strikes in suspects.items() if strikes >= STRIKES_GRAVE}
        if not live.record.strikes and wanted != live.avoid and wanted not in alone and self._fits(live, wanted):
            return wanted
        roomy = [wanted] + [one for one in sorted(self.workers) if one != wanted and self._takes(one)]
        roomy = [one for one in roomy if self._fits(live, one)]
        if not roomy:
            self._say_other_bits(live, now_s)
            return None  # it waits for a worker that makes the same bits
        away = [one for one in roomy if one != live.avoid] or roomy
        if grave and (own := [one for one in away if one not in busy]):
            return own[0]
        if grave and self._may_wait(live, now_s):
            return None
        if live.record.strikes and (clean := [one for one in away if one not in suspects]):
            return clean[0]
        light = [one for one in away if one not in alone]
        if light or grave:
            return light[0] if light else None
        # Beside one with two strikes it would likely be lost again, and that death would tell less.
        return None if self._may_wait(live, now_s) else away[0]

    def _say_other_bits(self, live: Live, now_s: float) -> None:
        """Once a wait: after an upgrade, say, no worker of the fleet makes the bits that the session began with."""
        if live.told_other_bits or any(self._fits(live, one) for one in self.workers):
            return
        live.told_other_bits = True
        live.record.reason = (
            f"no worker makes the bits of this stream any more (numerics_id {live.numerics_id}): an operator may "
            "migrate it with allow_approximate"
        )
        self._note(now_s, "wait", session=live.record.session_id, reason=live.record.reason)
        self._tell_session(live)

    def _may_wait(self, live: Live, now_s: float) -> bool:
        """Whether it may still wait for a better worker; asked at each tick, the first time starts the clock."""
        if live.own_by_s is None:
            live.own_by_s = now_s + OWN_WORKER_S
        if now_s >= live.own_by_s:
            return False
        # The tick believes it placed: it would not come back to it by itself.
        self.wake_at_s = live.own_by_s if self.wake_at_s is None else min(self.wake_at_s, live.own_by_s)
        return True
