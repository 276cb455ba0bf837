"""A session's state into host memory and back: copies, checksums, whole points; on a CPU, or with a CUDA device.

`copy` moves the pieces of pages (many small ones, as they lie in a cache) into the arena: the copy engine against
torch's and numpy's own copies in the calling thread. `checksum` is the arena's, against what the standard library has.
`pack` is the same with small pieces gathered into one buffer on the device (and scattered after), against a copy each.
`reserve-commit` is the table alone. `suspend`, `write-through` and `restore` are recovery points of the embedded model,
against safetensors of the same tensors. Rows with `cuda` in their case need a device and page-lock the arena.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import click
import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from turboserve.bench import timing
from turboserve.bench.command import bench_command
from turboserve.bench.offload_pack import pack_times
from turboserve.bench.report import Row, cpu_name, make_row, versions
from turboserve.model.interface import ChunkRequest, Control, SessionTensors
from turboserve.model.shapes.model import ShapesModel
from turboserve.runtime import native
from turboserve.runtime.arena import Arena, create_arena
from turboserve.runtime.checksum import checksum64
from turboserve.runtime.copy_engine import CopyEngine, join_pieces
from turboserve.runtime.engine import Engine
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.packing import ExtentKernels, state_kernels
from turboserve.runtime.recovery_store import RecoveryPoint, RecoveryStore
from turboserve.runtime.session_points import SessionPoints
from turboserve.runtime.session_tensors import HeldSession
from turboserve.runtime.snapshot import SnapshotShape, tensor_addresses

SESSION = "a" * 26
TWINS = ["python", *(["native"] if native.IMPLEMENTATION == "native" else [])]
TWIN_NAMES = {"python": "Python twin", "native": "C++"}
# (pieces, bytes of each): a page of `shapes`, one of a model with 30 layers at 480p cut to a sixteenth
BATCHES = [(12, 30_720), (60, 1 << 20)]
# Both sides of PACK_BELOW_BYTES, to see where packing stops to win.
PACKED = [(480, 4096), (480, 30_720), (240, 256 << 10), (64, 1 << 20), (32, 4 << 20)]
CHUNKS = 8


def settings(shape: str, device: str | None = None) -> dict:
    return {
        "shape": shape,
        "dtype": "uint8",
        "device": device or cpu_name(),
        "versions": versions("torch", "numpy", "safetensors"),
    }


def copies(pieces: int, piece_bytes: int, rounds: int, device: str) -> tuple[dict[str, timing.Timing], float]:
    """Times of every way to bring the pieces into the arena, and the largest error."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randint(0, 256, (pieces, 2, piece_bytes), dtype=torch.uint8, generator=generator).to(device)
    sources = [row[0] for row in whole]  # every second row, as the pages of a cache lie
    with ExitStack() as stack:
        fd = create_arena(pieces * piece_bytes + (1 << 20))
        stack.callback(os.close, fd)
        arena = stack.enter_context(Arena.map(fd, partition=0, owner_epoch=1))
        if device != "cpu":
            arena.pin()
        else:
            arena.touch()
        reservation = arena.reserve(SESSION, 1, pieces * piece_bytes)
        (memory,) = reservation.views
        batch = np.array(join_pieces(reservation.addresses(), tensor_addresses(sources)), np.uint64)
        into = torch.frombuffer(memory, dtype=torch.uint8).view(pieces, piece_bytes)
        into_array = np.frombuffer(memory, np.uint8).reshape(pieces, piece_bytes)
        ways: dict[str, Callable] = {}
        for twin in TWINS if device == "cpu" else ["native"]:
            engine = stack.enter_context(CopyEngine(device, implementation=twin))
            ways[twin] = lambda engine=engine: engine.submit(batch).wait(60)

        def by_torch() -> None:
            for row, source in zip(into, sources, strict=True):
                row.copy_(source)

        def by_numpy() -> None:
            for row, source in zip(into_array, arrays, strict=True):
                np.copyto(row, source)

        ways["torch"] = by_torch
        if device == "cpu":
            arrays = [one.numpy() for one in sources]
            ways["numpy"] = by_numpy
        expected = torch.stack(sources).cpu().numpy()
        error = 0.0
        for way in ways.values():
            into_array[:] = 0
            way()
            error = max(error, timing.max_rel_err(into_array, expected))
        floors = {"memcpy": timing.memory_copy(pieces * piece_bytes)}
        if device != "cpu":
            flat = torch.empty(pieces * piece_bytes, dtype=torch.uint8, device=device)

            def pinned_peak() -> None:
                into.view(-1).copy_(flat, non_blocking=True)
                torch.cuda.synchronize()

            floors = {"memcpy": pinned_peak}
        times = timing.alternate({**ways, **floors}, rounds=rounds)
    return times, error


