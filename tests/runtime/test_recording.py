"""`serve --record`: what is written decides again to the same plans; what is damaged is said to be."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import structlog
from click.testing import CliRunner

from turboserve.cli.main import main
from turboserve.errors import ConfigError, CorruptState
from turboserve.orchestrator import plan as plans
from turboserve.orchestrator import view as views
from turboserve.orchestrator.plan import Plan
from turboserve.orchestrator.recorded import TickDecoder, TickEncoder, decode_header, encode_header, plan_values
from turboserve.orchestrator.scheduler import Memory, TickConfig, tick
from turboserve.orchestrator.view import ClusterView
from turboserve.runtime.recording import TickRecorder, recorded_files
from turboserve.sim.from_recording import replay_recording
from turboserve.sim.profile_files import load_profile

CONFIG = TickConfig(cooldown_s=2.0)


def cluster(steps_floor: int | None = 2) -> ClusterView:
    view = views.make_view(
        (load_profile("k4"),), workers_min=1, workers_max=6, provision_s=5.0, steps_floor=steps_floor
    )
    for number in range(2):
        views.add_worker(view, f"w{number}", state=views.READY, request_s=0.0, ready_at_s=0.0)
    return view


def carry_out(view: ClusterView, plan: Plan) -> None:
    """Enough of a cluster that later ticks have something to decide."""
    ids = {one: row for row, one in enumerate(view.sessions.ids)}
    workers = {one: row for row, one in enumerate(view.workers.ids)}
    for action in plan.actions:
        if isinstance(action, plans.Place | plans.Migrate | plans.Resume):
            view.sessions.state[ids[action.session]] = views.HELD
            view.sessions.worker[ids[action.session]] = workers[action.worker]
        elif isinstance(action, plans.SetSteps):
            view.sessions.steps[ids[action.session]] = action.steps
        elif isinstance(action, plans.Suspend):
            view.sessions.state[ids[action.session]] = views.HOST
            view.sessions.worker[ids[action.session]] = views.NOWHERE
        elif isinstance(action, plans.AddWorker):
            for _ in range(action.count):
                name = f"w{view.workers.count}"
                views.add_worker(view, name, state=views.READY, request_s=0.0, ready_at_s=0.0)


def record(folder: Path, ticks: int = 400, seed: int = 1, **bounds: int) -> int:
    """A seeded run of ticks, recorded; how many actions it had."""
    rng = random.Random(seed)
    recorder = TickRecorder(folder, CONFIG, structlog.get_logger(), **bounds)
    decide = recorder.around(lambda view, memory, now_s: tick(view, memory, now_s, CONFIG))
    view, memory, actions = cluster(), Memory(), 0
    for number in range(ticks):
        now_s = number * 0.7
        if rng.random() < 0.2 and view.sessions.count < 40:
            row = views.add_session(view, f"s{view.sessions.count}", now_s=now_s)
            view.sessions.active[row] = True
        elif view.sessions.count:
            row = rng.randrange(view.sessions.count)
            view.sessions.active[row] = rng.random() < 0.6
        view.observed.chunks += 1
        plan, memory = decide(view, memory, now_s)
        actions += len(plan.actions)
        carry_out(view, plan)
    recorder.close()
    return actions


def test_what_was_recorded_decides_the_same_again(tmp_path: Path) -> None:
    actions = record(tmp_path)
    verdict = replay_recording(tmp_path)
    assert (verdict.ticks, verdict.different, verdict.files) == (400, 0, 1)
    assert sum(verdict.actions.values()) == actions
    assert {"Place", "AddWorker"} <= set(verdict.actions), verdict.actions
    size = sum(path.stat().st_size for path in recorded_files(tmp_path))
    assert size < 400 * 1500, "only what changed is written"


def test_a_profile_that_is_measured_anew_is_recorded(tmp_path: Path) -> None:
    """What workers and moves are measured to take changes while a fleet runs; the tick weighs with it."""
    view, encoder = cluster(), TickEncoder()
    encoder.encode(view, 1.0, Plan())
    unchanged = encoder.encode(view, 2.0, Plan())
    view.profiles = (replace(view.profile, migrate_s=0.321), *view.profiles[1:])
    changed = encoder.encode(view, 3.0, Plan())
    header = decode_header(encode_header(CONFIG, cluster(), Memory(), 0.0))
    decoder = TickDecoder(header.profiles)
    decoder.decode(TickEncoder().encode(cluster(), 1.0, Plan()))
    back, _, _ = decoder.decode(unchanged)
    assert back.profiles == header.profiles and len(unchanged) < len(changed)
    back, _, _ = decoder.decode(changed)
    assert back.profile.migrate_s == 0.321 and back.profiles == view.profiles


def test_files_rotate_within_their_bound_and_each_replays_alone(tmp_path: Path) -> None:
    record(tmp_path, ticks=600, file_bytes=20_000, files_kept=3)
    files = recorded_files(tmp_path)
    assert len(files) == 3 and files[0].name != "ticks-000000.rec"
    assert all(path.stat().st_size < 40_000 for path in files)
    verdict = replay_recording(tmp_path)
    assert verdict.files == 3 and verdict.different == 0 and 0 < verdict.ticks < 600
    record(tmp_path, ticks=10)  # a restarted controller goes on in a file of its own
    assert replay_recording(tmp_path).different == 0


def test_another_decision_is_found(tmp_path: Path) -> None:
    """The recording of a controller that decided otherwise: its plans differ from today's."""
    recorder = TickRecorder(tmp_path, CONFIG, structlog.get_logger())

    def other(view: ClusterView, memory: Memory, now_s: float) -> tuple[Plan, Memory]:
        plan, after = tick(view, memory, now_s, CONFIG)
        return replace(plan, actions=plan.actions[:-1]), after

    decide = recorder.around(other)
    view = cluster()
    views.add_session(view, "a", now_s=0.0)
    view.sessions.active[0] = True
    decide(view, Memory(), 1.0)
    recorder.close()
    verdict = replay_recording(tmp_path)
    assert verdict.different == 1 and verdict.differences[0]["now"]["actions"][0]["session"] == "a"
    result = CliRunner().invoke(main, ["simulate", "--from-recording", str(tmp_path)])
    assert result.exit_code == 1 and "0 of 1 ticks" in result.stderr


