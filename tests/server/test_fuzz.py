"""Whatever comes in is taken or refused with a typed error that repeats nothing of it."""

from __future__ import annotations

import json
import random

import pytest

from turboserve.errors import TurboServeError
from turboserve.server import protocol
from turboserve.server.bodies import CreateSessionBody, parse_json
from turboserve.server.gateway_config import Limits
from turboserve.server.guards import MessageGuard, Verdict

MESSAGES = [
    {"type": "attach", "token": "t" * 43, "next_index": 3, "format": "raw", "pace": "live"},
    {"type": "prompt", "text": "a red circle", "event_id": "e", "from_index": 9},
    {"type": "ack", "index": 4},
    {"type": "pause"},
    {"type": "ping", "t": 1.5},
]
PIECES = ["", "null", "NaN", "1e999", "-1", "9" * 400, '"\\ud800"', "[[[[", "{}", "\x00", "\\", '"type"', "💥", '"' * 3]
SECRET = "hunter2"


def mutated(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        match rng.randrange(4):
            case 0:
                text = text[:at] + rng.choice(PIECES) + text[at:]
            case 1:
                text = text[:at] + text[at + rng.randint(1, 9) :]
            case 2:
                text = text[:at] + chr(rng.randrange(1, 0x2FF)) + text[at + 1 :]
            case 3:
                text = text.replace(rng.choice(['"', ":", ",", "1", "a"]), rng.choice(PIECES), 1)
    return text


def test_viewer_messages() -> None:
    rng = random.Random(7)
    taken = 0
    for _ in range(20_000):
        text = mutated(rng, json.dumps(rng.choice(MESSAGES)))
        try:
            message = protocol.decode_viewer_message(text)
            if isinstance(message, protocol.Prompt):
                clean = protocol.clean_prompt(message.text)
                assert 0 < len(clean.encode()) <= protocol.PROMPT_BYTES_MAX
            taken += 1
        except TurboServeError as error:
            assert len(str(error)) < 300
    assert 100 < taken < 19_000  # both ways out were taken


def test_bodies() -> None:
    rng = random.Random(11)
    whole = json.dumps({"prompt": "x", "seed": 4, "format": "raw", "max_duration_s": 2.5, "steps": 4, "size": "96x96"})
    for _ in range(20_000):
        data = mutated(rng, whole).encode("utf-8", "surrogatepass")
        try:
            value = parse_json(data, 16)
            CreateSessionBody.model_validate(value)
        except (TurboServeError, ValueError):  # pydantic's errors are ValueErrors; bodies.py turns them into ours
            continue


@pytest.mark.parametrize(
    "text", [f'{{"type": "{SECRET}"}}', f'{{"type": "prompt", "text": ["{SECRET}"]}}', f'{{"{SECRET}": 1}}', SECRET]
)
def test_errors_repeat_nothing(text: str) -> None:
    with pytest.raises(TurboServeError) as refused:
        protocol.decode_viewer_message(text)
    assert SECRET not in str(refused.value)


def test_message_guard_counts_on_the_clock_it_is_given() -> None:
    guard = MessageGuard(Limits())
    verdicts = [guard.message(0.0) for _ in range(61)]
    assert verdicts == [Verdict.TAKE] * 30 + [Verdict.DROP] * 30 + [Verdict.CLOSE]
    assert guard.warn(0.0) and not guard.warn(0.5) and guard.warn(1.0)
    assert guard.message(2.0) is Verdict.TAKE
    bad = MessageGuard(Limits())
    assert [bad.bad(0.0) for _ in range(20)] == [False] * 19 + [True]
    assert not bad.bad(61.0)