def copy_rows(rounds: int, device: str) -> Iterator[Row]:
    for pieces, piece_bytes in BATCHES:
        times, error = copies(pieces, piece_bytes, rounds, device)
        floor = "one memcpy of the bytes" if device == "cpu" else "one pinned copy of the bytes, contiguous"
        for twin in [one for one in TWINS if one in times]:
            for baseline, name in (("torch", "torch copy_, piece by piece"), ("numpy", "numpy copyto, piece by piece")):
                if baseline in times:
                    yield make_row(
                        case=f"offload/copy/{device}/{TWIN_NAMES[twin]}",
                        timing=times[twin],
                        floor=f"{floor}, in this run",
                        floor_ms=times["memcpy"].median_ms,
                        baseline=name,
                        baseline_ms=times[baseline].median_ms,
                        max_rel_err=error,
                        **settings(
                            f"{pieces}x{piece_bytes}", None if device == "cpu" else torch.cuda.get_device_name()
                        ),
                    )


def pack_rows(
    rounds: int, device: torch.device, kernels: ExtentKernels, batches: list[tuple[int, int]] = PACKED
) -> Iterator[Row]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    for pieces, piece_bytes in batches:
        times, error = pack_times(pieces, piece_bytes, rounds, device, kernels)
        for way in ("out", "home"):
            yield make_row(
                case=f"offload/pack/{way}",
                timing=times[f"{way} packed"],
                floor="one pinned copy of the bytes, contiguous, in this run",
                floor_ms=times[f"{way} floor"].median_ms,
                baseline="the copy engine, a copy for each piece",
                baseline_ms=times[f"{way} plain"].median_ms,
                max_rel_err=error,
                **settings(f"{pieces}x{piece_bytes}", name),
            )


def checksum_rows(rounds: int) -> Iterator[Row]:
    data = np.random.default_rng(1).integers(0, 256, 8 << 20, np.uint8)
    values = {twin: checksum64([data], implementation=twin) for twin in TWINS}
    ways: dict[str, Callable] = {twin: (lambda twin=twin: checksum64([data], implementation=twin)) for twin in TWINS}
    ways |= {
        "crc32": lambda: zlib.crc32(data),
        "blake2b": lambda: hashlib.blake2b(data).digest(),
        "memcpy": timing.memory_copy(data.nbytes),
    }
    times = timing.alternate(ways, rounds=rounds)
    for twin in TWINS:
        for baseline, name in (("crc32", "zlib.crc32"), ("blake2b", "hashlib.blake2b")):
            yield make_row(
                case=f"offload/checksum/{TWIN_NAMES[twin]}",
                timing=times[twin],
                floor="one memcpy of the bytes, in this run",
                floor_ms=times["memcpy"].median_ms,
                baseline=name,
                baseline_ms=times[baseline].median_ms,
                max_rel_err=float(len(set(values.values())) != 1),
                **settings(str(data.nbytes)),
            )


def table_rows(rounds: int) -> Iterator[Row]:
    """Reserve, commit and free one empty extent in an arena of 4096 slabs."""
    with ExitStack() as stack:
        ways: dict[str, Callable] = {}
        for twin in TWINS:
            fd = create_arena(4096 * 4096, slab_bytes=4096)
            stack.callback(os.close, fd)
            arena = stack.enter_context(Arena.map(fd, partition=0, owner_epoch=1, implementation=twin))

            def once(arena: Arena = arena) -> None:
                arena.free(arena.commit(arena.reserve(SESSION, 1, 0), 0))

            ways[twin] = once
        header = bytes(512)
        times = timing.alternate({**ways, "crc": lambda: (zlib.crc32(header), zlib.crc32(header))}, rounds=10 * rounds)
        for twin in TWINS:
            yield make_row(
                case=f"offload/reserve-commit/{TWIN_NAMES[twin]}",
                timing=times[twin],
                floor="two CRC-32 of a header by zlib, in this run",
                floor_ms=times["crc"].median_ms,
                baseline="Python twin",
                baseline_ms=times["python"].median_ms,
                max_rel_err=0.0,
                **settings("4096 slabs"),
            )


def made_session() -> tuple[ShapesModel, SnapshotShape, HeldSession]:
    """The embedded model's architecture (random weights: bytes are bytes) after a full window of chunks."""
    model = ShapesModel.random(1)
    pool = KvPool(model.state_layout(), 2)
    engine = Engine(model, pool)
    engine.open(SESSION, 7, Control("a red ball", 1))
    for index in range(CHUNKS):
        engine.submit(SESSION, ChunkRequest(index, 1, Control("a red ball", 1)), 1e9)
        while engine.has_work:
            engine.run_pass()
    shape = SnapshotShape(model.spec, model.state_layout(), "bench")
    return model, shape, engine._sessions[SESSION]


