"""What the gateway's log holds, and how a restarted gateway reads it back.

The log is the only durable thing the gateway owns. It says which sessions exist, whose token opens them, which
inputs were bound to which chunk before that chunk could be generated, and how far the viewer has received. Pixels are
not in it: from the inputs they can be made again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from turboserve.errors import CorruptState


class Record(msgspec.Struct, tag_field="t", tag=True, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all records; `sid` is the session's id."""

    sid: str


class Opened(Record, kw_only=True, frozen=True):
    """A session exists. Durable before its id is given out."""

    tenant: str
    model: str
    model_hash: str
    seed: int
    width: int
    height: int
    steps: int
    format: str
    prompt: str
    prompt_switch: str
    token_hash: str
    created_unix_s: float
    allow_reduced_steps: bool = True
    max_chunks: int | None = None
    tenant_weight: float = 1.0
    wide: bool = False
    decoder: str = ""


class Rotated(Record, kw_only=True, frozen=True):
    """A viewer attached and got a new token. Durable before the viewer sees the token."""

    token_hash: str
    token_hash_prev: str


class Bound(Record, kw_only=True, frozen=True):
    """The inputs of chunk `index`. Durable before the credit is sent. `prompt` is there when it changed."""

    index: int
    steps: int
    version: int
    prompt: str | None = None


class Asked(Record, kw_only=True, frozen=True):
    """A prompt was accepted for chunk `from_index` at the earliest. Durable before the viewer is told so.

    `asked_index` is what the viewer named, None for "the next one"; with `event_id` and `prompt` it tells a repeated
    message from another one.
    """

    version: int
    from_index: int
    prompt: str
    event_id: str | None = None
    asked_index: int | None = None


class Frontier(Record, kw_only=True, frozen=True):
    """The viewer holds everything below `delivered`; `digest` is the chain's value there."""

    delivered: int
    digest: str


class Ended(Record, kw_only=True, frozen=True):
    """Nothing follows. `failed` tells a failure from an end that was asked for."""

    reason: str
    failed: bool = False


AnyRecord = Opened | Rotated | Bound | Asked | Frontier | Ended

EVENT_IDS_KEPT = 64
"""Prompts whose event_id is remembered, so that a repeated one gets its first answer."""
ASKED_KEPT = 128
"""More than that are never kept of a session: the newest, and what still waits (at most 16)."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyRecord)


def encode_record(record: Record) -> bytes:
    return _encoder.encode(record)


def decode_record(data: bytes) -> AnyRecord:
    """One record, or CorruptState when its bytes verify but do not fit (a log of another version)."""
    try:
        return _decoder.decode(data)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise CorruptState(f"gateway log: a record that does not fit its schema ({error})") from None


@dataclass(slots=True)
class LoggedSession:
    """One session as the log tells it. `inputs` holds (from_index, version, prompt), `steps` (from_index, steps)."""

    opened: Opened
    token_hash: str
    token_hash_prev: str = ""
    bound: int = 0
    delivered: int = 0
    digest: str = ""
    inputs: list[tuple[int, int, str]] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    def waiting(self) -> list[Asked]:
        """Prompts that no chunk was bound to yet; a newer one supersedes what waits for its index or a later one."""
        newest_bound = self.inputs[-1][1] if self.inputs else 1
        waiting: list[Asked] = []
        for one in self.asked:
            if one.version > newest_bound:
                waiting = [before for before in waiting if before.from_index < one.from_index] + [one]
        return waiting

    def _ask(self, record: Asked) -> None:
        if self.asked and record.version <= self.asked[-1].version:
            return  # repeated
        self.asked.append(record)
        if len(self.asked) > ASKED_KEPT:
            waiting = self.waiting()
            self.asked = [one for one in self.asked[:-EVENT_IDS_KEPT] if one in waiting] + self.asked[-EVENT_IDS_KEPT:]

    def as_records(self) -> list[AnyRecord]:
        """The fewest records that tell the same; a start-up writes them into a fresh log."""
        sid = self.opened.sid
        records: list[AnyRecord] = [self.opened]
        if self.token_hash != self.opened.token_hash or self.token_hash_prev:
            records.append(Rotated(sid=sid, token_hash=self.token_hash, token_hash_prev=self.token_hash_prev))
        prompts = {index: (version, prompt) for index, version, prompt in self.inputs}
        changes = sorted(
            {index for index, _ in self.steps} | set(prompts) | ({self.bound - 1} if self.bound else set())
        )
        steps, version = self.opened.steps, 1
        for index in changes:
            steps = next((count for first, count in reversed(self.steps) if first <= index), steps)
            version = prompts.get(index, (version, ""))[0]
            prompt = prompts[index][1] if index in prompts else None
            records.append(Bound(sid=sid, index=index, steps=steps, version=version, prompt=prompt))
        if self.delivered:
            records.append(Frontier(sid=sid, delivered=self.delivered, digest=self.digest))
        records.extend(self.asked)
        return records


def replay(records: Iterable[AnyRecord]) -> dict[str, LoggedSession]:
    """Sessions that had not ended, by id. Records of unknown or ended sessions are ignored."""
    live: dict[str, LoggedSession] = {}
    for record in records:
        follow(live, record)
    return live


def follow(live: dict[str, LoggedSession], record: Record) -> None:
    """One record further."""
    if isinstance(record, Opened):
        live[record.sid] = LoggedSession(opened=record, token_hash=record.token_hash)
        return
    session = live.get(record.sid)
    if session is None:
        return
    match record:
        case Rotated():
            session.token_hash, session.token_hash_prev = record.token_hash, record.token_hash_prev
        case Bound():
            session.bound = max(session.bound, record.index + 1)
            if record.prompt is not None:
                session.inputs.append((record.index, record.version, record.prompt))
            if not session.steps or session.steps[-1][1] != record.steps:
                session.steps.append((record.index, record.steps))
        case Asked():
            session._ask(record)
        case Frontier():
            session.delivered, session.digest = record.delivered, record.digest
        case Ended():
            del live[record.sid]
