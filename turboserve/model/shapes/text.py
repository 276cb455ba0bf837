"""Prompt text -> a complete scene: a small real tokenizer, without torch.

Words come in any order, singular or plural, with synonyms. Each word has a meaning (`LEXICON`) or is plain
English that carries none (`STOP_WORDS`); everything else comes back as ignored. Adjectives bind to the next
noun, words after a noun to that noun until "and" or a comma, and what one object does the other does too
unless told otherwise. What the prompt leaves open is chosen from the session's seed, attribute by attribute,
so that a change of one word changes one thing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from turboserve.model.interface import PromptReport
from turboserve.model.shapes import vocabulary as v
from turboserve.model.shapes.lexicon import (
    BACKGROUND_COLOURS,
    BACKGROUND_LEADS,
    BACKGROUND_NOUNS,
    LEXICON,
    SHADES,
    STOP_WORDS,
    lookup,
)

ATTRIBUTES = ("shape", "colour", "size", "motion", "speed")
_CLOSERS = frozenset({"and", ",", ";", ".", "with", "plus", "&"})


@dataclass(frozen=True)
class SceneObject:
    shape: str
    colour: str
    size: str
    motion: str
    speed: str


@dataclass(frozen=True)
class Scene:
    """A scene with nothing left open. One or two objects; `start` holds their cells (x, y), always two."""

    objects: tuple[SceneObject, ...]
    background: str
    start: tuple[tuple[int, int], tuple[int, int]]

    def tokens(self) -> list[int]:
        """The SLOT_COUNT token ids of vocabulary.SLOTS."""
        values = [v.COUNTS[len(self.objects) - 1], self.background]
        for index in range(v.OBJECTS_MAX):
            if index < len(self.objects):
                one = self.objects[index]
                values += [one.shape, one.colour, one.size, one.motion, one.speed]
            else:
                values += [v.NONE] * v.OBJECT_SLOT_COUNT
        return [v.TOKEN_OFFSET[name] + known.index(value) for (name, known), value in zip(v.SLOTS, values, strict=True)]

    def words(self) -> str:
        """The scene as a sentence in the model's own words."""
        one, *rest = self.objects
        if rest == [one]:
            things = f"two {one.size} {one.colour} {one.shape}s {_action(one)}"
        else:
            things = " and ".join(f"one {x.size} {x.colour} {x.shape} {_action(x)}" for x in self.objects)
        return f"{things} on a {self.background} background"


def _action(one: SceneObject) -> str:
    pace = {"slow": " slowly", "fast": " fast"}.get(one.speed, "")
    if one.motion == "still":
        return "standing still"
    return f"drifting {one.motion}{pace}" if one.motion in v.DRIFTS else f"{one.motion}{pace}"


def scene_to_json(scene: Scene) -> dict[str, Any]:
    return asdict(scene)


def scene_from_json(data: dict[str, Any]) -> Scene:
    first, second = (tuple(cell) for cell in data["start"])
    return Scene(tuple(SceneObject(**one) for one in data["objects"]), data["background"], (first, second))


@dataclass
class _Draft:
    """An object as far as the prompt describes it."""

    values: dict[str, str] = field(default_factory=dict)
    colours: list[str] = field(default_factory=list)
    count: int | None = None
    plural: bool = False
    twin: bool = False  # like the first object in all that is not said of it

    def set(self, kind: str, value: str) -> None:
        if kind == "colour":
            self.colours.append(value)
        elif kind == "count":
            self.count = int(value)
        else:
            self.values.setdefault(kind, value)

    @property
    def empty(self) -> bool:
        return not self.values and not self.colours and self.count is None


@dataclass
class _Reading:
    drafts: list[_Draft]
    background: str | None
    ignored: list[str]
    known: int
    drifts: bool = False  # "moving" and the like: in some direction, if none is named