def point_rows(rounds: int) -> Iterator[Row]:
    model, shape, session = made_session()
    tensors = {one.name: session.state.tensors[one.name] for one in [*shape.page_fields, *shape.tail_fields()]}
    with ExitStack() as stack:
        fd = create_arena(64 << 20, slab_bytes=64 << 10)
        stack.callback(os.close, fd)
        arena = stack.enter_context(Arena.map(fd, partition=0, owner_epoch=1))
        arena.touch()
        store = RecoveryStore(arena)
        session.kept.clear()  # safetensors saves no frames either
        running = SessionPoints(store, shape)

        def write(points: SessionPoints, epoch: int) -> RecoveryPoint:
            session.saved = False
            return points.write(session, epoch)

        def suspend() -> None:
            write(SessionPoints(store, shape), 1)

        def write_through() -> None:
            pages = running._written[SESSION].pages
            ended = pages.pop(max(pages))
            write(running, 2)
            arena.free(ended.extent)  # as the page that leaves the window is

        def read_into(pool: KvPool) -> SessionTensors:
            slot = pool.acquire(SESSION)
            state = SessionTensors(session_id=SESSION, seed=7, slot=slot, tensors=pool.tensors(SESSION))
            assert running.read(state, {}) is not None
            return state

        target = KvPool(model.state_layout(), 1)

        def bring_back() -> None:
            read_into(target)
            target.release(SESSION)

        point = write(running, 2)
        back = read_into(KvPool(model.state_layout(), 1))
        error = max(
            timing.max_rel_err(back.tensors[one.name].numpy(), session.state.tensors[one.name].numpy())
            for one in shape.tail_fields()
        )
        for chunk in shape.page_chunks(point.chunk):
            ours, theirs = (shape.page_pieces(one.tensors, chunk) for one in (session.state, back))
            error = max(error, timing.max_rel_err(torch.cat(theirs).numpy(), torch.cat(ours).numpy()))
        packed = save_tensors(tensors)

        def unpack() -> None:
            loaded = load_tensors(packed)
            for name, tensor in loaded.items():
                tensors[name].copy_(tensor)

        page, whole = shape.page_bytes + shape.tail_bytes(), point.total_bytes
        ways = {
            "suspend": suspend,
            "write-through": write_through,
            "restore": bring_back,
            "save": lambda: save_tensors(tensors),
            "load": unpack,
            "memcpy whole": timing.memory_copy(whole),
            "memcpy page": timing.memory_copy(page),
        }
        # `suspend` ends the pages that `running` knows, so each contender is measured by itself.
        times: dict[str, timing.Timing] = {}
        for names in (["suspend", "save", "memcpy whole"], ["write-through", "memcpy page"], ["restore", "load"]):
            if "suspend" not in names:
                store.drop(SESSION)
                write(running, 3)
            times |= timing.alternate({name: ways[name] for name in names}, rounds=rounds)
        for case, bytes_, floor, baseline, name in (
            ("suspend", whole, "memcpy whole", "save", "safetensors save of the same tensors"),
            ("write-through", page, "memcpy page", "save", "safetensors save of all tensors"),
            ("restore", whole, "memcpy whole", "load", "safetensors load of the same tensors, copied in"),
        ):
            yield make_row(
                case=f"offload/{case}",
                timing=times[case],
                floor="one memcpy of the bytes that move, in this run",
                floor_ms=times[floor].median_ms,
                baseline=name,
                baseline_ms=times[baseline].median_ms,
                max_rel_err=error,
                **settings(f"shapes, {bytes_} B"),
            )


@bench_command
@click.option("--rounds", default=50, type=click.IntRange(3), help="Measurements of each contender.")
def command(wanted: Callable[[str], bool], rounds: int) -> Iterator[Row]:
    """A session's state into host memory and back, against plain copies and safetensors."""
    torch.set_num_threads(1)  # as in a worker
    if any(wanted(f"offload/copy/cpu/{TWIN_NAMES[twin]}") for twin in TWINS):
        yield from copy_rows(rounds, "cpu")
    if torch.cuda.is_available() and native.load_cuda()[1] and wanted("offload/copy/cuda/C++"):
        yield from copy_rows(rounds, "cuda")
    if any(wanted(f"offload/pack/{way}") for way in ("out", "home")):
        if torch.cuda.is_available() and native.load_cuda()[1]:
            device = torch.device("cuda", torch.cuda.current_device())
            kernels = state_kernels(device)
            assert kernels is not None
            yield from pack_rows(rounds, device, kernels)
        else:
            click.echo("not run: offload/pack: there is no CUDA device here to pack on", err=True)
    if any(wanted(f"offload/checksum/{TWIN_NAMES[twin]}") for twin in TWINS):
        yield from checksum_rows(rounds)
    if any(wanted(f"offload/reserve-commit/{TWIN_NAMES[twin]}") for twin in TWINS):
        yield from table_rows(rounds)
    if any(wanted(f"offload/{case}") for case in ("suspend", "write-through", "restore")):
        yield from point_rows(rounds)
