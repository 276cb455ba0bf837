"""One tick: (view, memory, now_s) -> (plan, memory). The order of the decisions is here alone.

1. sample demand; 2. size the fleet; 3. place who waits; 4. empty draining workers; 5. balance; 6. make room in memory;
7. brownout. Each step sees what the ones before promised (`Survey`). Called once per instant that had an arrival,
activity change, worker or transfer event, and at `plan.wake_at_s`, by the live control loop and by the simulator. No
clock, no I/O, nothing kept but `memory`: a recorded view replays to the same plan for ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from turboserve.orchestrator import autoscaling, brownout, fairness, placement, residency
from turboserve.orchestrator.autoscaling import ScaleMemory, level_of, target_workers
from turboserve.orchestrator.demand import Demand, Work, follow, forecast, largest, lately, observe, work_factor
from turboserve.orchestrator.placement import Survey, lightest, promise, survey
from turboserve.orchestrator.plan import (
    Action,
    AddWorker,
    DrainWorker,
    Migrate,
    Place,
    Plan,
    Queue,
    ReleaseWorker,
    Resume,
    UndrainWorker,
)
from turboserve.orchestrator.service import REDUCED_SHARE, Service, look
from turboserve.orchestrator.unequal import search
from turboserve.orchestrator.view import HELD, HOST, NEW, NOWHERE, ClusterView, Ints

FULL_STEPS_PRICE = 100.0  # times the price of latency where only playout slack carries overload


@dataclass(frozen=True, slots=True)
class TickConfig:
    """What can be turned off or weighed; the defaults are the product, the switches are for ablations."""

    migrate: bool = True
    scale: bool = True
    forecast: bool = True  # off: the newest count is the forecast
    volatility: bool = True  # off: one price for all levels, no online refinement
    slack: bool = True  # off: never more than `capacity` active sessions a worker, others wait
    brownout: bool = True
    eta: float = 1.0  # seconds of moving against seconds of chunk latency
    gain_min_s: float = 0.005
    cooldown_s: float = 3.0
    moves_min: int = 8  # a tick may start this many balancing moves, or one per four workers
    level_gap: int = 2  # a session coming back moves if that leaves the two workers this much closer


@dataclass(frozen=True, slots=True)
class Memory:
    """What a tick hands to the next."""

    demand: Demand = field(default_factory=Demand)
    work: Work = field(default_factory=Work)
    scale: ScaleMemory = field(default_factory=ScaleMemory)
    queued: frozenset[str] = frozenset()
    reduced: bool = False  # some session may be below full steps
    period_s: float = 20.0  # mean active period seen
    ended: int = 0
    ended_s: float = 0.0
    service: Service = field(default_factory=Service)


DEFAULT = TickConfig()


def tick(view: ClusterView, memory: Memory, now_s: float, config: TickConfig = DEFAULT) -> tuple[Plan, Memory]:
    """Decide. Pure: equal arguments give equal answers, and nothing of the view is changed."""
    sv = survey(view, now_s)
    demand = observe(memory.demand, sv.active, now_s)
    sampled = demand is not memory.demand
    if sampled:
        work = follow(memory.work, view.observed.chunks, sv.active, now_s)
        memory = replace(memory, demand=demand, work=work, service=look(memory.service, view, now_s))
        memory = _periods(memory, view)
    actions: list[Action] = []
    fixed = view.workers_min >= view.workers_max
    if config.scale and not fixed and (sampled or view.provision_s <= 0):
        memory = _size_fleet(view, sv, memory, now_s, config, actions)
    active_max = _active_max(view, config)
    if len(view.tenant_weights) > 1:
        room = int(sv.ready.size) * active_max
        actions += fairness.enforce(view, sv, room - fairness.reserve(room))
    if sv.waiting:
        memory = _place(view, sv, memory, active_max, actions)
    elif memory.queued:
        memory = replace(memory, queued=frozenset())
    if sv.draining.size:
        actions += residency.empty_draining(view, sv, now_s, view.profile.capacity)
    if config.migrate:
        _level_returning(view, sv, now_s, config, actions)
        _balance(view, sv, memory, now_s, config, actions)
    actions += residency.make_room(view, sv)
    actions += residency.make_way(view, sv, now_s)
    if sv.draining.size:
        actions += residency.release_empty(view, sv)
    wake_at_s = memory.demand.next_s
    if config.brownout and view.steps_floor is not None:
        steps, look_s, reduced = brownout.adjust(view, sv, now_s, memory.reduced)
        actions += steps
        if look_s is not None:
            wake_at_s = min(wake_at_s, now_s + look_s)
        if reduced != memory.reduced:
            memory = replace(memory, reduced=reduced)
    return Plan(tuple(actions), wake_at_s), memory


def _active_max(view: ClusterView, config: TickConfig) -> int:
    """Most active sessions put on one worker; beyond that it is better that one waits than that all are late."""
    profile = view.profile
    if not config.slack:
        return profile.capacity
    if config.brownout and view.steps_floor is not None:
        return min(profile.batch_max, max(profile.capacity + 1, profile.capacity_at(view.steps_floor)))
    return min(profile.batch_max, profile.capacity + 1)


def _periods(memory: Memory, view: ClusterView) -> Memory:
    """Follow the mean active period and the share of reduced chunks (both fading over a few hundred events)."""
    seen = view.observed
    ended = seen.periods_ended - memory.ended
    if ended > 0:
        weight = min(0.5, ended / 200)
        mean = (seen.period_seconds - memory.ended_s) / ended
        memory = replace(
            memory,
            period_s=(1 - weight) * memory.period_s + weight * mean,
            ended=seen.periods_ended,
            ended_s=seen.period_seconds,
        )
    return memory


# Fleet.


def _size_fleet(
    view: ClusterView, sv: Survey, memory: Memory, now_s: float, config: TickConfig, actions: list[Action]
) -> Memory:
    profile, delay_s = view.profile, view.provision_s
    scale = memory.scale
    by_steps = config.brownout and view.steps_floor is not None and view.steps_floor < profile.denoise_steps
    if config.volatility and by_steps and delay_s > 0 and now_s - scale.refined_s >= autoscaling.REFINE_EVERY_S:
        scale = autoscaling.refine(scale, memory.service.reduced_share / REDUCED_SHARE, now_s)
    alone = profile.chunk_target_s / profile.batch_latency_s[0]
    # With no delay a worker is there as soon as a session needs it.
    factor = work_factor(memory.work, memory.period_s, profile.chunk_s, alone) if delay_s > 0 else 1.0
    newest = lately(memory.demand) if factor > 1.0 else float(sv.active)
    expected = forecast(memory.demand, newest, delay_s, memory.period_s if config.forecast else math.inf)
    mean = expected.mean * factor
    sigma = expected.sigma * factor * scale.sigma_scale
    volatility = sigma / max(1.0, mean)
    level = level_of(volatility if config.volatility else 0.0)
    rho = autoscaling.rho_for(level, delay_s)
    price = autoscaling.price_for(level, profile.capacity) * (1.0 if by_steps else FULL_STEPS_PRICE)
    target = target_workers(mean, sigma, float(profile.capacity), price, rho)
    unit = profile.provision_unit_workers
    target = min(view.workers_max, max(view.workers_min, -(-target // unit) * unit))
    hold_s = autoscaling.hold_s(delay_s)
    scale = autoscaling.remember(scale, target, now_s, hold_s)
    served = memory.service
    crowd = largest(memory.demand, autoscaling.crowd_hold_s(served.late_share, served.crowds)) * factor
    lowest = max(scale.recent[0][1], -(-math.ceil(crowd / profile.capacity - 1e-9) // unit) * unit)
    present = sv.ready.size + sv.starting.size
    why = f"{sv.active} active, {mean:.0f}±{sigma:.0f} expected in {delay_s:g} s, target {target}"
    if target > present:
        _grow(view, sv, target - present, why, actions)
    elif lowest < present and autoscaling.may_shrink(scale, now_s, hold_s):
        _shrink(view, sv, present - lowest, why, actions)
    return replace(memory, scale=scale)


def _grow(view: ClusterView, sv: Survey, count: int, why: str, actions: list[Action]) -> None:
    """Call drains off first: those workers are there at once and billed anyway."""
    back = sv.draining[np.lexsort((sv.draining, -sv.active_on[sv.draining]))][:count]
    if view.profile.provision_unit_workers > 1 and back.size:
        units = view.workers.unit[back]
        back = sv.draining[np.isin(view.workers.unit[sv.draining], units)]
    for row in back:
        actions.append(UndrainWorker(view.workers.ids[int(row)], why))
    if back.size:
        sv.ready = np.sort(np.concatenate([sv.ready, back]))
        sv.draining = np.setdiff1d(sv.draining, back)
    if count > back.size:
        actions.append(AddWorker(count - int(back.size), why))


def _shrink(view: ClusterView, sv: Survey, count: int, why: str, actions: list[Action]) -> None:
    """Whole units: those still starting first (newest first), then the ones with the fewest active sessions, as long
    as what is left has room for everybody at full steps."""
    w, capacity = view.workers, view.profile.capacity
    unit_of = w.unit
    starting: dict[int, list[int]] = {}
    running: dict[int, list[int]] = {}
    for row in sv.starting.tolist():
        starting.setdefault(int(unit_of[row]), []).append(row)
    for row in sv.ready.tolist():
        running.setdefault(int(unit_of[row]), []).append(row)
    for unit in sorted(starting, key=lambda u: (-w.request_s[starting[u][0]], -u)):
        rows = starting[unit]
        if len(rows) > count:
            continue
        count -= len(rows)
        actions.extend(ReleaseWorker(w.ids[r], f"not needed any more: {why}") for r in rows)
        sv.starting = np.setdiff1d(sv.starting, rows)

    def cost(unit: int) -> tuple[int, int, int]:
        rows = running[unit]
        return int(sv.active_on[rows].sum()), int(sv.held[rows].sum()), unit

    for unit in sorted(running, key=cost):
        rows = running[unit]
        if len(rows) > count:
            continue
        left = sv.ready.size - len(rows)
        if left < 1 or left * capacity < sv.active:
            break
        count -= len(rows)
        actions.extend(DrainWorker(w.ids[r], why) for r in rows)
        sv.ready = np.setdiff1d(sv.ready, rows)
        sv.draining = np.sort(np.concatenate([sv.draining, np.array(rows, np.int64)]))


# Sessions.


def _place(view: ClusterView, sv: Survey, memory: Memory, active_max: int, actions: list[Action]) -> Memory:
    s, w = view.sessions, view.workers
    n = s.count
    waiting = np.flatnonzero(s.active[:n] & ((s.state[:n] == NEW) | (s.state[:n] == HOST)))
    rows: list[int] = waiting[np.lexsort((waiting, s.active_since_s[waiting]))].tolist()
    room = int(sv.ready.size) * active_max
    shared = room  # what those may fill that are over their tenant's share
    tenants = len(view.tenant_weights) > 1
    if tenants:
        shared = room - fairness.reserve(room)
        rows, share, placed = fairness.order(view, np.array(rows, np.int64), shared)
        placed = placed.copy()
    queued = set(memory.queued)
    total = int(sv.active_on.sum())
    full = False  # nothing more can be placed; what is left is only said to wait
    for row in rows:
        if full and s.ids[row] in queued:
            continue
        session, tenant = s.ids[row], int(s.tenant[row])
        within = not tenants or placed[tenant] + 1 <= math.ceil(share[tenant] - 1e-9)
        by_transfer = bool(s.state[row] == HOST)
        target = NOWHERE
        if not full and ((within and total < room) or total < shared):
            target = lightest(
                sv.ready,
                sv.load_on,
                sv.active_on,
                sv.held,
                sv.inbound,
                float(s.load[row]),
                active_max,
                view.profile.resident_max,
                by_transfer,
            )
        if target >= 0:
            reason = f"least loaded, {int(sv.active_on[target])} active"
            name = w.ids[target]
            actions.append(Resume(session, name, reason) if by_transfer else Place(session, name, reason))
            promise(sv, view, row, NOWHERE, target)
            if not by_transfer:
                sv.inbound[target] = w.inbound[target]  # placing a new session is no transfer
            total += 1
            if tenants:
                placed[tenant] += 1
            queued.discard(session)
            continue
        full |= not _has_room(sv, active_max, view.profile.resident_max)
        if session not in queued:
            queued.add(session)
            actions.append(Queue(session, _why_waiting(sv, active_max)))
    return memory if queued == memory.queued else replace(memory, queued=frozenset(queued))


def _has_room(sv: Survey, active_max: int, held_max: int) -> bool:
    """Whether any worker could take another active session, a transfer's slot aside."""
    return bool(((sv.active_on[sv.ready] < active_max) & (sv.held[sv.ready] < held_max)).any())


