"""State from one process to another: one protocol over a link, and several ways to carry the bytes.

    sender -> receiver   Offer   manifest, sizes of the buffers, how they are carried
    receiver -> sender   Ready   memory is reserved; which buffers are not needed    (or Refused, and nothing moves)
    sender -> receiver   the bytes, by the carrier
    sender -> receiver   End     a checksum for every buffer
    receiver -> sender   Done    all of them verify                                  (or Failed)

A *link* carries small frames in order both ways (transport_links.py: in memory, or an authenticated socket). A
*carrier* moves the buffers: `InlineCarrier` in frames of the link itself, `ArenaCarrier` by naming extents of the
node's arena (nothing is copied), `GroupCarrier` (transport_group.py) by NCCL or gloo, `CudaIpcCarrier`
(transport_ipc.py) by mapping the other process's device memory.

Either both sides return, or both raise, or one side cannot know: then its error is TimeoutError or ConnectionError, the
link is closed, and the owner asks the directory. Nothing here decides who owns a session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from turboserve.errors import CorruptState, NotFound, ProtocolError, Refused, StateError, TurboServeError
from turboserve.runtime.arena import Arena, Extent, ExtentId, region
from turboserve.runtime.checksum import checksum64

CHUNK_BYTES = 512 << 10
FRAME_BYTES_MAX = 4 << 20
MANIFEST_BYTES_MAX = 1 << 20
BUFFERS_MAX = 4096
BUFFER_BYTES_MAX = 1 << 40

Pieces = Sequence[Any]
"""One buffer: contiguous pieces laid end to end, each a memoryview of bytes or a flat uint8 torch tensor (which may lie
on a device; carriers that know no devices copy it through host memory)."""
Buffer = Pieces | Extent
"""What can be sent: host memory, or an extent of the sender's arena."""


class Link(Protocol):
    """Small frames, in order, each once. Bounded: `send` waits while the peer does not read."""

    async def send(self, *parts: Any) -> None:
        """One frame: buffers laid end to end, at most FRAME_BYTES_MAX. ConnectionError when the peer is gone."""
        ...

    async def receive(self) -> memoryview | bytes:
        """The next frame. ConnectionError when the peer is gone, ProtocolError when it does not verify."""
        ...

    async def close(self) -> None: ...


class _Offer(msgspec.Struct, frozen=True, array_like=True, tag="offer"):
    manifest: bytes
    sizes: list[int]
    carrier: str
    extents: list[tuple[int, int]]


class _Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    skipped: list[int]


class _Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    code: str
    message: str


