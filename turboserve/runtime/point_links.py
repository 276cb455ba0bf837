"""Recovery points to and from workers of other nodes: carries out what `worker_far.py` decides. For the thread that
talks; the bytes go over `transport_links.py`.

    sender -> receiver   Carry    which session, under which move
    both                 a transfer of the point (transport.py)
    receiver -> sender   Kept     the point is committed in the receiver's arena

The listener stands on one named address from the first point on that is awaited here, and takes only what is awaited:
anything else is refused before a byte of it moves. Everything is bounded by `timeout_s`; a receiver that is told to
refuse, or is cut off, gives back all that it had reserved.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec

from turboserve.errors import CorruptState, NotFound, ProtocolError, TurboServeError, WorkerError
from turboserve.runtime import messages as m
from turboserve.runtime import worker_books as b
from turboserve.runtime.arena import KIND_POINT
from turboserve.runtime.channel import Channel, bound_port
from turboserve.runtime.failpoints import failpoint
from turboserve.runtime.point_transfer import receive_point, send_point
from turboserve.runtime.recovery_store import RecoveryPoint, RecoveryStore
from turboserve.runtime.transport import InlineCarrier, Offer, Pieces, Transport
from turboserve.runtime.transport_links import SocketLink, connect_link, listen_for_links
from turboserve.runtime.worker_config import WorkerConfig

TIMEOUT_S = 8.0
"""Below the deadline of a move's step: who waits for the answer gives up later than who makes it."""
ATTEMPTS = 4
"""Of a point whose owner goes on: it drops what the next point does not need, also while it is read here."""


class Carry(msgspec.Struct, frozen=True, array_like=True, tag="carry"):
    session: m.SessionId
    move_id: m.Count


class Kept(msgspec.Struct, frozen=True, array_like=True, tag="kept"):
    bytes: Annotated[int, msgspec.Meta(ge=0)]


_carries = msgspec.msgpack.Decoder(Carry)
_kept = msgspec.msgpack.Decoder(Kept)


