"""The gateway's append-only log: framed records, one checksum each, group-committed by a thread of its own.

    file   := magic record*
    record := length u32 | crc32 u32 (of length and payload) | payload

`append` returns a sequence number at once; the thread writes what has gathered, calls fdatasync once for all of it
and reports the highest number that is now durable. A failed write or sync is final: the thread reports it and takes
nothing more, because after a failed fsync the kernel may have dropped the pages and a retry would lie.

The thread follows the records it writes, so it knows the sessions that have not ended; when the file has grown past
`compact_bytes` it writes a fresh one that tells just these, and swaps it in.
"""

from __future__ import annotations

import itertools
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from turboserve.errors import CorruptState
from turboserve.server.log_records import AnyRecord, Record, decode_record, encode_record, follow, replay

MAGIC = b"turboserve-log-1\n"
RECORD_BYTES_MAX = 1 << 20
COMPACT_BYTES = 64 << 20
_HEADER = struct.Struct("<II")


def frame(payload: bytes) -> bytes:
    """A payload with its length and checksum in front."""
    length = struct.pack("<I", len(payload))
    return length + struct.pack("<I", zlib.crc32(payload, zlib.crc32(length))) + payload


def read_frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(end offset, payload) of every whole record; stops at the first that is torn or does not verify."""
    at = len(MAGIC)
    while at + _HEADER.size <= len(data):
        length, crc = _HEADER.unpack_from(data, at)
        end = at + _HEADER.size + length
        if length > RECORD_BYTES_MAX or end > len(data):
            return
        payload = data[at + _HEADER.size : end]
        if zlib.crc32(payload, zlib.crc32(data[at : at + 4])) != crc:
            return
        yield end, payload
        at = end


def read_log(path: Path) -> tuple[list[AnyRecord], int]:
    """All records up to the first torn one, and how many bytes behind it are not part of the log."""
    return parse_log(path.read_bytes() if path.exists() else b"", path.name)


def parse_log(data: bytes, name: str) -> tuple[list[AnyRecord], int]:
    """`read_log` of bytes already read."""
    if len(data) < len(MAGIC):  # a crash between creating the file and its first sync: nothing was promised yet
        return [], len(data)
    if not data.startswith(MAGIC):
        raise CorruptState(f"{name} is not a gateway log", hint="move it away, or name another --data-dir")
    records, whole = [], len(MAGIC)
    for whole, payload in read_frames(data):  # noqa: B007 - `whole` is read after the loop
        records.append(decode_record(payload))
    return records, len(data) - whole


def rewrite_log(path: Path, records: Iterable[Record]) -> None:
    """Replace the log by one that holds just these records: whole or not at all."""
    fresh = path.with_suffix(".fresh")
    with open(fresh, "wb") as file:
        file.write(MAGIC)
        for record in records:
            file.write(frame(encode_record(record)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class InputLog:
    """Appends from one thread, commits in another.

    `on_durable(seq)` and `on_failed(error)` are called from the committing thread.
    """

    def __init__(
        self,
        path: Path,
        *,
        on_durable: Callable[[int], None],
        on_failed: Callable[[OSError], None],
        sync: Callable[[int], None] = os.fdatasync,
        compact_bytes: int = COMPACT_BYTES,
    ) -> None:
        self._path = path
        self._compact_bytes = compact_bytes
        self._live = replay(read_log(path)[0])
        self._on_durable = on_durable
        self._on_failed = on_failed
        self._sync = sync
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._bytes = path.stat().st_size
        self._waiting: list[tuple[Record, bytes]] = []
        self._seq = 0
        self._failed = False
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="input-log", daemon=True)
        self._thread.start()

    def append(self, record: Record) -> int:
        """Queue one record; its number. What follows it must wait until that number is durable."""
        data = frame(encode_record(record))
        with self._wake:
            self._seq += 1
            self._waiting.append((record, data))
            self._wake.notify()
            return self._seq

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closing:
                    self._wake.wait()
                if not self._waiting or self._failed:
                    return
                batch, self._waiting = self._waiting, []
                seq = self._seq
            try:
                self._commit(b"".join(data for _, data in batch))
                for record, _ in batch:
                    follow(self._live, record)
                if self._bytes > self._compact_bytes:
                    self._compact()
            except OSError as error:
                self._failed = True
                self._on_failed(error)
                return
            self._on_durable(seq)

    def _commit(self, data: bytes) -> None:
        written = 0
        while written < len(data):
            written += self._file.write(data[written:]) or 0
        self._sync(self._file.fileno())
        self._bytes += len(data)

    def _compact(self) -> None:
        rewrite_log(self._path, itertools.chain.from_iterable(one.as_records() for one in self._live.values()))
        self._file.close()
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - as above
        self._bytes = self._path.stat().st_size
        # Where live sessions alone fill the bound, the next round waits until as much again has come.
        self._compact_bytes = max(self._compact_bytes, 2 * self._bytes)

    def close(self) -> None:
        """Commit what is queued and stop the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout=10)
        self._file.close()
