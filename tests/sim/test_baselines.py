"""The baselines: each against what its source says, and all of them through the auditor."""

import itertools
import math

import numpy as np
import pytest

from turboserve.audit.audit import audit_run
from turboserve.errors import ConfigError
from turboserve.orchestrator.plan import AddWorker, DrainWorker, Migrate, Place, ReleaseWorker, UndrainWorker
from turboserve.orchestrator.view import DRAINING, HELD, READY, STARTING, add_session, add_worker, make_view
from turboserve.sim.files import write_run
from turboserve.sim.policies import POLICIES, make_policy, policy_class
from turboserve.sim.policies.fleet import Book
from turboserve.sim.policies.lcp import Lcp
from turboserve.sim.profile_files import load_profile
from turboserve.sim.replay import Settings, simulate
from turboserve.sim.report import report
from turboserve.sim.trace import demand, read_trace, write_trace
from turboserve.sim.workload import Workload, generate

K4 = load_profile("k4")
BASELINES = [name for name in POLICIES if name != "turboserve"]


def cluster(loads, *, idle=0, starting=0, now_s=0.0, profile=K4):
    """A view with one ready worker for each load, all sessions active and held."""
    view = make_view((profile,), worker_capacity=64)
    for number, load in enumerate(loads):
        worker = add_worker(view, f"w{number}", state=READY, request_s=0.0, ready_at_s=0.0)
        for i in range(load + (idle if number == 0 else 0)):
            row = add_session(view, f"s{number}-{i}", now_s=now_s)
            view.sessions.state[row] = HELD
            view.sessions.worker[row] = worker
            view.sessions.active[row] = i < load
    for i in range(starting):
        add_worker(view, f"new{i}", state=STARTING, request_s=float(i), ready_at_s=30.0)
    return view


def arrive(view, count):
    for i in range(count):
        row = add_session(view, f"n{i}", now_s=0.0)
        view.sessions.active[row] = True


def kinds(plan, kind):
    return [action for action in plan.actions if isinstance(action, kind)]


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_keeps_the_rules_and_repeats_itself(name, tmp_path):
    path = tmp_path / "flash.csv.gz"
    trace = generate(Workload(kind="flash", horizon_s=1000, mean_active=14, seed=5))
    write_trace(trace, path)
    scales = policy_class(name).scales
    settings = Settings(workers=None if scales else math.ceil(demand(trace).peak / 4), provision_s=30.0)
    files = []
    for out in ("a", "b"):
        run = simulate(trace, K4, make_policy(name, scaling=scales, provision_s=30.0), settings)
        write_run(run, report(run), tmp_path / out)
        files.append([(tmp_path / out / f).read_bytes() for f in ("report.json", "chunks.csv.gz", "decisions.jsonl")])
    assert files[0] == files[1]
    answer = audit_run(tmp_path / "a", path, "k4", {})
    assert answer["violation_counts"] == {}, answer["violations"][:3]
    assert answer["recomputed"]["balance_excess"] == pytest.approx(report(run)["balance_excess"], abs=1e-6)


@pytest.mark.parametrize("name", ["kpa", "llumnix", "published"])
def test_units_of_eight_come_and_go_whole(name, tmp_path):
    import dataclasses
    import json

    nodes = dataclasses.replace(K4, provision_unit_workers=8)
    profile_path = tmp_path / "nodes.json"
    profile_path.write_text(json.dumps(dataclasses.asdict(nodes)))
    path = tmp_path / "flash.csv.gz"
    trace = generate(Workload(kind="flash", horizon_s=1500, mean_active=30, seed=5))
    write_trace(trace, path)
    run = simulate(trace, nodes, make_policy(name, provision_s=30.0), Settings(provision_s=30.0, initial_workers=8))
    write_run(run, report(run), tmp_path / "run")
    assert audit_run(tmp_path / "run", path, str(profile_path), {})["violation_counts"] == {}
    ends = [bill.release_us for bill in run.log.bills]
    for unit in range(0, len(ends), 8):
        assert len(set(ends[unit : unit + 8])) == 1
    assert any(end < run.end_us for end in ends)


def test_round_robin_rotates_and_least_memory_balances():
    view = cluster([0, 0, 0])
    arrive(view, 5)
    placed = kinds(make_policy("static-rr").decide(view, 0.0), Place)
    assert [p.worker for p in placed] == ["w0", "w1", "w2", "w0", "w1"]
    view = cluster([1, 0, 2], idle=3)  # w0 holds 4 states, w1 none, w2 two
    arrive(view, 4)
    placed = kinds(make_policy("static-memory").decide(view, 0.0), Place)
    assert [p.worker for p in placed] == ["w1", "w1", "w1", "w2"]