def _why_waiting(sv: Survey, active_max: int) -> str:
    if sv.ready.size == 0:
        return "no worker is ready"
    if int(sv.active_on[sv.ready].min()) >= active_max:
        return f"every worker has {active_max} active sessions"
    return "transfers under way or tenant over its share"


def _level_returning(view: ClusterView, sv: Survey, now_s: float, config: TickConfig, actions: list[Action]) -> None:
    """Coming back is a chance to be placed anew: for the time of a move, before the first chunk has begun."""
    s = view.sessions
    n = s.count
    back = np.flatnonzero(s.active[:n] & (s.active_since_s[:n] == now_s) & (s.state[:n] == HELD) & ~s.in_chunk[:n])
    for row in back.tolist():
        source = int(s.worker[row])
        if sv.outbound[source]:
            continue
        target = lightest(
            sv.ready,
            sv.load_on,
            sv.active_on,
            sv.held,
            sv.inbound,
            float(s.load[row]),
            view.profile.batch_max,
            view.profile.resident_max,
            True,
        )
        if target < 0 or target == source:
            continue
        if sv.load_on[source] - sv.load_on[target] < config.level_gap * s.load[row]:
            continue
        reason = f"comes back: {int(sv.active_on[source])} active here, {int(sv.active_on[target])} there"
        actions.append(Migrate(s.ids[row], view.workers.ids[source], view.workers.ids[target], reason))
        promise(sv, view, row, source, target)


