"""Recovery points on disk, for sessions that have no room in host memory and for a server that stops.

One file a session: `<session>.state`. A new one is written beside the old, synced, and takes its name in one step, so a
session has its old file or its new one, whole, whatever is killed or full when. The file is

    magic 8 | manifest bytes u64 | manifest (msgpack, point_transfer.PointManifest) | the buffers | BLAKE2b-256

and the hash at its end covers everything before it, keyed where the caller gives a key: then only who knows the key can
make a file that loads. Which session to spill is the caller's decision; these calls block, so a thread makes them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from turboserve.errors import CorruptState, InvalidRequest, NotFound, PoolExhausted, ProtocolError
from turboserve.runtime.failpoints import failpoint
from turboserve.runtime.point_transfer import IncomingPoint, PointManifest, describe_point
from turboserve.runtime.recovery_store import RecoveryPoint, RecoveryStore
from turboserve.runtime.transport import MANIFEST_BYTES_MAX, Offer

log = logging.getLogger(__name__)

MAGIC = b"TSSPILL1"
HASH_BYTES = 32
_HEAD = struct.Struct("<8sQ")
_SESSION = re.compile(r"[a-z0-9]{26}")
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SpilledSession:
    """One session's file. `file_bytes` is all of it."""

    session: str
    epoch: int
    chunk: int
    file_bytes: int


class SpillDirectory:
    """A folder of spilled sessions, at most `bytes_max` in all. For one process, one thread at a time."""

    def __init__(self, path: Path, *, bytes_max: int, key: bytes = b"") -> None:
        self.path = path
        self.bytes_max = bytes_max
        self._key = key
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leftover in path.glob("*.state.tmp"):
            leftover.unlink()
        self._sizes = {one.stem: one.stat().st_size for one in path.glob("*.state") if _SESSION.fullmatch(one.stem)}

    @property
    def used_bytes(self) -> int:
        """Of all files."""
        return sum(self._sizes.values())

    def sessions(self) -> dict[str, int]:
        """File bytes of every session that has a file."""
        return dict(self._sizes)

    def spill(self, store: RecoveryStore, session: str) -> SpilledSession:
        """Writes the session's latest point; durable when this returns. It stays in the store.

        NotFound when there is none, PoolExhausted when the folder's bound or the disk has no room: the file that was
        there before stays.
        """
        point = store.latest(session)
        if point is None:
            raise NotFound(f"session {session} has no recovery point")
        manifest, buffers = describe_point(store, point)
        packed = msgspec.msgpack.encode(manifest)
        file_bytes = _HEAD.size + len(packed) + sum(manifest.sizes) + HASH_BYTES
        after_bytes = self.used_bytes - self._sizes.get(session, 0) + file_bytes
        if after_bytes > self.bytes_max:
            raise PoolExhausted(
                f"{file_bytes} B for session {session}: the spill folder would hold {after_bytes} B",
                expected=f"at most {self.bytes_max} B",
                hint="drop another session's file",
            )
        path = self._file(session)
        temporary = path.with_name(path.name + ".tmp")
        try:
            failpoint("controller.spill.begun")
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0) as file:
                code = self._hash()
                parts: list[Any] = [_HEAD.pack(MAGIC, len(packed)), packed]
                for part in [*parts, *(one for pieces in buffers for one in pieces)]:
                    code.update(part)
                    _write_all(file, memoryview(part))
                _write_all(file, memoryview(code.digest()))
                os.fsync(file.fileno())
            if not store.check_pages(point) or store.arena.get(point.extent.id) is None:
                raise NotFound(f"the point of session {session} was dropped while it was spilled")
            temporary.rename(path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise PoolExhausted(f"no room on disk for session {session}: {error}") from error
            raise
        self._sync_folder()
        self._sizes[session] = file_bytes
        return SpilledSession(session, point.epoch, point.chunk, file_bytes)

    def load(self, store: RecoveryStore, session: str) -> RecoveryPoint:
        """Brings a session's point back into the store; the file stays until `drop`.

        NotFound, ArenaFull, or CorruptState: then nothing of it is in the store.
        """
        try:
            file = self._file(session).open("rb", buffering=0)
        except FileNotFoundError:
            raise NotFound(f"session {session} is not spilled in {self.path}") from None
        with file:
            self._verify(file, session)
            file.seek(0)
            packed, manifest = _read_manifest(file, session)
            incoming = IncomingPoint(store)
            try:
                targets = incoming.place(Offer(packed, manifest.sizes))
                for pieces, size in zip(targets, manifest.sizes, strict=True):
                    if pieces is None:  # this page is in the store already
                        file.seek(size, os.SEEK_CUR)
                    for piece in pieces or ():
                        _read_into(file, piece, session)
                return incoming.commit()
            except BaseException as error:
                incoming.cancel()
                if isinstance(error, ProtocolError):
                    raise CorruptState(f"the manifest of session {session}: {error}") from None
                raise

    def newest(self, session: str) -> tuple[int, int] | None:
        """Epoch and chunk of the point in a session's file, as its head says: `load` verifies. None without a file or a
        head that can be read."""
        if session not in self._sizes:
            return None
        try:
            with self._file(session).open("rb", buffering=0) as file:
                _, manifest = _read_manifest(file, session)
        except (OSError, CorruptState):
            return None
        return manifest.epoch, manifest.chunk

    def drop(self, session: str) -> int:
        """Deletes a session's file, durably; its bytes, 0 when there is none."""
        if self._sizes.pop(session, None) is None:
            return 0
        path = self._file(session)
        freed = path.stat().st_size
        path.unlink()
        self._sync_folder()
        return freed

    def _verify(self, file: BinaryIO, session: str) -> None:
        left = os.fstat(file.fileno()).st_size - HASH_BYTES
        code = self._hash()
        while left > 0:
            part = file.read(min(left, _READ_BYTES))
            if not part:
                break
            code.update(part)
            left -= len(part)
        if left != 0 or file.read(HASH_BYTES) != code.digest():
            raise CorruptState(
                f"the file of session {session} does not verify", hint="it was cut, changed, or keyed anew"
            )

    def _hash(self) -> hashlib.blake2b:
        return hashlib.blake2b(digest_size=HASH_BYTES, key=self._key)

    def _file(self, session: str) -> Path:
        if not _SESSION.fullmatch(session):
            raise InvalidRequest(f"session id {session!r}", expected="[a-z0-9]{26}")
        return self.path / f"{session}.state"

    def _sync_folder(self) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _read_manifest(file: BinaryIO, session: str) -> tuple[bytes, PointManifest]:
    """From where a file begins; packed as well."""
    magic, manifest_bytes = _HEAD.unpack(_read_exactly(file, _HEAD.size, session))
    if magic != MAGIC or manifest_bytes > MANIFEST_BYTES_MAX:
        raise CorruptState(f"the file of session {session} is no spilled session")
    packed = _read_exactly(file, manifest_bytes, session)
    try:
        manifest = msgspec.msgpack.decode(packed, type=PointManifest)
    except msgspec.MsgspecError as error:
        raise CorruptState(f"the manifest of session {session}: {error}") from None
    if manifest.session != session:
        raise CorruptState(f"the file of session {session} holds {manifest.session}")
    return packed, manifest


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]


def _read_into(file: BinaryIO, target: memoryview, session: str) -> None:
    while len(target):
        count = file.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise CorruptState(f"the file of session {session} ends too early")
        target = target[count:]


def _read_exactly(file: BinaryIO, count: int, session: str) -> bytes:
    data = bytearray(count)
    _read_into(file, memoryview(data), session)
    return bytes(data)