def test_hpa_follows_its_formula_its_limits_and_its_window():
    hpa = make_policy("hpa", target=0.5)
    view = cluster([4, 4])  # use 1.0 of a target of 0.5: ceil(2 * 2) = 4 workers
    assert kinds(hpa.decide(view, 0.0), AddWorker)[0].count == 2
    assert hpa.decide(view, 14.0).actions == ()  # between syncs
    assert hpa.decide(view, 0.0).wake_at_s == 15.0
    burst = make_policy("hpa", target=0.1)
    assert kinds(burst.decide(cluster([4, 4]), 0.0), AddWorker)[0].count == 4  # four pods or double, the larger
    quiet = make_policy("hpa", target=0.5)
    quiet.decide(cluster([2, 2]), 0.0)  # recommends 2
    calm = cluster([1, 0])
    for now_s in range(15, 300, 15):
        assert kinds(quiet.decide(calm, float(now_s)), DrainWorker) == []
    assert len(kinds(quiet.decide(calm, 300.0), DrainWorker)) == 1
    within = make_policy("hpa", target=0.5)
    assert within.decide(cluster([2, 2, 3, 2, 2]), 0.0).actions == ()  # 0.55 is within 10% of 0.5


def test_kpa_panics_on_a_burst_and_does_not_shrink_in_panic():
    kpa = make_policy("kpa", target=1.0)
    for now_s in range(0, 60, 2):
        assert kinds(kpa.decide(cluster([2]), float(now_s)), AddWorker) == []
    burst = cluster([16])
    counts = [sum(a.count for a in kinds(kpa.decide(burst, float(t)), AddWorker)) for t in range(60, 68, 2)]
    assert max(counts) == 3  # 16 sessions over 4 a worker, seen by the 6 s window
    # The view still shows one worker, so a panicking KPA asks again; it never drains.
    assert kinds(kpa.decide(cluster([0, 0, 0, 0]), 80.0), DrainWorker) == []
    for now_s in range(82, 200, 2):
        last = kpa.decide(cluster([0, 0, 0, 0]), float(now_s))
    assert kinds(last, DrainWorker) != []


def brute_force(needs, beta, *, pay_up):
    """Last fleets of all optimal plans, by trying every one."""
    most = max(needs)
    best, ends = math.inf, set()
    for plan in itertools.product(range(most + 1), repeat=len(needs)):
        if any(x < need for x, need in zip(plan, needs, strict=True)):
            continue
        changes = zip((0, *plan), plan, strict=False)
        cost = sum(plan) + beta * sum(max(0, b - a) if pay_up else max(0, a - b) for a, b in changes)
        if cost < best - 1e-9:
            best, ends = cost, set()
        if cost < best + 1e-9:
            ends.add(plan[-1])
    return ends


@pytest.mark.parametrize("seed", range(12))
def test_lcp_bounds_are_those_of_the_paper(seed):
    rng = np.random.default_rng(seed)
    needs = rng.integers(1, 4, 6).tolist()
    lcp = Lcp(provision_s=2.5)
    for last in range(len(needs)):
        low, high = lcp._bounds(needs[last])
        seen = needs[: last + 1]
        assert low == min(brute_force(seen, lcp.beta, pay_up=True))
        assert high == max(brute_force(seen, lcp.beta, pay_up=False))


def test_lcp_is_lazy_for_as_long_as_a_start_costs():
    lcp = make_policy("lcp", target=1.0, provision_s=30.0)
    lcp.decide(cluster([4, 4]), 0.0)
    kept = 0
    while not kinds(lcp.decide(cluster([4, 0]), 1.0 + kept), DrainWorker):
        kept += 1
    assert 28 <= kept <= 31


def test_llumnix_pairs_the_busiest_with_the_freest():
    plan = make_policy("llumnix", scaling=False).decide(cluster([4, 4, 1, 1]), 0.0)
    assert [(m.source, m.worker) for m in kinds(plan, Migrate)] == [("w0", "w2"), ("w1", "w3")]
    assert kinds(make_policy("llumnix", scaling=False).decide(cluster([3, 2]), 0.0), Migrate) == []
    up = make_policy("llumnix", up=0.8, down=0.5)
    assert kinds(up.decide(cluster([4, 4]), 0.0), AddWorker)[0].count == 1
    assert kinds(up.decide(cluster([4, 4]), 9.0), AddWorker) == []
    assert len(kinds(up.decide(cluster([1, 1]), 10.0), DrainWorker)) == 1


def test_the_published_rule_stalls_on_ties_and_moves_otherwise():
    published = make_policy("published", scaling=False)
    assert kinds(published.decide(cluster([4, 4, 1, 1]), 0.0), Migrate) == []
    assert len(kinds(published.decide(cluster([4, 3, 1, 1]), 0.0), Migrate)) == 1


def test_the_published_target_and_its_hold():
    published = make_policy("published")
    view = cluster([3, 3])  # 6 active: ceil(6 / 3.6) = 2
    assert published.decide(view, 0.0).actions == ()
    arrive(view, 4)  # 10: ceil(10 / 3.6) = 3
    assert kinds(published.decide(view, 1.0), AddWorker)[0].count == 1
    calm = cluster([3, 3, 1])  # 7 active: 2 workers would do
    plan = published.decide(calm, 10.0)
    assert kinds(plan, DrainWorker) == [] and plan.wake_at_s == 15.0
    assert kinds(published.decide(calm, 15.0), DrainWorker)[0].worker == "w2"


