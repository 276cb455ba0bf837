"""A session's inputs: what was bound to which chunk, and what waits for a chunk that has not begun.

A prompt gets its version when it is accepted and its index at the latest when a credit is issued. The newest wins from
its index on: whatever waits for that index or a later one is superseded.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

from turboserve.errors import EventIdConflict, IndexPassed, Overloaded
from turboserve.server.log_records import EVENT_IDS_KEPT, LoggedSession

WAITING_MAX = 16
PROMPTS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class WaitingPrompt:
    """An accepted prompt that no chunk has begun with."""

    from_index: int
    version: int
    text: str
    event_id: str | None
    asked_index: int | None = None
    """What the viewer named; None for the next chunk not yet begun."""


@dataclass(slots=True)
class PromptLine:
    """`inputs` holds (from_index, version, text) in order; the first entry is the prompt the session opened with."""

    inputs: list[tuple[int, int, str]]
    steps: list[tuple[int, int]]
    waiting: list[WaitingPrompt] = field(default_factory=list)
    newest_version: int = 1
    _events: dict[str, WaitingPrompt] = field(default_factory=dict)

    @classmethod
    def restored(cls, logged: LoggedSession) -> PromptLine:
        """The line as an earlier gateway's log tells it: what was bound, what waits, which event_ids were used."""
        opened = logged.opened
        line = cls(
            inputs=list(logged.inputs) or [(0, 1, opened.prompt)], steps=list(logged.steps) or [(0, opened.steps)]
        )
        known = [
            WaitingPrompt(one.from_index, one.version, one.prompt, one.event_id, one.asked_index)
            for one in logged.asked
        ]
        versions = {one.version for one in logged.waiting()}
        line.waiting = [one for one in known if one.version in versions]
        line.newest_version = max(line.inputs[-1][1], *(one.version for one in known), 1)
        for one in known:
            line._remember(one)
        return line

    def at(self, index: int) -> tuple[int, str]:
        """(version, text) bound to a chunk."""
        _, version, text = self.inputs[max(0, bisect_right(self.inputs, (index, 1 << 62, "")) - 1)]
        return version, text

    def steps_at(self, index: int) -> int:
        return self.steps[max(0, bisect_right(self.steps, (index, 1 << 62)) - 1)][1]

    def accept(
        self, text: str, event_id: str | None, from_index: int | None, next_unbound: int
    ) -> tuple[WaitingPrompt, list[WaitingPrompt]]:
        """Take a prompt for `from_index` (the next chunk not yet begun when None); also whom it supersedes.

        The same message again (same event_id, text and index) is the same prompt again: it changes nothing.
        """
        if event_id is not None and (first := self._events.get(event_id)) is not None:
            if (first.text, first.asked_index) != (text, from_index):
                raise EventIdConflict("this event_id was used before in this session", expected="a fresh event_id")
            return first, []
        if from_index is not None and from_index < next_unbound:
            raise IndexPassed(
                f"chunk {from_index} has already begun", expected=f"from_index {next_unbound} or later, or none"
            )
        index = next_unbound if from_index is None else from_index
        superseded = [one for one in self.waiting if one.from_index >= index]
        kept = [one for one in self.waiting if one.from_index < index]
        if len(kept) >= WAITING_MAX or len(self.inputs) >= PROMPTS_MAX:
            raise Overloaded(
                "too many prompts wait in this session", expected=f"at most {WAITING_MAX} for future chunks"
            )
        self.newest_version += 1
        prompt = WaitingPrompt(index, self.newest_version, text, event_id, from_index)
        self.waiting = [*kept, prompt]
        self._remember(prompt)
        return prompt, superseded

    def _remember(self, prompt: WaitingPrompt) -> None:
        if prompt.event_id is None:
            return
        self._events[prompt.event_id] = prompt
        while len(self._events) > EVENT_IDS_KEPT:
            del self._events[next(iter(self._events))]

    def bind(self, index: int, steps: int) -> tuple[int, str, bool]:
        """Fix the inputs of chunk `index`: (version, text, whether the prompt changed with it)."""
        ready = [one for one in self.waiting if one.from_index <= index]
        if ready:
            self.waiting = self.waiting[len(ready) :]
            self.inputs.append((index, ready[-1].version, ready[-1].text))
        if self.steps[-1][1] != steps:
            self.steps.append((index, steps))
        version, text = self.at(index)
        return version, text, bool(ready)
