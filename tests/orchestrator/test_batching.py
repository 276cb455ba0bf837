from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.orchestrator.stories import K4
from turboserve.orchestrator.batching import ChunkCost, PassCost, ReadySegment, choose_batch, linear_cost


def segment(session: str, deadline_s: float, passes: int = 1) -> ReadySegment:
    return ReadySegment(session, "denoise", 100, deadline_s, passes)


GAINING = PassCost(base_s=0.010, token_s={"denoise": 0.0001})
FLAT = PassCost(base_s=0.0, token_s={"denoise": 0.0001})


def test_chunk_batching_takes_everyone_earliest_deadline_first_up_to_the_table() -> None:
    ready = [segment(f"s{i:02d}", 100.0 - i) for i in range(20)]
    assert choose_batch(ready, 0.0, ChunkCost(K4)) == list(range(19, 3, -1))


def test_chunk_batching_never_leaves_anyone_out_for_a_deadline() -> None:
    assert choose_batch([segment("a", -5.0), segment("b", 0.1)], 0.0, ChunkCost(K4)) == [0, 1]


def test_without_gain_the_most_urgent_runs_alone() -> None:
    assert choose_batch([segment("a", 9.0), segment("b", 5.0)], 0.0, FLAT) == [1]


def test_with_gain_all_that_harm_nobody_join() -> None:
    assert choose_batch([segment("a", 9.0, 5), segment("b", 5.0, 5)], 0.0, GAINING) == [1, 0]


def test_who_would_push_the_tightest_past_its_deadline_stays_out() -> None:
    # Alone b needs 4 passes of 20 ms = 80 ms and makes 100 ms; with a it would need 120 ms.
    assert choose_batch([segment("a", 9.0, 4), segment("b", 0.1, 4)], 0.0, GAINING) == [1]


def test_who_is_late_either_way_holds_nobody_back() -> None:
    assert choose_batch([segment("a", 9.0, 4), segment("b", 0.05, 4)], 0.0, GAINING) == [1, 0]


def test_a_cheap_segment_joins_where_a_dear_one_may_not() -> None:
    cost = PassCost(base_s=0.010, token_s={"denoise": 0.0001})
    ready = [
        segment("a", 0.1, 4),
        ReadySegment("big", "denoise", 400, 1.0, 4),
        ReadySegment("tiny", "denoise", 10, 2.0, 4),
    ]
    assert choose_batch(ready, 0.0, cost) == [0, 2]


def test_an_unmeasured_kind_is_taken_at_the_dearest_rate() -> None:
    assert GAINING.segment_s(ReadySegment("a", "recache", 100, 1.0)) == 0.01


def test_linear_cost_of_a_profile() -> None:
    base_s, segment_s = linear_cost(K4)
    assert abs(base_s - 0.4 + 0.2) < 1e-9 and abs(segment_s - 0.2) < 1e-9


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 6)), max_size=12), st.floats(0, 0.05))
def test_the_most_urgent_always_runs_and_nobody_twice(work: list[tuple[float, int]], base_s: float) -> None:
    ready = [segment(f"s{i:02d}", d, k) for i, (d, k) in enumerate(work)]
    cost = PassCost(base_s=base_s, token_s={"denoise": 0.0001}, segment_max=5)
    batch = choose_batch(ready, 0.0, cost)
    assert len(set(batch)) == len(batch) <= 5
    if ready:
        assert batch[0] == min(range(len(ready)), key=lambda i: (ready[i].deadline_s, ready[i].session))
        assert [ready[i].deadline_s for i in batch] == sorted(ready[i].deadline_s for i in batch)