def _balance(
    view: ClusterView, sv: Survey, memory: Memory, now_s: float, config: TickConfig, actions: list[Action]
) -> None:
    if sv.ready.size < 2:
        return
    s, w = view.sessions, view.workers
    horizon = max(2.0, min(120.0, memory.period_s / view.profile.chunk_s))
    budget = max(config.moves_min, int(sv.ready.size) // 4)
    if sv.equal:
        moves = placement.balance(
            view,
            sv,
            now_s,
            horizon_chunks=horizon,
            eta=config.eta,
            gain_min_s=config.gain_min_s,
            cooldown_s=config.cooldown_s,
            budget=budget,
        )
    else:
        moves = _balance_unequal(view, sv, horizon, now_s, config, budget)
    for row, target, reason in moves:
        actions.append(Migrate(s.ids[row], w.ids[int(s.worker[row])], w.ids[target], reason))


def _balance_unequal(
    view: ClusterView, sv: Survey, horizon: float, now_s: float, config: TickConfig, budget: int
) -> list[tuple[int, int, str]]:
    """The local search over the active sessions of ready workers."""
    s = view.sessions
    n = s.count
    position = np.full(view.workers.count, -1, np.int64)
    position[sv.ready] = np.arange(sv.ready.size)
    rows = np.flatnonzero(s.active[:n] & (s.state[:n] == HELD))
    rows = rows[position[s.worker[rows]] >= 0]
    home: Ints = position[s.worker[rows]]
    fixed = (now_s - s.moved_s[rows] < config.cooldown_s).astype(np.int8)
    per_byte = view.profile.migrate_s / view.profile.state_bytes if view.profile.state_bytes else 0.0
    move_s = s.state_bytes[rows] * per_byte if per_byte else np.full(rows.size, view.profile.migrate_s)
    after = search(
        home,
        s.load[rows],
        fixed,
        sv.load_on[sv.ready],
        ~sv.outbound[sv.ready],
        ~sv.inbound[sv.ready] & (sv.held[sv.ready] < view.profile.resident_max),
        move_s,
        placement.latency_table(view.profile),
        horizon,
        config.eta,
        budget,
    )
    found = []
    for k in np.flatnonzero(after != home).tolist():
        row, source, target = int(rows[k]), int(sv.ready[home[k]]), int(sv.ready[after[k]])
        promise(sv, view, row, source, target)
        found.append((row, target, f"balance unequal sessions, cost {1000 * move_s[k]:.0f} ms"))
    return found
