"""`serve --record DIR`: every tick's view and plan into rotating files of bounded size.

A file is the magic, then frames of (length, CRC-32, zlib-compressed bytes): one header, then one record a tick
(orchestrator/recorded.py). A new file begins when the newest is full; of more than FILES_KEPT the oldest goes.
`turboserve simulate --from-recording DIR` runs the same ticks again.
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from turboserve.orchestrator.plan import Plan
from turboserve.orchestrator.recorded import TickEncoder, encode_header
from turboserve.orchestrator.scheduler import Memory, TickConfig
from turboserve.orchestrator.view import ClusterView

MAGIC = b"TSREC001"
FRAME = struct.Struct("<II")
FILE_BYTES = 16 << 20
FILES_KEPT = 8
Decide = Callable[[ClusterView, Memory, float], tuple[Plan, Memory]]


class TickRecorder:
    """Writes what `decide` saw and said. A full disk ends the recording, not the controller."""

    def __init__(
        self,
        folder: Path,
        config: TickConfig,
        log: Any,
        *,
        file_bytes: int = FILE_BYTES,
        files_kept: int = FILES_KEPT,
    ) -> None:
        self._folder = folder
        self._config = config
        self._log = log
        self._file_bytes = file_bytes
        self._files_kept = files_kept
        self._file: IO[bytes] | None = None
        self._written = 0
        self._encoder = TickEncoder()
        self._over = False
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def around(self, decide: Decide) -> Decide:
        """`decide`, recorded."""

        def recorded(view: ClusterView, memory: Memory, now_s: float) -> tuple[Plan, Memory]:
            plan, after = decide(view, memory, now_s)
            if not self._over:
                try:
                    self._record(view, memory, now_s, plan)
                except OSError as error:
                    self._over = True
                    self._log.error("the recording has ended", folder=str(self._folder), error=error.strerror)
            return plan, after

        return recorded

    def _record(self, view: ClusterView, memory: Memory, now_s: float, plan: Plan) -> None:
        if self._file is None or self._written >= self._file_bytes:
            self._next_file(view, memory)
        self._write(self._encoder.encode(view, now_s, plan))

    def _next_file(self, view: ClusterView, memory: Memory) -> None:
        self.close()
        old = recorded_files(self._folder)
        number = int(old[-1].stem.removeprefix("ticks-")) + 1 if old else 0
        for path in old[: max(0, len(old) - self._files_kept + 1)]:
            path.unlink()
        self._file = open(self._folder / f"ticks-{number:06d}.rec", "xb")  # noqa: SIM115 - held until the next one
        self._file.write(MAGIC)
        self._written = len(MAGIC)
        self._encoder = TickEncoder()
        self._write(encode_header(self._config, view, memory, time.time()))

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        packed = zlib.compress(data, 1)
        self._file.write(FRAME.pack(len(packed), zlib.crc32(packed)) + packed)
        self._file.flush()
        self._written += FRAME.size + len(packed)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def recorded_files(folder: Path) -> list[Path]:
    """The files of a recording, oldest first."""
    return sorted(folder.glob("ticks-[0-9][0-9][0-9][0-9][0-9][0-9].rec"))