def read_prompt(prompt: str, seed: int, previous: Scene | None = None) -> tuple[Scene, PromptReport]:
    """The scene a prompt asks for, and what was made of its words.

    `previous` is the scene on screen: where the new prompt speaks of the same objects in another order, they
    keep their places.
    """
    reading = _read(_words(prompt))
    scene = _complete(reading, seed)
    if previous is not None:
        scene = _keep_places(scene, previous)
    report = PromptReport(
        ignored_words=tuple(dict.fromkeys(reading.ignored)),
        random_scene=reading.known == 0,
        canonical=scene.words(),
    )
    return scene, report


def check_prompt(prompt: str, seed: int) -> PromptReport:
    """What the model will make of a first prompt."""
    return read_prompt(prompt, seed)[1]


def _words(prompt: str) -> list[str]:
    text = prompt.lower().replace("’", "'").replace("-", " ")
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?|[,;.&]", text)


def _read(words: Sequence[str]) -> _Reading:
    words, background, used = _take_background(words)
    reading = _Reading([], background, [], used)
    pending, open_noun = _Draft(), False
    for word in words:
        if word in _CLOSERS:
            open_noun = False
            continue
        found = lookup(word)
        if found is None:
            if word not in STOP_WORDS:
                reading.ignored.append(word)
            continue
        kind, value, plural = found
        if kind == "motion_verb":
            reading.known += 1
            reading.drifts = True
            continue
        if kind == "background":
            if reading.background is None:
                reading.background = value
                reading.known += 1
            continue
        reading.known += 1
        if kind == "shape":
            pending.values["shape"] = value
            pending.plural = plural
            reading.drafts.append(pending)
            pending, open_noun = _Draft(), True
        elif open_noun and kind not in ("colour", "size", "count"):
            reading.drafts[-1].set(kind, value)
        else:
            pending.set(kind, value)
    _place_leftovers(reading, pending)
    return reading


def _place_leftovers(reading: _Reading, pending: _Draft) -> None:
    """Words after the last noun ("circles, two, red"): they speak of it, or of an object without a shape."""
    if pending.empty:
        return
    if not reading.drafts:
        reading.drafts.append(pending)
        return
    last = reading.drafts[-1]
    for kind, value in pending.values.items():
        last.set(kind, value)
    last.colours = last.colours or pending.colours
    last.count = last.count or pending.count


def _take_background(words: Sequence[str]) -> tuple[list[str], str | None, int]:
    """Find the phrase that names the background: (the other words, its value, words used).

    It is a background noun with the colours right before it ("a dark blue sky"), or colours after "on",
    "over" and the like with no noun of a shape behind them ("on black").
    """
    words = list(words)
    for index, word in enumerate(words):
        default = BACKGROUND_NOUNS.get(word)
        if default is None:
            continue
        first = index
        while first and (_is_shade(words[first - 1]) or words[first - 1] in STOP_WORDS - BACKGROUND_LEADS):
            first -= 1
        colour = next((one for one in words[first:index] if one in BACKGROUND_COLOURS), None)
        last = index + 1
        if colour is None and word in ("background", "backdrop"):
            # "background: black", "the background is dark green"
            after = last
            while after < len(words) and (_is_shade(words[after]) or words[after] in ("is", "be", "of", ",")):
                after += 1
            colour = next((one for one in words[last:after] if one in BACKGROUND_COLOURS), None)
            last = after if colour else last
        value = BACKGROUND_COLOURS[colour] if colour else default or None
        return words[:first] + words[last:], value, last - first
    for index, word in enumerate(words):
        if word not in BACKGROUND_LEADS:
            continue
        last = index + 1
        while last < len(words) and (_is_shade(words[last]) or words[last] in ("a", "an", "the")):
            last += 1
        colour = next((one for one in words[index + 1 : last] if one in BACKGROUND_COLOURS), None)
        noun = lookup(words[last]) if last < len(words) else None
        if colour and (noun is None or noun[0] not in ("shape", "size")):
            return words[:index] + words[last:], BACKGROUND_COLOURS[colour], last - index
    return words, None, 0


def _is_shade(word: str) -> bool:
    return word in SHADES or word in BACKGROUND_COLOURS


