"""One stream as its client sees it, over any number of sockets. No I/O: messages go in, meaning comes out.

Holds what must survive a lost connection: the newest token, the next index, the digest so far. The socket that
carries it lives in `aio`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from turboserve.client.chunk import Chunk
from turboserve.client.failures import from_body
from turboserve.digest import next_digest
from turboserve.errors import CorruptState, ProtocolError, TurboServeError


class Attached(msgspec.Struct, frozen=True):
    token: str
    epoch: int
    next_index: int
    numerics_id: str = ""
    mime: str | None = None


class State(msgspec.Struct, frozen=True):
    state: str
    reason: str | None = None
    queue_position: int | None = None


class ChunkHeader(msgspec.Struct, frozen=True):
    index: int
    epoch: int = 0
    frames: int = 0
    prompt_version: int = 0
    steps: int = 0
    digest: str = ""
    digest_prev: str = ""
    latency_ms: float = 0.0
    bytes: int = -1
    format: str = "raw"
    continuity: str | None = None
    init: bool = False


class PromptAccepted(msgspec.Struct, frozen=True):
    prompt_version: int
    from_index: int
    event_id: str | None = None


class PromptSuperseded(msgspec.Struct, frozen=True):
    event_id: str | None = None


class ErrorNote(msgspec.Struct, frozen=True):
    code: str
    message: str
    retryable: bool = False
    expected: str | None = None
    hint: str | None = None
    event_id: str | None = None

    def to_error(self) -> TurboServeError:
        return from_body(msgspec.to_builtins(self))


class End(msgspec.Struct, frozen=True):
    delivered: int = 0
    reason: str | None = None


class Init(msgspec.Struct, frozen=True):
    """The first bytes of a fragmented mp4; each attach sends them anew."""

    payload: bytes


Event = Attached | State | Chunk | PromptAccepted | PromptSuperseded | ErrorNote | End | Init

_KINDS: dict[str, Any] = {
    "attached": Attached,
    "state": State,
    "chunk": ChunkHeader,
    "prompt_accepted": PromptAccepted,
    "prompt_superseded": PromptSuperseded,
    "error": ErrorNote,
    "end": End,
}


def encode(kind: str, **values: Any) -> str:
    """A client message as JSON text; values that are None are left out."""
    return msgspec.json.encode({"type": kind, **{k: v for k, v in values.items() if v is not None}}).decode()


class Stream:
    """Attach, receive, acknowledge; checks that chunks are contiguous and that their digests chain."""

    def __init__(
        self,
        *,
        token: str,
        width: int,
        height: int,
        format: str,
        pace: str | None,
        next_index: int = 0,
        digest: str | None = None,
    ) -> None:
        self.token = token
        self.width = width
        self.height = height
        self.format = format
        self.pace = pace
        self.next_index = next_index
        self.digest = "" if next_index == 0 else digest
        """The chain so far; None when the stream was joined in the middle and its past is unknown."""
        self.acked = -1
        self.epoch = 0
        self.numerics_id = ""
        self.attached = False
        self._header: ChunkHeader | None = None

    def attach(self) -> str:
        """The first message on a fresh socket."""
        self.attached = False
        self._header = None
        return encode("attach", token=self.token, next_index=self.next_index, format=self.format, pace=self.pace)

    def ack(self, index: int) -> str:
        """Everything up to `index` is taken; the server may generate that much more."""
        self.acked = max(self.acked, index)
        return encode("ack", index=self.acked)

    def receive(self, message: str | bytes) -> Event | None:
        """What a message means, or None when there is nothing to do (a header, a pong, an unknown type)."""
        if isinstance(message, bytes):
            return self._binary(message)
        try:
            body = msgspec.json.decode(message)
            kind = _KINDS.get(body["type"])
            event = None if kind is None else msgspec.convert(body, kind)
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            raise ProtocolError(
                f"the server sent a message that does not fit its schema: {error}", expected="an object with a type"
            ) from None
        if isinstance(event, Attached):
            self._check_attached(event)
        if isinstance(event, ChunkHeader):
            self._header = event
            return None
        return event

    def _check_attached(self, event: Attached) -> None:
        if event.next_index != self.next_index:
            raise ProtocolError(f"attached at chunk {event.next_index}", expected=f"chunk {self.next_index}")
        # The old token stays valid until the first ack under the new one, so nothing is lost if this message is.
        self.token, self.epoch, self.numerics_id = event.token, event.epoch, event.numerics_id
        self.attached = True

    def _binary(self, payload: bytes) -> Chunk | Init:
        header, self._header = self._header, None
        if header is None:
            raise ProtocolError("binary data without a chunk header before it")
        if header.bytes not in (-1, len(payload)):
            raise ProtocolError(f"chunk {header.index} has {len(payload)} bytes", expected=f"{header.bytes}")
        if header.init:
            return Init(payload)
        if header.index != self.next_index:
            raise ProtocolError(f"the server sent chunk {header.index}", expected=f"chunk {self.next_index}")
        self._check_digest(header, payload)
        self.next_index, self.digest = header.index + 1, header.digest
        return Chunk(
            index=header.index,
            epoch=header.epoch,
            frame_count=header.frames,
            width=self.width,
            height=self.height,
            prompt_version=header.prompt_version,
            steps=header.steps,
            digest=header.digest,
            latency_ms=header.latency_ms,
            format=header.format,
            payload=payload,
            continuity=header.continuity or "",
        )

    def _check_digest(self, header: ChunkHeader, payload: bytes) -> None:
        """The link is checked for every format, the frames themselves where they come unencoded."""
        if self.digest is not None and header.digest_prev != self.digest:
            raise CorruptState(
                f"chunk {header.index} does not continue this stream",
                expected=f"digest_prev {self.digest[:16] or 'empty'}…, not {header.digest_prev[:16] or 'empty'}…",
            )
        if header.format != "raw":
            return
        size = header.frames * self.height * self.width * 3
        if len(payload) != size:
            raise ProtocolError(
                f"chunk {header.index} has {len(payload)} bytes", expected=f"{size} for {header.frames} frames"
            )
        if next_digest(header.digest_prev, payload) != header.digest:
            raise CorruptState(f"the frames of chunk {header.index} do not have the digest that came with them")
