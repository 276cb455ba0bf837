"""The simulator against rules of its own: what it must conserve, and that it does the same thing twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboserve.audit.audit import audit_run
from turboserve.errors import ConfigError, TraceError
from turboserve.orchestrator.plan import Action, Migrate, Plan, Shed, Suspend
from turboserve.orchestrator.view import ClusterView
from turboserve.sim.batch_steps import R_BATCH, R_FINISH, R_N, R_RELEASE, R_SESSION, R_START, R_STEPS
from turboserve.sim.events import TRANSFER_END, WAKE, Timers, up_us
from turboserve.sim.files import write_run
from turboserve.sim.policies import make_policy
from turboserve.sim.policies.base import StaticLeast
from turboserve.sim.profile_files import load_profile, shipped_profiles
from turboserve.sim.replay import Run, Settings, simulate
from turboserve.sim.report import report
from turboserve.sim.report_page import write_page
from turboserve.sim.trace import Trace, demand, randomise_phases, read_trace, write_trace

K4 = load_profile("k4")
TRACES = Path(__file__).parent.parent.parent / "traces"


def trace_of(lines: str, tmp_path: Path) -> Trace:
    path = tmp_path / "t.csv"
    path.write_text("time_s,session_id,event,chunks\n" + "\n".join(lines.split()) + "\n")
    return read_trace(path)


def play(trace: Trace, policy: str = "turboserve", **kinds: object) -> Run:
    chosen = Settings(**{"warmup_s": 0.0, **kinds})
    made = make_policy(policy, scaling=chosen.workers is None, provision_s=chosen.provision_s)
    return simulate(trace, K4, made, chosen)


class _ActsOnce(StaticLeast):
    """Static least-loaded that at `at_s` does one thing more."""

    def __init__(self, at_s: float, action: Action) -> None:
        super().__init__()
        self.at_s, self.action = at_s, action

    def decide(self, view: ClusterView, now_s: float) -> Plan:
        plan = super().decide(view, now_s)
        if now_s < self.at_s:
            return Plan(plan.actions, wake_at_s=self.at_s)
        return Plan((*plan.actions, self.action) if now_s == self.at_s else plan.actions)


def test_run_and_bill_end_with_the_last_chunk_not_with_a_transfer(tmp_path: Path) -> None:
    trace = trace_of("0,a,arrive, 0,a,active,4 3.2,a,depart,", tmp_path)
    slow = dataclasses.replace(K4, offload_s=5.0)
    run = simulate(trace, slow, _ActsOnce(2.2, Suspend("a", "w00000", "")), Settings(workers=1, warmup_s=0.0))
    assert sum(d["event"] == "suspend" and d["end_s"] == 7.4 for d in run.log.decisions) == 1
    assert run.end_us == trace.horizon_us == 3_200_000
    assert report(run)["worker_hours"] == pytest.approx(3.2 / 3600)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_move_that_has_not_begun_survives_the_loss_of_its_target(tmp_path: Path, seed: int) -> None:
    """The chunk in work ends at 0.4 s; at 0.3 s one of the two workers is lost."""
    trace = trace_of("0,a,arrive, 0,a,active,8 8,a,depart,", tmp_path)
    policy = _ActsOnce(0.2, Migrate("a", "w00000", "w00001", ""))
    chosen = Settings(workers=2, warmup_s=0.0, losses_s=(0.3,), provision_s=5.0, seed=seed)
    run = simulate(trace, K4, policy, chosen)
    lost = next(d["worker"] for d in run.log.decisions if d["event"] == "worker_lost")
    events = {d["event"] for d in run.log.decisions}
    assert "migrate" not in events and ("resume" in events) == (lost == "w00000")
    write_trace(trace, tmp_path / "t.csv.gz")
    write_run(run, report(run), tmp_path / "run")
    assert audit_run(tmp_path / "run", tmp_path / "t.csv.gz", "k4", {})["violation_counts"] == {}


def test_shed_chunks_count_from_their_release(tmp_path: Path) -> None:
    trace = trace_of("0,a,arrive, 0,a,active,8 8,a,depart,", tmp_path)
    run = simulate(trace, K4, _ActsOnce(3.5, Shed("a", "")), Settings(workers=1, warmup_s=5.0))
    shed = run.log.shed
    assert len(shed) + len(run.rows) == 8 and all(x.time_us == shed[0].time_us for x in shed)
    assert [x.release_us for x in shed] == [(x.index - 1) * 1_000_000 for x in shed]
    figures = report(run)
    counted = sum(x.release_us >= 5_000_000 for x in shed)
    assert 0 < counted < len(shed)
    assert (figures["shed"], figures["warmup"]["shed"]) == (counted, len(shed) - counted)


def test_one_session_alone_follows_the_release_times(tmp_path: Path) -> None:
    run = play(trace_of("0,a,arrive, 0,a,active,4 4,a,depart,", tmp_path), "static-least", workers=1)
    assert (run.rows[:, R_RELEASE] / 1e6).tolist() == [0, 0, 1, 2]
    assert (run.rows[:, R_START] / 1e6).tolist() == [0, 0.4, 1, 2]
    assert (run.rows[:, R_FINISH] / 1e6).tolist() == [0.4, 0.8, 1.4, 2.4]
    assert report(run)["on_time_share"] == 1.0 and run.end_us == 4_000_000


def test_closed_pace_releases_when_the_last_chunk_finishes(tmp_path: Path) -> None:
    trace = trace_of("0,a,arrive, 0,a,active,3 3,a,depart,", tmp_path)
    run = play(trace, "static-least", workers=1, pace="closed")
    assert (run.rows[:, R_FINISH] / 1e6).tolist() == [0.4, 0.8, 1.2]


def test_sessions_ready_together_share_a_batch_and_a_late_one_waits(tmp_path: Path) -> None:
    lines = "0,a,arrive, 0,a,active,1 0,b,arrive, 0,b,active,1 0.1,c,arrive, 0.1,c,active,1 "
    lines += "1,a,depart, 1,b,depart, 2,c,depart,"
    run = play(trace_of(lines, tmp_path), "static-least", workers=1)
    assert run.rows[:, R_N].tolist() == [2, 2, 1]
    assert (run.rows[:, R_START] / 1e6).tolist() == [0, 0, 0.6]


def test_a_period_that_comes_too_early_waits_and_keeps_its_own_start(tmp_path: Path) -> None:
    lines = "0,a,arrive, 0,a,active,9 1,a,idle, 1.5,a,active,1 2.5,a,depart,"
    run = play(trace_of(lines, tmp_path), "static-least", workers=1)
    assert len(run.rows) == 10 and run.rows[-1, R_RELEASE] == 1_500_000
    assert run.rows[-1, R_START] >= run.rows[-2, R_FINISH]


def test_ends_come_before_starts_in_demand(tmp_path: Path) -> None:
    trace = trace_of("0,a,arrive, 0,a,active,5 5,a,depart, 5,b,arrive, 5,b,active,1 6,b,depart,", tmp_path)
    assert demand(trace).peak == 1


@pytest.mark.parametrize(
    "lines",
    [
        "0,a,active,1",
        "0,a,arrive, 0,a,active,0",
        "1,a,arrive, 0,a,active,1",
        "0,a,arrive, 0,a,gone,",
        "0,a,arrive, 0,a,idle,",
    ],
)
def test_a_broken_trace_is_refused_with_its_line(lines: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"t\.csv:"):
        trace_of(lines, tmp_path)


def test_settings_that_cannot_be_run_are_refused(tmp_path: Path) -> None:
    trace = trace_of("0,a,arrive, 0,a,active,1 1,a,depart,", tmp_path)
    for kinds in ({"pace": "fast"}, {"batching": "none"}, {"steps_floor": 1}, {"workers": 0}):
        with pytest.raises(ConfigError):
            play(trace, **kinds)
    with pytest.raises(ConfigError, match="fixed fleet"):
        play(trace, "static-least")
    with pytest.raises(ConfigError, match="no profile"):
        load_profile("nothing")
    assert {"k4", "compute4"} <= set(shipped_profiles())


def test_pass_batching_lets_a_newcomer_in_before_the_chunk_ends(tmp_path: Path) -> None:
    lines = "0,a,arrive, 0,a,active,1 0.1,b,arrive, 0.1,b,active,1 9,a,depart, 9,b,depart,"
    by_pass = play(trace_of(lines, tmp_path), "static-least", workers=1, batching="pass")
    assert by_pass.rows[1, R_START] < by_pass.rows[0, R_FINISH]
    assert len(by_pass.rows) == 2


def test_trace_files_read_back_equal_and_phases_keep_the_gaps(tmp_path: Path) -> None:
    trace = read_trace(TRACES / "synthetic_tenants.csv.gz")
    write_trace(trace, tmp_path / "again.csv.gz")
    again = read_trace(tmp_path / "again.csv.gz")
    assert np.array_equal(trace.time_us, again.time_us) and trace.tenants == again.tenants
    shifted = randomise_phases(trace, 3)
    assert int(shifted.chunks.sum()) == int(trace.chunks.sum())
    write_trace(shifted, tmp_path / "shifted.csv.gz")
    read_trace(tmp_path / "shifted.csv.gz")


def test_timers_come_by_time_then_kind_then_number() -> None:
    timers = Timers()
    timers.add(5, WAKE, "d")
    timers.add(5, TRANSFER_END, "b")
    timers.add(5, TRANSFER_END, "c")
    timers.add(1, WAKE, "a")
    got = []
    while (due := timers.pop_due(5)) is not None:
        got.append(due[1])
    assert got == ["a", "b", "c", "d"] and up_us(0.03) == 30_000 and up_us(0.0300011) == 30_002


def test_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    trace = read_trace(TRACES / "synthetic_flash.csv.gz")
    for name in ("one", "two"):
        run = play(trace, steps_floor=2, warmup_s=60.0, losses_s=(100.0,), seed=3)
        found = report(run)
        write_run(run, found, tmp_path / name)
        write_page(run, found, tmp_path / name / "report.html")
    for file in ("chunks.csv.gz", "decisions.jsonl", "shed.csv", "report.json", "report.html"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    page = (tmp_path / "one" / "report.html").read_text()
    assert page.count("<svg") == 4 and "http" not in page.replace("http-equiv", "")
    assert json.loads((tmp_path / "one" / "timing.json").read_text())["decisions"] == len(run.decision_s)


@st.composite
def traces(draw: st.DrawFn) -> list[tuple[float, str, str, str]]:
    """Small random traces: sessions with periods and gaps, in time order."""
    events: list[tuple[float, int, str, str, str]] = []
    for k in range(draw(st.integers(1, 14))):
        name, at = f"s{k}", draw(st.integers(0, 400)) / 10
        events.append((at, len(events), name, "arrive", ""))
        for _ in range(draw(st.integers(1, 3))):
            chunks = draw(st.integers(1, 15))
            events.append((at, len(events), name, "active", str(chunks)))
            at += chunks
            gap = draw(st.integers(0, 200)) / 10
            if gap > 5:
                events.append((at, len(events), name, "idle", ""))
                at += gap
            else:
                break
        events.append((at, len(events), name, "depart", ""))
    return [(t, name, kind, chunks) for t, _, name, kind, chunks in sorted(events)]


def audited(rows: list[tuple[float, str, str, str]], directory: Path, policy: str, **kinds: object) -> Run:
    """Simulate, check what must be conserved, and let the independent auditor read the files."""
    path = directory / "t.csv"
    path.write_text("time_s,session_id,event,chunks\n" + "".join(f"{t:.3f},{s},{e},{c}\n" for t, s, e, c in rows))
    trace = read_trace(path)
    profile_file = directory / "p.json"
    profile = kinds.pop("profile", K4)
    profile_file.write_text(json.dumps(dataclasses.asdict(profile)))
    chosen = Settings(warmup_s=10.0, **kinds)
    made = make_policy(policy, scaling=chosen.workers is None, provision_s=chosen.provision_s)
    run = simulate(trace, profile, made, chosen)
    assert len(run.rows) + len(run.log.shed) == int(trace.chunk_counts(profile.chunk_s).sum())
    assert (run.rows[:, R_STEPS] >= (chosen.steps_floor or profile.denoise_steps)).all()
    pairs = run.rows[:, [R_BATCH, R_SESSION]]
    assert len(np.unique(pairs, axis=0)) == len(pairs)  # a session has one chunk in a batch
    write_run(run, report(run), directory / "out")
    found = audit_run(directory / "out", path, str(profile_file), {})
    assert found["violations"] == []
    return run


small = dataclasses.replace(K4, name="small", resident_max=5, capacity=2)
nodes = dataclasses.replace(K4, name="nodes", provision_unit_workers=2)


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [
        ("turboserve", {"steps_floor": 2, "provision_s": 10.0}),
        ("turboserve", {"steps_floor": 2, "provision_s": 0.0, "profile": small}),
        ("turboserve", {"provision_s": 5.0, "profile": nodes, "initial_workers": 2}),
        ("turboserve", {"workers": 3, "losses_s": (20.0, 25.0), "provision_s": 5.0, "seed": 4}),
        ("static-least", {"workers": 2, "profile": small}),
    ],
    ids=["scaling", "no-delay-small-memory", "units-of-two", "losses", "static"],
)
@given(rows=traces())
@settings(max_examples=15, deadline=None)
def test_the_auditor_finds_nothing_in_random_traces(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[float, str, str, str]],
    policy: str,
    kinds: dict[str, object],
) -> None:
    audited(rows, tmp_path_factory.mktemp("run"), policy, **dict(kinds))


@pytest.mark.soak
@given(rows=traces(), delay=st.sampled_from([0.0, 3.0, 30.0]), floor=st.sampled_from([None, 2]), seed=st.integers(0, 9))
@settings(max_examples=1000, deadline=None)
def test_the_auditor_finds_nothing_in_a_thousand(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[float, str, str, str]],
    delay: float,
    floor: int | None,
    seed: int,
) -> None:
    kinds: dict[str, object] = {"provision_s": delay, "steps_floor": floor, "seed": seed}
    if seed > 6:
        kinds |= {"losses_s": (15.0,)}
    audited(rows, tmp_path_factory.mktemp("run"), "turboserve", profile=(K4, small, nodes)[seed % 3], **kinds)


def test_a_worker_given_back_at_the_first_moment_costs_nothing(tmp_path: Path) -> None:
    trace = trace_of("0,a,arrive, 0,a,active,40 40,a,depart,", tmp_path)
    run = play(trace, "hpa")
    assert sorted(bill.release_us for bill in run.log.bills) == [0, run.end_us]
    assert report(run)["worker_hours"] == pytest.approx(run.end_us / 1e6 / 3600)


def test_the_first_chunk_of_a_period_that_began_before_the_warm_up_is_not_counted(tmp_path: Path) -> None:
    trace = trace_of("0,a,arrive, 0,a,active,20 20,a,idle, 30,a,active,10 40,a,depart,", tmp_path)
    figures = report(simulate(trace, K4, StaticLeast(), Settings(workers=1, warmup_s=10.0)))
    only = {"mean": 0.4, "p50": 0.4, "p95": 0.4, "p99": 0.4, "max": 0.4}
    assert figures["first_chunk_s"] == only and figures["warmup"]["first_chunk_s"] == only


@pytest.mark.parametrize("profile", ["k4", "compute4"])
def test_a_level_load_of_tiny_sessions_is_served_without_swinging(profile: str, tmp_path: Path) -> None:
    """A session that asks for one or two chunks is hardly seen where there is room; its work is there all the same."""
    rng = np.random.default_rng(5)
    at_s = np.sort(rng.uniform(0, 1200, 6000))
    lines = [(t, f"{t:.3f},s{n},arrive,\n{t:.3f},s{n},active,{1 + n % 2}\n") for n, t in enumerate(at_s)]
    lines += [(t + 1 + n % 2, f"{t + 1 + n % 2:.3f},s{n},depart,\n") for n, t in enumerate(at_s)]
    path = tmp_path / "tiny.csv"
    path.write_text("time_s,session_id,event,chunks\n" + "".join(text for _, text in sorted(lines)))
    made = make_policy("turboserve", scaling=True, provision_s=30.0)
    figures = report(simulate(read_trace(path), load_profile(profile), made, Settings(steps_floor=2, provision_s=30.0)))
    assert figures["on_time_share"] >= 0.999 and figures["reduced_step_share"] <= 0.02
    assert figures["workers"]["max"] <= 5 and figures["scale_outs"] <= 10


def test_for_a_crowd_that_comes_again_and_again_its_room_is_kept(tmp_path: Path) -> None:
    """Fifty sessions at once every four minutes, for two each: by the fourth time their workers are not given back."""
    lines = [
        line
        for wave in range(8)
        for second, event in ((0, "arrive,"), (0, "active,120"), (120, "depart,"))
        for n in range(50)
        for line in [f"{240 * wave + second + n / 50:.3f},s{wave}_{n},{event}"]
    ]
    lines.sort(key=lambda line: float(line.split(",")[0]))
    made = make_policy("turboserve", scaling=True, provision_s=30.0)
    run = simulate(
        trace_of(" ".join(lines), tmp_path), K4, made, Settings(steps_floor=2, provision_s=30.0, warmup_s=700.0)
    )
    figures = report(run)
    assert figures["on_time_share"] > 0.999 and figures["warmup"]["on_time_share"] < 0.9
    assert figures["workers"]["mean"] < 16, "thirteen have room for fifty"