class PointLinks:
    """One worker's transfers. `host` says on which address to listen, at the first need; `post` takes what became of
    each action, `tell` whose points lie here (session -> bytes) when that is to be said."""

    def __init__(
        self,
        store: RecoveryStore,
        token: bytes,
        host: Callable[[], str],
        post: Callable[[b.PointEvent], None],
        tell: Callable[[dict[str, int]], None],
        log: Any,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._store = store
        self._token = token
        self._host = host
        self._post = post
        self._tell = tell
        self._log = log
        self._timeout_s = timeout_s
        self._listening: asyncio.Task[asyncio.Server] | None = None
        self._awaited: dict[str, int] = {}
        self._incoming: dict[str, asyncio.Task[Any]] = {}
        self._outgoing: dict[str, tuple[b.SendPoint, asyncio.Task[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def do(self, action: b.PointAction) -> None:
        """Begin what was decided; returns at once."""
        if isinstance(action, b.AwaitPoint):
            self._awaited[action.session_id] = action.move_id
            self._soon(self._await(action))
        elif isinstance(action, b.RefusePoint):
            self._awaited.pop(action.session_id, None)
            if (task := self._incoming.pop(action.session_id, None)) is not None:
                task.cancel()
        elif isinstance(action, b.ForgetPoint):
            self._store.drop(action.session_id)
        elif isinstance(action, b.TellPoints):
            self._tell(dict(sorted(self._store.sessions().items())[: m.POINTS_TOLD_MAX]))
        else:
            self._begin_to_send(action)

    async def close(self) -> None:
        """Nothing comes or goes any more."""
        for task in (*self._incoming.values(), *(task for _, task in self._outgoing.values()), *self._tasks):
            task.cancel()
        if self._listening is not None and self._listening.done() and not self._listening.exception():
            self._listening.result().close()

    def _soon(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ------------------------------------------------------------------ receiving

    async def _await(self, asked: b.AwaitPoint) -> None:
        try:
            if self._listening is None or (self._listening.done() and self._listening.exception()):
                self._listening = asyncio.ensure_future(self._listen())
            server = await asyncio.shield(self._listening)
        except (OSError, TurboServeError) as error:
            self._awaited.pop(asked.session_id, None)
            self._log.error("cannot listen for points from other nodes", host=self._host(), error=str(error))
            self._post(b.PointNotAwaited(asked.session_id, asked.move_id, WorkerError.code, f"cannot listen: {error}"))
            return
        self._post(b.PointAwaited(asked.session_id, asked.move_id, address_of(self._host(), bound_port(server))))

    async def _listen(self) -> asyncio.Server:
        server = await listen_for_links(self._host(), 0, self._token, self._take)
        self._log.info("listens for points from other nodes", host=self._host(), port=bound_port(server))
        return server

    async def _take(self, link: SocketLink) -> None:
        """One point, from one peer. A newer link for the session takes the place of an older one."""
        transport = Transport(link, InlineCarrier())
        session_id, task = "", None
        try:
            async with asyncio.timeout(self._timeout_s):
                carry = _decoded(_carries, await link.receive())
                session_id = carry.session
                if self._awaited.get(session_id) != carry.move_id:
                    await transport.receive(_not_awaited, timeout_s=self._timeout_s)
                if (older := self._incoming.get(session_id)) is not None:
                    older.cancel()
                task = self._incoming[session_id] = asyncio.ensure_future(self._receive(transport, session_id))
                point = await task
                await link.send(msgspec.msgpack.encode(Kept(point.total_bytes)))
        except (TurboServeError, ConnectionError, TimeoutError) as error:
            self._log.warning("point not received", session=session_id, peer=link.peer, error=_text(error))
        except asyncio.CancelledError:
            self._log.info("point no longer awaited", session=session_id, peer=link.peer)
        finally:
            if task is not None and self._incoming.get(session_id) is task:
                del self._incoming[session_id]

    async def _receive(self, transport: Transport, session_id: str) -> RecoveryPoint:
        point = await receive_point(transport, self._store, session=session_id, timeout_s=self._timeout_s)
        self._drop_before(point)
        failpoint("worker.receive.point")
        return point

    def _drop_before(self, point: RecoveryPoint) -> None:
        """Nobody on this node owns the session, so what is older here is nobody's. One that is newer (an owner's that
        was cut off) stays: who reads takes the newest, and it is dropped with the first point of the next owner."""
        points = self._store.arena.find(point.session, kind=KIND_POINT)
        if points and points[0].id == point.extent.id:
            self._store.drop_older(point.session, point)

    # ------------------------------------------------------------------ sending

    def _begin_to_send(self, asked: b.SendPoint) -> None:
        before = self._outgoing.get(asked.session_id)
        if before is not None:
            if before[0] == asked:
                return  # the same again
            before[1].cancel()
        self._outgoing[asked.session_id] = asked, self._soon(self._send(asked))

    async def _send(self, asked: b.SendPoint) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                sent = await self._sent(asked)
        except (TurboServeError, OSError, TimeoutError) as error:
            code = error.code if isinstance(error, TurboServeError) else WorkerError.code
            self._log.warning("point not sent", session=asked.session_id, to=asked.address, error=_text(error))
            event: b.PointEvent = b.PointNotSent(
                asked.session_id, asked.move_id, asked.ahead, code, f"its point was not sent: {_text(error)}"
            )
        else:
            event = b.PointSent(asked.session_id, asked.move_id, asked.ahead, sent)
        if self._outgoing.get(asked.session_id, (None,))[0] == asked:
            del self._outgoing[asked.session_id]
        self._post(event)

    async def _sent(self, asked: b.SendPoint) -> int:
        """Bytes that moved. A point that ended while it was sent is followed by its successor."""
        for attempt in range(ATTEMPTS):
            try:
                return await self._try_to_send(asked)
            except (NotFound, CorruptState, ConnectionError):
                if not asked.ahead or attempt + 1 == ATTEMPTS:
                    raise
            await asyncio.sleep(0)
        raise AssertionError("the last attempt returns or raises")

    async def _try_to_send(self, asked: b.SendPoint) -> int:
        point = await asyncio.to_thread(self._store.latest, asked.session_id)
        if point is None:
            raise NotFound(f"session {asked.session_id} has no recovery point on this node")
        host, port = split_address(asked.address)
        link = await connect_link(host, port, self._token)
        try:
            if asked.ahead:
                failpoint("worker.send.ahead")
            else:
                failpoint("worker.send.last")
            await link.send(msgspec.msgpack.encode(Carry(asked.session_id, asked.move_id)))
            sent = await send_point(Transport(link, InlineCarrier()), self._store, point, timeout_s=self._timeout_s)
            _decoded(_kept, await link.receive())
            failpoint("worker.send.done")
            return sent
        finally:
            with contextlib.suppress(OSError):
                await link.close()


def own_address(config: WorkerConfig, controller: Channel | None) -> str:
    """One address of this machine, where workers of other nodes may bring points."""
    if config.advertise:
        return config.advertise
    if not config.joined:
        return config.controller_host
    if controller is None:
        raise ProtocolError("the controller is away, and with it the address that it sees this worker at")
    return controller.own_host


def points_held(config: WorkerConfig, held: dict[str, int]) -> m.PointsHeld:
    return m.PointsHeld(worker_id=config.worker_id, worker_epoch=config.worker_epoch, sessions=held)


def _decoded(decoder: Any, frame: bytes) -> Any:
    try:
        return decoder.decode(frame)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"a transfer's frame that does not fit its schema: {error}") from None


def _not_awaited(offer: Offer) -> Sequence[Pieces | None]:
    raise NotFound("nothing of that session is awaited here", hint="its move was given up, or another one follows it")


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


def address_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(text: str) -> tuple[str, int]:
    """What `address_of` made."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ProtocolError(f"a transfer address {text[:64]!r}", expected="HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)
