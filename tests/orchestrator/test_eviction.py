"""Which points leave: enough of them, none too many, the least worth first, whatever the order they are told in."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from turboserve.orchestrator.eviction import (
    HIGH_SHARE,
    LOW_SHARE,
    Partition,
    StoredPoint,
    choose_evictions,
    choose_spills,
    read_back_s,
    short_of,
    worth,
)

TOTAL = 1000
sizes = st.integers(1, 300)
idle = st.floats(0, 1e6, allow_nan=False)


@st.composite
def arenas(draw):
    """Partitions, the points that may leave them, and a room that is to be kept."""
    count = draw(st.integers(1, 4))
    used = [draw(st.integers(0, 400)) for _ in range(count)]  # what belongs to sessions that run
    points = []
    for number in range(draw(st.integers(0, 12))):
        share: dict[int, int] = {}
        for _ in range(draw(st.integers(1, 2))):
            where, bytes_ = draw(st.integers(0, count - 1)), draw(sizes)
            if used[where] + bytes_ <= TOTAL:
                used[where] += bytes_
                share[where] = share.get(where, 0) + bytes_
        if share:
            bytes_ = sum(share.values())
            points.append(StoredPoint(f"s{number}", bytes_, draw(idle), read_back_s(bytes_), share))
    return [Partition(TOTAL, one) for one in used], points, draw(st.integers(0, 400))


def left_short(partitions, points, gone, room_bytes):
    """Bytes by which each partition that was short still is, when the sessions in `gone` have left."""
    left = {}
    for number, one in enumerate(partitions):
        freed = sum(point.by_partition.get(number, 0) for point in points if point.session in gone)
        if (need := short_of(one, room_bytes)) > 0:
            left[number] = max(0, need - freed)
    return left


@given(arenas(), st.randoms())
def test_enough_leaves_and_nothing_in_vain(arena, rng: random.Random):
    partitions, points, room_bytes = arena
    chosen = [one.session for one in choose_spills(partitions, points, room_bytes=room_bytes, at_most=99)]
    shuffled = rng.sample(points, len(points))
    assert [one.session for one in choose_spills(partitions, shuffled, room_bytes=room_bytes, at_most=99)] == chosen
    assert len(set(chosen)) == len(chosen)
    for number, need in left_short(partitions, points, chosen, room_bytes).items():
        staying = [one for one in points if one.session not in chosen and one.by_partition.get(number)]
        assert need == 0 or not staying, "nothing of use was left behind"
    for index, session in enumerate(chosen):
        before = left_short(partitions, points, chosen[:index], room_bytes)
        (point,) = (one for one in points if one.session == session)
        assert any(need and point.by_partition.get(number) for number, need in before.items())
    some = [one.session for one in choose_spills(partitions, points, room_bytes=room_bytes, at_most=2)]
    assert some == chosen[:2]


@given(arenas())
def test_a_partition_that_was_relieved_is_left_alone(arena):
    partitions, points, room_bytes = arena
    chosen = {one.session for one in choose_spills(partitions, points, room_bytes=room_bytes, at_most=99)}
    staying = [one for one in points if one.session not in chosen]
    after = [
        Partition(
            one.total_bytes,
            one.used_bytes - sum(point.by_partition.get(number, 0) for point in points if point.session in chosen),
        )
        for number, one in enumerate(partitions)
    ]
    assert choose_spills(after, staying, room_bytes=room_bytes, at_most=99) == []


def test_marks_and_room():
    assert short_of(Partition(TOTAL, int(HIGH_SHARE * TOTAL)), 0) == 0
    assert short_of(Partition(TOTAL, 900), 0) == 900 - int(LOW_SHARE * TOTAL)
    assert short_of(Partition(TOTAL, 600), 500) == 100, "below the high mark, but there is no room for one more point"
    assert short_of(Partition(TOTAL, 0), 5000) == 0, "nothing can leave an empty partition"


def test_the_longest_idle_goes_first_and_of_equals_the_lower_id():
    points = [
        StoredPoint(f"s{n}", 100, idle_s, read_back_s(100), {0: 100}) for n, idle_s in enumerate([5, 50, 500, 50])
    ]
    chosen = choose_spills([Partition(TOTAL, 999)], points, room_bytes=0, at_most=99)
    assert [one.session for one in chosen] == ["s2", "s1", "s3"]
    assert "100% full" in chosen[0].reason and "idle 500 s" in chosen[0].reason


@given(st.lists(st.tuples(sizes, idle, st.floats(0, 1e4)), max_size=10), st.tuples(sizes, idle, st.floats(0, 1e4)))
def test_what_comes_to_the_disk_is_worth_more_than_what_goes(files, coming):
    points = [StoredPoint(f"s{n}", *one) for n, one in enumerate(files)]
    incoming = StoredPoint("new", *coming)
    need_bytes = incoming.bytes_
    chosen = [one.session for one in choose_evictions(points, incoming, need_bytes=need_bytes)]
    gone = [one for one in points if one.session in chosen]
    cheaper = [one for one in points if worth(one, one.bytes_) < worth(incoming, incoming.bytes_)]
    if sum(one.bytes_ for one in cheaper) < need_bytes:
        assert chosen == [], "there is no room to be made without a loss"
        return
    assert sum(one.bytes_ for one in gone) >= need_bytes
    assert all(one in cheaper for one in gone)
    last = next(one for one in gone if one.session == chosen[-1])
    assert sum(one.bytes_ for one in gone) - last.bytes_ < need_bytes, "none too many"
    staying = [worth(one, one.bytes_) for one in points if one not in gone]
    assert all(worth(one, one.bytes_) <= rest for one in gone for rest in staying)