class _End(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    checksums: list[int]


class _Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    pass


class _Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    message: str


_Message = _Offer | _Ready | _Refused | _End | _Done | _Failed
_decoder = msgspec.msgpack.Decoder(_Message)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a receiver is asked to take. `extents` is empty unless the bytes lie in the shared arena already."""

    manifest: bytes
    sizes: tuple[int, ...]
    extents: tuple[Extent, ...] = ()


@dataclass(frozen=True, slots=True)
class Delivery:
    """What was received and verified. A buffer is None where the receiver said that it has it."""

    manifest: bytes
    buffers: list[Pieces | None]
    extents: tuple[Extent, ...] = ()
    """With an arena: the buffers' extents, which now are the receiver's to free."""


Place = Callable[[Offer], Sequence[Pieces | None]]
"""Reserves memory for each buffer (None: not needed), before any byte moves. What it raises (a TurboServeError) reaches
the sender as Refused. For an offer of extents its answer is not used."""


class Carrier(Protocol):
    """Moves buffers between the two ends of a link, in order."""

    name: str

    def extents(self, buffers: Sequence[Buffer]) -> tuple[Sequence[Extent], Callable[[], None]]:
        """Extents to name in the offer (none: the bytes move), and how to take back what was made for it."""
        ...

    async def push(self, link: Link, buffers: Sequence[Pieces]) -> None: ...

    async def pull(self, link: Link, targets: Sequence[Pieces]) -> None: ...

    def checksum(self, pieces: Pieces) -> int:
        """What both ends compare; carriers of one name compute the same number."""


def host_bytes(piece: Any) -> memoryview:
    """A piece's bytes in host memory: where they lie, or a copy of what lies on a device."""
    return piece if isinstance(piece, memoryview) else memoryview(piece.cpu().numpy())


def _put(target: Any, data: memoryview) -> None:
    if isinstance(target, memoryview):
        target[:] = data
    else:
        target.copy_(_torch().frombuffer(bytearray(data), dtype=target.dtype))


def _torch() -> Any:
    """Only where somebody passed a tensor: this module serves processes without torch too."""
    import torch

    return torch


def host_checksum(pieces: Pieces) -> int:
    """The arena's checksum; bytes on a device are copied into host memory for it."""
    return checksum64(map(host_bytes, pieces))


def _nothing() -> None:
    return None


@dataclass(slots=True)
class InlineCarrier:
    """The bytes themselves, over the link, in chunks; one is packed while another is on its way."""

    chunk_bytes: int = CHUNK_BYTES
    name: str = "inline"

    def extents(self, buffers: Sequence[Buffer]) -> tuple[Sequence[Extent], Callable[[], None]]:
        return (), _nothing

    async def push(self, link: Link, buffers: Sequence[Pieces]) -> None:
        for pieces in buffers:
            total = sum(len(piece) for piece in pieces)
            for at in range(0, total, self.chunk_bytes):
                await link.send(*map(host_bytes, region(pieces, at, min(self.chunk_bytes, total - at))))

    async def pull(self, link: Link, targets: Sequence[Pieces]) -> None:
        for pieces in targets:
            total = sum(len(piece) for piece in pieces)
            at = 0
            while at < total:
                chunk = memoryview(await link.receive())
                if not 0 < len(chunk) <= total - at:
                    raise ProtocolError(f"a chunk of {len(chunk)} B", expected=f"1 to {total - at} B of the buffer")
                filled = 0
                for target in region(pieces, at, len(chunk)):
                    _put(target, chunk[filled : filled + len(target)])
                    filled += len(target)
                at += filled

    checksum = staticmethod(host_checksum)


@dataclass(slots=True)
class ArenaCarrier:
    """Hands over extents of the node's arena: both ends map it, and no byte is copied.

    A buffer that lies elsewhere is written into a new extent first. Once the receiver has them all, they are its own.
    """

    arena: Arena
    session: str
    epoch: int
    name: str = "arena"

    def extents(self, buffers: Sequence[Buffer]) -> tuple[Sequence[Extent], Callable[[], None]]:
        made: list[Extent] = []

        def take_back() -> None:
            for one in made:
                self.arena.free(one)

        try:
            offered = []
            for buffer in buffers:
                if isinstance(buffer, Extent):
                    offered.append(buffer)
                    continue
                made.append(self._write(buffer))
                offered.append(made[-1])
        except BaseException:
            take_back()
            raise
        return offered, take_back

    def _write(self, pieces: Pieces) -> Extent:
        reservation = self.arena.reserve(self.session, self.epoch, sum(len(piece) for piece in pieces))
        try:
            at = 0
            for piece in pieces:
                reservation.write(at, host_bytes(piece))
                at += len(piece)
            return self.arena.commit(reservation, -1)
        except BaseException:
            self.arena.free(reservation)
            raise

    async def push(self, link: Link, buffers: Sequence[Pieces]) -> None:
        return None

    async def pull(self, link: Link, targets: Sequence[Pieces]) -> None:
        return None

    checksum = staticmethod(host_checksum)


class Transport:
    """One end of a link with one way to carry bytes; the other end has the same. One transfer at a time.

    Both calls raise TimeoutError or ConnectionError when it stays open what the other end knows; the link is closed.
    """

    def __init__(self, link: Link, carrier: Carrier) -> None:
        self.link = link
        self.carrier = carrier
        self._turn = asyncio.Lock()

    async def send(self, manifest: bytes, buffers: Sequence[Buffer], *, timeout_s: float) -> list[int]:
        """Moves the buffers; returns once the receiver has verified all of them. The indices it did not need.

        Refused with the receiver's reason when it has no room or does not want them; CorruptState when they did not
        verify there. Either leaves both sides as they were.
        """
        _check_sizes(manifest, [_size(buffer) for buffer in buffers])
        return await self._in_turn(self._send(manifest, buffers), timeout_s)

    async def receive(self, place: Place, *, timeout_s: float) -> Delivery:
        """Waits for one transfer. What `place` raises refuses it and is raised here too.

        On any error the memory that `place` reserved is the caller's to give back; its content means nothing.
        """
        return await self._in_turn(self._receive(place), timeout_s)

    async def close(self) -> None:
        await self.link.close()

    async def _in_turn(self, work: Any, timeout_s: float) -> Any:
        async with self._turn:
            try:
                async with asyncio.timeout(timeout_s):
                    return await work
            except (Refused, CorruptState, _RefusedHere) as error:
                if isinstance(error, _RefusedHere):
                    raise error.reason from None
                raise
            except BaseException:
                await self.link.close()  # the peer may be anywhere in the protocol
                raise

    async def _send(self, manifest: bytes, buffers: Sequence[Buffer]) -> list[int]:
        extents, take_back = self.carrier.extents(buffers)
        try:
            names = [(one.id.entry, one.id.generation) for one in extents]
            sizes = [_size(buffer) for buffer in buffers]
            await self._say(_Offer(manifest, sizes, self.carrier.name, names))
            answer = await self._hear(_Ready, _Refused)
            if isinstance(answer, _Refused):
                raise Refused(f"the receiver refused ({answer.code}): {answer.message}")
            assert isinstance(answer, _Ready)
            skipped = set(answer.skipped)
            if extents:
                checksums = [one.checksum for one in extents]
            else:
                needed = [_pieces(buffer) for index, buffer in enumerate(buffers) if index not in skipped]
                await self.carrier.push(self.link, needed)
                checksums = [self.carrier.checksum(pieces) for pieces in needed]
            await self._say(_End(checksums))
            verdict = await self._hear(_Done, _Failed)
            if isinstance(verdict, _Failed):
                raise CorruptState(f"the transfer did not verify: {verdict.message}", hint="send it again")
        except BaseException:
            take_back()
            raise
        return sorted(skipped)

    async def _receive(self, place: Place) -> Delivery:
        asked = await self._hear(_Offer)
        assert isinstance(asked, _Offer)
        _check_sizes(asked.manifest, asked.sizes)
        try:
            offer = Offer(asked.manifest, tuple(asked.sizes), self._find_extents(asked))
            targets = list(place(offer))
            skipped = [] if offer.extents else _skipped(offer, targets)
        except TurboServeError as error:
            await self._say(_Refused(error.code, str(error)))
            raise _RefusedHere(error) from None
        await self._say(_Ready(skipped))
        if offer.extents:
            buffers: list[Pieces | None] = [self._read_extent(one) for one in offer.extents]
        else:
            buffers = list(targets)
            await self.carrier.pull(self.link, [one for one in buffers if one is not None])
        end = await self._hear(_End)
        assert isinstance(end, _End)
        found = [self.carrier.checksum(one) for one in buffers if one is not None]
        if found != end.checksums:
            wrong = [i for i, (ours, theirs) in enumerate(zip(found, end.checksums, strict=False)) if ours != theirs]
            await self._say(_Failed(f"buffers {wrong} of {len(found)}"))
            raise CorruptState(f"received buffers {wrong} of {len(found)} do not verify")
        await self._say(_Done())
        return Delivery(offer.manifest, buffers, offer.extents)

    def _find_extents(self, asked: _Offer) -> tuple[Extent, ...]:
        if asked.carrier != self.carrier.name:
            raise StateError(f"the bytes come by {asked.carrier}", expected=self.carrier.name)
        if not isinstance(self.carrier, ArenaCarrier):
            return ()
        found = []
        for (entry, generation), size in zip(asked.extents, asked.sizes, strict=True):
            extent = self.carrier.arena.get(ExtentId(entry, generation))
            if extent is None or extent.payload_bytes != size:
                raise NotFound(f"arena extent {entry}.{generation} is not there")
            found.append(extent)
        return tuple(found)

    def _read_extent(self, extent: Extent) -> Pieces:
        assert isinstance(self.carrier, ArenaCarrier)
        return self.carrier.arena.read(extent, verify=False)

    async def _say(self, message: _Message) -> None:
        await self.link.send(msgspec.msgpack.encode(message))

    async def _hear(self, *kinds: type) -> _Message:
        frame = await self.link.receive()
        try:
            message: _Message = _decoder.decode(frame)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"a transfer message that does not decode: {error}") from None
        if not isinstance(message, kinds):
            raise ProtocolError(f"a transfer message {type(message).__name__} out of order")
        return message


