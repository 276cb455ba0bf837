"""The arena as a state machine: two owners that come and go, an onlooker, both twins in turn, against a plain model."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from turboserve.errors import ArenaFull, Conflict
from turboserve.runtime import native
from turboserve.runtime.arena import Arena, Ledger, create_arena

SLAB, SLABS = 4096, 6
SESSIONS = ["a" * 26, "b" * 26]
TWINS = ["python", *(["native"] if native.IMPLEMENTATION == "native" else [])]


class ArenaStates(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.fd = create_arena(2 * SLABS * SLAB, partition_count=2, slab_bytes=SLAB)
        self.epochs = [0, 0]
        self.owners: list[Arena | None] = [None, None]
        self.onlooker = Arena.map(self.fd, implementation=TWINS[0])
        self.reserved: list = []  # (partition, reservation)
        self.committed: list = []  # (partition, extent, payload)
        for partition in (0, 1):
            self.take_over(partition, TWINS[partition % len(TWINS)])

    def teardown(self) -> None:
        for one in [*self.owners, self.onlooker]:
            if one is not None:
                one.close()
        os.close(self.fd)

    @rule(partition=st.integers(0, 1), implementation=st.sampled_from(TWINS))
    def take_over(self, partition: int, implementation: str) -> None:
        self.epochs[partition] += 1
        former = self.owners[partition]
        self.owners[partition] = Arena.map(
            self.fd, partition=partition, owner_epoch=self.epochs[partition], implementation=implementation
        )
        if former is not None:
            with pytest.raises(Conflict):
                former.reserve(SESSIONS[0], 1, 1)
            former.close()
        self.reserved = [one for one in self.reserved if one[0] != partition]

    @rule(partition=st.integers(0, 1), session=st.sampled_from(SESSIONS), bytes_=st.integers(0, 4 * SLAB))
    def reserve(self, partition: int, session: str, bytes_: int) -> None:
        owner = self.owners[partition]
        try:
            self.reserved.append((partition, owner.reserve(session, self.epochs[partition], bytes_)))
        except ArenaFull:
            assert max(1, -(-bytes_ // SLAB)) > SLABS - self.slabs_of(partition)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), chunk=st.integers(0, 99), byte=st.integers(0, 255))
    def commit(self, data, chunk: int, byte: int) -> None:
        partition, reservation = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        payload = bytes([byte]) * reservation.payload_bytes
        reservation.write(0, payload)
        extent = self.owners[partition].commit(reservation, chunk, meta=bytes([byte]))
        self.committed.append((partition, extent, payload))

    @precondition(lambda self: self.committed)
    @rule(data=st.data(), by=st.integers(0, 2))
    def free(self, data, by: int) -> None:
        _, extent, _ = self.committed.pop(data.draw(st.integers(0, len(self.committed) - 1)))
        someone = self.onlooker if by == 2 else self.owners[by]
        assert someone.free(extent)
        assert not self.onlooker.free(extent)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def cancel(self, data) -> None:
        partition, reservation = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        assert self.owners[partition].free(reservation)

    @rule(partition=st.integers(0, 1))
    def sweep(self, partition: int) -> None:
        swept = [one for one in self.reserved if one[0] == partition]
        self.reserved = [one for one in self.reserved if one[0] != partition]
        expected = sum(max(1, -(-one.payload_bytes // SLAB)) for _, one in swept) * SLAB
        assert self.onlooker.sweep(partition) == expected
        for _, reservation in swept:
            with pytest.raises(Conflict):
                self.owners[partition].commit(reservation, 0)

    def slabs_of(self, partition: int) -> int:
        held = [one.payload_bytes for at, one in self.reserved if at == partition]
        held += [one.payload_bytes for at, one, _ in self.committed if at == partition]
        return sum(max(1, -(-bytes_ // SLAB)) for bytes_ in held)

    @invariant()
    def the_ledger_is_exact(self) -> None:
        committed = sum(one.slab_bytes for _, one, _ in self.committed)
        reserved = sum(self.slabs_of(partition) for partition in (0, 1)) * SLAB - committed
        total = 2 * SLABS * SLAB
        for arena in [*self.owners, self.onlooker]:
            assert arena.ledger() == Ledger(total, total - reserved - committed, reserved, committed)
            arena.check()

    @invariant()
    def everybody_finds_and_reads_the_same(self) -> None:
        for session in SESSIONS:
            expected = sorted(
                (one for _, one, _ in self.committed if one.session == session), key=lambda one: one.age_key
            )
            for arena in [*self.owners, self.onlooker]:
                assert sorted(arena.find(session), key=lambda one: (one.age_key, one.id.entry)) == sorted(
                    expected, key=lambda one: (one.age_key, one.id.entry)
                )
        for _, extent, payload in self.committed:
            assert self.onlooker.read_bytes(extent) == payload


ArenaStates.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestArenaStates = ArenaStates.TestCase
