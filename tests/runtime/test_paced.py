"""Passes padded to a latency profile: the same video, at the profile's pace."""

import json

import pytest
from engine_harness import alone, prompt_of, request_of
from tiny_model import TinyModel, session_id

from turboserve.errors import ConfigError
from turboserve.model.interface import Control, PassKind
from turboserve.runtime.engine import Engine
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.paced import PacedModel, read_profile

PROFILE = {
    "name": "test",
    "chunk_s": 0.5,
    "chunk_target_s": 0.5,
    "batch_latency_s": [0.2, 0.25, 0.4],
    "capacity": 3,
    "resident_max": 8,
    "denoise_steps": 4,
    "denoise_steps_floor": 2,
    "step_latency_share": 0.8,
}


class Clock:
    """Time that only sleeping moves; decoding takes `decode_s`."""

    def __init__(self):
        self.now_s = 0.0

    def sleep(self, seconds):
        self.now_s += seconds


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE))
    return read_profile(str(path))


@pytest.mark.parametrize("decode_s", [0.0, 0.03, 0.15])
def test_a_chunk_takes_what_the_profile_says_and_its_video_is_the_same(deterministic, profile, decode_s):
    clock = Clock()

    class Slow(TinyModel):
        def decode(self, state, chunk_index):
            clock.now_s += decode_s
            return super().decode(state, chunk_index)

    model = PacedModel(Slow(), profile, clock=lambda: clock.now_s, sleep=clock.sleep)
    engine = Engine(model, KvPool(model.state_layout(), 3), model.cost(3), clock=lambda: clock.now_s)
    engine.open(session_id("b"), sum(b"b"), Control(prompt_of("b", 0)))
    digests = []
    for index in range(6):
        engine.submit(session_id("b"), request_of("b", index), 1e9)
        while engine.has_work:
            digests += [event.digest for event in engine.run_pass()]
    assert digests == alone("b", 6)
    assert clock.now_s == pytest.approx(6 * 0.2, abs=max(1e-9, decode_s))  # the last decode is nobody's to pay for


def test_parts_of_a_batch_add_up(profile):
    model = PacedModel(TinyModel(), profile)
    for count, whole_s in enumerate(PROFILE["batch_latency_s"], start=1):
        denoise, context = [PassKind.DENOISE] * count, [PassKind.CONTEXT] * count
        assert 4 * model.pass_s(denoise) + model.pass_s(context) == pytest.approx(whole_s)
        assert 2 * model.pass_s(denoise) + model.pass_s(context) == pytest.approx(profile.batch_latency(count, 2))
    assert model.cost(3).pass_s(3 * 16) == pytest.approx(model.pass_s([PassKind.DENOISE] * 3), rel=0.3)


def test_a_profile_that_is_none_says_so(tmp_path, profile):
    with pytest.raises(ConfigError, match="no-such"):
        read_profile(str(tmp_path / "no-such.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="JSON object"):
        read_profile(str(tmp_path / "list.json"))
    other = tmp_path / "steps.json"
    other.write_text(json.dumps(PROFILE | {"denoise_steps": 8}))
    with pytest.raises(ConfigError, match="8 denoise steps"):
        PacedModel(TinyModel(), read_profile(str(other)))
