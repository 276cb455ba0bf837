"""The ticks of a running server, decided again: same views, same code, and the plans should be the same.

Written by `serve --record DIR` (runtime/recording.py says how the files look).
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turboserve.errors import ConfigError, CorruptState
from turboserve.orchestrator.recorded import TickDecoder, decode_header, plan_values
from turboserve.orchestrator.scheduler import tick

MAGIC = b"TSREC001"
FRAME = struct.Struct("<II")
RECORD_BYTES_MAX = 256 << 20
DIFFERENCES_KEPT = 20


@dataclass(slots=True)
class Verdict:
    """What a replay found."""

    files: int = 0
    ticks: int = 0
    different: int = 0
    actions: Counter[str] = field(default_factory=Counter)
    differences: list[dict[str, Any]] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    """Files whose last record is cut, as a kill leaves it; what came before counts."""

    def as_json(self) -> dict[str, Any]:
        return {
            "files": self.files,
            "ticks": self.ticks,
            "different": self.different,
            "actions": dict(sorted(self.actions.items())),
            "differences": self.differences,
            "torn": self.torn,
        }


def replay_recording(folder: Path) -> Verdict:
    """Decide every recorded tick again. ConfigError when there is no recording, CorruptState when one is damaged."""
    files = sorted(folder.glob("ticks-[0-9][0-9][0-9][0-9][0-9][0-9].rec"))
    if not files:
        raise ConfigError(f"no recording in {folder}", expected="files ticks-NNNNNN.rec", hint="serve --record DIR")
    verdict = Verdict()
    for path in files:
        _replay_file(path, verdict)
    return verdict


def _replay_file(path: Path, verdict: Verdict) -> None:
    frames = _frames(path, verdict)
    first = next(frames, None)
    if first is None:
        return
    header = decode_header(first)
    verdict.files += 1
    decoder, memory = TickDecoder(header.profiles), header.memory
    for number, data in enumerate(frames):
        view, now_s, recorded = decoder.decode(data)
        plan, memory = tick(view, memory, now_s, header.config)
        verdict.ticks += 1
        verdict.actions.update(type(one).__name__ for one in plan.actions)
        if plan != recorded:
            verdict.different += 1
            if len(verdict.differences) < DIFFERENCES_KEPT:
                difference = {"recorded": plan_values(recorded), "now": plan_values(plan)}
                verdict.differences.append({"file": path.name, "tick": number, "now_s": now_s, **difference})


def _frames(path: Path, verdict: Verdict) -> Iterator[bytes]:
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CorruptState(f"{path} is no recording", expected=f"a file that begins with {MAGIC.decode()}")
        while head := file.read(FRAME.size):
            if len(head) == FRAME.size:
                length, check = FRAME.unpack(head)
                packed = file.read(min(length, RECORD_BYTES_MAX))
                if len(packed) == length and zlib.crc32(packed) == check:
                    yield _unpacked(packed, path)
                    continue
                if file.read(1):
                    raise CorruptState(f"{path}: a record in its middle does not have its checksum")
            verdict.torn.append(path.name)
            return


def _unpacked(packed: bytes, path: Path) -> bytes:
    """Bounded: a small damaged file must not become a large one in memory."""
    inflate = zlib.decompressobj()
    try:
        data = inflate.decompress(packed, RECORD_BYTES_MAX)
    except zlib.error as error:
        raise CorruptState(f"{path}: {error}") from None
    if inflate.unconsumed_tail:
        raise CorruptState(f"{path}: a record larger than {RECORD_BYTES_MAX} bytes")
    return data