class _RefusedHere(Exception):
    """The receiver's own refusal: the link goes on."""

    def __init__(self, reason: TurboServeError) -> None:
        self.reason = reason


def _size(buffer: Buffer) -> int:
    return buffer.payload_bytes if isinstance(buffer, Extent) else sum(len(piece) for piece in buffer)


def _pieces(buffer: Buffer) -> Pieces:
    if isinstance(buffer, Extent):
        raise StateError("an arena extent can only go by the arena", hint="read it and send its pieces")
    return buffer


def _check_sizes(manifest: bytes, sizes: Sequence[int]) -> None:
    if len(manifest) > MANIFEST_BYTES_MAX or len(sizes) > BUFFERS_MAX:
        raise ProtocolError(
            f"a manifest of {len(manifest)} B with {len(sizes)} buffers",
            expected=f"at most {MANIFEST_BYTES_MAX} B and {BUFFERS_MAX} buffers",
        )
    if any(not 0 <= size <= BUFFER_BYTES_MAX for size in sizes):
        raise ProtocolError(f"a buffer of {max(sizes)} B", expected=f"at most {BUFFER_BYTES_MAX} B")


def _skipped(offer: Offer, targets: Sequence[Pieces | None]) -> list[int]:
    if len(targets) != len(offer.sizes):
        raise StateError(f"{len(targets)} buffers placed", expected=str(len(offer.sizes)))
    for target, size in zip(targets, offer.sizes, strict=True):
        if target is not None and sum(len(piece) for piece in target) != size:
            raise StateError("a placed buffer has another size than the offered one")
    return [index for index, target in enumerate(targets) if target is None]
