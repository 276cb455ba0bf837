"""Recovery points as files: one session's newest point with all its pages, to be read back into an arena later.

    magic, version | header length u32 | header (msgpack) | pages, tail, frames end to end | SHA-256 of all before

A file is written under another name, synced and renamed, and the folder synced: under its own name it is whole or it
is not there. The bytes of all files together are bounded. Names are session ids, so nothing else can be meant.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from pathlib import Path

import msgspec

from turboserve.errors import CorruptState, NotFound, PoolExhausted
from turboserve.runtime.failpoints import failpoint
from turboserve.runtime.recovery_store import RecoveryPoint, RecoveryStore

_MAGIC = b"TSSPILL1"
_LENGTH = struct.Struct("<I")
_DIGEST_BYTES = 32
SUFFIX = ".point"


class _Header(msgspec.Struct, array_like=True, frozen=True):
    """Pages are (key, chunk, bytes)."""

    session: str
    epoch: int
    chunk: int
    digest: bytes
    meta: bytes
    pages: list[tuple[str, int, int]]
    tail_bytes: int
    frame_bytes: list[int]


class SpillFiles:
    """The points of one node on disk, under one folder."""

    def __init__(self, folder: Path, bytes_max: int) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._bytes_max = bytes_max
        for left in folder.glob("*.part"):  # of a process that was killed while it wrote
            left.unlink()

    def path(self, session: str) -> Path:
        return self._folder / f"{session}{SUFFIX}"

    def sessions(self) -> dict[str, int]:
        """session -> bytes of its file."""
        return {one.stem: one.stat().st_size for one in self._folder.glob(f"*{SUFFIX}")}

    def write(self, store: RecoveryStore, point: RecoveryPoint) -> int:
        """Put a point on disk; the bytes of the file. PoolExhausted over the bound, OSError from the disk."""
        total = sum(size for name, size in self.sessions().items() if name != point.session)
        if total + point.total_bytes > self._bytes_max:
            raise PoolExhausted(
                f"recovery points on disk: {total} B and {point.total_bytes} B more", expected=f"{self._bytes_max} B"
            )
        frames = store.read_frames(point)
        header = msgspec.msgpack.encode(
            _Header(
                point.session,
                point.epoch,
                point.chunk,
                point.digest,
                point.meta,
                [(page.key, page.chunk, page.payload_bytes) for page in point.pages],
                point.tail_bytes,
                [len(one) for one in frames],
            )
        )
        digest = hashlib.sha256()
        path = self.path(point.session)
        part = path.with_suffix(".part")
        try:
            with part.open("wb") as file:

                def put(data: bytes | memoryview) -> None:
                    digest.update(data)
                    file.write(data)

                put(_MAGIC + _LENGTH.pack(len(header)) + header)
                for page in point.pages:
                    for view in store.read_page(page):
                        put(view)
                for view in store.read_tail(point):
                    put(view)
                for frame in frames:
                    put(frame)
                file.write(digest.digest())
                file.flush()
                failpoint("controller.spill.written")
                os.fsync(file.fileno())
            os.replace(part, path)
            self._sync_folder()
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return path.stat().st_size

    def read(self, session: str, store: RecoveryStore) -> RecoveryPoint:
        """The point back in the arena (the store's own partition). NotFound, CorruptState, ArenaFull."""
        try:
            data = self.path(session).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"no recovery point of session {session} on disk") from None
        header, at = self._check(session, data)
        view = memoryview(data)
        refs = []
        try:
            for key, chunk, size in header.pages:
                refs.append(store.put_page(session, header.epoch, key, view[at : at + size], chunk=chunk))
                at += size
            tail = view[at : at + header.tail_bytes]
            at += header.tail_bytes
            frames = []
            for size in header.frame_bytes:
                frames.append(view[at : at + size])
                at += size
            return store.commit_point(
                session,
                header.epoch,
                header.chunk,
                pages=refs,
                tail=tail,
                frames=frames,
                digest=header.digest,
                meta=header.meta,
            )
        except BaseException:
            for ref in refs:
                store.arena.free(ref.extent)
            raise

    @staticmethod
    def _check(session: str, data: bytes) -> tuple[_Header, int]:
        """(header, where the pages begin), when every byte is as it was written."""
        start = len(_MAGIC) + _LENGTH.size
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if not data.startswith(_MAGIC) or len(data) < start + _DIGEST_BYTES:
            raise CorruptState(f"the recovery point of session {session} on disk is no such file")
        if hashlib.sha256(body).digest() != digest:
            raise CorruptState(f"the recovery point of session {session} on disk does not verify")
        (length,) = _LENGTH.unpack_from(data, len(_MAGIC))
        try:
            header = msgspec.msgpack.decode(data[start : start + length], type=_Header)
        except msgspec.MsgspecError as error:
            raise CorruptState(f"the recovery point of session {session} on disk: {error}") from None
        sizes = sum(size for _, _, size in header.pages) + header.tail_bytes + sum(header.frame_bytes)
        if header.session != session or start + length + sizes != len(body):
            raise CorruptState(f"the file of session {session} on disk holds another point")
        return header, start + length

    def drop(self, session: str) -> None:
        """Idempotent."""
        self.path(session).unlink(missing_ok=True)

    def _sync_folder(self) -> None:
        fd = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)
