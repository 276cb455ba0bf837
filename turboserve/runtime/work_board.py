"""Which sessions a worker's engine is working on, in memory that outlives the worker: the launcher reads it when the
process has died.

A sealed-size memfd with two halves. The writer fills the half that does not count and then says, in one byte, that it
does: whatever instant it is killed at, one whole list is there. Nobody else writes; it is read once the writer is gone.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Iterable

from turboserve.errors import ConfigError
from turboserve.session import ID_LENGTH

NAMES_MAX = 1024
_COUNT = struct.Struct("<I")
_NAME = re.compile(f"[a-z0-9]{{{ID_LENGTH}}}")
_HALF_BYTES = _COUNT.size + NAMES_MAX * ID_LENGTH
BOARD_BYTES = 1 + 2 * _HALF_BYTES


def create_board() -> int:
    """A new board's descriptor, owned by the caller; it shows nobody."""
    fd = os.memfd_create("turboserve-work-board", os.MFD_CLOEXEC)
    os.ftruncate(fd, BOARD_BYTES)
    return fd


class WorkBoard:
    """One mapping of a board; the descriptor stays the caller's."""

    def __init__(self, fd: int) -> None:
        if os.fstat(fd).st_size != BOARD_BYTES:
            raise ConfigError(f"descriptor {fd} is no work board", expected=f"a file of {BOARD_BYTES} bytes")
        self._memory = mmap.mmap(fd, BOARD_BYTES)
        self._shown: tuple[str, ...] | None = None

    def show(self, names: Iterable[str]) -> None:
        """From now on these sessions, and no others, are being worked on; of more than NAMES_MAX the first."""
        shown = tuple(names)[:NAMES_MAX]
        if shown == self._shown:
            return
        half = 1 - self._memory[0]
        at = 1 + half * _HALF_BYTES
        data = _COUNT.pack(len(shown)) + "".join(shown).encode("ascii")
        self._memory[at : at + len(data)] = data
        self._memory[0] = half
        self._shown = shown

    def read(self) -> tuple[str, ...]:
        """The sessions that were being worked on when the writer died. What a dying process scribbled is left out."""
        at = 1 + (self._memory[0] & 1) * _HALF_BYTES
        (count,) = _COUNT.unpack_from(self._memory, at)
        at += _COUNT.size
        names = bytes(self._memory[at : at + min(count, NAMES_MAX) * ID_LENGTH]).decode("ascii", "replace")
        found = (names[k : k + ID_LENGTH] for k in range(0, len(names), ID_LENGTH))
        return tuple(one for one in found if _NAME.fullmatch(one))

    def close(self) -> None:
        self._memory.close()