def _complete(reading: _Reading, seed: int) -> Scene:
    drafts = _expand(reading)
    count = len(drafts)
    if count == 0:
        count = 1 + _pick(seed, "count", 2)
        drafts = [_Draft() for _ in range(count)]
        drafts[-1].twin = count == 2 and _pick(seed, "alike", 2) == 1
    objects: list[SceneObject] = []
    for index, draft in enumerate(drafts):
        first = objects[0] if objects else None
        objects.append(_fill(draft, drafts, first, reading.drifts, seed, index))
    background = reading.background or list(v.BACKGROUNDS)[_pick(seed, "background", len(v.BACKGROUNDS))]
    return Scene(tuple(objects), background, _start(seed))


def _expand(reading: _Reading) -> list[_Draft]:
    """One draft per object, two at most; the words of a third are ignored."""
    expanded: list[_Draft] = []
    for draft in reading.drafts:
        colours = draft.colours[: v.OBJECTS_MAX]
        many = draft.count or (len(colours) if len(colours) > 1 else 2 if draft.plural else 1)
        for index in range(many):
            if len(expanded) == v.OBJECTS_MAX:
                if index == 0:
                    reading.ignored.extend([*draft.colours, *draft.values.values()])
                break
            one = _Draft(dict(draft.values))
            one.twin = index > 0
            if colours:
                one.colours = [colours[min(index, len(colours) - 1)]]
            expanded.append(one)
    return expanded


def _fill(
    draft: _Draft, drafts: Sequence[_Draft], first: SceneObject | None, drifts: bool, seed: int, index: int
) -> SceneObject:
    """Close what a draft leaves open: like its twin, as the other object does, or by the seed."""
    motions = tuple(v.DRIFTS) if drifts else v.MOTIONS
    known = {"shape": v.SHAPES, "colour": tuple(v.COLOURS), "size": tuple(v.SIZES), "motion": motions}
    values = {name: draft.values[name] for name in ATTRIBUTES if name in draft.values}
    if draft.colours:
        values["colour"] = draft.colours[0]
    if first is not None:
        inherited = ATTRIBUTES if draft.twin else ("motion", "speed")
        for name in inherited:
            values.setdefault(name, getattr(first, name))
    else:
        # The first does what the second is told to do, when only that one is: "a circle and a square moving
        # left".
        for name in ("motion", "speed"):
            later = [other.values[name] for other in drafts[1:] if name in other.values]
            if later:
                values.setdefault(name, later[0])
    for name, choices in known.items():
        if name not in values:
            values[name] = choices[_pick(seed, f"{name}{index}", len(choices))]
    paces = ("normal", "normal", "slow", "fast")
    values.setdefault("speed", paces[_pick(seed, f"speed{index}", len(paces))])
    return SceneObject(**values)


def _pick(seed: int, what: str, choices: int) -> int:
    """A number below `choices` from the seed and the name of what is chosen; the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{what}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % choices


def _start(seed: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Start cells as the training scripts draw them: the second far from the first along both axes."""
    first = (_pick(seed, "x", v.START_CELLS), _pick(seed, "y", v.START_CELLS))
    reach = v.START_CELLS - 2 * v.APART_CELLS_MIN + 1
    apart = [v.APART_CELLS_MIN + _pick(seed, f"apart {axis}", reach) for axis in "xy"]
    second = tuple((cell + step) % v.START_CELLS for cell, step in zip(first, apart, strict=True))
    return first, (second[0], second[1])


def _keep_places(scene: Scene, previous: Scene) -> Scene:
    """Order the objects so that as many attributes as possible stay with their object."""

    def agreement(objects: tuple[SceneObject, ...]) -> int:
        pairs = zip(objects, previous.objects, strict=False)
        return sum(getattr(a, name) == getattr(b, name) for a, b in pairs for name in ("shape", "colour", "size"))

    swapped = scene.objects[::-1]
    if agreement(swapped) > agreement(scene.objects):
        return Scene(swapped, scene.background, scene.start)
    return scene


def known_words() -> list[str]:
    """All words with a meaning, for help texts."""
    return sorted({*LEXICON, *BACKGROUND_NOUNS})
