"""A stream's card: all that is needed to make the same stream again, and the digest it must end with.

The server builds a card from its input log, the page offers it as "copy this stream", `turboserve generate --card`
writes one and `turboserve replay CARD.json` verifies it. As JSON:

    {
      "kind": "turboserve.card", "version": 1,
      "model": "shapes", "model_hash": "…", "numerics_id": "…",   (numerics_id "": unknown)
      "seed": 7, "size": "96x96",
      "prompt_switch": "swap",
      "decoder": "full",          (optional: where the model offers several)
      "inputs": [{"from_index": 0, "prompt": "a red circle", "prompt_version": 1},
                 {"from_index": 9, "prompt": "a blue square", "prompt_version": 2}],
      "steps": [{"from_index": 0, "steps": 4}],   (runs: each holds until the next one)
      "chunk_count": 20,
      "digest": "…",              (64 hex digits, of the last chunk; "" when chunk_count is 0)
      "digests": ["…", "…"],      (optional: one per chunk; lets a mismatch be named by its chunk)
      "approximate_from": 12      (optional: first chunk made under other numerics)
    }

Unknown keys are ignored, so that fields can be added; another `version` is refused. Build one with `Card(...)`, or
from lists per chunk with `steps_runs`; write with `to_json`, read with `from_json` or `read`.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from turboserve.digest import DIGEST_PATTERN
from turboserve.errors import InvalidRequest

CARD_KIND = "turboserve.card"
CARD_VERSION = 1
MAX_CARD_BYTES = 16 << 20
MAX_CHUNKS = 1_000_000
MAX_PROMPT_BYTES = 4096

_SIZE = re.compile(r"^([1-9]\d{0,4})x([1-9]\d{0,4})$")


@dataclass(frozen=True, slots=True)
class CardInput:
    """A prompt and the first chunk it was bound to."""

    from_index: int
    prompt: str
    prompt_version: int


@dataclass(frozen=True, slots=True)
class StepsRun:
    """Denoise steps per chunk from `from_index` on, until the next run."""

    from_index: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """See the module's docstring. A card that does not hold together is an InvalidRequest when it is made."""

    model: str
    model_hash: str
    seed: int
    size: str
    inputs: tuple[CardInput, ...]
    steps: tuple[StepsRun, ...]
    chunk_count: int
    digest: str
    numerics_id: str = ""
    prompt_switch: str = "swap"
    decoder: str = ""
    digests: tuple[str, ...] | None = None
    approximate_from: int | None = None
    kind: str = CARD_KIND
    version: int = CARD_VERSION

    def __post_init__(self) -> None:
        _need(self.kind == CARD_KIND, f"kind is {self.kind!r}", repr(CARD_KIND))
        _need(self.version == CARD_VERSION, f"version is {self.version}", str(CARD_VERSION))
        _need(_SIZE.match(self.size), f"size is {self.size!r}", 'like "96x96"')
        _need(0 <= self.chunk_count <= MAX_CHUNKS, f"chunk_count is {self.chunk_count}", f"0 to {MAX_CHUNKS}")
        _need_runs("inputs", [one.from_index for one in self.inputs])
        _need_runs("steps", [one.from_index for one in self.steps])
        for one in self.inputs:
            size = len(one.prompt.encode())
            _need(size <= MAX_PROMPT_BYTES, f"a prompt of {size} bytes", f"at most {MAX_PROMPT_BYTES}")
            _need(one.prompt_version >= 1, f"prompt_version is {one.prompt_version}", "1 or more")
        for run in self.steps:
            _need(1 <= run.steps <= 64, f"steps is {run.steps}", "1 to 64")
        _need_digest("digest", self.digest, empty=self.chunk_count == 0)
        if self.digests is not None:
            found, wanted = len(self.digests), self.chunk_count
            _need(found == wanted, f"digests has {found} entries", f"{wanted}, one per chunk")
            for index, digest in enumerate(self.digests):
                _need_digest(f"digests[{index}]", digest, empty=False)
            last = self.digests[-1] if self.digests else ""
            _need(last == self.digest, "digest is not the last of digests", "the same")

    @property
    def width(self) -> int:
        return int(self.size.split("x")[0])

    @property
    def height(self) -> int:
        return int(self.size.split("x")[1])

    def input_at(self, chunk_index: int) -> CardInput:
        """The prompt that chunk `chunk_index` was made with."""
        return self.inputs[_last_at(self.inputs, chunk_index)]

    def steps_at(self, chunk_index: int) -> int:
        """The denoise steps of chunk `chunk_index`."""
        return self.steps[_last_at(self.steps, chunk_index)].steps

    def to_json(self, *, indent: int | None = None) -> str:
        """JSON text; fields that say nothing are left out."""
        body: dict[str, Any] = msgspec.to_builtins(self)
        body = {"kind": body.pop("kind"), "version": body.pop("version"), **body}
        for name in ("digests", "approximate_from"):
            if body[name] is None:
                del body[name]
        if not body["decoder"]:
            del body["decoder"]
        data = msgspec.json.encode(body)
        return (msgspec.json.format(data, indent=indent) if indent else data).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Card:
        """The card in `text`; InvalidRequest says which field is wrong and how."""
        data = text.encode() if isinstance(text, str) else text
        _need(len(data) <= MAX_CARD_BYTES, f"a card of {len(data)} bytes", f"at most {MAX_CARD_BYTES}")
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.DecodeError as error:  # ValidationError is one, too
            raise _wrong(str(error), "a card as turboserve/card.py describes it") from None

    @classmethod
    def read(cls, path: str | Path) -> Card:
        """The card in a file."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise InvalidRequest(f"cannot read {path}: {error.strerror}", expected="a card as JSON") from None
        return cls.from_json(data)


def steps_runs(steps: Iterable[int]) -> tuple[StepsRun, ...]:
    """One number per chunk, as runs."""
    runs: list[StepsRun] = []
    for index, one in enumerate(steps):
        if not runs or runs[-1].steps != one:
            runs.append(StepsRun(index, one))
    return tuple(runs)


def _last_at(entries: Sequence[CardInput] | Sequence[StepsRun], chunk_index: int) -> int:
    return bisect.bisect_right(entries, chunk_index, key=lambda one: one.from_index) - 1


def _wrong(what: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"this is no card that can be replayed: {what}", expected=expected)


def _need(good: object, what: str, expected: str) -> None:
    if not good:
        raise _wrong(what, expected)


def _need_runs(name: str, starts: list[int]) -> None:
    _need(starts[:1] == [0], f"{name} does not begin at chunk 0", "a first entry with from_index 0")
    growing = all(first < second for first, second in itertools.pairwise(starts))
    _need(growing, f"{name} is out of order", "growing from_index")


def _need_digest(name: str, digest: str, *, empty: bool) -> None:
    if empty:
        _need(digest == "", f"{name} is {digest[:16]!r}… without a chunk", 'the empty string ""')
    else:
        _need(re.match(DIGEST_PATTERN, digest), f"{name} is {digest[:16]!r}", "64 hex digits")
