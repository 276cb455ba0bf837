"""Where the points of suspended sessions lie: in host memory, on disk, or nowhere but as inputs in the log.

Workers write points into the arena until a partition has no room left. Before that, those of suspended sessions go to
disk, least worth first (orchestrator/eviction.py); a session that is resumed has its point read back. Where the disk is
full too, the point that is worth least is dropped and its chunks are made again from the input log, or the new one
stays in memory. No session ends for want of room.

A point leaves the arena only when the directory says that it is on disk. At most SPILLS_AT_ONCE are on their way, and
nothing is decided on figures that were counted before they had arrived.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from turboserve.orchestrator import eviction
from turboserve.runtime.controller_books import ControllerBooks, DropFile, DropHost, Effect, Live, Load, Spill
from turboserve.session import SessionState

SPILLS_AT_ONCE = 4
SPILL_RETRY_S = 30.0
"""A point that found no room on disk, or could not be written, is left alone for so long."""
LOAD_RETRY_S = 0.2
LOAD_TRIES_MAX = 50
"""A session whose point finds no room in the arena for so many tries is made again from the input log instead."""


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """What was counted a moment ago, in bytes: `shares` says how much each session has in each partition."""

    partitions: tuple[eviction.Partition, ...] = ()
    shares: dict[str, dict[int, int]] = field(default_factory=dict)
    disk_sessions: dict[str, int] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    newer: frozenset[str] = frozenset()
    """Sessions on disk of which the arena has a newer point: a worker that was cut off wrote it late."""


class ControllerStorage(ControllerBooks):
    """Points between arena and disk."""

    count_soon = False
    """Somebody found no room, or room was made: the bytes should be counted again now."""

    @property
    def spilling(self) -> bool:
        """Whether points are on their way to disk."""
        return any(one.record.state is SessionState.SPILLING for one in self.sessions.values())

    # ------------------------------------------------------------------ what is there

    def stored_bytes(self, found: StoredBytes, now_s: float) -> list[Effect]:
        """What lies in the arena and on disk; where it is too much, points are sent on their way to disk."""
        for session_id, live in self.sessions.items():
            if live.record.state is SessionState.DISK:
                live.disk_bytes = found.disk_sessions.get(session_id, 0) if live.disk_bytes else 0
            elif self._at_home(live):  # else its worker says (PointsHeld)
                live.point_bytes = sum(found.shares.get(session_id, {}).values())
        self.storage = found.totals
        self.changed = True
        if not self.stopping:
            self._make_room(found, now_s)
        return self._flush()

    def _make_room(self, found: StoredBytes, now_s: float) -> None:
        if self.spilling or not found.totals.get("disk_total_bytes"):
            return
        used = [one.used_bytes for one in found.partitions]
        points: list[eviction.StoredPoint] = []
        for session_id, share in found.shares.items():
            live = self.sessions.get(session_id)
            if live is None or live.loading or live.move is not None:
                continue
            if not self._at_home(live):
                # An older copy: where room is short it goes, as long as the node with the newest one is there.
                short = any(4 * used[number] > 3 * found.partitions[number].total_bytes for number in share)
                if short and any(one.hello.node == live.point_node for one in self.workers.values()):
                    self._out.append(DropHost(session_id))
                    for number, bytes_ in share.items():
                        used[number] -= bytes_
                continue
            if live.wanted:
                continue
            if live.record.state is SessionState.DISK and (session_id in found.newer or not live.disk_bytes):
                # What it goes on from lies here again, and may go to disk in its turn.
                live.point_bytes = sum(share.values())
                self._move(live, SessionState.HOST, live.record.reason)
                self._tell_session(live)
            elif live.record.state is SessionState.DISK:
                # The arena's copy of what is on disk as well: gone by now, or left by whoever read it back in vain.
                live.point_bytes = 0
                self._out.append(DropHost(session_id))
                for number, bytes_ in share.items():
                    used[number] -= bytes_
            elif live.record.state is SessionState.HOST and now_s >= live.spill_after_s:
                points.append(self._point(live, sum(share.values()), now_s, by_partition=share))
        partitions = [
            eviction.Partition(one.total_bytes, left) for one, left in zip(found.partitions, used, strict=True)
        ]
        sizes = [sum(share.values()) for share in found.shares.values()]
        room_bytes = max([*sizes, *found.disk_sessions.values()], default=0)
        for choice in eviction.choose_spills(partitions, points, room_bytes=room_bytes, at_most=SPILLS_AT_ONCE):
            self._note(now_s, "spill", session=choice.session, reason=choice.reason)
            self._spill(self.sessions[choice.session])

    def _point(
        self, live: Live, bytes_: int, now_s: float, by_partition: dict[int, int] | None = None
    ) -> eviction.StoredPoint:
        """In host memory, where reading it back is lost, if `by_partition` is given; else on disk."""
        idle_s = 0.0 if live.wanted else max(0.0, now_s - float(self.view.sessions.idle_since_s[live.row]))
        again_s = eviction.read_back_s(bytes_) if by_partition is not None else self._remake_s(live)
        return eviction.StoredPoint(live.record.session_id, bytes_, idle_s, again_s, by_partition or {})

    def _remake_s(self, live: Live) -> float:
        """What it takes to make all chunks of a session again, on a worker that has nothing else to do."""
        return live.next_index * self.view.profile.batch_latency_s[0]

    def _at_home(self, live: Live) -> bool:
        """Whether its newest point lies on the server's node, so that this arena and this disk have it."""
        return live.point_node in ("", self.node)

    def _lies_on(self, live: Live, node: str) -> None:
        raise NotImplementedError

    # ------------------------------------------------------------------ to disk

    def _spill(self, live: Live) -> None:
        live.spill_tried = self.stopping
        self._move(live, SessionState.SPILLING, live.record.reason)
        self._out.append(Spill(live.record.session_id))

    def spilled(self, session_id: str, disk_bytes: int, now_s: float, why: str = "") -> list[Effect]:
        """A recovery point lies on disk. 0 bytes: it could not be written and stays in the arena; `why` is `full` where
        there was no room."""
        live = self.sessions.get(session_id)
        if live is not None and live.record.state is SessionState.SPILLING:
            again, live.spill_again = live.spill_again, False
            if disk_bytes:
                live.disk_bytes = disk_bytes
                self._lies_on(live, self.node)
                self._move(live, SessionState.DISK, live.record.reason)
                self.point_counts["spilled"] += 1
                if not (live.wanted or self.stopping):  # else it is opened from the arena at once, or that ends too
                    live.point_bytes = 0
                    self._out.append(DropHost(session_id))
            else:
                self._move(live, SessionState.HOST, live.record.reason)
                self._not_spilled(live, again, now_s, why)
            self._tell_session(live)
            self.count_soon = True
            self._tick(now_s)
        return self._flush()

    def _not_spilled(self, live: Live, again: bool, now_s: float, why: str) -> None:
        if why == "full" and not again and self._evict_for(live, now_s):
            live.spill_again = True
            self._spill(live)
            return
        live.spill_after_s = now_s + SPILL_RETRY_S
        self.point_counts["not_spilled"] += 1
        reason = "it could not be written to disk: it stays in host memory"
        if why == "full":
            reason = "the disk is full and nothing there is worth less: it stays in host memory"
        self._note(now_s, "not_spilled", session=live.record.session_id, reason=reason)

    def _evict_for(self, incoming: Live, now_s: float) -> bool:
        """Drop files that are worth less than what comes. False when there is no room to be made that way."""
        files = [
            self._point(one, one.disk_bytes, now_s)
            for one in self.sessions.values()
            if one.record.state is SessionState.DISK
            and one.disk_bytes
            and not (one.loading or one.move)
            and (self.stopping or not (one.wanted or one.point_bytes))
        ]
        bytes_ = max(1, incoming.point_bytes)
        used_bytes = sum(one.disk_bytes for one in self.sessions.values())
        over_bytes = used_bytes + bytes_ - self.storage.get("disk_total_bytes", used_bytes + bytes_)
        # Below our own bound the disk itself is full: then as much has to go as comes.
        need_bytes = over_bytes if over_bytes > 0 else bytes_
        chosen = eviction.choose_evictions(files, self._point(incoming, bytes_, now_s), need_bytes=need_bytes)
        for choice in chosen:
            self._note(now_s, "evict", session=choice.session, reason=choice.reason)
            self.point_counts["evicted"] += 1
            evicted = self.sessions[choice.session]
            evicted.disk_bytes = 0
            evicted.record.reason = "no room on disk: its chunks are made again from the input log"
            self._move(evicted, SessionState.DISK, evicted.record.reason)
            self._out.append(DropFile(choice.session))
            self._tell_session(evicted)
        return bool(chosen)

    def not_on_disk(self) -> list[str]:
        """Sessions that have begun and of which no point lies on disk: a server that starts makes those again."""
        return [one.record.session_id for one in self.sessions.values() if one.began and not one.disk_bytes]

    # ------------------------------------------------------------------ from disk

    def _load(self, live: Live) -> None:
        if not live.loading:
            live.loading = True
            self._show(live)
            self._out.append(Load(live.record.session_id))
            self._tell_session(live)

    def loaded(self, session_id: str, point_bytes: int, now_s: float, why: str = "") -> list[Effect]:
        """A recovery point has come from disk. 0 bytes: there was no room for it (`why` is `full`), or it is of no use
        and the session begins anew."""
        live = self.sessions.get(session_id)
        if live is None or not live.loading:
            return self._flush()
        live.loading = False
        if point_bytes:
            live.point_bytes, live.load_tries = point_bytes, 0
            self.point_counts["read_back"] += 1
        elif why == "full" and live.load_tries < LOAD_TRIES_MAX:
            if not live.load_tries:
                self._note(now_s, "wait", session=session_id, reason="no room in the arena to read its point back into")
            live.load_tries += 1
            live.retry_at_s = now_s + LOAD_RETRY_S
            self.count_soon = True
        else:
            live.disk_bytes = live.load_tries = 0
            reason = "no room was found to read its point back into" if why == "full" else "it cannot be used"
            self._note(now_s, "no_point", session=session_id, reason=f"its recovery point on disk: {reason}")
            self._out.append(DropFile(session_id))
        self._show(live)
        self._tick(now_s)
        return self._flush()

    def _tick(self, now_s: float) -> None:
        raise NotImplementedError