def test_slack_moves_only_the_urgent_and_not_twice():
    view = cluster([5, 1])
    view.sessions.next_deadline_s[:6] = 100.0
    slack = make_policy("slack")
    assert kinds(slack.decide(view, 0.0), Migrate) == []
    view.sessions.next_deadline_s[2] = 3.0  # two batches of five take 2.4 s
    assert [m.session for m in kinds(slack.decide(view, 0.0), Migrate)] == ["s0-2"]
    view.sessions.moved_s[2] = -5.0
    assert kinds(slack.decide(view, 0.0), Migrate) == []


def test_growing_takes_drains_back_before_it_asks_for_workers():
    view = cluster([2, 2, 1])
    view.workers.state[2] = DRAINING
    book = Book(view)
    book.resize(4, "test")
    assert [type(a) for a in book.actions] == [UndrainWorker, AddWorker] and book.actions[1].count == 1


def test_shrinking_gives_back_what_has_not_started_first():
    book = Book(cluster([3, 1], starting=2))
    book.resize(1, "test")
    assert [(type(a), a.worker) for a in book.actions] == [
        (ReleaseWorker, "new1"),
        (ReleaseWorker, "new0"),
        (DrainWorker, "w1"),
    ]


def test_levelling_reaches_the_least_maximum():
    rng = np.random.default_rng(0)
    for _ in range(30):
        loads = rng.integers(0, 9, 6).tolist()
        view = cluster(loads)
        for _ in range(40):  # transfers take no time here: carry every move out at once
            book = Book(view)
            book.level(most_moves=64)
            if not book.actions:
                break
            for move in book.actions:
                row = view.sessions.ids.index(move.session)
                view.sessions.worker[row] = view.workers.ids.index(move.worker)
        assert Book(view).load[:6].max() == -(-sum(loads) // 6)


@pytest.mark.parametrize("name", [name for name in BASELINES if policy_class(name).scales])
def test_a_fleet_that_was_lost_comes_back(name, tmp_path):
    """Two sessions are half of one worker's capacity: within every rule's calm band."""
    lines = "".join(f"{t},{s},{e},{c}\n" for s in "ab" for t, e, c in ((0, "arrive", ""), (0, "active", 60)))
    lines += "60,a,depart,\n60,b,depart,\n"
    (tmp_path / "t.csv").write_text("time_s,session_id,event,chunks\n" + lines)
    policy = make_policy(name, scaling=True, provision_s=5.0)
    run = simulate(
        read_trace(tmp_path / "t.csv"),
        K4,
        policy,
        Settings(provision_s=5.0, warmup_s=0.0, initial_workers=1, losses_s=(20.0,)),
    )
    assert len(run.rows) == 120


def test_unknown_policies_and_knobs_are_refused():
    with pytest.raises(ConfigError, match="no policy 'hpb'"):
        make_policy("hpb")
    with pytest.raises(ConfigError, match="hpa has no knob rho"):
        make_policy("hpa", rho=0.9)


def test_random_traces_audit_clean(tmp_path):
    """A few seeds here; `soak` runs a thousand."""
    for seed in range(6):
        _audit_random(seed, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_thousand_random_traces_audit_clean(tmp_path):
    for seed in range(1000):
        _audit_random(seed, tmp_path)


def _audit_random(seed, tmp_path):
    rng = np.random.default_rng(seed)
    trace = generate(
        Workload(
            kind=["steady", "modulated", "diurnal", "flash"][seed % 4],
            lengths=["lognormal", "pareto"][seed % 2],
            horizon_s=float(rng.uniform(60, 400)),
            mean_active=float(rng.uniform(1, 25)),
            active_s_mean=float(rng.uniform(2, 40)),
            idle_s_mean=float(rng.uniform(0.5, 60)),
            seed=seed,
        )
    )
    write_trace(trace, tmp_path / "t.csv.gz")
    name = BASELINES[seed % len(BASELINES)]
    scales = policy_class(name).scales
    delay_s = float(rng.choice([0.0, 10.0, 30.0]))
    losses_s = tuple(rng.uniform(0, 300, int(rng.integers(0, 3))).tolist())
    workers = int(rng.integers(1, 10))
    run = simulate(
        trace,
        K4,
        make_policy(name, scaling=scales, provision_s=delay_s),
        Settings(workers=None if scales else workers, provision_s=delay_s, warmup_s=0.0, losses_s=losses_s, seed=seed),
    )
    write_run(run, report(run), tmp_path / "run")
    answer = audit_run(tmp_path / "run", tmp_path / "t.csv.gz", "k4", {})
    assert answer["violation_counts"] == {}, (seed, name, answer["violations"][:3])
