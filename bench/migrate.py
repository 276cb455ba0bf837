"""State between two worker processes: every transport, against gloo.

This process asks, the other sends, the time ends when the bytes are here and have verified. `arena` hands over extents
of shared memory; `socket` is the authenticated link between nodes (here over loopback). Baselines: torch.distributed
send and recv over gloo, and raw bytes over a multiprocessing pipe; neither authenticates or verifies. `point` is a
recovery point of the embedded model from one store to another node's.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection

import click
import numpy as np
import torch

from turboserve.bench import timing
from turboserve.bench.command import bench_command
from turboserve.bench.report import Row, cpu_name, make_row, versions
from turboserve.runtime.arena import Arena, create_arena
from turboserve.runtime.channel import bound_port, new_token
from turboserve.runtime.point_transfer import receive_point, send_point
from turboserve.runtime.recovery_store import RecoveryStore
from turboserve.runtime.transport import ArenaCarrier, InlineCarrier, Offer, Transport
from turboserve.runtime.transport_links import SocketLink, connect_link, listen_for_links

SESSION = "a" * 26
SIZES = [2 << 20, 64 << 20]
PAGE_BYTES, PAGES, TAIL_BYTES = 368_640, 5, 49_152  # about a session of `shapes`
TIMEOUT_S = 60.0


def payload(bytes_: int) -> np.ndarray:
    return np.random.default_rng(bytes_).integers(0, 256, bytes_, np.uint8)


def put_point(store: RecoveryStore, epoch: int) -> None:
    pages = [store.put_page(SESSION, epoch, f"kv/{i}", payload(PAGE_BYTES), chunk=i) for i in range(PAGES)]
    point = store.commit_point(SESSION, epoch, PAGES, pages=pages, tail=payload(TAIL_BYTES), digest=b"")
    store.drop_older(SESSION, point)


async def answer(host: str, port: int, token: bytes, arena_path: str, sizes: list[int]) -> None:
    """The other process: three links, each asked by a frame that names the bytes."""
    arena = Arena.map(os.open(arena_path, os.O_RDWR), partition=1, owner_epoch=1)
    store = RecoveryStore(arena)
    put_point(store, 1)
    extents = {}
    for bytes_ in sizes:
        reservation = arena.reserve(SESSION, 1, bytes_)
        reservation.write(0, payload(bytes_))
        extents[bytes_] = arena.commit(reservation, -2)

    async def serve(way: str) -> None:
        link = await connect_link(host, port, token)
        await link.send(way.encode())
        carrier = ArenaCarrier(arena, SESSION, 1) if way == "arena" else InlineCarrier()
        transport = Transport(link, carrier)
        while asked := int(bytes(await link.receive())):
            if way == "arena":
                await transport.send(b"", [extents[asked]], timeout_s=TIMEOUT_S)
            elif way == "socket":
                await transport.send(b"", arena_pieces[asked], timeout_s=TIMEOUT_S)
            else:
                point = store.latest(SESSION)
                assert point is not None
                await send_point(transport, store, point, timeout_s=TIMEOUT_S)
        await link.close()

    arena_pieces = {bytes_: [arena.read(extent)] for bytes_, extent in extents.items()}
    await asyncio.gather(*(serve(way) for way in ("arena", "socket", "point")))


def run_answer(host: str, port: int, token: bytes, arena_path: str, sizes: list[int]) -> None:
    torch.set_num_threads(1)
    asyncio.run(answer(host, port, token, arena_path, sizes))


def run_baselines(folder: str, asked: Connection, sizes: list[int]) -> None:
    """A third process for what one would use otherwise."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(f"{folder}/store", 2), rank=1, world_size=2
    )
    sources = {bytes_: torch.from_numpy(payload(bytes_)) for bytes_ in sizes}
    while (message := asked.recv_bytes()) != b"end":
        way, _, bytes_ = message.decode().partition(" ")
        if way == "gloo":
            torch.distributed.send(sources[int(bytes_)], 0)
        else:
            asked.send_bytes(sources[int(bytes_)].numpy())
    torch.distributed.destroy_process_group()


class Receiver:
    """This process's ends, on one event loop that runs only while something is received."""

    def __init__(self, stack: ExitStack) -> None:
        self.loop = asyncio.new_event_loop()
        stack.callback(self.loop.close)
        self.fd = create_arena(4 * sum(SIZES) + (32 << 20), partition_count=2, slab_bytes=64 << 10)
        stack.callback(os.close, self.fd)
        self.arena = stack.enter_context(Arena.map(self.fd, partition=0, owner_epoch=1))
        self.arena.touch()
        far = create_arena(64 << 20, slab_bytes=64 << 10)
        stack.callback(os.close, far)
        self.store = RecoveryStore(stack.enter_context(Arena.map(far, partition=0, owner_epoch=1)))
        self.links: dict[str, SocketLink] = {}
        self.over = asyncio.Event()
        self.targets = {bytes_: np.zeros(bytes_, np.uint8) for bytes_ in SIZES}

    async def start(self, context: multiprocessing.context.SpawnContext) -> multiprocessing.process.BaseProcess:
        token = new_token()
        arrived = asyncio.Event()

        async def on_link(link: SocketLink) -> None:
            self.links[bytes(await link.receive()).decode()] = link
            if len(self.links) == 3:
                arrived.set()
            await self.over.wait()

        self.server = await listen_for_links("127.0.0.1", 0, token, on_link)
        arguments = ("127.0.0.1", bound_port(self.server), token, f"/proc/{os.getpid()}/fd/{self.fd}", SIZES)
        process = context.Process(target=run_answer, args=arguments, daemon=True)
        process.start()
        await asyncio.wait_for(arrived.wait(), 120)
        return process

    async def take(self, way: str, bytes_: int) -> np.ndarray | None:
        link = self.links[way]
        carrier = ArenaCarrier(self.arena, SESSION, 1) if way == "arena" else InlineCarrier()
        transport = Transport(link, carrier)
        await link.send(str(bytes_).encode())
        if way == "point":
            point = await receive_point(transport, self.store, timeout_s=TIMEOUT_S)
            self.point = point
            return None
        target = self.targets[bytes_]

        def place(offer: Offer) -> list:
            return [] if offer.extents else [[memoryview(target)]]

        delivery = await transport.receive(place, timeout_s=TIMEOUT_S)
        (pieces,) = delivery.buffers
        assert pieces is not None
        return np.frombuffer(pieces[0], np.uint8) if len(pieces) == 1 else np.frombuffer(b"".join(pieces), np.uint8)

    def way(self, name: str, bytes_: int) -> Callable[[], np.ndarray | None]:
        return lambda: self.loop.run_until_complete(self.take(name, bytes_))

    async def stop(self) -> None:
        for link in self.links.values():
            await link.send(b"0")
        self.over.set()
        self.server.close()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)


