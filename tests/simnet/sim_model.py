"""The toy model and its oracle. A session's state is a hash of all its inputs, a chunk a hash of state and input, so a
chunk made from a wrong history, twice from different inputs, or out of order cannot have the right digest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from sim_world import Violation

from turboserve.digest import next_digest
from turboserve.server.log_records import Bound, Opened, Record


def _hash(*parts: Any) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def first_state(seed: int) -> bytes:
    return _hash("state", seed)


def make_chunk(state: bytes, seed: int, index: int, steps: int, version: int, prompt: str) -> tuple[bytes, bytes]:
    """(the chunk's frames, the state after it)."""
    inputs = (seed, index, steps, version, prompt)
    return _hash("frames", state, inputs), _hash("after", state, inputs)


@dataclass
class Reference:
    """One session as it would run undisturbed, from the inputs that are on disk."""

    seed: int
    inputs: list[tuple[int, int, str]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    state: bytes = b""

    def digest(self, index: int) -> str:
        while len(self.digests) <= index:
            at = len(self.digests)
            if at >= len(self.inputs):
                raise Violation(f"I4 chunk {index} exists and its inputs are not durable (to {at})")
            steps, version, prompt = self.inputs[at]
            frames, self.state = make_chunk(self.state or first_state(self.seed), self.seed, at, steps, version, prompt)
            self.digests.append(next_digest(self.digests[-1] if self.digests else "", frames))
        return self.digests[index]


class Oracle:
    """What is durable of every session's inputs."""

    def __init__(self) -> None:
        self.sessions: dict[str, Reference] = {}
        self._prompts: dict[str, str] = {}

    def durable(self, record: Record) -> None:
        """A record is on disk. Inputs that were bound once never change."""
        if isinstance(record, Opened):
            self.sessions.setdefault(record.sid, Reference(record.seed))
            self._prompts.setdefault(record.sid, record.prompt)
        elif isinstance(record, Bound):
            known = self.sessions[record.sid]
            prompt = record.prompt
            if prompt is None:
                prompt = known.inputs[-1][2] if known.inputs else self._prompts[record.sid]
            inputs = (record.steps, record.version, prompt)
            if record.index < len(known.inputs):
                if known.inputs[record.index] != inputs:
                    raise Violation(f"I4 inputs of chunk {record.index} changed", known.inputs[record.index], inputs)
            elif record.index == len(known.inputs):
                known.inputs.append(inputs)
            else:
                raise Violation(f"I4 inputs of chunk {len(known.inputs)} are missing before {record.index}")

    def check_begin(self, sid: str, index: int, steps: int, version: int, prompt: str) -> None:
        """A worker begins a chunk."""
        known = self.sessions.get(sid)
        if known is None or index >= len(known.inputs):
            raise Violation(f"I4 chunk {index} begins before its inputs are durable")
        if known.inputs[index] != (steps, version, prompt):
            raise Violation(f"I4 chunk {index} begins with other inputs than are durable")