@pytest.mark.parametrize("steps_floor", [2, None])
def test_a_view_comes_back_column_by_column(steps_floor: int | None) -> None:
    view = cluster(steps_floor)
    for number in range(5):
        views.add_session(view, f"s{number}", now_s=float(number), load=1.0 + number)
    view.tenant_weights = (1.0, 2.5)
    encoder, header = TickEncoder(), decode_header(encode_header(CONFIG, view, Memory(), 12.0))
    assert header.config == CONFIG and header.profiles == view.profiles
    assert np.array_equal(header.memory.demand.samples, Memory().demand.samples)
    decoder = TickDecoder(header.profiles)
    plan = Plan((plans.Shed("s1", "full", None), plans.Migrate("s0", "w0", "w1", "balance")), 3.5)
    first = encoder.encode(view, 1.0, plan)
    view.sessions.worker[3] = 1
    second = encoder.encode(view, 2.0, Plan())
    assert len(second) < len(first) / 4
    _, now_s, again = decoder.decode(first)
    assert now_s == 1.0 and again == plan and plan_values(again)["actions"][0]["kind"] == "Shed"
    back, _, _ = decoder.decode(second)
    assert list(back.open_sessions()) == list(view.open_sessions())
    assert list(back.present_workers()) == list(view.present_workers())
    assert back.tenant_weights == (1.0, 2.5) and back.steps_floor == steps_floor and back.observed == view.observed


def test_damage_is_named_and_a_cut_end_is_not_damage(tmp_path: Path) -> None:
    record(tmp_path, ticks=50)
    (path,) = recorded_files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    verdict = replay_recording(tmp_path)
    assert verdict.torn == [path.name] and verdict.ticks == 49 and verdict.different == 0
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :])
    with pytest.raises(CorruptState):
        replay_recording(tmp_path)
    path.write_bytes(b"something else")
    with pytest.raises(CorruptState, match="no recording"):
        replay_recording(tmp_path)
    path.unlink()
    with pytest.raises(ConfigError):
        replay_recording(tmp_path)


def test_arrays_of_objects_are_refused() -> None:
    """Nothing in a recording can be made to build objects."""
    import msgspec

    view = cluster()
    header = msgspec.msgpack.decode(encode_header(CONFIG, view, Memory(), 0.0))
    header["memory"]["demand"]["samples"] = {"dtype": "|O", "data": struct.pack("<Q", 0)}
    with pytest.raises(CorruptState):
        decode_header(msgspec.msgpack.encode(header))


def test_a_full_disk_ends_the_recording_and_not_the_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = TickRecorder(tmp_path, CONFIG, structlog.get_logger())
    monkeypatch.setattr(recorder, "_write", lambda data: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    decide = recorder.around(lambda view, memory, now_s: tick(view, memory, now_s, CONFIG))
    for now_s in (1.0, 2.0):
        plan, _ = decide(cluster(), Memory(), now_s)
        assert isinstance(plan, Plan)