@bench_command
@click.option("--rounds", default=30, type=click.IntRange(3), help="Measurements of each contender.")
def command(wanted: Callable[[str], bool], rounds: int) -> Iterator[Row]:
    """Session state between two processes: arena and socket, against gloo and a pipe."""
    torch.set_num_threads(1)  # as in a worker
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        here, there = context.Pipe()
        baselines = context.Process(target=run_baselines, args=(folder, there, SIZES), daemon=True)
        baselines.start()
        stack.callback(baselines.kill)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.FileStore(f"{folder}/store", 2), rank=0, world_size=2
        )
        stack.callback(torch.distributed.destroy_process_group)
        receiver = Receiver(stack)
        other = receiver.loop.run_until_complete(receiver.start(context))
        stack.callback(other.kill)
        for bytes_ in SIZES:
            yield from _rows_of_size(receiver, here, bytes_, rounds)
        if wanted("migrate/point/socket"):
            yield from _point_rows(receiver, rounds)
        here.send_bytes(b"end")
        receiver.loop.run_until_complete(receiver.stop())
        other.join(10)
        baselines.join(10)


def _settings(shape: str) -> dict:
    return {"shape": shape, "dtype": "uint8", "device": cpu_name(), "versions": versions("torch", "numpy")}


def _rows_of_size(receiver: Receiver, here: Connection, bytes_: int, rounds: int) -> Iterator[Row]:
    by_gloo = torch.zeros(bytes_, dtype=torch.uint8)

    def gloo() -> np.ndarray:
        here.send_bytes(f"gloo {bytes_}".encode())
        torch.distributed.recv(by_gloo, 1)
        return by_gloo.numpy()

    def pipe() -> np.ndarray:
        here.send_bytes(f"pipe {bytes_}".encode())
        return np.frombuffer(here.recv_bytes(), np.uint8)

    ways: dict[str, Callable] = {
        "arena": receiver.way("arena", bytes_),
        "socket": receiver.way("socket", bytes_),
        "gloo": gloo,
        "pipe": pipe,
    }
    error = max(timing.max_rel_err(way(), payload(bytes_)) for way in ways.values())
    times = timing.alternate({**ways, "memcpy": timing.memory_copy(bytes_)}, rounds=rounds)
    for way in ("arena", "socket"):
        for baseline, name in (("gloo", "torch.distributed over gloo"), ("pipe", "multiprocessing pipe, raw bytes")):
            yield make_row(
                case=f"migrate/{way}",
                timing=times[way],
                floor="one memcpy of the bytes, in this run",
                floor_ms=times["memcpy"].median_ms,
                baseline=name,
                baseline_ms=times[baseline].median_ms,
                max_rel_err=error,
                **_settings(str(bytes_)),
            )


def _point_rows(receiver: Receiver, rounds: int) -> Iterator[Row]:
    store = receiver.store
    take = receiver.way("point", 1)

    def whole() -> None:
        store.drop(SESSION)
        take()

    def tail_only() -> None:
        take()
        store.drop_older(SESSION, receiver.point)

    whole()
    point = receiver.point
    error = timing.max_rel_err(np.frombuffer(b"".join(store.read_tail(point)), np.uint8), payload(TAIL_BYTES))
    for page in point.pages:
        received = np.frombuffer(b"".join(store.read_page(page)), np.uint8)
        error = max(error, timing.max_rel_err(received, payload(PAGE_BYTES)))
    total = PAGES * PAGE_BYTES + TAIL_BYTES
    floors = {"whole": timing.memory_copy(total), "tail": timing.memory_copy(TAIL_BYTES)}
    times = timing.alternate({"point": whole, "memcpy": floors["whole"]}, rounds=rounds)
    tail_times = timing.alternate({"tail": tail_only, "memcpy": floors["tail"]}, rounds=rounds)
    for case, taken, floor_ms, shape in (
        ("migrate/point/socket", times["point"], times["memcpy"].median_ms, f"{PAGES} pages and tail, {total} B"),
        (
            "migrate/point/socket, pages sent ahead",
            tail_times["tail"],
            tail_times["memcpy"].median_ms,
            f"{TAIL_BYTES} B",
        ),
    ):
        yield make_row(
            case=case,
            timing=taken,
            floor="one memcpy of the bytes that move, in this run",
            floor_ms=floor_ms,
            baseline="the whole point over the same socket",
            baseline_ms=times["point"].median_ms,
            max_rel_err=error,
            **_settings(shape),
        )
